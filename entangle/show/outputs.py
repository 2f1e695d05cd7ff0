"""Figures of one neuron's outputs on held-out tokens, from a run of `disentangle`."""

from difflib import get_close_matches

import matplotlib as mpl
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from entangle.show.panels import (
    BAND,
    FIT,
    INK,
    STYLE,
    Floats,
    Picture,
    drawable,
    held_out_subject,
    place_of,
)

_BARS = 80
_MASSIVE = 20  # excess kurtosis above which a few tokens cause the whole distance


@mpl.rc_context(STYLE)
def clusters(run: xr.DataTree, name: str | None = None) -> Figure:
    """Draw a neuron's dense outputs split by cluster: one panel for each number of clusters.

    Bars are stacked, with a colour for each k-means cluster, ordered by mean output. The line is
    the Gaussian fitted to all outputs. ``name`` is LAYER:INDEX; by default it is the most entangled
    neuron without massive activations (excess kurtosis below 20).

    Raises:
        LookupError: the run is not of `disentangle`, or did not keep the neuron's outputs.
    """
    data, kept, name = _kept(run, name)
    dense = kept["dense"].to_numpy().astype(float)
    groups = run.children["outputs"].to_dataset(inherit=False)["clusters"]
    labels = groups.sel(clustered=name.rpartition(":")[0]).to_numpy()  # (arms, tokens)
    arms = range(1, len(labels), 2)
    row = _row(data, name)
    figure = Picture(figsize=(8.5, 3.2), layout="constrained")
    grid = figure.subplots(1, len(arms), sharex=True, sharey=True, squeeze=False)[0]
    edges = _edges(dense)
    for arm, ax in zip(arms, grid, strict=True):
        found = np.unique(labels[arm])
        parts = sorted((dense[labels[arm] == one] for one in found), key=lambda part: part.mean())
        weights = [np.full(len(part), 1 / len(dense) / np.diff(edges)[0]) for part in parts]
        tints = sns.color_palette("Spectral_r", len(parts))
        ax.hist(parts, edges, weights=weights, stacked=True, color=tints, linewidth=0)
        ax.plot(*_gaussian(dense, edges), color=INK, linewidth=1.4, label="fitted Gaussian")
        within, random = (float(row["wasserstein_within"][one]) for one in (arm, arm + 1))
        ax.set_title(
            f"{len(parts)} clusters: W1 within {within:.3f}, within random ones {random:.3f}"
        )
    whole = float(row["held_out_wasserstein"])
    title = f"{name}, W1 {whole:.3f}\n{drawable(held_out_subject(data))}"
    figure.suptitle(title, x=0.01, ha="left")
    figure.supxlabel(f"output of the neuron (output units){_beyond(dense, edges)}")
    figure.supylabel("density, a colour for each cluster")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right")
    return figure


@mpl.rc_context(STYLE)
def sparse(run: xr.DataTree, name: str | None = None, *, sparsity: str | None = None) -> Figure:
    """Draw a neuron's sparse and dense outputs: one panel for each number of experts.

    ``name`` is LAYER:INDEX; by default it is the most entangled neuron without massive activations
    (excess kurtosis below 20). ``sparsity`` is by default the run's last one.

    Raises:
        LookupError: the run is not of `disentangle`, did not keep the neuron's outputs, or lacks
            the sparsity.
    """
    data, kept, name = _kept(run, name)
    place = place_of(data, sparsity)
    sparsity = str(data["sparsity"].to_numpy()[place])
    dense = kept["dense"].to_numpy().astype(float)
    pruned = kept["sparse"].to_numpy()[place]  # (arms, tokens)
    experts = data["experts"].to_numpy()
    row = _row(data, name)
    arms = [0, *range(1, len(experts), 2)]
    figure = Picture(figsize=(8.5, 3.2), layout="constrained")
    grid = figure.subplots(1, len(arms), sharex=True, sharey=True, squeeze=False)[0]
    edges = _edges(dense)
    for arm, ax in zip(arms, grid, strict=True):
        heights = [
            np.histogram(x, edges)[0] / len(x) / np.diff(edges)[0] for x in (dense, pruned[arm])
        ]
        ax.stairs(heights[0], edges, fill=True, color=BAND, alpha=0.5, label="dense")
        ax.stairs(heights[1], edges, color=FIT, linewidth=1.2, label=f"{sparsity} sparse")
        distance = row["distance_to_dense"][place].to_numpy()
        gain = row["improvement"][place].to_numpy()
        facts = f"W1 to dense {distance[arm]:.3f}, improvement {gain[arm]:.2f}"
        if arm:
            facts += f"\n(at random {distance[arm + 1]:.3f}, {gain[arm + 1]:.2f})"
        ax.set_title(f"{experts[arm]} expert{'s' if arm else ''}\n{facts}")
    figure.suptitle(f"{name}\n{drawable(held_out_subject(data))}", x=0.01, ha="left")
    figure.supxlabel(f"output of the neuron (output units){_beyond(dense, edges)}")
    figure.supylabel("density")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _kept(run: xr.DataTree, name: str | None) -> tuple[xr.Dataset, xr.Dataset, str]:
    """Return a run's dataset, the kept outputs of a neuron, and the neuron's name.

    Raises:
        LookupError: the run kept no outputs, or not those of this neuron.
    """
    if not isinstance(run, xr.DataTree) or "outputs" not in run.children:
        raise LookupError(
            "this run has no outputs of neurons: give a run that entangle disentangle wrote"
        )
    data = run.to_dataset()
    outputs = run.children["outputs"].to_dataset(inherit=False)
    names = [str(one) for one in outputs["kept"].to_numpy()]
    if name is None:
        rows = [_row(data, one) for one in names]
        distances = np.array([float(row["wasserstein"]) for row in rows])
        ordinary = np.array([float(row["kurtosis"]) < _MASSIVE for row in rows])
        name = names[int(np.nanargmax(np.where(ordinary, distances, distances - 10)))]
    if name not in names:
        near = get_close_matches(name, names, 3, 0.3) or names[:1]
        raise LookupError(
            f"the run has no outputs of {name!r}, but it has those of {', '.join(near)}: disentangle "
            "keeps those of each layer's most entangled neuron and of --neurons LAYER:INDEX"
        )
    return data, outputs.sel(kept=name).load(), name


def _row(data: xr.Dataset, name: str) -> xr.Dataset:
    layer, _, index = name.rpartition(":")
    here = (data["layer"] == layer) & (data["index"] == int(index))
    return data.isel(neuron=int(np.flatnonzero(here.to_numpy())[0]))


def _edges(dense: Floats) -> Floats:
    """Return edges of bars that cover the central 99% of outputs and 3.5 std around the median.

    The std is that of a Gaussian with the same quartiles, so massive activations do not widen it.
    """
    low, first, middle, third, high = np.quantile(dense, [0.005, 0.25, 0.5, 0.75, 0.995])
    reach = 3.5 * ((third - first) / 1.349 or dense.std())
    edges: Floats = np.linspace(min(low, middle - reach), max(high, middle + reach), _BARS + 1)
    return edges


def _gaussian(dense: Floats, edges: Floats) -> tuple[Floats, Floats]:
    x = np.linspace(edges[0], edges[-1], 401)
    std = float(dense.std())
    return x, np.exp(-0.5 * ((x - dense.mean()) / std) ** 2) / (std * np.sqrt(2 * np.pi))


def _beyond(dense: Floats, edges: Floats) -> str:
    count = int(((dense < edges[0]) | (dense > edges[-1])).sum())
    return f"\n{count:,} of {len(dense):,} tokens are outside the picture" if count else ""
