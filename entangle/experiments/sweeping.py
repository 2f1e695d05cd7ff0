"""Sweep over prunings of one model: prune, score, put the weights back, and make one table."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xarray as xr
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from entangle.experiments.sweep_table import markdown, tables_of
from entangle.model import folders, ranks
from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer, find_layers, replace_layer, weight_of, write_weight
from entangle.model.packing import load_tensors, save_tensors
from entangle.model.placing import check_in_memory
from entangle.model.sampling import sample_inputs, walk_blocks
from entangle.model.scoring import NotFiniteError, perplexity
from entangle.model.text import TokenWindows, check_disjoint, check_windows
from entangle.pruning import costs
from entangle.pruning.block import PrunedLayer, prune_layers
from entangle.pruning.budgets import block_outliers
from entangle.pruning.calibration import (
    HELD_OUT,
    calibrate,
    load_calibrations,
    load_rows,
    save_calibrations,
    save_rows,
)
from entangle.pruning.options import PULL, STRENGTH, UNIFORM, Clustering, Pruning, arms_of
from entangle.pruning.sparsifying import budget_of, budget_run, prunable_layers, prune_model
from entangle.runs import resuming, setup, store
from entangle.runs.setup import provenance

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
    experts: Sequence[int] = (1,),
    assign: Sequence[str] = ("kmeans",),
    components: Sequence[int | None] = (None,),
    pull: Sequence[float] = (PULL,),
    budgets: Sequence[str] = (UNIFORM,),
    strengths: Sequence[float] = (STRENGTH,),
    across: Sequence[str] = (UNIFORM,),
    run: xr.DataTree | xr.Dataset | None = None,
    layers: str | Sequence[str] = ("*",),
    batch_size: int = 4,
    skip_first: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    command: str | None = None,
) -> pd.DataFrame:
    """Score a model pruned in every combination of sparsities, methods, masks and so on.

    Returns a row per arm, the dense model first; what it was made of is in ``attrs``. An error
    is the standard error over evaluation windows; ``difference`` is in nats a token against the
    dense model, its error paired by window, and ``ratio`` its exponential. ``against_uniform`` is the same against
    uniform rows and blocks (or, if there are none, uniform rows of the same blocks). ``layer_error`` is the
    mean over layers of the relative squared error of their outputs on the calibration's inputs,
    ``held_out_error`` on inputs from the evaluation text; ``improvement`` is the median over neurons
    of the relative improvement, the RMSE of their outputs with one expert over that with several.
    Costs are those of `costs.totals`. Wanda and magnitude are run with one expert only. Arms that
    would be the same are run once: n:m is a mask by row, magnitude sees no inputs, and one expert
    has no router. ``budgets`` of rows and ``across`` blocks (see `zeros_of`) are made from a measured
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
    prunings = arms_of(
        sparsities,
        method=methods,
        mask=masks,
        propagate=propagate,
        experts=experts,
        assign=assign,
        components=components,
        pull=pull,
        budget=budgets,
        strength=strengths,
        across=across,
    )
    check_in_memory(model, "a sweep")
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
        evaluation=evaluation,
    )
    attributes |= {"arms": [pruning.words() for pruning in prunings]}
    attributes |= budget_run(model, prunings, run)
    alike = dict.fromkeys((layer.block for layer in chosen), 0.0)  # the walk has OWL's ratios
    for arm in prunings:  # what cannot be made is told before hours are spent
        budget_of(chosen, arm, run, alike, windows.seed)
    bench = _Bench(model, windows, evaluation, chosen, run, batch_size, skip_first, progress)
    clusterings = list(dict.fromkeys(p.clustering for p in prunings if p.propagate == "dense"))
    stopwatch = setup.Stopwatch()
    with resuming.resumed_run(out, attributes, overwrite=overwrite) as folder:
        files = [folder / "arms" / f"{name}.json" for name in (DENSE, *map(_name, prunings))]
        arms: dict[Path, Pruning | None] = dict(zip(files, (None, *prunings), strict=True))
        left = resuming.unwritten(arms)
        grams = folder / "grams"
        for file, pruning in tqdm(left.items(), unit="arm", disable=not progress):
            if pruning and pruning.propagate == "dense":
                _calibrate_dense(bench, clusterings, grams)  # once: the next arm finds it done
            found, losses = _run_arm(bench, pruning, grams)
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Bench:
    """What every arm of a sweep is run on."""

    model: PreTrainedModel
    windows: TokenWindows
    evaluation: TokenWindows
    layers: Sequence[LinearLayer]
    run: xr.DataTree | xr.Dataset | None  # that budgets are made from
    batch_size: int
    skip_first: int
    progress: bool

    @functools.cached_property
    def outliers(self) -> dict[int, float]:
        """Each block's outlier ratio, of the dense model."""
        return block_outliers(self.walk(), self.layers)

    @property
    def blocks(self) -> range:
        """The blocks up to the last one that has a layer to prune."""
        return range(max(layer.block for layer in self.layers) + 1)

    def walk(self) -> BlockWalk:
        """Return the calibration's windows before the first block."""
        return walk_blocks(self.model, self.windows, self.batch_size, self.skip_first)

    def held_out_walk(self) -> BlockWalk:
        """Return the evaluation's windows before the first block."""
        return walk_blocks(self.model, self.evaluation, self.batch_size, self.skip_first)


