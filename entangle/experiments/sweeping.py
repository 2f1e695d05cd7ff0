"""Sweep over prunings of one model: prune, score, put the weights back, and make one table."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import pandas as pd
import torch
import xarray as xr
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from entangle.experiments.sweep_table import markdown, tables_of
from entangle.model import folders, ranks
from entangle.model.layers import LinearLayer, find_layers, replace_layer, weight_of, write_weight
from entangle.model.packing import load_tensors, save_tensors
from entangle.model.placing import check_in_memory
from entangle.model.sampling import sample_inputs
from entangle.model.scoring import NotFiniteError
from entangle.model.text import TokenWindows
from entangle.pruning import costs
from entangle.pruning.block import PrunedLayer, prune_layers
from entangle.pruning.budgets import block_outliers, zeros_of
from entangle.pruning.calibration import (
    HELD_OUT,
    calibrate,
    load_calibrations,
    load_rows,
    save_calibrations,
    save_rows,
)
from entangle.pruning.options import (
    METHODS,
    Clustering,
    Pruning,
    PruningOptions,
    arms_of,
    with_options,
)
from entangle.pruning.sparsifying import budget_run, check_layers, needed_run, prune_model
from entangle.runs import store
from entangle.runs.resuming import resumed_run, unwritten
from entangle.runs.setup import Setup, Stopwatch

DENSE = "dense"  # the arm of the model as it is

Row = dict[str, Any]


@with_options(method=METHODS)
def sweep(
    model: PreTrainedModel,
    windows: TokenWindows,
    evaluation: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset | None = None,
    layers: str | Sequence[str] = ("*",),
    batch_size: int = 4,
    skip_first: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **options: Unpack[PruningOptions],
) -> pd.DataFrame:
    """Score a model pruned in every combination of the options of `sparsify`, each one or several.

    Without a ``method`` all of them are run.

    Returns a row per arm, the dense model first; what it was made of is in ``attrs``. An error
    is the standard error over evaluation windows; ``difference`` is in nats a token against the
    dense model, its error paired by window, and ``ratio`` its exponential. ``against_uniform`` is the same against
    uniform rows and blocks (or, if there are none, uniform rows of the same blocks). ``layer_error`` is the
    mean over layers of the relative squared error of their outputs on the calibration's inputs,
    ``held_out_error`` on inputs from the evaluation text; ``improvement`` is the median over neurons
    of the relative improvement, the RMSE of their outputs with one expert over that with several.
    Costs are those of `costs.totals`. Wanda and magnitude are run with one expert only. Arms that
    would be the same are run once: n:m is a mask by row, magnitude sees no inputs, and one expert
    has no router. Budgets of rows and ``across`` blocks (see `zeros_of`) are made from a measured
    ``run`` of the model; beside others n:m and masks by block are run uniform, as published. Arms with ``propagate="dense"`` share one pass over the calibration. Afterwards
    the model is as it was.

    With ``out`` tables are written to that folder. A sweep that was killed goes on where it was
    when it is called again with the same arguments, and its table is the same.

    Raises:
        FileExistsError: ``out`` exists, or an unfinished sweep of other settings is there, and
            ``overwrite`` is false.
        LookupError: a pattern matches no layer, or the run lacks one.
        RuntimeError: a model that cannot be run block by block, or whose dense score is not
            finite.
        ValueError: as `sparsify` says, a run of other weights, or a window of the evaluation is one of the calibration.
    """
    every: PruningOptions = {"method": METHODS, **options}
    prunings = arms_of(**every)
    check_in_memory(model, "a sweep")
    setup = Setup.of(
        model,
        windows,
        evaluation,
        run=needed_run(prunings, run),
        layers=layers,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
    )
    check_layers(setup, [pruning.sparsity for pruning in prunings])
    attributes = setup.provenance() | budget_run(setup)
    attributes |= {"arms": [pruning.words() for pruning in prunings]}
    alike = dict.fromkeys(setup.blocks, 0.0)  # the walk has OWL's ratios
    for arm in prunings:  # what cannot be made is told before hours are spent
        zeros_of(setup.layers, arm, run=setup.run, outliers=alike, seed=setup.seed)
    outliers = functools.cache(lambda: block_outliers(setup.walk(), setup.layers))
    clusterings = list(dict.fromkeys(p.clustering for p in prunings if p.propagate == "dense"))
    stopwatch = Stopwatch()
    with resumed_run(out, attributes, overwrite=overwrite) as folder:
        files = [folder / "arms" / f"{name}.json" for name in (DENSE, *map(_name, prunings))]
        arms: dict[Path, Pruning | None] = dict(zip(files, (None, *prunings), strict=True))
        left = unwritten(arms)
        grams = folder / "grams"
        for file, pruning in tqdm(left.items(), unit="arm", disable=not progress):
            if pruning and pruning.propagate == "dense":
                _calibrate_dense(setup, clusterings, grams)  # once: the next arm finds it done
            found, losses = _run_arm(setup, pruning, grams, outliers)
            if losses:
                ranks.once(save_tensors, _losses_file(file), losses)
            ranks.once(store.write_json, file, found)
        results = [store.read_json(file) for file in files]
        table, per_layer = tables_of([r | _losses(f) for r, f in zip(results, files, strict=True)])
        table.attrs.update(attributes)
        if ranks.rank() == 0:
            store.save_table(table, folder / "tables" / "sweep.csv")
            store.save_table(per_layer, folder / "tables" / "layers.csv")
            store.save_text(markdown(table), folder / "tables" / "sweep.md")
            store.write_json(folder / "log.json", stopwatch.log() | {"arms_run": len(left)})
            folders.remove_folder(grams)
    return table


def _name(pruning: Pruning) -> str:
    return "-".join(map(str, pruning.words().values())).replace(":", "of").replace("*", "x")


def _calibrate_dense(setup: Setup, clusterings: Sequence[Clustering], folder: Path) -> None:
    """Save the calibrations of the dense model, block by block, where that is not done."""
    layers = setup.blocks
    files = {block: _files(folder, block, clusterings) for block in layers}
    missing = {b: [c for c, file in some.items() if not file.exists()] for b, some in files.items()}
    missing = ranks.from_rank(0, missing)
    left = {block for block in files if missing[block]}
    if not left:
        return
    walk, held_out = setup.walk(), setup.evaluation_walk()
    blocks = range(setup.last_block + 1)
    for block in tqdm(blocks, unit="block", desc="calibrate", disable=not setup.progress):
        if block not in left:  # done before we were killed, or nothing to do
            walk.advance()
            held_out.advance()
            continue
        here, wanted = layers[block], [c for c in clusterings if c in missing[block]]
        rows = sample_inputs(held_out, here, HELD_OUT, setup.seed, advance=True)
        ranks.once(save_rows, files[block][None], rows)
        found = calibrate(walk, here, wanted, seed=setup.seed, advance=True)
        for clustering, calibrations in found.items():
            ranks.once(save_calibrations, files[block][clustering], calibrations)


def _files(
    folder: Path, block: int, clusterings: Sequence[Clustering]
) -> dict[Clustering | None, Path]:
    """Return the files of a block's calibrations, and for None that of its held-out inputs."""
    files: dict[Clustering | None, Path] = {None: folder / f"{block}.safetensors"}
    for clustering in clusterings:
        name = "-".join(map(str, (block, *dataclasses.astuple(clustering))))
        files[clustering] = folder / f"{name}.safetensors"
    return files


