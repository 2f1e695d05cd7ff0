"""Prune a model block by block, from the inputs that its layers have over a text.

With several experts a layer becomes a mixture: one pruned copy of its weights for each cluster of
its inputs. One expert is plain one-shot pruning.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Unpack

import pandas as pd
import torch
import xarray as xr
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.model import ranks
from entangle.model.layers import check_prunable, find_layers, naming
from entangle.model.loading import save_model
from entangle.model.placing import is_offloaded
from entangle.model.sampling import sample_inputs
from entangle.model.text import TokenWindows
from entangle.numerics.masks import check_group
from entangle.numerics.sparsity import Sparsity
from entangle.pruning import costs
from entangle.pruning.block import PrunedLayer, prune_layers
from entangle.pruning.budgets import Zeros, block_outliers, zeros_of
from entangle.pruning.calibration import HELD_OUT, calibrate
from entangle.pruning.checkpoint import FinishedBlocks
from entangle.pruning.options import Pruning, PruningOptions, with_options
from entangle.runs import store
from entangle.runs.dataset import about
from entangle.runs.resuming import resumed_run
from entangle.runs.setup import Setup, Stopwatch

# What determines a run, and so a budget made from it.
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
    """What pruning made of each layer: a row per layer, and what it was made of (run.json)."""

    layers: pd.DataFrame
    attributes: dict[str, Any]

    @property
    def sparsity(self) -> float:
        """The share of the layers' weights that are zero, of all experts' where there are some."""
        return float(self.layers["zeros"].sum() / self.layers["weights"].sum())

    @property
    def error(self) -> float:
        """The mean over layers of the relative squared error of their outputs."""
        return float(self.layers["error"].mean())


@with_options()
def sparsify(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset | None = None,
    layers: str | Sequence[str] = ("*",),
    batch_size: int = 4,
    skip_first: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **options: Unpack[PruningOptions],
) -> Sparsified:
    """Prune the matching layers of a model in place, block by block, from windows of a text.

    ``sparsity`` is a share of zeros or ``n:m``, n kept of every m. With ``propagate="sparse"`` a
    block is pruned for the inputs that the pruned blocks before it give, with ``"dense"`` for
    those of the dense model.

    With several ``experts`` each layer becomes a mixture (Sparse Expansion, arXiv 2405.15756): a
    pruned copy of its weights for each of so many clusters of its inputs, found by PCA (to
    ``components``, inputs // 32 unless told otherwise, 0 for none) and k-means; with
    ``assign="random"`` tokens go to experts at random, the control. Each cluster's Gram is pulled
    towards the pooled one as by ``pull * inputs`` average tokens; as published, ``pull=0``.

    A ``budget`` of rows or ``across`` blocks keeps more weights where neurons are entangled, at the
    same total (see `zeros_of`), by a measured ``run`` of this model.

    With ``out`` the model, and the tokenizer, are also written to that folder: an ordinary Hugging
    Face one, or with several experts one that `load_model` loads, with run.json, log.json and
    sparsity.json. After an error the model may be pruned in part. A command that was killed goes on
    with the blocks that are done when it is called again with the same arguments. Of a model whose
    blocks are in files, what is here is used up afterwards: load what was written.

    Raises:
        FileExistsError: ``out`` exists, or holds unfinished work of other arguments, and
            ``overwrite`` is false.
        LookupError: a pattern matches no layer.
        RuntimeError: a model that cannot be run block by block, or a layer that did not run once
            in each batch.
        ValueError: windows longer than the model's context, a model in training mode, compiled,
            quantised or expanded, a number or word out of range, a run of other weights, or inputs
            that no pruning can be made of; the message names the layer.
    """
    pruning = Pruning.of(**options)
    setup = Setup.of(
        model,
        windows,
        run=needed_run([pruning], run),
        layers=layers,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
    )
    check_layers(setup, [pruning.sparsity])
    if out is None and is_offloaded(model):
        raise ValueError("the model's weights are in files: give a folder to write it to, with out")
    attributes = setup.provenance() | pruning.words() | budget_run(setup)
    stopwatch = Stopwatch()
    dense = costs.model_multiply_adds(model)
    kept = nullcontext() if out is None else resumed_run(out, attributes, overwrite=overwrite)
    with kept as folder:
        outliers = None
        if pruning.across == "owl":
            outliers = block_outliers(setup.walk(), setup.layers)
        zeros = zeros_of(setup.layers, pruning, run=setup.run, outliers=outliers, seed=setup.seed)
        done = None if folder is None else FinishedBlocks(model, folder)
        pruned = prune_model(setup, pruning, zeros=zeros, done=done)
        found = Sparsified(pd.DataFrame([layer.row for layer in pruned]), attributes)
        if done is not None and ranks.rank() == 0:
            rows: list[Any] = found.layers.to_dict(orient="records")
            save_model(model, tokenizer, done.folder, done.described())
            whole = {"sparsity": found.sparsity, "error": found.error}
            whole |= costs.totals(rows, dense) | {"model_bytes": costs.size_of(done.folder)}
            store.write_json(done.folder / "sparsity.json", whole | {"layers": rows})
            store.write_json(done.folder / "log.json", stopwatch.log())
            done.remove()
    return found


def needed_run(
    prunings: Sequence[Pruning], run: xr.DataTree | xr.Dataset | None
) -> xr.DataTree | xr.Dataset | None:
    """Return the run where a budget is made of it, and else none.

    Raises:
        ValueError: a budget needs a run, and there is none.
    """
    needed = [pruning for pruning in prunings if pruning.needs_run]
    if needed and run is None:
        raise ValueError(
            f"budget {needed[0].budget} across {needed[0].across} needs a measured run of the model"
        )
    return run if needed else None


def budget_run(setup: Setup) -> dict[str, Any]:
    """Return what names the run that budgets are made of, if there is one."""
    if setup.run is None:
        return {}
    return {"budget_run": {name: about(setup.run).get(name) for name in _OF_RUN}}


def check_layers(setup: Setup, sparsities: Sequence[Sparsity]) -> None:
    """See that the layers can be pruned to sparsities, before minutes are spent.

    Raises:
        ValueError: a layer is quantised or expanded, shares its weight, or has no such groups.
    """
    check_prunable(setup.layers, find_layers(setup.model))
    for layer in setup.layers:
        for sparsity in dict.fromkeys(sparsities):
            with naming(layer):
                check_group(layer.inputs, sparsity)


def prune_model(
    setup: Setup,
    pruning: Pruning,
    *,
    zeros: Zeros | None = None,
    done: FinishedBlocks | None = None,
) -> list[PrunedLayer]:
    """Prune layers in place, block by block.

    Where there is an evaluation, the error is measured on its inputs too. Blocks that are ``done``
    are read, and the others saved there.

    Raises:
        ValueError: the inputs of a layer cannot be pruned by; the message names it.
    """
    pruned: list[PrunedLayer] = []
    dense = pruning.propagate == "dense"
    last, layers = setup.last_block, setup.blocks
    walk = setup.walk()
    held_out = None if setup.evaluation is None else setup.evaluation_walk()
    walks = [walk] if held_out is None else [walk, held_out]
    with tqdm(total=last + 1, unit="block", desc="prune", disable=not setup.progress) as bar:
        for block in range(last + 1):
            here = layers.get(block, [])
            if here and done is not None and block in done.there:
                for one in walks if dense and block < last else ():
                    one.advance()
                pruned += done.load(here)
            elif here:
                unseen: dict[str, torch.Tensor] = {}
                if held_out is not None:
                    unseen = sample_inputs(held_out, here, HELD_OUT, setup.seed, advance=dense)
                found = calibrate(walk, here, [pruning.clustering], seed=setup.seed, advance=dense)
                calibrations = found[pruning.clustering]
                words: dict[str, Any] = {"held_out": unseen, "zeros": zeros}
                pruned += prune_layers(setup.model, here, calibrations, pruning, **words)
                if done is not None:
                    done.save(here, pruned[-len(here) :])
            for one in walks:
                if one.block == block < last:
                    one.advance()
            if done is not None:
                done.let_go(block)
            bar.update()
    return pruned
