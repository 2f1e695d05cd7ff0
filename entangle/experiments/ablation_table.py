"""The tables of an ablation: scores compared with the dense model and with random neurons."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy

from entangle.experiments.interventions import RANDOM
from entangle.model.divergence import divergence_columns
from entangle.model.score import Score
from entangle.runs import store
from entangle.runs.dataset import overlap_notes, skipped_notes
from entangle.runs.markdown import (
    DIVERGENCE,
    DIVERGENCE_HEADS,
    divergence_cells,
    is_compared,
    table_lines,
    with_error,
)

Array = npt.NDArray[np.float64]
Result = Mapping[str, Any]

TEXT = {"intervention", "sparsity", "block", "set", "problem"}  # columns of text
_DRAWS = 500  # bootstrap samples
KIND = ("intervention", "sparsity", "experts", "block")  # columns that rows to be compared share
_AGAINST_RANDOM = (
    "over_random",
    "over_random_error",
    "times_random",
    "times_low",
    "times_high",
    "equivalent_share",
    "equivalent_low",
    "equivalent_high",
)
NAMES = {"wasserstein": "top wasserstein", "bottom": "bottom wasserstein", "random": "random"}


def table_of(results: Sequence[Result]) -> pd.DataFrame:
    """Return a table with a row per arm, the dense model first.

    The columns are those that `ablate` lists, without ``seeds`` and the comparisons with random
    neurons (``over_random`` and after), and with ``seed``: the seed of a random set, else empty.
    """
    dense = _nats(results[0])
    return pd.DataFrame(
        [_arm(result) | _scored(_nats(result)[None], dense, [result]) for result in results]
    )


def effects_of(results: Sequence[Result]) -> pd.DataFrame:
    """Return a table with a row per set of neurons, the dense model first.

    Random sets that differ only in the seed share a row, which has means over the seeds and 95%
    t-intervals over them, ``_low`` to ``_high``. Errors are standard errors over windows; those of
    ratios and differences are paired by window. A number that a row does not have is NaN. Columns:

    * ``intervention``: the intervention; ``dense`` is the untreated model.
    * ``sparsity``, ``experts``: options of ``sparsify``; else empty and 1.
    * ``block``: the treated block; empty if all blocks are treated.
    * ``set``: the set of neurons.
    * ``share``: the treated share of each layer's neurons.
    * ``neurons``: number of treated neurons.
    * ``realised``: share of zeros in the treated rows, mean over experts.
    * ``model_sparsity``: share of zeros in all weights of the model.
    * ``seeds``: number of random sets; 0 for other sets.
    * ``perplexity``, with ``_error``, ``_low``, ``_high``: perplexity on the evaluation windows.
    * ``ratio``, ``ratio_error``: perplexity over that of the dense model.
    * ``difference``, with ``_error``, ``_low``, ``_high``: difference to the dense model, nats per
      token.
    * ``kl``, ``kl_tail``, ``agreement``, ``lost``, ``gained``, each with its ``_error``: as the
      columns of `sweep`; for random sets means over seeds, and errors of these means over windows.
    * ``windows``: evaluation windows.
    * ``tokens``: scored tokens.
    * ``problem``: why the row has no score; empty if it has one.
    * ``over_random``, ``over_random_error``: difference to random neurons of the same share, nats
      per token; the error combines windows and seeds.
    * ``times_random``: increase of perplexity over that with random neurons of the same share; NaN
      if random neurons cause no increase.
    * ``times_low``, ``times_high``: its 95% bootstrap interval over windows and seeds.
    * ``equivalent_share``: share of random neurons that causes the same difference (see
      `equivalent_share`); infinite if no share that was run does.
    * ``equivalent_low``, ``equivalent_high``: its 95% bootstrap interval over windows and seeds.
    """
    dense = _nats(results[0])
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        arm = _arm(result)
        key = tuple(arm[name] for name in (*KIND, "share", "set"))
        groups.setdefault(key, []).append(result)
    rows = []
    for key, members in groups.items():
        nats = np.array([_nats(member) for member in members])  # (seeds, windows)
        row = _arm(members[0]) | {"seeds": len(members) if key[-1] == RANDOM else 0}
        row |= _scored(nats, dense, members)
        problems = [member["problem"] for member in members if "problem" in member]
        row |= {"problem": "; ".join(dict.fromkeys(problems))}
        rows.append(row | _against_random(key, nats, groups, dense))
    return pd.DataFrame(rows).drop(columns="seed")


def _nats(result: Result) -> Array:
    return np.array(result["window_nats"], dtype=np.float64)


def _arm(result: Result) -> dict[str, Any]:
    """Return the columns that describe an arm."""
    block = result.get("block")
    return {
        "intervention": result["intervention"],
        "sparsity": result.get("sparsity", ""),
        "experts": result.get("experts", 1),
        "block": "" if block is None else str(block),
        "set": result.get("neurons", ""),
        "share": result.get("share", 0.0),
        "seed": "" if result.get("seed") is None else str(result["seed"]),
        "neurons": result.get("neurons_treated", 0),
        "realised": result.get("realised", math.nan),
        "model_sparsity": result.get("model_sparsity", math.nan),
    }


def _scored(nats: Array, dense: Array, members: Sequence[Result]) -> dict[str, Any]:
    """Return the score columns of nats (seeds, windows): means, errors over windows, intervals."""
    tokens = int(members[0]["tokens"])
    mean = nats.mean(axis=0)  # (windows,)
    change = Score(mean - dense, tokens)
    perplexities = np.array([Score(one, tokens).perplexity for one in nats])
    perplexity, perplexity_half = _interval(perplexities)
    ratio = float(np.exp((nats - dense).mean(axis=1)).mean())
    difference, difference_half = _interval((nats - dense).mean(axis=1))
    scored = Score(mean, tokens)
    return {
        "perplexity": perplexity,
        "perplexity_error": perplexity * scored.nats_error,
        "perplexity_low": perplexity - perplexity_half,
        "perplexity_high": perplexity + perplexity_half,
        "ratio": ratio,
        "ratio_error": ratio * change.nats_error,
        "difference": difference,
        "difference_error": change.nats_error,
        "difference_low": difference - difference_half,
        "difference_high": difference + difference_half,
        **divergence_columns([member.get("divergence") for member in members], range(len(dense))),
        "windows": len(dense),
        "tokens": tokens,
        "problem": members[0].get("problem", ""),
    }


def _interval(values: Array) -> tuple[float, float]:
    """Return a mean and the half-width of its 95% t-interval, NaN for one value."""
    n = len(values)
    if n < 2:
        return float(values.mean()), math.nan
    if not np.isfinite(values).all():
        return float(values.mean()), math.nan
    half = scipy.stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)
    return float(values.mean()), float(half)


def _against_random(
    key: tuple[Any, ...],
    nats: Array,
    groups: Mapping[tuple[Any, ...], Sequence[Result]],
    dense: Array,
) -> dict[str, float]:
    """Compare a set's nats (1, windows) with those of random neurons with the same treatment."""
    *kind, share, name = key
    found = dict.fromkeys(_AGAINST_RANDOM, math.nan)
    random = {
        other[-2]: np.array([_nats(result) for result in members])
        for other, members in groups.items()
        if list(other[:-2]) == kind and other[-1] == RANDOM
    }
    if name == RANDOM or share not in random or np.isnan(nats).any():
        return found
    seeds = random[share]  # (seeds, windows)
    over = Score(nats[0] - seeds.mean(axis=0), 0)
    spread = seeds.mean(axis=1).std(ddof=1) / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan
    error = math.hypot(over.nats_error, spread)
    found |= {"over_random": over.nats, "over_random_error": error}
    curve = {one: random[one] for one in sorted(random)}
    found["times_random"] = _times(nats[0], seeds, dense)
    found["equivalent_share"] = _equivalent_to(nats[0], curve, dense)
    return found | _bootstrap(nats[0], share, curve, dense)


