"""Figures of the tables of sweeps and ablations."""

from pathlib import PurePath
from typing import Any, overload

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle.experiments.ablation_table import display_name
from entangle.experiments.interventions import RANDOM
from entangle.experiments.sweep_table import ROUNDED, UNPRUNED
from entangle.pruning.options import EXPERT_DEFAULTS, OF_INPUTS, OPTIONS, UNBUDGETED
from entangle.show.panels import DASHES, STYLE, Picture, drawable

_MARKS = {"sparsegpt": "o", "wanda": "s", "magnitude": "^"}
_RIVALS = ("#b8306b", "#8c6d31")
_COLOURED = [
    *("method", "solve", "reconstruct", "experts", "components", "shrinkage", "budget", "strength"),
    *("inputs", "input_shares", "weights"),
]
_STROKES = ("-", "--", "-.", ":", (0, (1, 3)))  # one per budget across blocks
_SETS = {  # in the order in which they are drawn
    "wasserstein": "#0b3c5d",
    "wasserstein_bulk": "#c9741a",
    "kurtosis": "#b8306b",
    "difficulty": "#8c6d31",
    "std": "#2a9d6f",
    "weight_norm": "#7b5ea7",
    "random": "0.45",
    "bottom": "#3f8fc5",
}
_NEAR_ZERO = {"linthresh": 0.01}  # nats
# Lines run over the sparsity, and those of sparse inputs over the input sparsity: then the sparsity
# of the weights is one of the line's `weights`.
_OVER = {"sparsity", "input_sparsity"}
_KINDS = [*_COLOURED, *(name for name in OPTIONS if name not in {*_COLOURED, *_OVER})]
_LABELLED = {"method", "experts", "assign", "budget", "strength", "across", "mask", "propagate"}
_LABELLED |= {"inputs", "input_shares", "weights"}


@overload
def sweep(table: pd.DataFrame, *, ax: None = None) -> Figure: ...
@overload
def sweep(table: pd.DataFrame, *, ax: Axes) -> Axes: ...
@mpl.rc_context(STYLE)
def sweep(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure | Axes:
    """Draw perplexity (log axis) against the weights read for a token: a line per combination of options.

    ``table`` is a result of `entangle.sweep`. A token reads a weight for each multiply-add. These
    are those per token of the pruned layers and their routers, over the dense ones: with one
    expert, 1 minus the realised sparsity. Bars are one standard error over windows. Sparsities n:m
    are single labelled marks. The dashed line is the dense model, and paler ones its rounded
    weights. Each budget of rows has a colour, each budget across blocks a line style. Several
    budgets at a single sparsity, which all keep as many weights, are drawn as a list instead: the
    difference to the dense model, nats per token, paired by window. Each evaluation text has a
    panel; with ``ax`` the table must be of one text.

    Raises:
        ValueError: no arm has a score; or the table is of several texts and there is only ``ax``.
    """
    older: dict[str, Any] = {n: _default(n) for n in OPTIONS if n not in table and n != "sparsity"}
    pruned = ~table["method"].isin(UNPRUNED)
    arms = table[pruned & np.isfinite(table["perplexity"])].assign(**older)
    arms = arms.assign(weights=arms["sparsity"].where(arms["inputs"] != "dense", ""))
    if arms.empty:
        raise ValueError("no arm of this sweep has a score to draw")
    free = arms.loc[~arms["sparsity"].str.contains(":"), "sparsity"]
    listed = free.nunique() == 1 and len(arms[[*UNBUDGETED]].drop_duplicates()) > 1
    texts = [*map(str, dict.fromkeys(table["evaluation"]))] if "evaluation" in table else [""]
    if ax is not None and len(texts) > 1:
        raise ValueError(
            f"one panel shows the scores of one text, but the table is of {len(texts)}: choose the "
            "rows of one, table[table['evaluation'] == NAME]"
        )
    draw, height = (_budgets, 1.2 + 0.24 * len(arms) / len(texts)) if listed else (_curve, 4.2)
    figure = Picture(figsize=(8.5, height * len(texts)), layout="constrained")
    panels = [ax] if ax else figure.subplots(len(texts), squeeze=False, sharex=listed)[:, 0]
    if listed:  # best first, in all panels by the first text; the rows of an arm stand together
        order = arms["difference"].to_numpy()[:: len(texts)].argsort(kind="stable")
        arms = arms.iloc[(order[:, None] * len(texts) + np.arange(len(texts))).ravel()]
    for text, panel in zip(texts, panels, strict=True):
        if len(texts) > 1:
            of_text = table[table["evaluation"] == text]
            of_text.attrs = table.attrs | {"evaluation": text}
            draw(panel, of_text, arms[arms["evaluation"] == text])
        else:
            draw(panel, table, arms)
    return ax or figure


def _curve(panel: Axes, table: pd.DataFrame, arms: pd.DataFrame) -> None:
    """Draw perplexity against the weights read for a token."""
    tints = _tints(arms)
    for kind, part in arms.groupby(_KINDS, sort=False):
        options: dict[str, Any] = dict(zip(_KINDS, kind, strict=True))
        tint = tints[tuple(options[name] for name in _COLOURED)]
        style = {
            "color": tint,
            "marker": "x" if options["assign"] == "random" else _MARKS.get(options["method"], "D"),
            "markersize": 4,
            "markerfacecolor": tint if options["mask"] == "row" else "white",
            "linewidth": 1.2,
            "capsize": 2,
        }
        _line(panel, part, _label(options, arms), _dashes(options, arms), style)
    dense = table.loc[table["method"] == "dense", "perplexity"].iloc[0]
    panel.axhline(dense, label=f"dense, {dense:.4g}", **DASHES)
    for bits, method in ROUNDED.items():
        for value in table.loc[table["method"] == method, "perplexity"]:
            label = f"dense, rounded to {bits} bits, {value:.4g}"
            panel.axhline(value, label=label, **DASHES | {"alpha": bits / 16})
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.10g}"))
    panel.yaxis.set_minor_locator(ticker.NullLocator())
    low, high = panel.get_xlim()
    if high - low < 0.04:  # one sparsity: rounding differences must not fill the axis
        panel.set_xlim((low + high) / 2 - 0.02, (low + high) / 2 + 0.02)
    panel.xaxis.set_major_formatter(ticker.PercentFormatter(1))
    tokens = f"{int(table['tokens'].max()):,} tokens, {int(table['windows'].max())} windows"
    panel.set(
        xlabel="weights read for a token: multiply-adds of the pruned layers and their routers (% of dense)",
        ylabel=f"perplexity\n({tokens})",
    )
    panel.grid(axis="y", alpha=0.25)
    panel.set_title(_subject(table), loc="left")
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1))


