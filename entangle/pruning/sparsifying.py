"""One-shot pruning of a model, block by block, calibrated on windows of a text.

With several experts a layer becomes a mixture: one pruned copy of its weights for each cluster of
its inputs. One expert is plain pruning.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Unpack

import pandas as pd
import torch
import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.model import ranks
from entangle.model.blocks import BlockWalk
from entangle.model.integrity import LOG, described_files
from entangle.model.layers import LinearLayer, find_layers, naming
from entangle.model.loading import save_model
from entangle.model.placing import check_in_memory, is_offloaded
from entangle.model.progress import progress_bar
from entangle.model.prunable import check_no_trained_experts, check_prunable
from entangle.model.reloading import check_saved
from entangle.model.sampling import sample_inputs
from entangle.model.sparse_inputs import input_hooks
from entangle.model.text import TokenWindows
from entangle.numerics.masks import check_group
from entangle.numerics.sparsity import Sparsity
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.pruning import costs
from entangle.pruning.block import PrunedLayer, dense_layers, prune_layers
from entangle.pruning.budgets import BY_INPUTS, Zeros, block_importance, zeros_of
from entangle.pruning.calibration import HELD_OUT, HELD_OUT_WINDOWS, calibrate
from entangle.pruning.checkpoint import FinishedBlocks
from entangle.pruning.inputs import choose_inputs
from entangle.pruning.options import NONE, SEARCH, Pruning, PruningOptions, with_options
from entangle.pruning.reconstruction import Targets, tuned_layers
from entangle.pruning.searching import SEARCH_FILE, search_starts, searched
from entangle.runs import store
from entangle.runs.dataset import about
from entangle.runs.resuming import resumed_run
from entangle.runs.setup import Setup, Stopwatch

# Attributes that identify the run that a budget was made from.
_OF_RUN = (
    "text",
    "tokens",
    "fingerprint",
    "windows",
    "length",
    "seed",
    "skip_first",
    "bins",
    "dtype",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Sparsified:
    """The result of pruning: a table with a row per pruned layer, and run.json as ``attributes``.

    Columns of ``layers``; NaN where a number does not exist:

    * ``layer``: dotted name of the layer.
    * ``block``: index of its block.
    * ``role``: its name within the block.
    * ``neurons``, ``inputs``: shape of its weight.
    * ``clusters``: clusters of its inputs, one per expert.
    * ``smallest_cluster``, ``largest_cluster``: calibration tokens in them.
    * ``weights``: number of weights, over all experts.
    * ``zeros``: number of zeros among them.
    * ``realised``: share of zeros.
    * ``least``, ``most``: smallest and largest share of zeros in a row of an expert.
    * ``error``: ‖(W - Ŵ)X‖² / ‖WX‖² on the calibration inputs X, each with the Ŵ of its expert.
    * ``held_out_error``: the same on held-out inputs; `sparsify` has none, `sweep` has.
    * ``mlp_error_before``: mean over held-out tokens of ‖ŷ - y‖² / ‖y‖², where y and ŷ are the hidden
      states behind the layer's block in the dense and in the pruned model, before the block is
      reconstructed; NaN without ``reconstruct``. The tokens are of the calibration windows.
    * ``mlp_error``: the same after it.
    * ``damping``: largest damping that an expert's Gram needed, in units of its mean diagonal; 0
      for greedy Wanda and magnitude, which need none.
    * ``tokens``: calibration tokens.
    * ``held_out_tokens``: tokens of the held-out error.
    * ``multiply_adds``: non-zero weights that a token is multiplied by, mean over the calibration
      tokens.
    * ``router_multiply_adds``: multiply-adds per token of the router; counted in the first of the
      layers that share it.
    * ``dense_multiply_adds``: multiply-adds per token of the dense layer; of a trained expert's times
      the share of the experts that a token is sent to.
    * ``stored``: non-zero weights, over all experts.
    * ``dense_weights``: weights of the dense layer.
    * ``disk_bytes``: size of the written weights and router, bytes; several experts are packed.
    * ``memory_bytes``: size of the weights and router in memory, bytes.
    * ``input_share``: the share of zero inputs that the layer was given; 0 with dense inputs.
    * ``input_threshold``: the absolute value below which its inputs are zero; NaN but for ``teal``.
    * ``realised_inputs``: the share of zero inputs on the calibration tokens, the first of each window
      included, which are dense; NaN with dense inputs. ``multiply_adds`` counts these zeros. The
      errors are of the weights alone, on dense inputs.
    """

    layers: pd.DataFrame
    attributes: dict[str, Any]

    @property
    def sparsity(self) -> float:
        """The share of zeros in the layers' weights, over all experts."""
        return float(self.layers["zeros"].sum() / self.layers["weights"].sum())

    @property
    def error(self) -> float:
        """The relative squared error of a layer's outputs, mean over layers."""
        return float(self.layers["error"].mean())