def _times(nats: Array, random: Array, dense: Array) -> float:
    """Return the increase of perplexity over that with random neurons (seeds, windows)."""
    before = Score(dense, 0).perplexity
    increase, *others = (Score(one, 0).perplexity - before for one in (nats, *random))
    mean = float(np.mean(others))
    return increase / mean if mean > 0 else math.nan


def _equivalent_to(nats: Array, curve: Mapping[float, Array], dense: Array) -> float:
    differences = [float((random - dense).mean()) for random in curve.values()]
    return equivalent_share(float((nats - dense).mean()), list(curve), differences)


def _bootstrap(
    nats: Array, share: float, curve: Mapping[float, Array], dense: Array
) -> dict[str, float]:
    """Return 95% bootstrap intervals; windows and seeds are drawn with replacement.

    All sets and shares use the same draws. There is no interval with one seed, or if more than one
    draw in twenty has no value because random neurons cause no increase in it.
    """
    if min(map(len, curve.values())) < 2:
        return {}
    generator = np.random.default_rng(0)
    found: dict[str, list[float]] = {"times": [], "equivalent": []}
    for _ in range(_DRAWS):
        windows = generator.integers(len(dense), size=len(dense))
        seeds = generator.integers(len(curve[share]), size=len(curve[share]))
        drawn = {one: random[seeds % len(random)][:, windows] for one, random in curve.items()}
        arguments = nats[windows], dense[windows]
        found["times"].append(_times(arguments[0], drawn[share], arguments[1]))
        found["equivalent"].append(_equivalent_to(arguments[0], drawn, arguments[1]))
    ends = {}
    for name, values in found.items():
        known = np.array(values)
        known = known[~np.isnan(known)]
        known = known if len(known) >= 0.95 * _DRAWS else known[:0]
        for end, quantile in (("low", 0.025), ("high", 0.975)):
            value = np.quantile(known, quantile, method="nearest") if len(known) else math.nan
            ends[f"{name}_{end}"] = float(value)
    return ends


