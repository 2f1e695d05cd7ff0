"""Figures of runs and tables; no function writes a file.

Figures are 8.5 inches wide: 850 pixels at 100 dpi, the width of a README. Neurons without a
distance (dead or not finite) or with an error bound above 0.1 are left out of figures of the distance;
a line below the figure says how many. `layers` are patterns of layer names. `figure` is an empty
figure or subfigure to draw into; the whole figure is returned. Input channels that a run has beside
its neurons are drawn in panels of their own, with roles such as mlp.down_proj:input.
"""

from collections.abc import Sequence
from typing import Any, overload

import matplotlib as mpl
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from entangle.numerics.gaussian import noise_floor
from entangle.runs.dataset import TRUSTED_ERROR, check_neuron, dataset_of
from entangle.runs.shapes import held_of
from entangle.show.arms import ablation, sweep
from entangle.show.outputs import clusters, sparse
from entangle.show.panels import (
    BAND,
    DASHES,
    DEAD,
    DISTANCES,
    FIT,
    INK,
    QUIET,
    STYLE,
    Counts,
    Floats,
    Names,
    Picture,
    Run,
    Sheet,
    colours_of,
    drawable,
    frame_of,
    histogram_of,
    label_of,
    panels_of,
    quantiles_of,
    subject_of,
)
from entangle.show.relations import comparison, difficulty, improvement
from entangle.show.sketches import axis_of, sketch

__all__ = [
    "ablation",
    "clusters",
    "comparison",
    "difficulty",
    "heatmap",
    "improvement",
    "layers",
    "neuron",
    "neurons",
    "ranks",
    "sparse",
    "sweep",
]

_BARS = 64  # in the histogram of each of several neurons
_VALUES = {"output": "output of the neuron", "input": "input of the layer"}

REFERENCES = {  # exact W1 of known distributions to their fitted Gaussians, std
    "two equal points": [0.53538],
    "exponential": [0.31442],
    "uniform, Laplace": [0.15428, 0.14541],
    "t, 5 d.o.f.": [0.102],
    "logistic": [0.0593],
}


@mpl.rc_context(STYLE)
def heatmap(
    run: Run,
    *,
    variable: str = "wasserstein",
    bins: int = 50,
    layers: Names = None,
    figure: Sheet = None,
) -> Figure:
    """Draw a variable as heatmaps, one panel per role: blocks down, neurons across, largest first.

    Each layer's neurons are sorted and averaged into ``bins`` columns of equal share; a neuron at
    the edge of a column counts in both in part. Neurons without a value come last, in grey. The
    trained experts of a block stand side by side in one panel, each with columns of its own. The
    colour scale is the square root for variables without negative values, else asinh, up to the
    99.8% quantile of the cells.

    Raises:
        ValueError: ``bins`` is below one, or no neuron has a value.
    """
    if bins < 1:
        raise ValueError(f"a layer needs at least one column, got bins={bins}")
    frame, blocks = frame_of(run, variable, layers)
    rims = np.append(blocks, blocks[-1] + 1) - 0.5
    cells = {role: _side_by_side(part, blocks, bins) for role, part in frame.groupby("role")}
    scale, colour = colours_of(np.concatenate([*cells.values()], axis=None))
    order = "most entangled" if variable in DISTANCES else "largest"
    across = f"neurons, {order} first (% of layer; a column is the mean of its {100 / bins:.3g}%)"
    across += "; experts side by side" * bool((frame["expert"] >= 0).any())
    height = float(np.clip(0.105 * len(blocks), 1.3, 5))
    panels, sheet = panels_of(frame, figure, most=7, height=height, labels=(across, "block"))
    for role, ax in panels.items():
        edges = np.linspace(0, 100, cells[role].shape[1] + 1)
        mesh = ax.pcolormesh(edges, rims, cells[role], norm=scale, cmap=colour)
        ax.set_facecolor(DEAD)
        for block in np.setdiff1d(blocks, frame.loc[frame["role"] == role, "block"]):
            ax.axhspan(block - 0.5, block + 0.5, color="white")
        ax.set(xticks=[0, 50, 100], ylim=rims[[-1, 0]])
        ax.yaxis.set_major_locator(ticker.MaxNLocator(7, integer=True, min_n_ticks=1))
    bar = sheet.colorbar(mesh, ax=[*panels.values()], pad=0.015, aspect=25)
    bar.set_label(label_of(run, variable))
    return sheet.figure


