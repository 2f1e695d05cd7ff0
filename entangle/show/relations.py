"""Figures of other measures of a neuron against its distance to a Gaussian."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle.measurement.comparing import diff
from entangle.measurement.ranking import rank_correlations
from entangle.runs.dataset import dataset_of, matching, outputs_of
from entangle.show.panels import (
    BAND,
    DASHES,
    DISTANCE,
    FIT,
    INK,
    STYLE,
    Floats,
    Names,
    Picture,
    Run,
    Sheet,
    drawable,
    experts_together,
    frame_of,
    held_out_subject,
    panels_of,
    place_of,
    subject_of,
)

_LEAST = 25  # fewest neurons for a median


@mpl.rc_context(STYLE)
def difficulty(run: Run, *, layers: Names = None, figure: Sheet = None) -> Figure:
    """Draw each neuron's mapping difficulty against its distance: one panel per role.

    The difficulty is divided by its layer's median, since it is known only up to a factor per
    layer. The line is the median in each tenth of the neurons. The number is the median of the
    layers' rank correlations. Both axes are logarithmic.

    Raises:
        LookupError: the run was measured without mapping difficulty.
        ValueError: no neuron has a mapping difficulty.
    """
    if "difficulty" not in dataset_of(run):
        raise LookupError(
            "the run has no mapping difficulty: measure it with --difficulty PAIRS, such as 4096"
        )
    data = outputs_of(run)
    frame, _ = frame_of(data, "wasserstein", layers)
    chosen = matching(data["layer"].to_numpy(), layers or "*")
    frame["other"] = data["difficulty"].to_numpy()[chosen]
    if not np.isfinite(frame[["value", "other"]]).all(axis=1).any():
        raise ValueError("no neuron has a mapping difficulty to draw")
    frame["other"] /= frame.groupby("layer")["other"].transform("median")
    rho = rank_correlations(data, "wasserstein", ["difficulty"], layers=layers or "*")
    rhos = experts_together(rho).groupby("role", sort=False)["difficulty"].median()
    down = "mapping difficulty\nover the layer's median"
    panels, sheet = panels_of(frame, figure, most=4, height=2.0, labels=(DISTANCE, down))
    for role, ax in panels.items():
        part = frame[frame["role"] == role].dropna()
        _cloud(ax, part["value"].to_numpy(), part["other"].to_numpy())
        ax.set_xscale("log")
        ax.set_yscale("log")
        for axis, subs in ((ax.xaxis, (1, 3)), (ax.yaxis, (1, 1.2, 1.5, 2, 3, 5, 8))):
            axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=9))
            axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axis.set_minor_locator(ticker.NullLocator())
        ax.text(0.04, 0.93, f"rank correlation {rhos[role]:.2f}", transform=ax.transAxes)
    return sheet.figure


@mpl.rc_context(STYLE)
def improvement(
    run: xr.DataTree | xr.Dataset,
    *,
    sparsity: str | None = None,
    layers: Names = None,
    figure: Sheet = None,
) -> Figure:
    """Draw relative improvement on held-out tokens against distance: a panel per number of experts.

    A point is a neuron with k-means experts. Lines are medians in each tenth of the neurons, with
    k-means and with random experts. ``sparsity`` is by default the run's last one.

    Raises:
        LookupError: the run is not of `disentangle`, or lacks the sparsity.
        ValueError: no neuron has an improvement.
    """
    data = dataset_of(run)
    if "improvement" not in data:
        raise LookupError("this run has no improvement: give a run that entangle disentangle wrote")
    place = place_of(data, sparsity)
    frame, _ = frame_of(run, "wasserstein", layers)
    chosen = matching(data["layer"].to_numpy(), layers or "*")
    values = data["improvement"].to_numpy()[chosen, place]  # (neurons, arms)
    experts = data["experts"].to_numpy()
    arms = range(1, len(experts), 2)
    sheet = figure or Picture(figsize=(8.5, 3.4), layout="constrained")
    grid = sheet.subplots(1, len(arms), sharex=True, sharey=True, squeeze=False)[0]
    distance = frame["value"].to_numpy()
    shown = values[np.isfinite(distance)][:, 1:]
    shown = shown[np.isfinite(shown)]
    if not len(shown):
        raise ValueError(
            "no neuron has a finite improvement to draw: the sparse outputs equal the dense ones"
        )
    low, high = np.quantile(shown, [0.0005, 0.9995])
    for arm, ax in zip(arms, grid, strict=True):
        _cloud(ax, distance, values[:, arm], label="experts of k-means")
        line = _medians(distance, values[:, arm + 1])
        ax.plot(line.index, line, color=FIT, linewidth=1.4, label="experts at random")
        ax.axhline(1, label="one expert", **DASHES | {"color": "0.4"})
        ax.set(title=f"{experts[arm]} experts", xscale="log", ylim=(low - 0.01, high + 0.01))
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8))
        ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_locator(ticker.NullLocator())
    sparsity = str(data["sparsity"].to_numpy()[place])
    sheet.suptitle(f"{drawable(held_out_subject(data))}\n{sparsity} sparse", x=0.01, ha="left")
    sheet.supxlabel(DISTANCE.replace("\n", " "))
    sheet.supylabel("relative improvement")
    sheet.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return sheet.figure


@mpl.rc_context(STYLE)
def comparison(
    run: Run, other: Run, *, layers: Names = None, exclude: Names = None, figure: Sheet = None
) -> Figure:
    """Draw each neuron's distance in another run against that in the first: one panel per role.

    The number is the median of the layers' rank correlations. The dashed line is equality, the
    other line the median in each tenth of the neurons. Both axes are logarithmic.

    Raises:
        LookupError: the runs share no neuron with a distance.
    """
    found = diff(run, other, layers=layers or "*", exclude=exclude or ())
    data, place = dataset_of(run), experts_together(found.layers).set_index("layer")
    neurons = found.neurons.assign(layer=found.neurons["neuron"].str.rpartition(":")[0])
    frame = neurons.join(place[["block", "role", "expert"]], on="layer")
    order = frame["layer"].map({layer: number for number, layer in enumerate(place.index)})
    frame = frame.iloc[np.argsort(order.to_numpy(), kind="stable")]
    first, second = (drawable(subject_of(one)) for one in (data, dataset_of(other)))
    frame.attrs = {"notes": f"horizontal: {first}; vertical: {second}", "subject": first}
    panels, sheet = panels_of(frame, figure, most=4, height=2.0, labels=(DISTANCE, DISTANCE))
    sheet.suptitle("")
    ends = [frame[["first", "other"]].min().min(), frame[["first", "other"]].max().max()]
    for role, ax in panels.items():
        part = frame[frame["role"] == role]
        _cloud(ax, part["first"].to_numpy(), part["other"].to_numpy())
        ax.plot(ends, ends, label="equal distances", **DASHES)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1,), numticks=6))
        ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        rho = place.loc[place["role"] == role, "correlation"].median()
        ax.text(0.04, 0.93, f"rank correlation {rho:.2f}", transform=ax.transAxes)
    sheet.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return sheet.figure


def _cloud(ax: Axes, x: Floats, y: Floats, label: str = "median") -> None:
    """Draw neurons as faint points, and the median in each tenth of them."""
    known = np.isfinite(x) & np.isfinite(y)
    ax.plot(x[known], y[known], ".", color=BAND, markersize=1.2, alpha=0.25, rasterized=True)
    line = _medians(x, y)
    ax.plot(line.index, line, color=INK, linewidth=1.6, label=label)


def _medians(x: Floats, y: Floats) -> "pd.Series[float]":
    """Return medians of y in tenths of x (the last one split finer), indexed by medians of x."""
    known = np.isfinite(x) & np.isfinite(y)
    table = pd.DataFrame({"x": x[known], "y": y[known]}).sort_values("x", kind="stable")
    ranks = (np.arange(len(table)) + 0.5) / max(len(table), 1)
    edges = [*np.arange(0.1, 1, 0.1), 0.95, 0.98, 0.99, 0.995, 0.999]
    groups = table.groupby(np.digitize(ranks, edges))
    middle = groups.median()[groups.size() >= _LEAST]
    return pd.Series(middle["y"].to_numpy(), index=middle["x"])