def equivalent_share(
    difference: float, shares: Sequence[float], differences: Sequence[float]
) -> float:
    """Return the share of random neurons that causes this difference, in nats per token.

    It is interpolated linearly between the ``shares`` that were run (ascending) and their
    ``differences``, starting with difference 0 at share 0. It is the smallest such share, infinite
    if the difference is not reached.
    """
    if math.isnan(difference) or np.isnan(differences).any():
        return math.nan
    if difference <= 0:
        return 0.0
    points = list(zip((0.0, *shares), (0.0, *differences), strict=True))
    for (share, low), (next_share, high) in itertools.pairwise(points):
        if high >= difference:
            return share + (next_share - share) * (difference - low) / (high - low)
    return math.inf


def read_table(folder: str | Path) -> pd.DataFrame:
    """Return the table of an ablation's folder; its ``attrs`` are run.json.

    Raises:
        FileNotFoundError: the folder has no such table.
    """
    return store.read_table(folder, "ablation", TEXT)


def markdown(table: pd.DataFrame) -> str:
    """Return the table in Markdown, below a paragraph on models, texts and units."""
    about, run = table.attrs, table.attrs["run"]
    compared = is_compared(table)
    pruned = (
        f" Sparsified rows were pruned by SparseGPT with mask row, solve "
        f"{about.get('solve', 'greedy')}, calibrated on "
        f"{about['tokens']:,} tokens of {about['text']} ({about['windows']} windows of "
        f"{about['length']}) with the dense model."
        if about["pruned"]
        else ""
    )
    lines = [
        f"{about['model']}: neurons of layers {' '.join(about['layers'])}, chosen from a run on "
        f"{run.get('tokens', 0):,} tokens of {run.get('text', '?')}; scored on "
        f"{int(table['tokens'].max()):,} tokens of {about['evaluation']} "
        f"({about['evaluation_windows']} windows of {about['evaluation_length']} that do not overlap, each "
        f"scored from its own start).{pruned} ± is the standard error over windows; for differences "
        "it is paired by window. Random neurons have the mean over seeds and its 95% t-interval over "
        "seeds. Times random is the increase of perplexity divided by that with random neurons of "
        "the same share. Equivalent share is the share of random neurons that causes the same "
        "difference, interpolated between the shares that were run. Both have 95% intervals from a "
        "bootstrap of windows and seeds. Realised is the share of zeros in the treated rows, and "
        "model is the share of zeros in all weights of the model, its embedding included."
        + (f" {DIVERGENCE}Random sets have means over seeds." if compared else ""),
        *overlap_notes(about),
        *skipped_notes(about, "treated"),
    ]
    if about["missing_sets"]:
        left_out = "this set is" if len(about["missing_sets"]) == 1 else "these sets are"
        lines.append(
            f"\nThe run has no {' and no '.join(about['missing_sets'])}: {left_out} left out."
        )
    heads = ["intervention", "sparsity", "experts", "block", "share", "neurons", "realised"]
    heads += ["model", "perplexity", "ratio", "difference, nats"]
    heads += DIVERGENCE_HEADS if compared else []
    heads += ["over random, nats", "times random", "equivalent share"]
    rows = []
    for row in table.to_dict(orient="records"):
        if row["intervention"] == "dense":
            cells = ["dense", *["-"] * 6, _share(row["model_sparsity"])]
        else:
            cells = [row["intervention"], row["sparsity"] or "-", str(row["experts"])]
            cells += [row["block"] or "-", f"{row['share']:.2%}".replace(".00%", "%")]
            cells += [f"{display_name(row['set'])}, {row['neurons']:,}"]
            cells += [_share(row["realised"]), _share(row["model_sparsity"])]
        rows.append([*cells, *_numbers(row, compared)])
    kept = [i for i, head in enumerate(heads) if head != "block" or table["block"].any()]
    lines += ["", *table_lines([[row[i] for i in kept] for row in [heads, *rows]])]
    for row in table.to_dict(orient="records"):
        if row["problem"]:
            lines.append(
                f"\nNo score for {row['intervention']} {display_name(row['set'])}: {row['problem']}"
            )
    return "\n".join(lines) + "\n"