@mpl.rc_context(STYLE)
def layers(
    run: Run, *, variable: str = "wasserstein", layers: Names = None, figure: Sheet = None
) -> Figure:
    """Draw the distribution of the distances in each layer against its block: one panel per role.

    ``variable`` is ``wasserstein`` or ``wasserstein_bulk``. A box shows a layer's median, its 25%
    to 75% and 5% to 95% quantiles, and the largest distance as a point. The dashed line is the
    noise floor at the layer's number of tokens; the bulk's distance has none.

    Raises:
        ValueError: the variable is no distance, or no neuron has a value.
    """
    label = _distance(variable)
    frame, blocks = frame_of(run, variable, layers)
    by_layer = frame.groupby(["role", "block"])
    table = by_layer["value"].quantile(np.array([0.05, 0.25, 0.5, 0.75, 0.95, 1])).unstack()
    table["floor"] = by_layer["floor"].max()
    panels, sheet = panels_of(frame, figure, most=4, height=1.7, labels=("block", label))
    for role, ax in panels.items():
        part = table.loc[role].reindex(blocks)
        ax.plot(blocks, part[1.0], ".", color=INK, markersize=3.5, label="largest")
        for low, high, alpha in ((0.05, 0.95, 0.3), (0.25, 0.75, 0.8)):
            look: dict[str, Any] = {"color": BAND, "alpha": alpha, "linewidth": 0}
            name = f"{low:.0%} to {high:.0%}"
            ax.bar(blocks, part[high] - part[low], 0.86, part[low], label=name, **look)
        ax.hlines(part[0.5], blocks - 0.43, blocks + 0.43, INK, linewidth=1.6, label="median")
        rims = np.append(blocks, blocks[-1] + 1) - 0.5
        if variable == "wasserstein":
            ax.stairs(part["floor"], rims, baseline=None, label="noise floor", **DASHES)
        ax.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
    sheet.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=5)
    return sheet.figure


@mpl.rc_context(STYLE)
def ranks(
    run: Run, *, variable: str = "wasserstein", layers: Names = None, figure: Sheet = None
) -> Figure:
    """Draw each layer's distances, largest first, against their rank: one panel per role.

    ``variable`` is ``wasserstein`` or ``wasserstein_bulk``. The colour is the block. Of
    ``wasserstein``, ticks at the right are the exact distances of known distributions, and the
    dashed line is the noise floor, its median over the role's neurons.

    Raises:
        ValueError: the variable is no distance, or no neuron has a value.
    """
    label = _distance(variable)
    frame, blocks = frame_of(run, variable, layers)
    shades = colors.ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.93, 256)))
    colour = ScalarMappable(colors.Normalize(blocks[0] - 0.5, blocks[-1] + 0.5), shades)
    tints = dict(zip(blocks.tolist(), colour.to_rgba(blocks), strict=True))
    across = "neurons, most entangled first (% of layer)"
    panels, sheet = panels_of(frame, figure, most=4, height=2.0, labels=(across, label))
    for role, ax in panels.items():
        part = frame[frame["role"] == role]
        for block, layer in part.groupby("block"):
            values = np.sort(layer["value"].dropna())[::-1]
            share = 100 * (np.arange(len(values)) + 0.5) / len(layer)
            ax.plot(share, values, color=tints[block], linewidth=0.8)
        if variable == "wasserstein":
            ax.axhline(part["floor"].median(), label="noise floor", **DASHES)
        ax.set(xlim=(-2, 101), xticks=[0, 25, 50, 75, 100])
    if variable == "wasserstein":
        _mark_references([*panels.values()])
        sheet.legend(*ax.get_legend_handles_labels(), loc="outside upper right")
    bar = sheet.colorbar(colour, ax=[*panels.values()], label="block", pad=0.015, aspect=40)
    bar.locator = ticker.MaxNLocator(8, integer=True)
    return sheet.figure


