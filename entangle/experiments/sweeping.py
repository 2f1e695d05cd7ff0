"""Prune one model in many ways: prune, score, restore the weights, and return one table."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import pandas as pd
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.experiments.sweep_table import DENSE, ROUNDED, markdown, tables_of
from entangle.model import folders, ranks
from entangle.model.generating import token_microseconds
from entangle.model.kept_logits import KeptLogits
from entangle.model.layers import LinearLayer, find_layers, replace_layer, weight_of, write_weight
from entangle.model.packing import load_tensors, pack_layers, save_tensors
from entangle.model.placing import check_in_memory
from entangle.model.progress import progress_bar
from entangle.model.sampling import sample_inputs
from entangle.model.scoring import NotFiniteError
from entangle.model.sparse_inputs import counting_nonzero, densify_inputs
from entangle.model.text import TokenWindows
from entangle.numerics.rounding import round_to_nearest
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.pruning import costs
from entangle.pruning.block import PrunedLayer, prune_layers
from entangle.pruning.budgets import BY_INPUTS, Zeros, block_importance, zeros_of
from entangle.pruning.calibration import (
    HELD_OUT,
    HELD_OUT_WINDOWS,
    calibrate,
    load_calibrations,
    load_inputs,
    save_calibrations,
    save_inputs,
)
from entangle.pruning.inputs import zero_inputs
from entangle.pruning.options import (
    METHODS,
    SEARCH,
    UNIFORM,
    Clustering,
    Pruning,
    PruningOptions,
    arms_of,
    with_options,
)
from entangle.pruning.searching import search_name, search_starts, searched
from entangle.pruning.sparsifying import (
    budget_run,
    check_prunings,
    needed_run,
    prune_model,
    searched_blocks,
    sparsified_inputs,
)
from entangle.runs import store
from entangle.runs.resuming import resumed_run, unwritten
from entangle.runs.setup import Setup, Stopwatch

Row = dict[str, Any]


@with_options(method=METHODS)
@with_torch_defaults
def sweep(
    model: PreTrainedModel,
    windows: TokenWindows,
    evaluation: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset | None = None,
    blocks: Mapping[int, int] | None = None,
    rounded: Sequence[int] = (),
    speed: bool = False,
    layers: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    batch_size: int = 4,
    skip_first: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    **options: Unpack[PruningOptions],
) -> pd.DataFrame:
    """Score a model pruned in every combination of the options of `sparsify`, one or several each.

    Without a ``method`` all methods are run. Wanda and magnitude are run with one expert only.
    Arms that would be the same are run once: n:m is always a mask by row, greedy magnitude uses no
    inputs, and one expert has no router. Budgets (see `zeros_of`) are made from a measured ``run``
    of the model. If masks by row are run too, masks by block have no budget; if shares of zeros are
    run too, n:m has none. Both are as published. Arms with ``propagate="dense"`` share one pass over the
    calibration windows. The model is restored at the end.

    ``rounded`` has numbers of bits, 8 or 4: the dense model is also scored with the weights of the
    layers rounded to the nearest of so many bits, by groups of 64 (see `round_to_nearest`).

    With ``speed`` each arm also writes a text, and its time is measured. On processors that run packed
    weights the arm's layers are packed before, as `load_model(packed=True)` has them.

    With ``out`` the tables are written to that folder. A killed sweep resumes when it is called
    again with the same arguments, and returns the same table. log.json has the seconds of each arm.

    The evaluation may be of several texts (see `mixed_windows`). Each is scored by itself, and
    held-out errors are over all of them.

    Returns a table with a row per arm and evaluation text, the dense model first; ``attrs`` holds
    run.json. Errors are standard errors over the text's windows; those of ratios and differences are
    paired by window. A number that an arm does not have is NaN. Columns:

    * ``method``: ``sparsegpt``, ``wanda`` or ``magnitude``; ``none`` of sparsity 0; ``dense`` is the
      dense model with dense inputs, and ``rtn8`` or ``rtn4`` the same with ``rounded`` weights.
    * ``mask``, ``solve``, ``propagate``, ``reconstruct``, ``experts``, ``assign``, ``components``,
      ``shrinkage``, ``budget``, ``strength``, ``across``, ``scores``, ``inputs``,
      ``input_sparsity``, ``input_shares``, ``sparsity``: the options of `sparsify`, as text but for
      ``experts``; empty where an option does not apply.
    * ``evaluation``: the text that the arm is scored on.
    * ``realised``: share of zeros in the weights of the chosen layers, over all experts.
    * ``model_sparsity``: share of zeros in all weights of the model.
    * ``realised_inputs``: share of zero inputs of the chosen layers on the evaluation's tokens of all
      texts, the first of each window included, which are dense; layers weighted by their weights;
      NaN with dense inputs.
    * ``least``, ``most``: smallest and largest share of zeros in a row.
    * ``least_layer``, ``most_layer``: smallest and largest share of zeros in a layer.
    * ``perplexity``, ``perplexity_error``: perplexity on the text's windows.
    * ``ratio``, ``ratio_error``: perplexity over that of the dense model.
    * ``nats``, ``nats_error``: mean negative log-likelihood, nats per token.
    * ``difference``, ``difference_error``: ``nats`` minus those of the dense model, nats per token.
    * ``against_uniform``, ``against_uniform_error``: ``nats`` minus those of the arm with uniform
      rows and blocks (without one, uniform rows and the same ``across``), nats per token.
    * ``kl``, ``kl_error``: KL divergence of the arm's next-token probabilities from the dense
      model's, KL(dense ‖ arm), mean over tokens, nats.
    * ``kl_tail``, ``kl_tail_error``: its 99.9% quantile over tokens; the error is from a bootstrap
      of windows.
    * ``agreement``, ``agreement_error``: share of tokens at which the most likely next token is the
      dense model's.
    * ``lost``, ``lost_error``: share of tokens at which the dense model's most likely token is the
      text's, and the arm's is not.
    * ``gained``, ``gained_error``: the reverse. ``kl`` to ``gained_error`` are NaN for all arms if
      the dense model's logits cannot be made again (see `model.kept_logits`).
    * ``layer_error``: ‖(W - Ŵ)X‖² / ‖WX‖² on the calibration inputs, mean over layers.
    * ``held_out_error``: the same on at most 8,192 tokens of at most 32 evaluation windows.
    * ``mlp_error_before``, ``mlp_error``: ‖ŷ - y‖² / ‖y‖² of a token's hidden states behind a block
      (y dense, ŷ pruned), before and after the block is reconstructed, mean over held-out tokens of
      the calibration windows and over blocks; NaN without ``reconstruct``.
    * ``improvement``: RMSE of a neuron's outputs with one expert over that with several, on the
      calibration inputs, median over neurons; needs both arms, with dense propagation.
    * ``held_out_improvement``: the same on inputs from the evaluation windows.
    * ``damping``: largest damping that a Gram needed, in units of its mean diagonal.
    * ``density``: multiply-adds of the pruned layers and their routers over their dense ones.
    * ``multiply_adds``: multiply-adds per token with non-zero weights of the pruned layers, and with
      sparse inputs those of inputs that are not zero; mean over the calibration tokens.
    * ``router_multiply_adds``: multiply-adds per token of their routers.
    * ``dense_multiply_adds``: multiply-adds per token of the same layers when dense.
    * ``model_multiply_adds``: multiply-adds per token of the model's linear layers, routers and
      output embedding.
    * ``model_dense_multiply_adds``: the same for the dense model.
    * ``stored``: non-zero weights of the pruned layers, over all experts.
    * ``dense_weights``: weights of the same layers when dense.
    * ``disk_bytes``, ``memory_bytes``: size of the pruned layers and routers, bytes.
    * ``microseconds``: the time of a token of a text that the model writes, median (see
      `token_microseconds`), on the machine as it is; NaN without ``speed``, or if it could not be
      measured.
    * ``windows``: windows of the text.
    * ``tokens``: its scored tokens.
    * ``problem``: why the arm has no score; empty if it has one.

    Raises:
        FileExistsError: ``out`` exists or holds an unfinished sweep with other settings, and
            ``overwrite`` is false.
        LookupError: a pattern matches no layer, or the run lacks a layer.
        RuntimeError: the model cannot be run block by block.
        ValueError: as `sparsify`; the run was measured on other weights; or the calibration
            windows or the run's text have 4% or more of the evaluation's tokens.
    """
    all_options: PruningOptions = {"method": METHODS, **options}
    prunings = arms_of(**all_options)
    check_in_memory(model, "a sweep")
    setup = Setup.of(
        model,
        windows,
        evaluation,
        run=needed_run(prunings, run),
        layers=layers,
        exclude=exclude,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
        pruned=True,
    )
    return sweep_arms(
        setup, prunings, blocks=blocks, rounded=rounded, speed=speed, out=out, overwrite=overwrite
    )


def sweep_arms(
    setup: Setup,
    prunings: Sequence[Pruning],
    *,
    blocks: Mapping[int, int] | None = None,
    rounded: Sequence[int] = (),
    speed: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Score the model of a setup pruned in several ways; return the table of `sweep`.

    Raises:
        FileExistsError, LookupError, RuntimeError: as `sweep`.
        ValueError: as `sweep`; weights are to be rounded to another number of bits than 8 or 4; or
            the speed is to be measured in several processes.
    """
    check_prunings(setup, prunings)
    attributes = setup.provenance() | budget_run(setup)
    attributes |= {"arms": [pruning.settings() for pruning in prunings]}
    attributes |= searched_blocks(prunings, blocks)
    for bits in rounded:
        if bits not in ROUNDED:
            choices = " or ".join(map(str, ROUNDED))
            raise ValueError(f"weights are rounded to {choices} bits, got rounded={bits!r}")
    rounded = list(dict.fromkeys(rounded))
    attributes |= {"rounded": rounded} if rounded else {}
    if speed and ranks.count() > 1:
        raise ValueError(
            f"the time of a token is measured in one process, but there are {ranks.count()}, which take "
            "time from one another: run without torchrun, or leave out the speed"
        )
    attributes |= {"speed": True} if speed else {}
    starts: dict[str, Any] = {}  # of searches
    equal = dict.fromkeys(setup.blocks, 0.0)  # in place of the importance, which is not known yet
    for arm in prunings:  # raise for an impossible budget before pruning starts
        known: dict[str, Any] = {"run": setup.run, "importance": equal, "seed": setup.seed}
        if arm.across == SEARCH and blocks is None:
            starts[search_name(arm)] = search_starts(setup, arm)
            known["blocks"] = starts[search_name(arm)][UNIFORM]
        zeros_of(setup.layers, arm, **{"blocks": blocks} | known)
    clusterings = list(dict.fromkeys(p.clustering for p in prunings if p.propagate == "dense"))
    stopwatch = Stopwatch(setup.windows)
    with resumed_run(out, attributes, setup.windows, overwrite=overwrite) as folder:
        kinds: list[Pruning | int | None] = [None, *rounded, *prunings]
        files = [folder / "arms" / f"{_name(kind)}.json" for kind in kinds]
        arms = dict(zip(files, kinds, strict=True))
        left = unwritten(arms)
        grams, log = folder / "grams", folder / "log.json"
        dense = setup.keep_logits() if left else None
        importance = functools.cache(
            lambda across: block_importance(across, setup.walk(), setup.layers)
        )

        def zeros(arm: Pruning) -> Zeros:
            known: dict[str, Any] = {"run": setup.run, "seed": setup.seed, "blocks": blocks}
            if arm.across in BY_INPUTS:
                known["importance"] = importance(arm.across)
            if arm.across == SEARCH and blocks is None:
                name = search_name(arm)
                known["blocks"] = searched(setup, arm, starts[name], folder / "searches" / name)[0]
            return zeros_of(setup.layers, arm, **known)

        # Of the arms that are finished, by name.
        seconds = store.read_json(log)["arm_seconds"] if log.exists() else {}
        for file, pruning in progress_bar(left.items(), unit="arm", shown=setup.progress):
            if isinstance(pruning, Pruning) and pruning.propagate == "dense":
                _calibrate_dense(setup, clusterings, grams)  # only the first call computes
            begin = time.perf_counter()
            with _restored(setup.model, setup.layers):
                result, losses = _run_arm(setup, pruning, grams, zeros, dense)
                seconds[file.stem] = round(time.perf_counter() - begin, 3)
                if losses:
                    ranks.on_rank_zero(save_tensors, _losses_file(file), losses)
                ranks.on_rank_zero(store.write_json, log, {"arm_seconds": seconds})
                ranks.on_rank_zero(store.write_json, file, result)
                if speed and not result.get("problem"):  # the result is not lost if this fails
                    result["microseconds"] = _microseconds(setup)
                    store.write_json(file, result)
        results = [store.read_json(file) for file in files]
        found = [r | _losses(f) for r, f in zip(results, files, strict=True)]
        table, per_layer = tables_of(found, setup.texts)
        table.attrs.update(attributes)
        if ranks.rank() == 0:
            store.save_table(table, folder / "tables" / "sweep.csv")
            store.save_table(per_layer, folder / "tables" / "layers.csv")
            store.save_text(markdown(table), folder / "tables" / "sweep.md")
            arms_log = {"arms_run": len(left), "arm_seconds": seconds}
            store.write_log(folder, stopwatch.log() | arms_log, "sweep")
            folders.remove_folder(grams)
    return table