def display_name(name: str) -> str:
    """Return the display name of a set of neurons."""
    return NAMES.get(name, f"top {name}")


def _share(value: float) -> str:
    return f"{value:.2%}" if math.isfinite(value) else "-"


def _numbers(row: Mapping[Any, Any], compared: bool) -> list[str]:
    """Return the cells from perplexity on, as text."""
    if row["problem"]:
        return ["-"] * (11 if compared else 6)
    if row["set"] == RANDOM:
        perplexity = _with_interval(row, "perplexity")
        difference = _with_interval(row, "difference")
    else:
        perplexity = with_error(row["perplexity"], row["perplexity_error"])
        difference = with_error(row["difference"], row["difference_error"])
    cells = [perplexity, f"{row['ratio']:.4g}", difference]
    cells += divergence_cells(row) if compared else []
    if not math.isfinite(row["over_random"]):
        return [*cells, "-", "-", "-"]
    cells += [with_error(row["over_random"], row["over_random_error"])]
    times, low, high = row["times_random"], row["times_low"], row["times_high"]
    cell = f"{times:.3g}" if math.isfinite(times) else "-"
    cell += f" [{low:.3g}, {high:.3g}]" if math.isfinite(low) else ""
    cells += [cell, _equivalent(row)]
    return cells


def _with_interval(row: Mapping[Any, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if not math.isfinite(low):  # one seed
        return with_error(row[name], row[f"{name}_error"])
    return f"{row[name]:.4g} [{low:.4g}, {high:.4g}]"


def _equivalent(row: Mapping[Any, Any]) -> str:
    ends = [row[f"equivalent_{end}"] for end in ("share", "low", "high")]
    texts = ["not reached" if math.isinf(end) else f"{end:.2%}" for end in ends]
    if math.isnan(ends[1]):
        return texts[0]
    return texts[0] if len({*texts}) == 1 else f"{texts[0]} [{texts[1]}, {texts[2]}]"
