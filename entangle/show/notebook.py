"""Accessor for notebooks: ``run.entangle.neuron("LAYER:INDEX")`` on the tree of a run."""

import html
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle.numerics.gaussian import from_samples, noise_floor
from entangle.runs.contexts_file import Kept, read_contexts
from entangle.runs.dataset import check_neuron, dataset_of
from entangle.runs.descriptions import read_descriptions
from entangle.runs.words_file import read_words
from entangle.show import plots
from entangle.show.coloured import ColouredText, ColouredWindows
from entangle.show.panels import subject_of
from entangle.show.sketches import sketch

_BARS = 72
_OF_WINDOWS = {"scale", "windows", "unit"}
_FACTS = ("mean", "std", "skewness", "kurtosis", "modes", "min", "max", "weight_norm", "count")


def _function(module: str, name: str) -> Any:
    """Return a function that needs torch, whose import takes seconds: all else here needs none."""
    return getattr(importlib.import_module(f"entangle.{module}"), name)


@xr.register_datatree_accessor("entangle")  # type: ignore[no-untyped-call]
class Entangle:
    """The accessor ``entangle`` of a run's tree."""

    def __init__(self, run: xr.DataTree) -> None:
        """Wrap a tree that ``measure`` or ``open_run`` returned."""
        self._run = run
        self._loaded: tuple[Any, Any] | None = None

    def loaded(self) -> tuple[Any, Any]:
        """Return the model that the run was measured on, and its tokenizer; they are loaded once."""
        if self._loaded is None:
            about = self._run.attrs
            where = {"revision": about.get("revision")}
            self._loaded = (
                _function("model.loading", "load_model")(
                    about["model"], dtype=about["dtype"], **where
                ),
                _function("model.loading", "load_tokenizer")(about["model"], **where),
            )
        return self._loaded

    def neuron(self, name: str) -> "Neuron":
        """Return one neuron, written LAYER:INDEX, or input channel, LAYER:input:INDEX.

        Raises:
            LookupError: the run has no such neuron.
        """
        return Neuron(self._run, name)