def _name(pruning: Pruning | int | None) -> str:
    if not isinstance(pruning, Pruning):
        return DENSE if pruning is None else ROUNDED[pruning]
    return "-".join(map(str, pruning.settings().values())).replace(":", "of").replace("*", "x")


def _calibrate_dense(setup: Setup, clusterings: Sequence[Clustering], folder: Path) -> None:
    """Save the missing calibrations of the dense model, block by block."""
    layers = setup.blocks
    files = {block: _files(folder, block, clusterings) for block in layers}
    missing = {b: [c for c, file in one.items() if not file.exists()] for b, one in files.items()}
    missing = ranks.from_rank(0, missing)
    left = {block for block in files if missing[block]}
    if not left:
        return
    walk, held_out = setup.walk(), setup.evaluation_walk(HELD_OUT_WINDOWS)
    blocks = range(setup.last_block + 1)
    for block in progress_bar(blocks, unit="block", desc="calibrate", shown=setup.progress):
        if block not in left:  # already saved, or no chosen layer
            walk.advance()
            held_out.advance()
            continue
        here, wanted = layers[block], [c for c in clusterings if c in missing[block]]
        rows = sample_inputs(held_out, here, HELD_OUT, setup.seed, advance=True)
        ranks.on_rank_zero(save_inputs, files[block][None], rows)
        found = calibrate(walk, here, wanted, seed=setup.seed, advance=True)
        for clustering, calibrations in found.items():
            ranks.on_rank_zero(save_calibrations, files[block][clustering], calibrations)