@overload
def neuron(run: xr.DataTree, name: str, *, ax: None = None) -> Figure: ...
@overload
def neuron(run: xr.DataTree, name: str, *, ax: Axes) -> Axes: ...
@mpl.rc_context(STYLE)
def neuron(run: xr.DataTree, name: str, *, ax: Axes | None = None) -> Figure | Axes:
    """Draw the distribution of the neuron LAYER:INDEX and its fitted Gaussian N(mean, std²).

    A bar is a whole number of fine bins, about as wide as the rule of Freedman and Diaconis
    (2·IQR/∛tokens). Its height is a density over all tokens: the bars integrate to the share of
    tokens shown. The range follows the bulk (see `sketches.axis_of`). At its ends it says how many
    tokens are beyond them and how far they reach.

    Raises:
        LookupError: the run has no such neuron.
        ValueError: the run has no histograms, or the neuron is dead or not finite.
    """
    held, data = _histograms(run), dataset_of(run)
    check_neuron(data, name)
    row = data.sel(neuron=name).load()
    mean, std = float(row["mean"]), float(row["std"])
    if not (np.isfinite(mean) and 0 < std < np.inf):
        raise ValueError(
            f"{name} is dead or not finite (mean {mean:g}, std {std:g}): choose another neuron"
        )
    own = held_of(held, run, [name])
    edges, below = histogram_of(own.isel(neuron=0))
    (low,), (high,) = axis_of(own)
    figure = Picture(figsize=(8.5, 3.6), layout="constrained")
    panel = ax or figure.add_subplot()
    side = str(row["side"].item())
    span = float(low), float(high)
    beyond = _draw_density(panel, edges, below, span, mean=mean, std=std, label=f"{side}s")
    ends = (float(row["min"]) - mean) / std, (float(row["max"]) - mean) / std
    _mark_tails(panel, beyond, ends, below[-1])
    unseen = sum(beyond)
    note = f"all {below[-1]:,} tokens are within the picture"
    if unseen:
        reach = f"{side}s reach from {_number(row['min'])} to {_number(row['max'])}"
        note = f"{unseen:,} of {below[-1]:,} tokens are outside the picture ({reach}), "
        note += f"{below[0] + below[-1] - below[-2]:,} of them beyond the histogram"
    across = f"{_VALUES[side]} ({side} units)\n{note}"
    panel.set(xlabel=across, ylabel=f"density (share of tokens per {side} unit)")
    panel.set_title(f"{name}\n{drawable(subject_of(data))}".strip(), loc="left")
    both = (lambda x: np.subtract(x, mean) / std), (lambda z: np.multiply(z, std) + mean)
    top = panel.secondary_xaxis("top", functions=both)
    top.set_xlabel("standard deviations from the mean")
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    panel.text(1.025, 0, _facts(row), transform=panel.transAxes, family="monospace")
    return ax or figure


