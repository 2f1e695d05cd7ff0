"""Pictures of a table of arms: what was done to a model, and what its score became."""

from pathlib import PurePath
from typing import overload

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle.show.panels import DASHES, STYLE, Picture

_MARKS = {"sparsegpt": "o", "wanda": "s", "magnitude": "^"}


@overload
def sweep(table: pd.DataFrame, *, ax: None = None) -> Figure: ...
@overload
def sweep(table: pd.DataFrame, *, ax: Axes) -> Axes: ...
@mpl.rc_context(STYLE)
def sweep(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure | Axes:
    """Draw perplexity against realised sparsity: a line per method, mask and propagation.

    Bars are one standard error over windows; n:m sparsities are single marks, named beside the
    right-most one; the dashed line is the dense model. The perplexity's axis is logarithmic.

    Raises:
        ValueError: if no arm has a score.
    """
    arms = table[(table["method"] != "dense") & np.isfinite(table["perplexity"])]
    if arms.empty:
        raise ValueError("no arm of this sweep has a score to draw")
    figure = Picture(figsize=(8.5, 4.2), layout="constrained")
    panel = ax or figure.add_subplot()
    kinds = ["method", "mask", "propagate"]
    several = [kind for kind in kinds if kind == "method" or arms[kind].nunique() > 1]
    colours = sns.color_palette("colorblind", arms["method"].nunique())
    tints = dict(zip(arms["method"].unique(), colours, strict=True))
    for (method, mask, propagate), part in arms.groupby(kinds, sort=False):
        grouped = part["sparsity"].str.contains(":")
        said = dict(zip(kinds, (method, mask, propagate), strict=True))
        style = {
            "color": tints[method],
            "marker": _MARKS.get(method, "D"),
            "markersize": 4,
            "markerfacecolor": tints[method] if mask == "row" else "white",
            "linewidth": 1.2,
            "capsize": 2,
        }
        line = "-" if propagate == "sparse" or "propagate" not in several else ":"
        free = part[~grouped].sort_values("realised")
        label = ", ".join(said[kind] for kind in several)
        shown = free if len(free) else part[grouped]
        panel.errorbar(
            shown["realised"],
            shown["perplexity"],
            yerr=shown["perplexity_error"],
            linestyle=line if len(free) else "none",
            label=label,
            **style,
        )
        for row in part[grouped].itertuples():
            if len(free):
                panel.errorbar(
                    row.realised, row.perplexity, row.perplexity_error, linestyle="none", **style
                )
            panel.annotate(
                row.sparsity, (row.realised, row.perplexity), (5, -3), textcoords="offset points"
            )
    dense = table.loc[table["method"] == "dense", "perplexity"].iloc[0]
    panel.axhline(dense, label=f"dense, {dense:.4g}", **DASHES)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.10g}"))
    panel.yaxis.set_minor_locator(ticker.NullLocator())
    low, high = panel.get_xlim()
    if high - low < 0.04:  # all at one sparsity, which rounding alone is not to spread out
        panel.set_xlim((low + high) / 2 - 0.02, (low + high) / 2 + 0.02)
    panel.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
    tokens = f"{int(table['tokens'].max()):,} tokens, {int(table['windows'].max())} windows"
    panel.set(xlabel="realised sparsity of the pruned layers", ylabel=f"perplexity\n({tokens})")
    panel.grid(axis="y", alpha=0.25)
    panel.set_title(_subject(table), loc="left")
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax or figure


def _subject(table: pd.DataFrame) -> str:
    """Return what was pruned and scored, as far as the table knows."""
    about = table.attrs
    paths = [PurePath(str(about.get(key, ""))).parts for key in ("model", "evaluation")]
    model, text = ("/".join(path[-2:]).removesuffix(".txt") for path in paths)
    return " · ".join(filter(None, [model, " ".join(about.get("layers", [])), text]))