@with_options()
@with_torch_defaults
def sparsify(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset | None = None,
    blocks: Mapping[int, int] | None = None,
    layers: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    batch_size: int = 4,
    skip_first: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    **options: Unpack[PruningOptions],
) -> Sparsified:
    """Prune the matching layers of a model in place, block by block, from windows of a text.

    Layers that match a pattern in ``exclude`` are left out, and so are those that cannot be heard
    or that do more than multiply their inputs by a weight. It is an error if ``layers`` has the
    exact name of one of these.

    Options:

    * ``sparsity``: the share of zeros, or ``n:m``, n weights kept of every m.
    * ``method``: ``sparsegpt``, ``wanda`` or ``magnitude``.
    * ``mask``: ``row``, every neuron has exactly the sparsity; ``block``, weights are chosen per
      128 columns over all rows, as published.
    * ``solve``: ``greedy``, the method's weights as published; ``exact``, the weights with the least
      error that its mask allows; ``admm``, by a better mask too (see `numerics.solving`). ``auto``
      is exact for SparseGPT and greedy for the others.
    * ``propagate``: ``sparse``, each block is calibrated on the outputs of the pruned blocks before
      it; ``dense``, on those of the dense model.
    * ``reconstruct``: ``mlp`` tunes the kept weights of each block's MLP after the block is pruned,
      until the hidden states behind the block are the dense model's (see `reconstruct`); ``none``.
    * ``experts``: number of pruned copies of each layer, one per cluster of its inputs (Sparse
      Expansion, arXiv 2405.15756); 1 is plain pruning.
    * ``assign``: tokens go to experts by ``kmeans`` or, as a control, at ``random``.
    * ``components``: PCA components before k-means; None for inputs // 32, 0 for no PCA.
    * ``shrinkage``: shrinkage of each cluster's Gram towards the pooled one, as if ``shrinkage * inputs``
      average tokens had joined the cluster; 0 as published.
    * ``budget``: variable of a measured ``run`` by which rows differ in sparsity, ``trim`` for
      TRIM's rule, or ``uniform``; the total stays the same (see `zeros_of`).
    * ``strength``: how much rows differ, from 0 (not at all) to 1.
    * ``across``: score by which blocks differ in sparsity, or ``uniform`` (see `zeros_of`).
    * ``scores``: how many scores a search takes at most, with ``across`` ``search``.
    * ``inputs``: which inputs of a layer are zero for a token: none (``dense``); those whose absolute
      value is below the layer's threshold (``teal``); all but the largest products of absolute value
      and norm of the column of weights (``wina``). The first token of each window keeps its inputs.
    * ``input_sparsity``: share of zero inputs.
    * ``input_shares``: how they are divided among a block's layers: ``greedy`` or ``uniform`` (see
      `choose_inputs`).

    ``blocks`` has the number of zeros of each block, for ``across`` ``search`` (see `choose_budget`).
    ``run`` is a measured run of this model. A ``budget`` by a variable needs it, and so does
    ``across`` by ``entanglement`` or ``shuffled``.

    With ``out`` the model, and the tokenizer if given, are written to that folder, with run.json,
    log.json and sparsity.json: an ordinary Hugging Face folder, or with several experts one that
    `load_model` loads. A killed command resumes after its finished blocks when it is called again
    with the same arguments. After an error the model may be partly pruned. A model whose blocks
    are in files cannot be used afterwards: load the written one.

    Raises:
        FileExistsError: ``out`` exists or holds unfinished work with other arguments, and
            ``overwrite`` is false.
        LookupError: a pattern matches no layer, or all layers are excluded.
        RuntimeError: the model cannot be run block by block, or a layer did not run once in each
            batch.
        ValueError: the windows are longer than the model's context; the model is in training mode,
            compiled, quantised or expanded; a number or word is out of range; the run was measured
            on other weights; or the inputs of a layer cannot be used (the message names it).
    """
    pruning = Pruning.of(**options)
    setup = Setup.of(
        model,
        windows,
        run=needed_run([pruning], run),
        layers=layers,
        exclude=exclude,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
        pruned=True,
    )
    check_prunings(setup, [pruning])
    experts_in_files = is_offloaded(model) and pruning.experts > 1
    if experts_in_files and pruning.sparse_inputs and pruning.propagate == "dense":
        raise ValueError(
            f"inputs {pruning.inputs} with propagate dense needs another walk through the pruned "
            "model, but with offload experts are released after their block: use propagate sparse"
        )
    if out is None and is_offloaded(model):
        raise ValueError(
            "the model's weights are in files (offload): give a folder for the pruned model as out"
        )
    attributes = setup.provenance() | pruning.settings() | budget_run(setup)
    attributes |= searched_blocks([pruning], blocks)
    if pruning.across == SEARCH and blocks is None:
        check_in_memory(model, "a search for blocks")
        starts = search_starts(setup, pruning)
    stopwatch = Stopwatch(windows)
    dense = costs.model_multiply_adds(model)
    kept = (
        nullcontext() if out is None else resumed_run(out, attributes, windows, overwrite=overwrite)
    )
    with kept as folder:
        known: dict[str, Any] = {"run": setup.run, "seed": setup.seed, "blocks": blocks}
        if pruning.across in BY_INPUTS:
            known["importance"] = block_importance(pruning.across, setup.walk(), setup.layers)
        if pruning.across == SEARCH and blocks is None:
            file = None if folder is None else folder / SEARCH_FILE
            known["blocks"] = searched(setup, pruning, starts, file)[0]
        zeros = zeros_of(setup.layers, pruning, **known)
        checkpoint = None if folder is None else FinishedBlocks(model, folder)
        pruned = prune_model(setup, pruning, zeros=zeros, checkpoint=checkpoint)
        found = Sparsified(pd.DataFrame([layer.row for layer in pruned]), attributes)
        if checkpoint is not None and ranks.rank() == 0:
            rows: list[Any] = found.layers.to_dict(orient="records")
            save_model(model, tokenizer, checkpoint.folder, checkpoint.described())
            check_saved(model, checkpoint.folder, windows.tokens[:1], checkpoint.blocks)
            whole = {"sparsity": found.sparsity, "error": found.error}
            size = costs.size_of(checkpoint.folder, without=checkpoint.blocks)
            whole |= costs.totals(rows, dense) | {"model_bytes": size}
            store.write_json(checkpoint.folder / "sparsity.json", whole | {"layers": rows})
            files = described_files(checkpoint.folder, checkpoint.name)
            store.write_json(checkpoint.folder / LOG, stopwatch.log() | files)
            checkpoint.remove()
    return found


