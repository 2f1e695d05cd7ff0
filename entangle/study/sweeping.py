"""Sweep over prunings of one model: prune, score, put the weights back, and make one table."""

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer, say_skipped, weight_of, write_weight
from entangle.model.text import TokenWindows, check_disjoint, check_windows
from entangle.study import runs
from entangle.study.calibration import (
    calibrate,
    load_calibrations,
    save_calibrations,
    walk_blocks,
)
from entangle.study.expansion import Pruning, prunable_layers, prune_layer, prune_model
from entangle.study.perplexity import Score, score
from entangle.study.recording import provenance

DENSE = "dense"  # the arm of the model as it is

Row = dict[str, Any]


def sweep(
    model: PreTrainedModel,
    windows: TokenWindows,
    evaluation: TokenWindows,
    sparsities: Sequence[str | float],
    *,
    methods: Sequence[str] = ("sparsegpt", "wanda", "magnitude"),
    masks: Sequence[str] = ("row",),
    propagate: Sequence[str] = ("sparse",),
    layers: str | Sequence[str] = ("*",),
    batch_size: int = 4,
    skip_first: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    command: str | None = None,
) -> pd.DataFrame:
    """Score a model pruned in every combination of sparsities, methods, masks and propagations.

    Returns a row per arm, the dense model first; what it was made of is in ``attrs``. An error is the standard error over evaluation
    windows; ``difference`` is in nats a token against the dense model, its error paired by
    window, and ``ratio`` its exponential. ``layer_error`` is the mean over layers of the relative
    squared error of their outputs on the calibration's inputs. Arms that would be the same are
    run once: n:m is a mask by row, and magnitude sees no inputs. Arms with ``propagate="dense"``
    share one pass over the calibration. Afterwards the model is as it was.

    With ``out`` tables are written to that folder. A sweep that was killed goes on where it was
    when it is called again with the same arguments, and its table is the same.

    Raises:
        FileExistsError: ``out`` exists, or an unfinished sweep of other settings is there, and
            ``overwrite`` is false.
        LookupError: a pattern matches no layer.
        RuntimeError: a model that cannot be run block by block, or whose dense score is not
            finite.
        ValueError: as `sparsify` says, or a window of the evaluation is one of the calibration.
    """
    prunings = arms_of(sparsities, methods, masks, propagate)
    chosen = prunable_layers(model, windows, layers, prunings, skip_first)
    check_windows(model, evaluation, skip_first)
    check_disjoint(windows, evaluation)
    attributes = provenance(
        model,
        windows,
        layers=layers,
        batch_size=batch_size,
        skip_first=skip_first,
        command=command,
    )
    attributes |= {
        "tokens": len(windows) * (windows.length - skip_first),
        "evaluation": evaluation.text,
        "evaluation_fingerprint": evaluation.fingerprint,
        "evaluation_windows": len(evaluation),
        "arms": [pruning.words() for pruning in prunings],
    }
    bench = _Bench(model, windows, evaluation, chosen, batch_size, skip_first, progress)
    stopwatch = runs.Stopwatch()
    with _folder(out, attributes, overwrite) as folder:
        files = [folder / "arms" / f"{name}.json" for name in (DENSE, *map(_name, prunings))]
        arms: dict[Path, Pruning | None] = dict(zip(files, (None, *prunings), strict=True))
        left = {file: pruning for file, pruning in arms.items() if not file.exists()}
        grams = folder / "grams"
        if any(pruning and pruning.propagate == "dense" for pruning in left.values()):
            _calibrate_dense(bench, grams)
        for file, pruning in tqdm(left.items(), unit="arm", disable=not progress):
            runs.write_json(file, _run_arm(bench, pruning, grams))
        table, per_layer = _tables([runs.read_json(file) for file in files])
        table.attrs.update(attributes)
        runs.save_table(table, folder / "tables" / "sweep.csv")
        runs.save_table(per_layer, folder / "tables" / "layers.csv")
        runs.save_text(markdown(table), folder / "tables" / "sweep.md")
        runs.write_json(folder / "log.json", stopwatch.log() | {"arms_run": len(left)})
        runs.remove_folder(grams)
    return table


def arms_of(
    sparsities: Sequence[str | float],
    methods: Sequence[str],
    masks: Sequence[str],
    propagate: Sequence[str],
) -> list[Pruning]:
    """Return the prunings of all combinations, each once.

    Raises:
        ValueError: a word that is none of the choices, no sparsity, or nothing to combine.
    """
    arms: dict[tuple[Any, ...], Pruning] = {}
    for carried in propagate:
        for method in methods:
            for mask in masks:
                for sparsity in sparsities:
                    arm = Pruning.of(sparsity, method, mask, carried)
                    key = (
                        method,
                        "" if arm.sparsity.group else mask,
                        "" if method == "magnitude" else carried,
                        arm.sparsity,
                    )
                    if arm.sparsity.group:  # groups lie in a row
                        arm = Pruning.of(sparsity, method, "row", carried)
                    arms.setdefault(key, arm)
    if not arms:
        raise ValueError("a sweep needs at least one sparsity, method, mask and propagation")
    return list(arms.values())