def _files(
    folder: Path, block: int, clusterings: Sequence[Clustering]
) -> dict[Clustering | None, Path]:
    """Return the file of a block's calibration per clustering; key None is the held-out inputs."""
    files: dict[Clustering | None, Path] = {None: folder / f"{block}.safetensors"}
    for clustering in clusterings:
        name = "-".join(map(str, (block, *dataclasses.astuple(clustering))))
        files[clustering] = folder / f"{name}.safetensors"
    return files


def _losses_file(file: Path) -> Path:
    return file.with_suffix(".safetensors")


def _losses(file: Path) -> dict[str, Any]:
    """Return the squared errors of an arm's neurons (neurons,) by name, empty if none are saved."""
    file = _losses_file(file)
    return {k: v.numpy() for k, v in load_tensors(file).items()} if file.exists() else {}


def _run_arm(
    setup: Setup,
    pruning: Pruning | int | None,
    grams: Path,
    zeros: Callable[[Pruning], Zeros],
    logits: KeptLogits | None,
) -> tuple[Row, dict[str, torch.Tensor]]:
    """Prune the model in place and score it; return the arm's result and errors by neuron.

    Instead of a pruning it may be a number of bits to round the weights to, or None: the dense model.
    ``logits`` are those of the dense model. If an arm cannot be pruned, or its score is not finite,
    its result holds the reason and the sweep continues.

    Raises:
        NotFiniteError: the score of the dense model is not finite.
    """
    settings: Row = {"method": _name(pruning)}
    if isinstance(pruning, Pruning):
        settings = pruning.settings()
    nothing = {"window_nats": [None] * len(setup.evaluation or ()), "tokens": 0, "layers": []}
    dense = costs.model_multiply_adds(setup.model)
    pruned: list[PrunedLayer] = []
    try:
        if isinstance(pruning, Pruning):
            pruned = _prune(setup, pruning, grams, zeros(pruning))
        elif pruning is not None:
            for layer in setup.layers:
                write_weight(layer, round_to_nearest(weight_of(layer), pruning))
    except ValueError as error:
        return settings | nothing | {"problem": str(error)}, {}
    try:
        with counting_nonzero(setup.model) as counted:
            scored = setup.score(logits)
    except NotFiniteError as error:
        if pruning is None:
            raise
        return settings | nothing | {"problem": str(error)}, {}
    layers = find_layers(setup.model, [layer.name for layer in setup.layers])
    rows = [layer.row for layer in pruned]
    dense_rows = list(map(costs.dense_costs_of, layers))
    if isinstance(pruning, int):
        dense_rows = [costs.rounded_costs_of(layer, pruning) for layer in layers]
    found = settings | scored.stored(setup.texts.values())
    found |= {
        "realised": _share_of_zeros(weight_of(layer) for layer in layers),
        "model_sparsity": _share_of_zeros(setup.model.parameters()),
        "costs": costs.totals(rows or dense_rows, dense),
        "realised_inputs": zero_inputs(layers, counted),
        "layers": rows,
    }
    if not pruned:
        return found, {}
    lost = torch.cat([layer.lost for layer in pruned]).float().cpu()
    held_out = torch.cat([layer.held_out for layer in pruned]).float().cpu()
    return found, {"lost": lost, "held_out_lost": held_out}