def needed_run(
    prunings: Sequence[Pruning], run: xr.DataTree | xr.Dataset | None
) -> xr.DataTree | xr.Dataset | None:
    """Return the run if a budget needs it or a search can use it, else None.

    Raises:
        ValueError: a budget needs a run, and none is given.
    """
    needed = [pruning for pruning in prunings if pruning.needs_run]
    searches = any(
        pruning.across == SEARCH for pruning in prunings
    )  # it may begin with the run's budget
    if needed and run is None:
        raise ValueError(
            f"budget {needed[0].budget} across {needed[0].across} needs a measured run of the model: "
            "pass it as run"
        )
    return run if needed or searches else None


def budget_run(setup: Setup) -> dict[str, Any]:
    """Return the attributes that identify the budgets' run; empty without one."""
    if setup.run is None:
        return {}
    return {"budget_run": {name: about(setup.run).get(name) for name in _OF_RUN}}


def searched_blocks(
    prunings: Sequence[Pruning], blocks: Mapping[int, int] | None
) -> dict[str, Any]:
    """Return the attribute with the zeros of each block that a search found; empty without one.

    Raises:
        ValueError: zeros are given, and no pruning has them.
    """
    if blocks is None:
        return {}
    if all(pruning.across != SEARCH for pruning in prunings):
        raise ValueError(f"blocks are for across {SEARCH}: give it, or leave the blocks out")
    return {"blocks": {str(block): zeros for block, zeros in blocks.items()}}


def check_layers(setup: Setup, sparsities: Sequence[Sparsity]) -> None:
    """Check, before any computation, that the layers can be pruned to these sparsities.

    Raises:
        ValueError: a layer is quantised or expanded, shares its weight, or its inputs cannot be
            divided into groups of m; or the model has sparse inputs, in whatever layers: they were
            chosen for its present weights, and restoring the model would remove them.
    """
    sparse = next(iter(input_hooks(setup.model)), None)
    if sparse is not None:
        raise ValueError(
            f"{sparse} has sparse inputs already, which were chosen for the model's present weights: "
            "prune the model that it was made from"
        )
    check_prunable(setup.layers, find_layers(setup.model))
    for layer in setup.layers:
        for sparsity in dict.fromkeys(sparsities):
            with naming(layer):
                check_group(layer.inputs, sparsity)


def check_experts(setup: Setup, experts: Sequence[int]) -> None:
    """Check that no trained expert is to be expanded.

    Raises:
        ValueError: one is.
    """
    if max(experts, default=1) > 1:
        check_no_trained_experts(setup.layers, f"be expanded to {max(experts)} experts")