def _name(pruning: Pruning) -> str:
    return "-".join(map(str, pruning.words().values())).replace(":", "of").replace("*", "x")


def _calibrate_dense(bench: _Bench, clusterings: Sequence[Clustering], folder: Path) -> None:
    """Save the calibrations of the dense model, block by block, where that is not done."""
    layers = {block: [x for x in bench.layers if x.block == block] for block in bench.blocks}
    files = {block: _files(folder, block, clusterings) for block in layers if layers[block]}
    missing = {b: [c for c, file in some.items() if not file.exists()] for b, some in files.items()}
    missing = ranks.from_rank(0, missing)
    left = {block for block in files if missing[block]}
    if not left:
        return
    walk, held_out = bench.walk(), bench.held_out_walk()
    bar = tqdm(layers.items(), unit="block", desc="calibrate", disable=not bench.progress)
    for block, here in bar:
        if block not in left:  # done before we were killed, or nothing to do
            walk.advance()
            held_out.advance()
            continue
        seed, wanted = bench.windows.seed, [c for c in clusterings if c in missing[block]]
        rows = sample_inputs(held_out, here, HELD_OUT, seed, advance=True)
        ranks.once(save_rows, files[block][None], rows)
        found = calibrate(walk, here, wanted, seed=seed, advance=True)
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
    bench: _Bench, pruning: Pruning | None, grams: Path
) -> tuple[Row, dict[str, torch.Tensor]]:
    """Prune, score, and put the dense weights back; return what the arm found, also by neuron.

    An arm that cannot be pruned, or whose score is not finite, says why and costs the others
    nothing; the dense model's is an error.

    Raises:
        NotFiniteError: the dense model's score is not finite.
    """
    words: Row = pruning.words() if pruning else {"method": DENSE}
    nothing = {"window_nats": [None] * len(bench.evaluation), "tokens": 0, "layers": []}
    dense = costs.model_multiply_adds(bench.model)
    with _restored(bench.model, bench.layers):
        try:
            pruned = _prune(bench, pruning, grams) if pruning else []
        except ValueError as error:
            return words | nothing | {"problem": str(error)}, {}
        try:
            scored = perplexity(
                bench.model,
                bench.evaluation,
                batch_size=bench.batch_size,
                skip_first=bench.skip_first,
                progress=bench.progress,
            )
        except NotFiniteError as error:
            if pruning is None:
                raise
            return words | nothing | {"problem": str(error)}, {}
        layers = find_layers(bench.model, [layer.name for layer in bench.layers])
        rows = [layer.row for layer in pruned]
        found = words | {
            "window_nats": scored.window_nats.tolist(),
            "tokens": scored.tokens,
            "realised": _share_of_zeros(weight_of(layer) for layer in layers),
            "model_sparsity": _share_of_zeros(bench.model.parameters()),
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


def _prune(bench: _Bench, pruning: Pruning, grams: Path) -> list[PrunedLayer]:
    """Prune the model in place: dense propagation from what is saved, sparse from the text."""
    seed = bench.windows.seed
    outliers = bench.outliers if pruning.across == "owl" else None
    zeros = budget_of(bench.layers, pruning, bench.run, outliers, seed)
    if pruning.propagate == "sparse":
        return prune_model(
            bench.walk(),
            bench.layers,
            pruning,
            seed=seed,
            held_out=bench.held_out_walk(),
            zeros=zeros,
            progress=bench.progress,
        )
    pruned: list[PrunedLayer] = []
    for block in bench.blocks:
        here = [layer for layer in bench.layers if layer.block == block]
        if not here:
            continue
        files, device = _files(grams, block, [pruning.clustering]), weight_of(here[0]).device
        found = load_calibrations(files[pruning.clustering], device)
        rows = load_rows(files[None], device)
        pruned += prune_layers(bench.model, here, found, pruning, held_out=rows, zeros=zeros)
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