def _microseconds(setup: Setup) -> float:
    """Pack the pruned layers of a model, and return its time of a token; NaN if it cannot write."""
    assert setup.evaluation is not None
    pack_layers(setup.model, find_layers(setup.model, [layer.name for layer in setup.layers]))
    try:
        return token_microseconds(setup.model, setup.evaluation.tokens[:1, :1])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return math.nan


def _share_of_zeros(weights: Iterable[torch.Tensor]) -> float:
    counts = [(int((weight == 0).sum()), weight.numel()) for weight in weights]
    return sum(zeros for zeros, _ in counts) / sum(size for _, size in counts)


def _prune(setup: Setup, pruning: Pruning, grams: Path, zeros: Zeros) -> list[PrunedLayer]:
    """Prune the model in place; dense propagation reads the saved calibrations."""
    if pruning.propagate == "sparse":
        return prune_model(setup, pruning, zeros=zeros)
    pruned: list[PrunedLayer] = []
    for block, here in setup.blocks.items():
        files, device = _files(grams, block, [pruning.clustering]), weight_of(here[0]).device
        found = load_calibrations(files[pruning.clustering], here, device)
        rows = load_inputs(files[None], device)
        pruned += prune_layers(setup.model, here, found, pruning, held_out=rows, zeros=zeros)
    return sparsified_inputs(setup, pruning, pruned)


@contextmanager
def _restored(model: PreTrainedModel, layers: Sequence[LinearLayer]) -> Iterator[None]:
    """Restore the layers of the model and their weights on exit."""
    dense = [weight_of(layer).clone() for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, dense, strict=True):
            write_weight(layer, weight)
            replace_layer(model, layer, layer.module)
        densify_inputs(model)
