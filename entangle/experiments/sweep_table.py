"""The tables of a sweep: scores of its arms, differences to the dense model, and errors."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from entangle.model.divergence import divergence_columns
from entangle.model.score import Score
from entangle.pruning.options import EXPERT_DEFAULTS, OF_INPUTS, OPTIONS, UNBUDGETED
from entangle.runs import store
from entangle.runs.dataset import overlap_notes, short_names, skipped_notes
from entangle.runs.markdown import (
    DIVERGENCE,
    DIVERGENCE_HEADS,
    divergence_cells,
    is_compared,
    table_lines,
    with_error,
)

COSTS = (
    "density",
    "multiply_adds",
    "router_multiply_adds",
    "dense_multiply_adds",
    "model_multiply_adds",
    "model_dense_multiply_adds",
    "stored",
    "dense_weights",
    "disk_bytes",
    "memory_bytes",
)
TEXT = {*OPTIONS} - {"experts"} | {"evaluation", "problem"}  # columns in which "" is no NaN
_MLP_ERROR = (
    "MLP error is the relative squared error of a token's hidden states behind a block, before and "
    "after the block's MLP is reconstructed, on held-out calibration tokens, mean over blocks. "
)
_OF_LAYERS = {"inputs": "sparse_inputs"}  # options that have another name in the table of layers
_SPARSE = (
    "Zero inputs is the realised share of the layers' inputs that are zero, on the evaluation's tokens; "
    "errors are of the weights alone, and multiply-adds count the zero inputs of the calibration. "
)
_SPEED = (
    " A token is the median time of a token that the whole model writes, its pruned layers packed where "
    "`generate` packs them, on this machine with what ran beside it."
)
DENSE = "dense"  # the method of the row of the dense model
ROUNDED = {8: "rtn8", 4: "rtn4"}  # and of the rows of its weights rounded to so many bits
UNPRUNED = (DENSE, *ROUNDED.values())
Losses = npt.NDArray[np.float64]
Texts = Mapping[str, Sequence[int]]


def tables_of(
    results: Sequence[Mapping[str, Any]], texts: Texts
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a table of arms and texts, the dense model first, and a table of arms and layers.

    ``texts`` has, by name, the places of each text's windows among all windows of the evaluation.
    The first table has the columns that `sweep` lists. The second has, for each pruned arm:

    * ``method``, ``mask``, ``solve``, ``propagate``, ``reconstruct``, ``experts``, ``assign``,
      ``components``, ``shrinkage``, ``budget``, ``strength``, ``across``, ``scores``,
      ``sparse_inputs``, ``input_sparsity``, ``input_shares``, ``sparsity``: the options of the arm,
      as in the first, whose ``inputs`` is ``sparse_inputs`` here.
    * the columns of `Sparsified.layers`.
    * ``improvement``: RMSE of a neuron's outputs with one expert over that with several, on the
      calibration inputs, median over the layer's neurons; NaN unless both arms were run.
    * ``held_out_improvement``: the same on inputs from the evaluation windows.
    """
    rows, layers = [], []
    for result in results:
        arm = {name: str(result.get(name, UNBUDGETED.get(name, ""))) for name in OPTIONS}
        arm["experts"] = result.get("experts", 1)
        place = _uniform(result, results)
        uniform = None if place is None else results[place]
        pruned = pd.DataFrame(result["layers"])
        means = dict.fromkeys(
            ("error", "held_out_error"), 0.0 if result is results[0] else math.nan
        )
        means |= dict.fromkeys(("mlp_error_before", "mlp_error"), math.nan)
        damping, improvements = 0.0 if result is results[0] else math.nan, {}
        ranges = dict.fromkeys(("least", "most", "least_layer", "most_layer"), math.nan)
        if len(pruned):
            of_blocks = pruned.drop_duplicates("block") if "block" in pruned else pruned
            for name in (name for name in means if name in pruned):
                rows_of = of_blocks if name.startswith("mlp") else pruned
                means[name] = float(rows_of[name].astype(float).mean())
            damping = pruned["damping"].max()
            if "least" in pruned:
                ranges = {"least": pruned["least"].min(), "most": pruned["most"].max()}
                ranges["least_layer"] = pruned["realised"].min()
                ranges["most_layer"] = pruned["realised"].max()
            improvements = _improvements(result, results)
            for name, values in improvements.items():
                pruned[name] = _medians(values, result["layers"])
            # A layer's row has `inputs` too: the number of its inputs.
            options = {_OF_LAYERS.get(name, name): value for name, value in arm.items()}
            layers.append(pd.DataFrame([options]).merge(pruned, how="cross"))
        before = {
            "realised": result.get("realised", math.nan),
            "model_sparsity": result.get("model_sparsity", math.nan),
            "realised_inputs": _nan(result.get("realised_inputs")),
            **ranges,
        }
        after = {
            "layer_error": means["error"],
            "held_out_error": means["held_out_error"],
            "mlp_error_before": means["mlp_error_before"],
            "mlp_error": means["mlp_error"],
            "improvement": _median(improvements.get("improvement")),
            "held_out_improvement": _median(improvements.get("held_out_improvement")),
            "damping": damping,
            **{name: result.get("costs", {}).get(name, math.nan) for name in COSTS},
            "microseconds": _nan(result.get("microseconds")),
        }
        problem = {"problem": result.get("problem", "")}
        for place, (text, windows) in enumerate(texts.items()):
            scores = _scores(result, results[0], uniform, windows)
            scores |= divergence_columns([result.get("divergence")], windows, place)
            size = {name: scores.pop(name) for name in ("windows", "tokens")}
            rows.append(arm | {"evaluation": text} | before | scores | after | size | problem)
    return pd.DataFrame(rows), pd.concat(layers, ignore_index=True) if layers else pd.DataFrame()