class Neuron:
    """One neuron of a run: its variables, distribution, contexts and clusters."""

    def __init__(self, run: xr.DataTree, name: str) -> None:
        """Select the neuron LAYER:INDEX of a run.

        Raises:
            LookupError: the run has no such neuron.
        """
        data = dataset_of(run)
        self.name = name
        self._run = run
        check_neuron(data, name)
        self.values: xr.Dataset = data.sel(neuron=name).load()

    def plot(self, *, ax: Axes | None = None) -> Figure | Axes:
        """Draw the distribution and the fitted Gaussian (see ``plots.neuron``)."""
        return (
            plots.neuron(self._run, self.name, ax=ax) if ax else plots.neuron(self._run, self.name)
        )

    @property
    def contexts(self) -> pd.DataFrame:
        """The contexts that ``entangle contexts`` found: a row per token, with reason and text.

        ``attrs`` holds what concerns all tokens, such as the exact distance and its interval.

        Raises:
            LookupError: the contexts of this neuron were not searched yet.
        """
        found = dict(self._kept().neurons[self.name])
        table = pd.DataFrame(found.pop("contexts"))
        table.attrs = {name: value for name, value in found.items() if name not in _OF_WINDOWS}
        return table

    @property
    def windows(self) -> ColouredWindows:
        """The windows that ``entangle contexts`` found, with the neuron's value at each token.

        A notebook shows them in colour: the distance to the median, full for the farthest 1%.

        Raises:
            LookupError: the contexts of this neuron were not searched yet, or by an older version.
        """
        found = self._kept().windows_of(self.name)
        if not found:
            raise LookupError(f"the windows of {self.name} are missing: {self._search()}")
        return ColouredWindows(found)

    @property
    def cases(self) -> pd.DataFrame:
        """The signs of gate and up of the neuron's hidden unit: a row per case.

        ``attrs`` holds the names of gate, up and product, and their distances.

        Raises:
            LookupError: the contexts of this neuron were not searched yet, or it is in no gated MLP.
        """
        unit = self._kept().neurons[self.name].get("unit")
        if not unit:
            raise LookupError(
                f"{self.name} has no sign cases: it is no part of a gated MLP, or an older version "
                f"found its contexts. Then {self._search()}"
            )
        table = pd.DataFrame(unit["cases"])
        table.attrs = {name: value for name, value in unit.items() if name != "cases"}
        return table

    def on(self, text: str, *, model: Any = None, tokenizer: Any = None) -> ColouredText:
        """Return the neuron's value at each token of a text, and its place in the distribution.

        Without ``model`` and ``tokenizer`` those that the run was measured on are loaded, once for
        all neurons of the run. A notebook shows the text in colour; ``table`` has the numbers.

        Raises:
            ValueError: the run was measured on other weights, or the text has no tokens or too many.
        """
        if model is None or tokenizer is None:
            model, tokenizer = self._run.entangle.loaded()
        values_on = _function("measurement.prompting", "values_on")
        (found,) = values_on(model, text, run=self._run, neurons=self.name, tokenizer=tokenizer)
        return ColouredText(self.name, found.table, found.shades.tolist())

    def _folder(self) -> Path | None:
        """Return the folder that the run was read from."""
        source = self._run.encoding.get("source")
        return Path(source).parent if source else None

    def _kept(self) -> Kept:
        """Return what the run's contexts.json has of this neuron and others.

        Raises:
            LookupError: it has nothing of this neuron.
        """
        folder = self._folder()
        kept = read_contexts(folder) if folder else Kept({}, {})
        if self.name not in kept.neurons:
            raise LookupError(f"the contexts of {self.name} are missing: {self._search()}")
        return kept

    @property
    def words(self) -> pd.DataFrame:
        """The words that ``entangle words`` found: a row per token, the largest products first.

        Columns:

        * ``side``: whether the weights read the token or write it.
        * ``of``: the neuron or input channel whose weights they are.
        * ``token``: of the vocabulary.
        * ``value``: product of the weights and the token's embedding.
        * ``deviation``: of the value from the mean over the vocabulary, in std.

        Raises:
            LookupError: the words of this neuron were not searched yet.
        """
        folder = self._folder()
        kept = read_words(folder) if folder else {}
        if self.name not in kept:
            raise LookupError(
                f"the words of {self.name} are missing: run entangle words {folder or 'RUN'} {self.name}"
            )
        columns = ("token", "value", "deviation")
        return pd.DataFrame(
            [
                {"side": one["side"], "of": one["neuron"]} | {name: word[name] for name in columns}
                for one in kept[self.name]["words"]
                for word in [*one["top"], *one["bottom"][::-1]]
            ]
        )

    @property
    def description(self) -> str | None:
        """The description that ``entangle describe`` added, or None."""
        folder = self._folder()
        return read_descriptions(folder).get(self.name) if folder else None

    def _search(self) -> str:
        """Return the advice to search the contexts of this neuron."""
        return f"run entangle contexts {self._folder() or 'RUN'} {self.name}"

    @property
    def by_cluster(self) -> pd.DataFrame:
        """The dense outputs on held-out tokens: a table with a row per arm and cluster.

        Columns:

        * ``experts``: number of clusters of the arm.
        * ``assign``: ``kmeans`` or ``random``.
        * ``cluster``: index of the cluster.
        * ``tokens``: held-out tokens in it.
        * ``mean``, ``std``: of the outputs in the cluster, output units.
        * ``wasserstein``: distance of these outputs to a Gaussian, in their std.
        * ``noise_floor``: noise floor for as many tokens, std.

        Raises:
            LookupError: the run is not of ``disentangle``, or did not keep the neuron's outputs.
        """
        if "outputs" not in self._run.children:
            raise LookupError(
                "this run has no clusters: open a run that entangle disentangle wrote"
            )
        data, outputs = (
            self._run.to_dataset(),
            self._run.children["outputs"].to_dataset(inherit=False),
        )
        if self.name not in outputs["kept"].to_numpy().astype(str):
            raise LookupError(
                f"the run has no outputs of {self.name}: run entangle disentangle with --neurons "
                f"{self.name}"
            )
        dense = outputs["dense"].sel(kept=self.name).to_numpy()
        clusters = outputs["clusters"].sel(clustered=self.name.rpartition(":")[0]).to_numpy()
        rows = []
        for labels, experts, assign in zip(
            clusters, data["experts"].to_numpy(), data["assign"].to_numpy(), strict=True
        ):
            for cluster in np.unique(labels):
                part = dense[labels == cluster]
                rows.append(
                    {
                        "experts": int(experts),
                        "assign": str(assign),
                        "cluster": int(cluster),
                        "tokens": len(part),
                        "mean": float(part.mean()),
                        "std": float(part.std()),
                        "wasserstein": float(from_samples(part[:, None])[0]),
                        "noise_floor": noise_floor(len(part)),
                    }
                )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """Return the name and distance in one line."""
        values = self.values
        return (
            f"{self.name}: W1 {float(values['wasserstein']):.4f} "
            f"± {float(values['wasserstein_error']):.4f} std"
        )

    def _repr_html_(self) -> str:
        values = self.values
        cells = {"W1 (std)": f"{float(values['wasserstein']):.4f}"}
        cells["error bound"] = f"{float(values['wasserstein_error']):.4f}"
        cells["noise floor"] = f"{noise_floor(int(values['count'])):.4f}"
        if "wasserstein_bulk" in values:
            cells["W1 of the bulk"] = f"{float(values['wasserstein_bulk']):.4f}"
        cells |= {name: f"{float(values[name]):.4g}" for name in _FACTS if name in values}
        cells["count"] = f"{int(values['count']):,}"
        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{cell}</td></tr>"
            for name, cell in cells.items()
        )
        subject = html.escape(subject_of(self._run.to_dataset()))
        return (
            f"<div><b>{html.escape(self.name)}</b><br><small>{subject}</small>"
            f"{f'<p>{html.escape(self.description)}</p>' if self.description else ''}"
            f"<div style='display:flex;gap:1.5em;align-items:flex-start'>"
            f"<table>{rows}</table>{self._sketch()}</div></div>"
        )

    def _sketch(self) -> str:
        """Return the histogram and the fitted Gaussian as a small SVG, empty without them."""
        mean, std = float(self.values["mean"]), float(self.values["std"])
        side = str(self.values["side"].item())
        if "histogram" not in self._run.children or not 0 < std < np.inf:
            return ""
        held = self._run.children["histogram"].to_dataset(inherit=False)
        place = dataset_of(self._run).get_index("neuron").get_loc(self.name)
        held = held.isel(neuron=[place]).load()
        drawn = sketch(held, np.array([mean]), np.array([std]), bars=_BARS)
        rims = np.linspace(drawn.low[0], drawn.high[0], _BARS + 1)
        heights = drawn.shares[0] / np.diff(rims)
        middles = (rims[1:] + rims[:-1]) / 2
        gaussian = np.exp(-0.5 * ((middles - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
        top = max(heights.max(), gaussian.max())
        bars = "".join(
            f"<rect x='{4 * place}' y='{100 - 100 * height / top:.1f}' width='3.6' "
            f"height='{100 * height / top:.1f}' fill='#3f8fc5'/>"
            for place, height in enumerate(heights)
        )
        line = " ".join(
            f"{4 * place + 2},{100 - 100 * height / top:.1f}"
            for place, height in enumerate(gaussian)
        )
        return (
            f"<figure style='margin:0'><svg width='{4 * _BARS}' height='104' role='img' "
            f"aria-label='histogram of the {side}s over the fitted Gaussian'>{bars}"
            f"<polyline points='{line}' fill='none' stroke='#d55e00' stroke-width='1.5'/></svg>"
            f"<figcaption><small>{side}s from {rims[0]:.3g} to {rims[-1]:.3g}, over the fitted "
            f"Gaussian</small></figcaption></figure>"
        )