@contextmanager
def _folder(
    out: str | Path | None, attributes: Mapping[str, Any], overwrite: bool
) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        with runs.resumed_run(out, attributes, overwrite=overwrite) as kept:
            yield kept


@dataclasses.dataclass(frozen=True, eq=False)
class _Bench:
    """What every arm of a sweep is run on."""

    model: PreTrainedModel
    windows: TokenWindows
    evaluation: TokenWindows
    layers: Sequence[LinearLayer]
    batch_size: int
    skip_first: int
    progress: bool

    @property
    def blocks(self) -> range:
        """The blocks up to the last one that has a layer to prune."""
        return range(max(layer.block for layer in self.layers) + 1)

    def walk(self) -> BlockWalk:
        """Return the calibration's windows before the first block."""
        return walk_blocks(self.model, self.windows, self.batch_size, self.skip_first)


def _name(pruning: Pruning) -> str:
    return "-".join(pruning.words().values()).replace(":", "of")


def _calibrate_dense(bench: _Bench, folder: Path) -> None:
    """Save the calibration of the dense model, block by block, where that is not done."""
    files = {block: _gram_file(folder, block) for block in bench.blocks}
    if all(file.exists() for file in files.values()):
        return
    walk = bench.walk()
    bar = tqdm(files.items(), unit="block", desc="calibrate", disable=not bench.progress)
    for block, file in bar:
        here = [layer for layer in bench.layers if layer.block == block]
        if file.exists():  # from before we were killed
            walk.advance()
        else:
            save_calibrations(file, calibrate(walk, here, advance=True))


def _gram_file(folder: Path, block: int) -> Path:
    return folder / f"{block}.safetensors"


def _run_arm(bench: _Bench, pruning: Pruning | None, grams: Path) -> Row:
    """Prune, score, and put the dense weights back; return what the arm found.

    An arm that cannot be pruned, or whose score is not finite, says why and costs the others
    nothing; the dense model's is an error.

    Raises:
        RuntimeError: the dense model's score is not finite.
    """
    words: Row = pruning.words() if pruning else {"method": DENSE}
    nothing = {"window_nats": [None] * len(bench.evaluation), "tokens": 0, "layers": []}
    with _restored(bench.layers):
        try:
            layers = _prune(bench, pruning, grams) if pruning else []
        except ValueError as error:
            return words | nothing | {"problem": str(error)}
        try:
            scored = score(
                bench.model,
                bench.evaluation,
                batch_size=bench.batch_size,
                skip_first=bench.skip_first,
                progress=bench.progress,
            )
        except RuntimeError as error:
            if pruning is None or isinstance(error, torch.OutOfMemoryError):
                raise
            return words | nothing | {"problem": str(error)}
        return words | {
            "window_nats": scored.window_nats.tolist(),
            "tokens": scored.tokens,
            "realised": _share_of_zeros(weight_of(layer) for layer in bench.layers),
            "model_sparsity": _share_of_zeros(bench.model.parameters()),
            "layers": layers,
        }


def _share_of_zeros(weights: Iterable[torch.Tensor]) -> float:
    counts = [(int((weight == 0).sum()), weight.numel()) for weight in weights]
    return sum(zeros for zeros, _ in counts) / sum(size for _, size in counts)


def _prune(bench: _Bench, pruning: Pruning, grams: Path) -> list[Row]:
    """Prune the model in place: dense propagation from what is saved, sparse from the text."""
    if pruning.propagate == "sparse":
        return prune_model(bench.walk(), bench.layers, pruning, progress=bench.progress)
    rows = []
    for block in bench.blocks:
        found = load_calibrations(_gram_file(grams, block), bench.model.device)
        here = [layer for layer in bench.layers if layer.block == block]
        rows += [prune_layer(layer, found[layer.name], pruning) for layer in here]
    return rows


@contextmanager
def _restored(layers: Sequence[LinearLayer]) -> Iterator[None]:
    """Give the layers their weights back at the end."""
    dense = [weight_of(layer).clone() for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, dense, strict=True):
            write_weight(layer, weight)


def _tables(results: Sequence[Row]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row per arm, the first being the dense model, and a row per arm and layer."""
    nats = [np.array(result["window_nats"], dtype=np.float64) for result in results]
    rows, layers = [], []
    for result, found in zip(results, nats, strict=True):
        arm = {name: result.get(name, "") for name in ("method", "mask", "propagate", "sparsity")}
        scored, change = Score(found, result["tokens"]), Score(found - nats[0], result["tokens"])
        pruned = pd.DataFrame(result["layers"])
        error, damping = (0.0, 0.0) if result is results[0] else (math.nan, math.nan)
        if len(pruned):
            error, damping = pruned["error"].mean(), pruned["damping"].max()
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
