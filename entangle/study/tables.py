"""Tables of arms: what each scored, its change against the dense model, and their errors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from entangle.model.layers import say_skipped
from entangle.study.perplexity import Score


def tables_of(results: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row per arm, the first being the dense model, and a row per arm and layer."""
    nats = [np.array(result["window_nats"], dtype=np.float64) for result in results]
    rows, layers = [], []
    for result, found in zip(results, nats, strict=True):
        arm = {name: result.get(name, "") for name in ("method", "mask", "propagate", "sparsity")}
        scored, change = Score(found, result["tokens"]), Score(found - nats[0], result["tokens"])
        pruned = pd.DataFrame(result["layers"])
        error, damping = (0.0, 0.0) if result is results[0] else (math.nan, math.nan)
        if len(pruned):
            error, damping = pruned["error"].astype(float).mean(), pruned["damping"].max()
            layers.append(pd.DataFrame([arm]).merge(pruned, how="cross"))
        row = arm | {
            "realised": result.get("realised", math.nan),
            "model_sparsity": result.get("model_sparsity", math.nan),
            "perplexity": scored.perplexity,
            "perplexity_error": scored.perplexity_error,
            "ratio": change.perplexity,  # exp of the mean difference: a ratio of perplexities
            "ratio_error": change.perplexity_error,
            "nats": scored.nats,
            "nats_error": scored.nats_error,
            "difference": change.nats,
            "difference_error": change.nats_error,
            "layer_error": error,
            "damping": damping,
            "windows": len(found),
            "tokens": scored.tokens,
            "problem": result.get("problem", ""),
        }
        rows.append(row)
    return pd.DataFrame(rows), pd.concat(layers, ignore_index=True) if layers else pd.DataFrame()


def markdown(table: pd.DataFrame) -> str:
    """Return a sweep's table in Markdown, with what it was measured on above it."""
    attributes, tokens = table.attrs, int(table["tokens"].max())
    lines = [
        f"{attributes['model']}, {' '.join(attributes['layers'])} pruned by "
        f"{attributes['tokens']:,} tokens of {attributes['text']} "
        f"({attributes['windows']} windows of {attributes['length']}), scored on {tokens:,} tokens "
        f"of {attributes['evaluation']} ({attributes['evaluation_windows']} windows of "
        f"{attributes['length']} that do not overlap, each scored from its own start). "
        "± is the standard error over windows; difference and ratio are to the dense model, "
        "paired by window; layer error is the mean relative squared error of the layers' outputs "
        "on the calibration's inputs.",
        *say_skipped(attributes["skipped_parameters"], "pruned"),
        "",
    ]
    header = ("method", "mask", "propagate", "sparsity", "realised", "perplexity", "ratio")
    rows = [[*header, "difference (nats)", "layer error"]]
    for row in table.to_dict(orient="records"):
        words = [str(row[name]) or "-" for name in header[:4]]
        if row["problem"]:
            rows.append([*words, "-", "-", "-", "-", "-"])
            continue
        rows.append(
            [
                *words,
                f"{row['realised']:.4f}",
                _with_error(row["perplexity"], row["perplexity_error"]),
                f"{row['ratio']:.4g}",
                _with_error(row["difference"], row["difference_error"]),
                f"{row['layer_error']:.4g}",
            ]
        )
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    for cells in rows:
        padded = map(str.ljust, cells, widths)
        lines.append(f"| {' | '.join(padded)} |")
    problems = table[table["problem"] != ""]
    for row in problems.to_dict(orient="records"):
        arm = " ".join(row[name] for name in header[:4])
        lines.append(f"\nNo score for {arm}: {row['problem']}")
    damped = table[table["damping"] > 0.01]
    for row in damped.to_dict(orient="records"):
        arm = " ".join(row[name] for name in header[:4])
        lines.append(f"\nA Gram needed damping of {row['damping']:g} instead of 0.01: {arm}")
    return "\n".join(lines) + "\n"


def _with_error(value: float, error: float) -> str:
    """Return a value with its error, both to the error's second digit."""
    if not (math.isfinite(error) and error > 0):
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
