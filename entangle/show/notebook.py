"""Accessor for notebooks: ``run.entangle.neuron("LAYER:INDEX")`` on the tree of a run."""

import html
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle.numerics.gaussian import from_samples, noise_floor
from entangle.runs import store
from entangle.runs.dataset import check_neuron, dataset_of
from entangle.show import plots
from entangle.show.panels import subject_of
from entangle.show.sketches import sketch

_BARS = 72
_FACTS = ("mean", "std", "skewness", "kurtosis", "modes", "min", "max", "weight_norm", "count")


@xr.register_datatree_accessor("entangle")  # type: ignore[no-untyped-call]
class Entangle:
    """The accessor ``entangle`` of a run's tree."""

    def __init__(self, run: xr.DataTree) -> None:
        """Wrap a tree that ``measure`` or ``open_run`` returned."""
        self._run = run

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
        source = self._run.encoding.get("source")
        file = Path(source).parent / "contexts.json" if source else None
        kept: dict[str, Any] = store.read_json(file) if file and file.is_file() else {}
        if self.name not in kept:
            folder = file.parent if file else "RUN"
            raise LookupError(
                f"the contexts of {self.name} are missing: run entangle contexts {folder} {self.name}"
            )
        found = kept[self.name]
        table = pd.DataFrame(found.pop("contexts"))
        table.attrs = found
        return table

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
