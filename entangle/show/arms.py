"""Pictures of a table of arms: what was done to a model, and what its score became."""

from pathlib import PurePath
from typing import Any, overload

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle.show.panels import DASHES, STYLE, Picture

_MARKS = {"sparsegpt": "o", "wanda": "s", "magnitude": "^"}
_RIVALS = ("#b8306b", "#8c6d31")
_COLOURED = ["method", "experts", "components", "pull"]
_KINDS = [*_COLOURED, "assign", "mask", "propagate"]


@overload
def sweep(table: pd.DataFrame, *, ax: None = None) -> Figure: ...
@overload
def sweep(table: pd.DataFrame, *, ax: Axes) -> Axes: ...
@mpl.rc_context(STYLE)
def sweep(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure | Axes:
    """Draw perplexity against multiply-adds: a line per number of experts and per rival method.

    Lines also tell apart masks, propagations and whatever else differs between the arms.
    Multiply-adds are those of a token in the pruned layers, routers included, over the dense ones:
    with one expert one less the realised sparsity. Bars are one standard error over windows; n:m
    sparsities are single marks, named beside them; the dashed line is the dense model. The
    perplexity's axis is logarithmic.

    Raises:
        ValueError: if no arm has a score.
    """
    arms = table[(table["method"] != "dense") & np.isfinite(table["perplexity"])]
    if arms.empty:
        raise ValueError("no arm of this sweep has a score to draw")
    figure = Picture(figsize=(8.5, 4.2), layout="constrained")
    panel = ax or figure.add_subplot()
    tints = _tints(arms)
    for kind, part in arms.groupby(_KINDS, sort=False):
        said = dict(zip(_KINDS, kind, strict=True))
        tint = tints[tuple(said[name] for name in _COLOURED)]
        style = {
            "color": tint,
            "marker": "x" if said["assign"] == "random" else _MARKS.get(said["method"], "D"),
            "markersize": 4,
            "markerfacecolor": tint if said["mask"] == "row" else "white",
            "linewidth": 1.2,
            "capsize": 2,
        }
        _line(panel, part, _label(said, arms), _dashes(said, arms), style)
    dense = table.loc[table["method"] == "dense", "perplexity"].iloc[0]
    panel.axhline(dense, label=f"dense, {dense:.4g}", **DASHES)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.10g}"))
    panel.yaxis.set_minor_locator(ticker.NullLocator())
    low, high = panel.get_xlim()
    if high - low < 0.04:  # all at one sparsity, which rounding alone is not to spread out
        panel.set_xlim((low + high) / 2 - 0.02, (low + high) / 2 + 0.02)
    panel.xaxis.set_major_formatter(ticker.PercentFormatter(1))
    tokens = f"{int(table['tokens'].max()):,} tokens, {int(table['windows'].max())} windows"
    panel.set(
        xlabel="multiply-adds of the pruned layers and their routers, of the dense ones",
        ylabel=f"perplexity\n({tokens})",
    )
    panel.grid(axis="y", alpha=0.25)
    panel.set_title(_subject(table), loc="left")
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax or figure


def _line(panel: Axes, part: pd.DataFrame, label: str, dashes: str, style: dict[str, Any]) -> None:
    """Draw the arms of one line, those of n:m beside it."""
    grouped = part["sparsity"].str.contains(":")
    free = part[~grouped].sort_values("density")
    shown = free if len(free) else part[grouped]
    panel.errorbar(
        shown["density"],
        shown["perplexity"],
        yerr=shown["perplexity_error"],
        linestyle=dashes if len(free) else "none",
        label=label,
        **style,
    )
    for arm in part[grouped].to_dict(orient="records"):
        place = arm["density"], arm["perplexity"]
        if len(free):
            panel.errorbar(*place, arm["perplexity_error"], linestyle="none", **style)
        panel.annotate(arm["sparsity"], place, (5, -3), textcoords="offset points")


def _tints(arms: pd.DataFrame) -> dict[tuple[Any, ...], Any]:
    """Return a colour for each rival, and a shade of one for each number of experts."""
    keys = list(dict.fromkeys(arms[_COLOURED].itertuples(index=False, name=None)))
    mixtures = [key for key in keys if key[0] == "sparsegpt"]
    rivals = [key for key in keys if key not in mixtures]
    shades = sns.color_palette("crest", len(mixtures))
    return dict(zip(mixtures, shades, strict=True)) | dict(zip(rivals, _RIVALS, strict=False))


def _label(said: dict[str, Any], arms: pd.DataFrame) -> str:
    """Return a line's name: its method, and what differs between the lines."""
    words = [said["method"]]
    if arms["experts"].max() > 1 and said["method"] == "sparsegpt":
        words.append(f"{said['experts']} expert{'s' if said['experts'] > 1 else ''}")
    several = {name for name in _KINDS if arms.loc[arms["experts"] > 1, name].nunique() > 1}
    if said["experts"] > 1:
        words += ["at random"] if said["assign"] == "random" else []
        words += [f"{n} {said[n]}" for n in ("components", "pull") if n in several]
    words += [f"mask by {said['mask']}"] if arms["mask"].nunique() > 1 else []
    words += [f"{said['propagate']} propagation"] if arms["propagate"].nunique() > 1 else []
    return ", ".join(words)


def _dashes(said: dict[str, Any], arms: pd.DataFrame) -> str:
    if said["assign"] == "random":
        return "--"
    return ":" if said["propagate"] == "dense" and arms["propagate"].nunique() > 1 else "-"


def _subject(table: pd.DataFrame) -> str:
    """Return what was pruned and scored, as far as the table knows."""
    about = table.attrs
    paths = [PurePath(str(about.get(key, ""))).parts for key in ("model", "evaluation")]
    model, text = ("/".join(path[-2:]).removesuffix(".txt") for path in paths)
    return " · ".join(filter(None, [model, " ".join(about.get("layers", [])), text]))