def _scores(
    result: Mapping[str, Any],
    dense: Mapping[str, Any],
    uniform: Mapping[str, Any] | None,
    windows: Sequence[int],
) -> dict[str, Any]:
    """Return the columns of an arm's score on some of the evaluation's windows."""

    def nats(one: Mapping[str, Any]) -> Losses:
        return np.array(one["window_nats"], dtype=np.float64)[[*windows]]

    tokens = result["tokens"] * len(windows) // len(result["window_nats"])
    scored = Score(nats(result), tokens)
    change = Score(scored.window_nats - nats(dense), tokens)
    against = Score(scored.window_nats - nats(uniform), tokens) if uniform else None
    return {
        "perplexity": scored.perplexity,
        "perplexity_error": scored.perplexity_error,
        "ratio": change.perplexity,  # exp of the mean difference: a ratio of perplexities
        "ratio_error": change.perplexity_error,
        "nats": scored.nats,
        "nats_error": scored.nats_error,
        "difference": change.nats,
        "difference_error": change.nats_error,
        "against_uniform": against.nats if against else math.nan,
        "against_uniform_error": against.nats_error if against else math.nan,
        "windows": len(windows),
        "tokens": tokens,
    }


def _uniform(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the index of the arm with the same options but uniform rows and blocks.

    Without such an arm it is the one with uniform rows and the same ``across``. None if there is
    neither, or if it is the arm itself.
    """
    same = [name for name in OPTIONS if name not in {*UNBUDGETED, "mask"}]
    alike = [
        place
        for place, one in enumerate(results)
        if one.get("mask") == "row" and all(one.get(name) == result.get(name) for name in same)
        if one.get("budget", "uniform") == "uniform"
    ]
    for across in ("uniform", result.get("across", "uniform")):
        for place in alike:
            if results[place].get("across", "uniform") == across:
                return None if results[place] is result else place
    return None


def _improvements(
    result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> dict[str, Losses]:
    """Return each neuron's RMSE with one expert over that with several, if both arms were run.

    The two compare only on the same inputs, so only with dense propagation.
    """
    same = [name for name in OPTIONS if name not in {"experts", *EXPERT_DEFAULTS}]
    if result["experts"] == 1 or result["propagate"] == "sparse":  # its inputs depend on the arm
        return {}
    for one in results:
        if one.get("experts") == 1 and all(one.get(name) == result.get(name) for name in same):
            break
    else:
        return {}
    found = {}
    for losses, name in (("lost", "improvement"), ("held_out_lost", "held_out_improvement")):
        if losses in one and losses in result:
            before, after = (arm[losses].astype(np.float64) for arm in (one, result))
            with np.errstate(divide="ignore", invalid="ignore"):  # neurons without error or output
                found[name] = np.sqrt(before / after)
    return found


def _medians(values: Losses, layers: Sequence[Mapping[str, Any]]) -> list[float]:
    edges = np.cumsum([layer["neurons"] for layer in layers])[:-1]
    return [_median(part) for part in np.split(values, edges)]


def _dense_weights(row: Mapping[str, Any]) -> float:
    """Return the number of weights of the dense layers; older tables have only the multiply-adds."""
    weights = float(row.get("dense_weights", math.nan))
    return float(row["dense_multiply_adds"]) if math.isnan(weights) else weights


def _median(values: Losses | None) -> float:
    """Return the median of the values that are not NaN; NaN if there is none."""
    known = values[~np.isnan(values)] if values is not None else np.zeros(0)
    return float(np.median(known)) if len(known) else math.nan


def read_table(folder: str | Path) -> pd.DataFrame:
    """Return the table of a sweep's folder; its ``attrs`` are run.json.

    Raises:
        FileNotFoundError: the folder has no such table.
        ValueError: the table is of an older version, without multiply-adds.
    """
    table = store.read_table(folder, "sweep", [*TEXT, "pull"])
    # Before 0.2.0 the shrinkage was called pull.
    table.columns = ["shrinkage" if name == "pull" else name for name in table]
    if "solve" not in table:  # it was always greedy then
        table.insert(3, "solve", ["" if one == "dense" else "greedy" for one in table["method"]])
    if "evaluation" not in table:  # it was always one text then
        place = [*table].index("realised")
        table.insert(place, "evaluation", table.attrs.get("evaluation", ""))
    if "scores" not in table:  # there was no search then
        table.insert([*table].index("sparsity"), "scores", "")
    if "inputs" not in table:  # they were always dense then
        place = [*table].index("sparsity")
        values = ["" if one == "dense" else "dense" for one in table["method"]]
        for name in OF_INPUTS[::-1]:
            table.insert(place, name, values if name == "inputs" else "")
        table["realised_inputs"] = math.nan
    if "microseconds" not in table:  # they were not measured then
        table["microseconds"] = math.nan
    if "density" not in table:
        raise ValueError(
            f"{folder} was written by an older version of entangle: run the sweep again"
        )
    return table


def markdown(table: pd.DataFrame) -> str:
    """Return a sweep's table in Markdown, below a paragraph on models, texts and units.

    It has a row per arm. The scores on several texts stand beside one another.
    """
    attributes, timed = table.attrs, table["microseconds"].notna().any()
    texts = [*dict.fromkeys(table["evaluation"])]
    lines = [
        f"{attributes['model']}, layers {' '.join(attributes['layers'])} pruned, calibrated on "
        f"{attributes['tokens']:,} tokens of {attributes['text']} "
        f"({attributes['windows']} windows of {attributes['length']}), scored on "
        f"{' and on '.join(_sizes(table))}. Windows do not overlap, and each is scored from its own "
        "start. "
        "± is the standard error over windows. Difference and ratio compare with the dense model, and "
        "`against uniform rows` with the arm with uniform rows, paired by window. Layer error is the "
        "relative squared error of the layers' outputs on the calibration inputs, mean over layers; "
        "held out is the same on held-out inputs. "
        + (DIVERGENCE if is_compared(table) else "")
        + (_SPARSE if table["realised_inputs"].notna().any() else "")
        + (_MLP_ERROR if table["mlp_error"].notna().any() else "")
        + "Multiply-adds are those of a token in the pruned "
        "layers and their routers, divided by those of the dense layers; a token that is written reads "
        "as many weights. Stored is the number of "
        "non-zero weights of all experts, divided by the number of weights of the dense layers. Disk "
        "and memory are the sizes of the pruned layers." + (_SPEED if timed else ""),
        *overlap_notes(attributes),
        *skipped_notes(attributes, "pruned"),
        "",
    ]
    arms = table[~table["method"].isin(UNPRUNED)]
    mixtures = arms[arms["experts"] > 1]
    names = [
        n for n in OPTIONS if n not in EXPERT_DEFAULTS or {*mixtures[n]} - {EXPERT_DEFAULTS[n]}
    ]
    names = [name for name in names if name not in UNBUDGETED or _differs(arms, name)]
    budgeted = any(name in names for name in UNBUDGETED)
    sparse = table["realised_inputs"].notna().any()
    if not sparse:
        names = [name for name in names if name not in OF_INPUTS]
    if not len(mixtures):
        names.remove("experts")
    improved = table["held_out_improvement"].notna().any()
    reconstructed = table["mlp_error"].notna().any()
    scores = ["perplexity", "ratio", "difference (nats)"]
    scores += ["against uniform rows"] if budgeted else []
    compared = is_compared(table)
    scores += DIVERGENCE_HEADS if compared else []
    ends = [f", {name}" for name in short_names(texts)] if texts[1:] else [""]
    heads = [
        "realised",
        *(["zero inputs"] if sparse else []),
        *(["of rows", "of layers"] if budgeted else []),
        *(f"{score}{end}" for end in ends for score in scores),
        "layer error",
        "held out",
    ]
    heads += ["MLP error before", "after"] if reconstructed else []
    heads += ["improvement"] if improved else []
    heads += ["multiply-adds", "stored", "disk", "memory", *(["a token"] if timed else [])]
    rows = [[*names, *heads]]
    for alike in _by_arm(table):
        row = alike[0]
        cells = [str(row[name]) or "-" for name in names]
        if row["method"] in UNPRUNED:
            cells = [row["method"], *["-"] * (len(names) - 1)]
        if row["problem"]:
            rows.append([*cells, *["-"] * len(heads)])
            continue
        cells += [
            f"{row['realised']:.4f}",
            *([_number(row["realised_inputs"], ".4f")] if sparse else []),
            *([_range(row, ""), _range(row, "_layer")] if budgeted else []),
            *(cell for one in alike for cell in _score_cells(one, budgeted, compared)),
            _number(row["layer_error"], ".4g"),
            _number(row["held_out_error"], ".4g"),
        ]
        tuned = [row["mlp_error_before"], row["mlp_error"]]
        cells += [_number(one, ".4g") for one in tuned] if reconstructed else []
        gain = row["held_out_improvement"]
        cells += [_number(gain, ".3f")] if improved else []
        cells += [
            f"{row['density']:.1%}",
            f"{row['stored'] / _dense_weights(row):.3g}x",
            f"{row['disk_bytes'] / 1e6:,.4g} MB",
            f"{row['memory_bytes'] / 1e6:,.4g} MB",
        ]
        cells += [_number(row["microseconds"] / 1e3, ".4g") + " ms"] if timed else []
        rows.append(cells)
    lines += [*table_lines(rows), *_remarks(table, names)]
    return "\n".join(lines) + "\n"


def _by_arm(table: pd.DataFrame) -> Iterator[list[dict[Any, Any]]]:
    """Yield the rows of each arm: one per text."""
    rows, texts = table.to_dict(orient="records"), table["evaluation"].nunique()
    for first in range(0, len(rows), texts):
        yield rows[first : first + texts]


def _sizes(table: pd.DataFrame) -> list[str]:
    """Return, for each text, its scored tokens and its windows."""
    length = table.attrs["evaluation_length"]
    return [
        f"{int(rows['tokens'].max()):,} tokens of {text} ({int(rows['windows'].max())} windows of "
        f"{length})"
        for text, rows in table.groupby("evaluation", sort=False)
    ]


def _score_cells(row: Mapping[Any, Any], budgeted: bool, compared: bool) -> list[str]:
    return [
        with_error(row["perplexity"], row["perplexity_error"]),
        f"{row['ratio']:.4g}",
        with_error(row["difference"], row["difference_error"]),
        *([_against(row)] if budgeted else []),
        *(divergence_cells(row) if compared else []),
    ]


def _differs(arms: pd.DataFrame, name: str) -> bool:
    return bool({*arms[name].astype(str)} - {UNBUDGETED[name]})


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "-"


def _against(row: Mapping[Any, Any]) -> str:
    nats = row["against_uniform"]
    return with_error(nats, row["against_uniform_error"]) if math.isfinite(nats) else "-"


def _range(row: Mapping[Any, Any], of: str) -> str:
    """Return the range of the shares of zeros as text: of rows, or of layers (``of="_layer"``)."""
    ends = row[f"least{of}"], row[f"most{of}"]
    return "-" if not math.isfinite(ends[0]) else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _remarks(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Return remarks on arms without a score and on damping above the default of 0.01."""
    lines = []
    for row, *_ in _by_arm(table):
        arm = " ".join(str(row[name]) for name in names)
        if row["problem"]:
            lines.append(f"\nNo score for {arm}: {row['problem']}")
        if row["damping"] > 0.01:
            lines.append(f"\nA Gram needed damping of {row['damping']:g} instead of 0.01: {arm}")
    return lines