@mpl.rc_context(STYLE)
def neurons(run: xr.DataTree, names: Sequence[str]) -> Figure:
    """Draw the standardised distributions of neurons, LAYER:INDEX, and N(0, 1), side by side.

    Panels share the horizontal axis. It follows each neuron's bulk (see `sketches.axis_of`), at most 8
    std on both sides of the mean.

    Raises:
        LookupError: the run has no such neuron.
        ValueError: the run has no histograms, no neuron is named, or one is dead or not finite.
    """
    held, data = _histograms(run), dataset_of(run)
    if not names:
        raise ValueError("no neuron is given to draw: name at least one as LAYER:INDEX")
    for name in names:
        check_neuron(data, name)
    part = data.sel(neuron=list(names)).load()
    mean, std = part["mean"].to_numpy(), part["std"].to_numpy()
    drawn = sketch(held_of(held, run, names), mean, std, bars=_BARS)
    sides = [*dict.fromkeys(part["side"].to_numpy().astype(str))]
    figure = Picture(figsize=(8.5, 3.0), layout="constrained")
    grid = figure.subplots(1, len(names), sharex=True, squeeze=False)[0]
    reach: list[Floats] = []  # of each panel, in std from its mean
    for place, ax in enumerate(grid):
        if not np.isfinite(drawn.low[place]):
            raise ValueError(f"{names[place]} is dead or not finite: choose another neuron")
        ends = (np.array([drawn.low[place], drawn.high[place]]) - mean[place]) / std[place]
        rims = np.linspace(ends[0], ends[1], _BARS + 1)
        heights = drawn.shares[place] / np.diff(rims)
        label = " or ".join(f"{side}s" for side in sides)
        ax.stairs(heights, rims, fill=True, color=BAND, alpha=0.6, label=label)
        x = np.linspace(-8, 8, 801)
        reach.append(ends)
        ax.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), color=FIT, label="N(0, 1)")
        row = part.isel(neuron=place)
        bulk = f", bulk {row['wasserstein_bulk']:.4f}" if "wasserstein_bulk" in row else ""
        facts = f"W1 {row['wasserstein']:.4f}{bulk}, excess kurtosis {_number(row['kurtosis'])}"
        ax.set_title(f"{names[place]}\n{facts}", loc="left")
    grid[0].set_xlim(max(np.min(reach), -8), min(np.max(reach), 8))
    values = " or ".join(_VALUES[side] for side in sides)
    figure.supxlabel(f"{values}, in its std from its mean")
    figure.supylabel("density (share of tokens per std)")
    figure.suptitle(drawable(subject_of(data)), x=0.01, ha="left")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _histograms(run: xr.DataTree) -> xr.Dataset:
    """Return the histogram state of a run.

    Raises:
        ValueError: the run has no histograms.
    """
    if not isinstance(run, xr.DataTree) or "histogram" not in run.children:
        raise ValueError(
            "the run has no histograms: pass the whole tree that measure and open_run return"
        )
    held = run.children["histogram"].to_dataset(inherit=False)
    return held.assign_coords(neuron=dataset_of(run)["neuron"])


def _distance(variable: str) -> str:
    """Return the label of a distance.

    Raises:
        ValueError: the variable is no distance.
    """
    if variable not in DISTANCES:
        raise ValueError(f"variable must be one of {', '.join(DISTANCES)}, got {variable!r}")
    return DISTANCES[variable]


def _mark_tails(ax: Axes, beyond: tuple[int, int], reach: tuple[float, float], tokens: int) -> None:
    """Mark at each end of the axis how many tokens are beyond it, and how many std they reach."""
    for side, (count, std) in enumerate(zip(beyond, reach, strict=True)):
        if count:
            words = f"{count / tokens:.2%} to {std:+.3g} std"
            ax.text(
                0.99 if side else 0.01,
                0.97,
                f"{words} \u25b8" if side else f"\u25c2 {words}",
                transform=ax.transAxes,
                ha="right" if side else "left",
                va="top",
                fontsize=7,
                color=QUIET,
            )