@mpl.rc_context(STYLE)
def ablation(table: pd.DataFrame) -> Figure:
    """Draw the difference to the dense model, nats per token: a panel per intervention.

    ``table`` is a result of `entangle.ablate`. The other axis is the share of treated neurons if
    there are several, the treated block if blocks were treated one at a time, or else the set of
    neurons. Bars are one standard error, paired by window. Random neurons have their mean over
    seeds and its 95% t-interval. In a list of sets the upper axis is the ratio of perplexities.

    Raises:
        ValueError: no arm has a score.
    """
    arms = table[(table["intervention"] != "dense") & np.isfinite(table["perplexity"])]
    if arms.empty:
        raise ValueError("no arm of this ablation has a score to draw")
    alone = (arms["block"] != "").any()
    by = ["intervention", "sparsity", "experts", *(["share"] if alone else [])]
    parts = list(arms.groupby(by, sort=False))
    several = arms["share"].nunique() > 1
    columns = min(len(parts), 1 if alone else 3)
    rows = -(-len(parts) // columns)
    height = 2.6 if alone or several else 0.5 + 0.26 * arms["set"].nunique()
    figure = Picture(figsize=(8.5, 0.9 + rows * (height + 0.4)), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for (kind, part), panel in zip(parts, grid, strict=False):
        panel.set_title(_treatment(dict(zip(by, kind, strict=True))))
        if alone:
            _curves(panel, part.assign(place=part["block"].astype(int)))
            panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        elif several:
            _curves(panel, part.assign(place=part["share"]))
            panel.set_xscale("log")
            positive = bool((arms["difference"] - _bars(arms) > 0).all())
            panel.set_yscale("log" if positive else "symlog", **({} if positive else _NEAR_ZERO))
            panel.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            shares = sorted(part["share"].unique())
            panel.set_xticks(shares, [f"{100 * share:g}%" for share in shares])
            panel.xaxis.set_minor_locator(ticker.NullLocator())
        else:
            _dots(panel, part)
    for place, panel in enumerate(grid[: len(parts)]):
        panel.tick_params(labelbottom=place + columns >= len(parts))
    for spare in grid[len(parts) :]:
        spare.remove()
    nats = "difference to the dense model (nats a token)\nbars: one standard error"
    across = {True: "treated block", False: "share of each layer's neurons treated"}[alone]
    if alone or several:
        figure.supxlabel(across)
        figure.supylabel(nats)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right upper")
    else:
        figure.supxlabel(nats)
    dense = table.loc[table["intervention"] == "dense"].iloc[0]
    tokens = f"{int(dense['tokens']):,} tokens, dense perplexity {dense['perplexity']:.4g}"
    figure.suptitle(f"{_subject(table)}\n{tokens}", x=0.01, ha="left")
    return figure


def _treatment(kind: dict[str, Any]) -> str:
    """Return a panel's title: the intervention and its options."""
    parts = [kind["intervention"]]
    if kind["sparsity"]:
        parts = [f"{kind['sparsity']} sparse", f"{kind['experts']} experts"]
        parts[1] = parts[1] if kind["experts"] > 1 else "one expert"
    return ", ".join(
        [*parts, *([f"{100 * kind['share']:.3g}% of neurons"] if "share" in kind else [])]
    )


def _set_label(name: str, part: pd.DataFrame) -> str:
    """Return the label of a set, with the meaning of its bar if that is no standard error."""
    over_seeds = part.loc[part["set"] == name, "difference_low"].notna().any()
    label = display_name(name)
    return f"{label} (95%, seeds)" if name == RANDOM and over_seeds else label


def _bars(row: pd.DataFrame) -> "pd.Series[float]":
    """Return the half-length of the bar of each difference, nats per token."""
    error = row["difference_error"]
    low = (row["difference"] - row["difference_low"]).where(row["set"] == RANDOM, error)
    return low.fillna(error).fillna(0.0)


def _colours(part: pd.DataFrame) -> dict[str, Any]:
    """Return the colour of each set, in drawing order."""
    others = [str(name) for name in dict.fromkeys(part["set"]) if name not in _SETS]
    return _SETS | dict(zip(others, sns.color_palette("flare", len(others)), strict=True))


def _curves(panel: Axes, part: pd.DataFrame) -> None:
    for name, line in part.groupby("set", sort=False):
        line = line.sort_values("place")
        style: dict[str, Any] = {
            "color": _colours(part)[str(name)],
            "label": _set_label(str(name), part),
            "linewidth": 1.2,
        }
        style |= {"marker": "o", "markersize": 3, "capsize": 2}
        style |= {"linestyle": "--"} if name in {RANDOM, "bottom"} else {}
        panel.errorbar(line["place"], line["difference"], yerr=_bars(line), **style)
    if (part["difference"] - _bars(part) <= 0).any():
        panel.axhline(0, color="0.7", linewidth=0.8)
    panel.grid(axis="y", alpha=0.25)


def _dots(panel: Axes, part: pd.DataFrame) -> None:
    colours = _colours(part)
    names = [name for name in colours if name in {*part["set"]}]
    rows = part.set_index("set").loc[names].reset_index()
    places = np.arange(len(rows))
    for name, place, difference, bar in zip(
        names, places, rows["difference"], _bars(rows), strict=True
    ):
        style: dict[str, Any] = {"color": colours[name], "marker": "o", "markersize": 4}
        panel.errorbar(difference, place, xerr=bar, capsize=3, **style)
    panel.set_yticks(places, [_set_label(name, part) for name in names])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.axvline(0, color="0.7", linewidth=0.8)
    panel.grid(axis="x", alpha=0.25)
    both = (np.exp, lambda ratio: np.log(np.maximum(ratio, 1e-9)))
    top = panel.secondary_xaxis("top", functions=both)
    top.tick_params(labelsize=7)
    top.set_xlabel("ratio of perplexities", fontsize=7)


def _budgets(panel: Axes, table: pd.DataFrame, arms: pd.DataFrame) -> None:
    """Draw arms of one sparsity as a list, from top to bottom."""
    places = np.arange(len(arms))
    uniform = (arms[[*UNBUDGETED]].astype(str) == [*UNBUDGETED.values()]).all(axis=1).to_numpy()
    for kind, tint in ((uniform, "0.45"), (~uniform, _SETS["wasserstein"])):
        style: dict[str, Any] = {"color": tint, "fmt": "o", "markersize": 4, "capsize": 3}
        part = arms[kind]
        panel.errorbar(part["difference"], places[kind], xerr=part["difference_error"], **style)
    kinds = arms[_KINDS].itertuples(index=False, name=None)
    labels = [_label(dict(zip(_KINDS, kind, strict=True)), arms) for kind in kinds]
    asked = arms["input_sparsity"].astype(str)
    labels = [f"{x} {of}".rstrip() for x, of in zip(labels, asked, strict=True)]
    if arms["sparsity"].nunique() > 1:
        labels = [f"{s}, {x}" for s, x in zip(arms["sparsity"], labels, strict=True)]
    panel.set_yticks(places, labels)
    panel.set_ylim(len(arms) - 0.5, -0.5)
    panel.grid(axis="x", alpha=0.25)
    tokens = f"{int(table['tokens'].max()):,} tokens, bars: one standard error, paired by window"
    panel.set_xlabel(f"difference to the dense model (nats a token)\n{tokens}")
    dense = table.loc[table["method"] == "dense", "perplexity"].iloc[0]
    sparsities = " and ".join(dict.fromkeys(arms["sparsity"]))
    facts = f"{sparsities} sparse, dense perplexity {dense:.4g}"
    panel.set_title(f"{_subject(table)}\n{facts}", loc="left")


def _line(panel: Axes, part: pd.DataFrame, label: str, dashes: Any, style: dict[str, Any]) -> None:
    """Draw the arms of one line, and its n:m arms as single marks."""
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
    """Return a colour for each combination of the coloured options; SparseGPT's are shades."""
    keys = list(dict.fromkeys(arms[_COLOURED].itertuples(index=False, name=None)))
    mixtures = [key for key in keys if key[0] == "sparsegpt"]
    rivals = [key for key in keys if key not in mixtures]
    kinds = arms["budget"].nunique() > 1  # budgets are categories: distinct hues, no shades
    shades = sns.color_palette("husl" if kinds else "crest", len(mixtures))
    others = _RIVALS if len(rivals) <= len(_RIVALS) else sns.color_palette("flare", len(rivals))
    return dict(zip(mixtures, shades, strict=True)) | dict(zip(rivals, others, strict=False))


def _label(options: dict[str, Any], arms: pd.DataFrame) -> str:
    """Return the label of a line: its method, and the options in which lines differ."""
    parts = [options["method"]]
    if arms["experts"].max() > 1 and options["method"] == "sparsegpt":
        parts.append(f"{options['experts']} expert{'s' if options['experts'] > 1 else ''}")
    several = {name for name in _KINDS if arms.loc[arms["experts"] > 1, name].nunique() > 1}
    if options["experts"] > 1:
        parts += ["at random"] if options["assign"] == "random" else []
        parts += [f"{n} {options[n]}" for n in EXPERT_DEFAULTS if n != "assign" and n in several]
    strengths = arms.loc[arms["strength"] != "", "strength"].nunique() > 1
    if arms["budget"].nunique() > 1 or strengths:
        parts.append(f"rows {options['budget']} {options['strength']}".rstrip())
    if arms["across"].nunique() > 1:
        parts.append(f"blocks {options['across']}")
    differ = {
        name for name in _KINDS if {*arms[name]} - {"", options[name]} and options[name] != ""
    }
    parts += [f"mask by {options['mask']}"] if "mask" in differ else []
    parts += [f"{options['propagate']} propagation"] if "propagate" in differ else []
    if options["inputs"] != "dense":
        parts += [f"inputs {options['inputs']}"]
        parts += [options["input_shares"]] if "input_shares" in differ else []
        parts += [f"weights {options['weights']}"] if options["method"] != "none" else []
    others = [name for name in _KINDS if name not in {*_LABELLED, *EXPERT_DEFAULTS}]
    parts += [f"{name} {options[name]}" for name in others if name in differ]
    return ", ".join(parts)


def _default(name: str) -> str:
    """Return the value of an option that a table of an older version lacks."""
    if name in {*EXPERT_DEFAULTS, *OF_INPUTS} - {"inputs"}:
        return ""
    if name == "solve":
        return "greedy"
    return UNBUDGETED.get(name, str(OPTIONS[name].default))


def _dashes(options: dict[str, Any], arms: pd.DataFrame) -> Any:
    across = list(dict.fromkeys(arms["across"]))
    if len(across) > 1:
        return _STROKES[across.index(options["across"])]
    if options["assign"] == "random":
        return "--"
    return ":" if options["propagate"] == "dense" and arms["propagate"].nunique() > 1 else "-"


def _subject(table: pd.DataFrame) -> str:
    """Return the title: model, layers and evaluation text, as far as the table has them."""
    about = table.attrs
    paths = [PurePath(str(about.get(key, ""))).parts for key in ("model", "evaluation")]
    model, text = ("/".join(path[-2:]).removesuffix(".txt") for path in paths)
    return drawable(" · ".join(filter(None, [model, " ".join(about.get("layers", [])), text])))
