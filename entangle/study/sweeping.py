"""Sweep over prunings of one model: prune, score, put the weights back, and make one table."""

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer, weight_of, write_weight
from entangle.model.text import TokenWindows, check_disjoint, check_windows
from entangle.study import runs
from entangle.study.calibration import (
    calibrate,
    load_calibrations,
    save_calibrations,
    walk_blocks,
)
from entangle.study.expansion import Pruning, prunable_layers, prune_layer, prune_model
from entangle.study.perplexity import NotFiniteError, score
from entangle.study.recording import provenance
from entangle.study.tables import markdown, tables_of

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

    Returns a row per arm, the dense model first; what it was made of is in ``attrs``. An error
    is the standard error over evaluation windows; ``difference`` is in nats a token against the
    dense model, its error paired by window, and ``ratio`` its exponential. ``layer_error`` is the
    mean over layers of the relative squared error of their outputs on the calibration's inputs.
    Arms that would be the same are run once: n:m is a mask by row, and magnitude sees no inputs.
    Arms with ``propagate="dense"`` share one pass over the calibration. Afterwards the model is
    as it was.

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
        for file, pruning in tqdm(left.items(), unit="arm", disable=not progress):
            if pruning and pruning.propagate == "dense":
                _calibrate_dense(bench, grams)  # once: the next arm finds it done
            runs.write_json(file, _run_arm(bench, pruning, grams))
        table, per_layer = tables_of([runs.read_json(file) for file in files])
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
        NotFiniteError: the dense model's score is not finite.
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
        except NotFiniteError as error:
            if pruning is None:
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
        here = [layer for layer in bench.layers if layer.block == block]
        if not here:
            continue
        found = load_calibrations(_gram_file(grams, block), weight_of(here[0]).device)
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
