"""Prune a model block by block, from the inputs that its layers have over a text.

With several experts a layer becomes a mixture: one pruned copy of its weights for each cluster of
its inputs. One expert is plain one-shot pruning.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xarray as xr
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.model import ranks
from entangle.model.blocks import BlockWalk
from entangle.model.hooks import check_hooks
from entangle.model.layers import LinearLayer, check_prunable, find_layers, naming
from entangle.model.loading import save_model
from entangle.model.placing import is_offloaded
from entangle.model.sampling import sample_inputs, walk_blocks
from entangle.model.text import TokenWindows, check_windows
from entangle.numerics.masks import check_group
from entangle.numerics.sparsity import Sparsity
from entangle.pruning import costs
from entangle.pruning.block import PrunedLayer, prune_layers
from entangle.pruning.budgets import Zeros, block_outliers, zeros_of
from entangle.pruning.calibration import HELD_OUT, calibrate
from entangle.pruning.checkpoint import FinishedBlocks
from entangle.pruning.options import PULL, STRENGTH, UNIFORM, Pruning, needs_run
from entangle.runs import resuming, setup, store
from entangle.runs.dataset import dataset_of
from entangle.runs.setup import check_weights, provenance

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


def sparsify(
    model: PreTrainedModel,
    windows: TokenWindows,
    sparsity: str | float,
    *,
    method: str = "sparsegpt",
    mask: str = "row",
    propagate: str = "sparse",
    experts: int = 1,
    assign: str = "kmeans",
    components: int | None = None,
    pull: float = PULL,
    budget: str = UNIFORM,
    strength: float = STRENGTH,
    across: str = UNIFORM,
    run: xr.DataTree | xr.Dataset | None = None,
    layers: str | Sequence[str] = ("*",),
    batch_size: int = 4,
    skip_first: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    command: str | None = None,
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
    pruning = Pruning.of(
        sparsity,
        method=method,
        mask=mask,
        propagate=propagate,
        experts=experts,
        assign=assign,
        components=components,
        pull=pull,
        budget=budget,
        strength=strength,
        across=across,
    )
    chosen = prunable_layers(model, windows, layers, [pruning], skip_first)
    if out is None and is_offloaded(model):
        raise ValueError("the model's weights are in files: give a folder to write it to, with out")
    attributes = provenance(
        model,
        windows,
        layers=layers,
        batch_size=batch_size,
        skip_first=skip_first,
        command=command,
    )
    attributes |= pruning.words() | budget_run(model, [pruning], run)
    attributes |= {"tokens": len(windows) * (windows.length - skip_first)}
    stopwatch = setup.Stopwatch()
    dense = costs.model_multiply_adds(model)
    kept = (
        nullcontext() if out is None else resuming.resumed_run(out, attributes, overwrite=overwrite)
    )
    with kept as folder:
        outliers = None
        if pruning.across == "owl":
            outliers = block_outliers(walk_blocks(model, windows, batch_size, skip_first), chosen)
        zeros = budget_of(chosen, pruning, run, outliers, windows.seed)
        done = None if folder is None else FinishedBlocks(model, folder)
        pruned = prune_model(
            walk_blocks(model, windows, batch_size, skip_first),
            chosen,
            pruning,
            seed=windows.seed,
            zeros=zeros,
            done=done,
            progress=progress,
        )
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


def budget_run(
    model: PreTrainedModel,
    prunings: Sequence[Pruning],
    run: xr.DataTree | xr.Dataset | None,
) -> dict[str, Any]:
    """See that there is a run of this model where a budget needs one; return what names it.

    Raises:
        ValueError: there is none, or one of other weights.
    """
    needed = [one for one in prunings if needs_run(one.budget, one.across)]
    if not needed:
        return {}
    if run is None:
        raise ValueError(
            f"budget {needed[0].budget} across {needed[0].across} needs a measured run of the model"
        )
    check_weights(model, run)
    about = dataset_of(run).attrs
    return {"budget_run": {name: about.get(name) for name in _OF_RUN}}


def budget_of(
    layers: Sequence[LinearLayer],
    pruning: Pruning,
    run: xr.DataTree | xr.Dataset | None,
    outliers: Mapping[int, float] | None,
    seed: int,
) -> Zeros:
    """Return the zeros of each layer's rows (see `zeros_of`)."""
    return zeros_of(
        layers,
        pruning.sparsity,
        budget=pruning.budget,
        strength=pruning.strength,
        across=pruning.across,
        run=run,
        outliers=outliers,
        seed=seed,
    )


def prunable_layers(
    model: PreTrainedModel,
    windows: TokenWindows,
    patterns: str | Sequence[str],
    prunings: Sequence[Pruning],
    skip_first: int,
) -> list[LinearLayer]:
    """Return the layers to prune, after all has been checked that can be before minutes are spent.

    Raises:
        LookupError: a pattern matches no layer.
        ValueError: as `sparsify` says.
    """
    check_windows(model, windows, skip_first)
    check_hooks(model, skip_first)
    chosen = find_layers(model, [patterns] if isinstance(patterns, str) else patterns)
    check_layers(model, chosen, [pruning.sparsity for pruning in prunings])
    return chosen


def check_layers(
    model: PreTrainedModel, layers: Sequence[LinearLayer], sparsities: Sequence[Sparsity]
) -> None:
    """See that layers can be pruned to sparsities, before minutes are spent.

    Raises:
        ValueError: a layer is quantised or expanded, shares its weight, or has no such groups.
    """
    check_prunable(layers, find_layers(model))
    for layer in layers:
        for sparsity in dict.fromkeys(sparsities):
            with naming(layer):
                check_group(layer.inputs, sparsity)


def prune_model(
    walk: BlockWalk,
    layers: Sequence[LinearLayer],
    pruning: Pruning,
    *,
    seed: int = 0,
    held_out: BlockWalk | None = None,
    zeros: Zeros | None = None,
    done: FinishedBlocks | None = None,
    progress: bool = False,
) -> list[PrunedLayer]:
    """Prune layers in place, block by block, and measure the error on inputs from other text too.

    Blocks that are ``done`` are read, and the others saved there.

    Raises:
        ValueError: the inputs of a layer cannot be pruned by; the message names it.
    """
    pruned: list[PrunedLayer] = []
    dense = pruning.propagate == "dense"
    last = max(layer.block for layer in layers)
    walks = [walk] if held_out is None else [walk, held_out]
    with tqdm(total=last + 1, unit="block", desc="prune", disable=not progress) as bar:
        for block in range(last + 1):
            here = [layer for layer in layers if layer.block == block]
            if here and done is not None and block in done.there:
                for one in walks if dense and block < last else ():
                    one.advance()
                pruned += done.load(here)
            elif here:
                unseen: dict[str, torch.Tensor] = {}
                if held_out is not None:
                    unseen = sample_inputs(held_out, here, HELD_OUT, seed, advance=dense)
                found = calibrate(walk, here, [pruning.clustering], seed=seed, advance=dense)
                calibrations = found[pruning.clustering]
                words: dict[str, Any] = {"held_out": unseen, "zeros": zeros}
                pruned += prune_layers(walk.model, here, calibrations, pruning, **words)
                if done is not None:
                    done.save(here, pruned[-len(here) :])
            for one in walks:
                if one.block == block < last:
                    one.advance()
            if done is not None:
                done.let_go(block)
            bar.update()
    return pruned