def _losses_file(file: Path) -> Path:
    return file.with_suffix(".safetensors")


def _losses(file: Path) -> dict[str, Any]:
    """Return the losses of an arm's neurons (neurons,), if it has some."""
    file = _losses_file(file)
    return {k: v.numpy() for k, v in load_tensors(file).items()} if file.exists() else {}


def _run_arm(
    setup: Setup, pruning: Pruning | None, grams: Path, outliers: Callable[[], dict[int, float]]
) -> tuple[Row, dict[str, torch.Tensor]]:
    """Prune, score, and put the dense weights back; return what the arm found, also by neuron.

    An arm that cannot be pruned, or whose score is not finite, says why and costs the others
    nothing; the dense model's is an error.

    Raises:
        NotFiniteError: the dense model's score is not finite.
    """
    words: Row = pruning.words() if pruning else {"method": DENSE}
    nothing = {"window_nats": [None] * len(setup.evaluation or ()), "tokens": 0, "layers": []}
    dense = costs.model_multiply_adds(setup.model)
    with _restored(setup.model, setup.layers):
        try:
            pruned = _prune(setup, pruning, grams, outliers) if pruning else []
        except ValueError as error:
            return words | nothing | {"problem": str(error)}, {}
        try:
            scored = setup.score()
        except NotFiniteError as error:
            if pruning is None:
                raise
            return words | nothing | {"problem": str(error)}, {}
        layers = find_layers(setup.model, [layer.name for layer in setup.layers])
        rows = [layer.row for layer in pruned]
        found = words | {
            "window_nats": scored.window_nats.tolist(),
            "tokens": scored.tokens,
            "realised": _share_of_zeros(weight_of(layer) for layer in layers),
            "model_sparsity": _share_of_zeros(setup.model.parameters()),
            "costs": costs.totals(rows or list(map(costs.dense_costs_of, layers)), dense),
            "layers": rows,
        }
    if not pruned:
        return found, {}
    lost = torch.cat([layer.lost for layer in pruned]).float().cpu()
    held_out = torch.cat([layer.held_out for layer in pruned]).float().cpu()
    return found, {"lost": lost, "held_out_lost": held_out}


def _share_of_zeros(weights: Iterable[torch.Tensor]) -> float:
    counts = [(int((weight == 0).sum()), weight.numel()) for weight in weights]
    return sum(zeros for zeros, _ in counts) / sum(size for _, size in counts)


def _prune(
    setup: Setup, pruning: Pruning, grams: Path, outliers: Callable[[], dict[int, float]]
) -> list[PrunedLayer]:
    """Prune the model in place: dense propagation from what is saved, sparse from the text."""
    ratios = outliers() if pruning.across == "owl" else None
    zeros = zeros_of(setup.layers, pruning, run=setup.run, outliers=ratios, seed=setup.seed)
    if pruning.propagate == "sparse":
        return prune_model(setup, pruning, zeros=zeros)
    pruned: list[PrunedLayer] = []
    for block, here in setup.blocks.items():
        files, device = _files(grams, block, [pruning.clustering]), weight_of(here[0]).device
        found = load_calibrations(files[pruning.clustering], device)
        rows = load_rows(files[None], device)
        pruned += prune_layers(setup.model, here, found, pruning, held_out=rows, zeros=zeros)
    return pruned


@contextmanager
def _restored(model: PreTrainedModel, layers: Sequence[LinearLayer]) -> Iterator[None]:
    """Give the model its layers, and them their weights, back at the end."""
    dense = [weight_of(layer).clone() for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, dense, strict=True):
            write_weight(layer, weight)
            replace_layer(model, layer, layer.module)