def _draw_density(
    ax: Axes,
    edges: Floats,
    below: Counts,
    span: tuple[float, float],
    *,
    mean: float,
    std: float,
    label: str,
) -> tuple[int, int]:
    """Draw bars of whole fine bins, and the Gaussian, over a range.

    Return how many tokens are below the bars, and above them.
    """
    low, high = span
    quarters = quantiles_of(edges, below, [0.25, 0.75])
    width = 2 * (quarters[1] - quarters[0]) / np.cbrt(below[-1])
    fine = edges[1] - edges[0]
    step = max(1, round(width / fine), round((high - low) / fine / 240))
    first = np.clip(np.searchsorted(edges, low, "right") - 1, 0, len(edges) - 2)
    last = np.clip(np.searchsorted(edges, high), first + 1, len(edges) - 1)
    starts = np.append(np.arange(first, last, step), last)
    rims, shares = edges[starts], np.diff(below[starts]) / below[-1]
    ax.stairs(shares / np.diff(rims), rims, fill=True, color=BAND, alpha=0.6, label=label)
    x = np.linspace(min(low, rims[0]), max(high, rims[-1]), 801)
    gaussian = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    ax.plot(x, gaussian, color=FIT, linewidth=1.4, label="fitted Gaussian")
    ax.set_xlim(x[0], x[-1])
    return int(below[first]), int(below[-1] - below[last])


def _side_by_side(part: pd.DataFrame, blocks: Counts, bins: int) -> Floats:
    """Return the columns of a role's heatmap; experts have about as many together as other layers."""
    experts = part["expert"].max() + 1
    if not experts:
        return _columns(part, blocks, bins)
    own = max(bins // experts, 2)
    parts = [_columns(part[part["expert"] == expert], blocks, own) for expert in range(experts)]
    return np.concatenate(parts, axis=1)


def _columns(part: pd.DataFrame, blocks: Counts, bins: int) -> Floats:
    """Return the means of a role's heatmap columns (blocks, bins), NaN for empty ones."""
    table = np.full((len(blocks), bins), np.nan)
    for block, layer in part.groupby("block"):
        ranked = np.sort(layer["value"].dropna())[::-1]
        cuts = np.linspace(0, len(layer), bins + 1).clip(max=len(ranked))
        sums = np.interp(cuts, np.arange(len(ranked) + 1), np.append(0, np.cumsum(ranked)))
        with np.errstate(invalid="ignore"):  # 0/0: a column without a value
            table[blocks == block] = np.diff(sums) / np.diff(cuts)
    return table


def _mark_references(panels: Sequence[Axes]) -> None:
    """Mark known distributions at the right of each panel, with names in the first row."""
    low, high = panels[0].get_ylim()
    ends = [ax for ax in panels if (spec := ax.get_subplotspec()) and spec.is_last_col()]
    for ax in panels:
        place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "color": QUIET}
        for name, values in REFERENCES.items():
            for value in values:
                ax.plot([0.96, 1], [value, value], linewidth=0.8, **place)
            if ax is (ends or panels)[0] and low < values[0] < high:
                ax.text(1.03, float(np.mean(values)), name, fontsize=7, va="center", **place)
        ax.set_ylim(low, high)


def _number(value: Any) -> str:
    return f"{float(value):,.0f}" if abs(value) >= 1000 else f"{float(value):.3g}"


def _bulk_facts(row: xr.Dataset) -> dict[str, str]:
    if "wasserstein_bulk" not in row:
        return {}
    return {
        "W1 of the bulk": f"{row['wasserstein_bulk']:.4f}",
        "  its bound": f"±{np.ceil(row['wasserstein_bulk_error'] * 1e4) / 1e4:.4f}",
    }


def _facts(row: xr.Dataset) -> str:
    """Return the variables of a neuron as aligned text."""
    texts = {
        "W1 (std)"
        if row["wasserstein_error"] <= TRUSTED_ERROR
        else "W1, untrusted": f"{row['wasserstein']:.4f}",
        "  error bound": f"±{np.ceil(row['wasserstein_error'] * 1e4) / 1e4:.4f}",
        "  noise floor": f"{noise_floor(int(row['count'])):.4f}",
        **_bulk_facts(row),
        **{key: _number(row[key]) for key in ("mean", "std", "skewness")},
        "excess kurtosis": _number(row["kurtosis"]),
        "modes": f"{row['modes']:,.0f}",
        "tokens": f"{row['count']:,.0f}",
    }
    return "\n".join(f"{label:<15} {text:>9}" for label, text in texts.items())