def check_prunings(setup: Setup, prunings: Sequence[Pruning]) -> None:
    """Check, before any computation, that the layers can be pruned in these ways.

    Raises:
        ValueError: as `check_layers`; a trained expert is to be expanded, or to have sparse inputs;
            or a block is to be reconstructed, and no layer can be tuned
            or there is only one window.
    """
    check_layers(setup, [pruning.sparsity for pruning in prunings])
    check_experts(setup, [pruning.experts for pruning in prunings])
    if any(pruning.sparse_inputs for pruning in prunings):
        check_no_trained_experts(setup.layers, "have sparse inputs")
    if any(pruning.reconstruct != "none" for pruning in prunings):
        tuned_layers(setup)


def prune_model(
    setup: Setup,
    pruning: Pruning,
    *,
    zeros: Zeros | None = None,
    checkpoint: FinishedBlocks | None = None,
) -> list[PrunedLayer]:
    """Prune layers in place, block by block.

    If there is an evaluation, the error on its inputs is measured too. Finished blocks are read
    from the ``checkpoint``, and the others are written to it.

    Raises:
        ValueError: the inputs of a layer cannot be used; the message names the layer.
    """
    pruned: list[PrunedLayer] = []
    dense = pruning.propagate == "dense"
    last, layers = setup.last_block, setup.blocks
    targets = None if pruning.reconstruct == "none" else Targets(setup)
    walk = setup.walk(targets.batch_size if targets else None)
    held_out = None
    if setup.evaluation is not None and pruning.method != NONE:
        held_out = setup.evaluation_walk(HELD_OUT_WINDOWS)
    walks = [walk] if held_out is None else [walk, held_out]
    finished = set() if checkpoint is None else checkpoint.finished
    if targets and checkpoint is not None:
        checkpoint.restore_hidden(targets.dense)
    with progress_bar(total=last + 1, unit="block", desc="prune", shown=setup.progress) as bar:
        for block in range(last + 1):
            here = layers.get(block, [])
            if targets:
                targets.advance_past(block)
            if here and block in finished:
                assert checkpoint is not None
                for one in walks if dense and block < last else ():
                    one.advance()
                pruned += checkpoint.load(here)
            elif here:
                if pruning.method == NONE:
                    walk.fetch()  # its weights are counted
                    found = dense_layers(here, walk.tokens)
                else:
                    found = _pruned(setup, walk, held_out, here, pruning, zeros, targets)
                if pruning.sparse_inputs and not dense:
                    found = with_inputs(found, choose_inputs(walk, here, pruning))
                pruned += found
                if checkpoint is not None:
                    dense_walk = targets.dense if targets else None
                    checkpoint.save(here, pruned[-len(here) :], dense_walk)
            for one in walks:
                if one.block == block < last:
                    one.advance()
            if checkpoint is not None:
                checkpoint.release_experts(block)
            bar.update()
    return sparsified_inputs(setup, pruning, pruned) if dense else pruned


def _pruned(
    setup: Setup,
    walk: BlockWalk,
    held_out: BlockWalk | None,
    layers: Sequence[LinearLayer],
    pruning: Pruning,
    zeros: Zeros | None,
    targets: Targets | None,
) -> list[PrunedLayer]:
    """Prune the layers of the walks' block; with dense propagation the walks move past it.

    Raises:
        ValueError: the inputs of a layer cannot be used; the message names the layer.
    """
    dense = pruning.propagate == "dense"
    unseen: dict[str, torch.Tensor] = {}
    if held_out is not None:
        unseen = sample_inputs(held_out, layers, HELD_OUT, setup.seed, advance=dense)
    found = calibrate(walk, layers, [pruning.clustering], seed=setup.seed, advance=dense)
    return prune_layers(
        setup.model,
        layers,
        found[pruning.clustering],
        pruning,
        held_out=unseen,
        zeros=zeros,
        reconstruct=targets.reconstructing(walk, layers) if targets else None,
    )


def sparsified_inputs(
    setup: Setup, pruning: Pruning, pruned: Sequence[PrunedLayer]
) -> list[PrunedLayer]:
    """Give the layers of a pruned model sparse inputs, if asked, by another walk through it.

    With sparse propagation `prune_model` does this block by block, so that the next block is pruned
    for what the sparse inputs leave. With dense propagation no block depends on those before it.
    """
    if not pruning.sparse_inputs:
        return list(pruned)
    walk, rows = setup.walk(), dict[str, dict[str, Any]]()
    for block in range(setup.last_block + 1):
        here = setup.blocks.get(block, [])
        if here:
            rows |= choose_inputs(walk, here, pruning)
        else:
            walk.advance()
    return with_inputs(pruned, rows)


def with_inputs(
    pruned: Sequence[PrunedLayer], rows: Mapping[str, dict[str, Any]]
) -> list[PrunedLayer]:
    """Return layers' results with what sparse inputs change in their rows."""
    return [dataclasses.replace(one, row=one.row | rows[str(one.row["layer"])]) for one in pruned]
