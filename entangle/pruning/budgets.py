"""Budgets: non-uniform sparsity over the rows of a layer and over the blocks of a model.

Every budget prunes exactly as many weights in total as uniform rows do, so arms differ only in
where the weights are kept.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer, naming, weight_of
from entangle.numerics.masks import prune, wanda_scores
from entangle.numerics.moments import output_energy
from entangle.numerics.shares import (
    largest_remainder,
    outlier_ratio,
    ranks_of,
    sparsity_by_rank,
    sparsity_by_score,
)
from entangle.numerics.sparsity import Sparsity
from entangle.pruning.calibration import Calibrations, calibrate
from entangle.pruning.options import DISTANCE, ONE, SEARCH, SHUFFLED, TRIM, UNIFORM, Pruning
from entangle.runs.dataset import values_of

Floats = npt.NDArray[np.float64]
Zeros = dict[
    str, torch.Tensor | int
]  # by layer: of each row (neurons,), or for TRIM's rule of the layer
ENTANGLED = 0.15  # std: a neuron with a larger distance counts as entangled
WIDTH = 0.08  # largest deviation of a block's density: OWL's λ as published
BY_INPUTS = {"owl", "lsa"}  # values of across that need `block_importance`
ENTANGLED_WIDTH = 0.16  # the same if the score is the share of entangled neurons


def zeros_of(
    layers: Sequence[LinearLayer],
    pruning: Pruning,
    *,
    run: xr.Dataset | None = None,
    importance: Mapping[int, float] | None = None,
    blocks: Mapping[int, int] | None = None,
    seed: int = 0,
) -> Zeros:
    """Return the number of weights to prune in each row of each layer; empty for uniform rows.

    All budgets prune as many weights in total as uniform rows do.

    Within a layer, rows whose neuron has a higher rank of ``budget`` keep more weights (see
    `numerics.shares.sparsity_by_rank`):

    * ``wasserstein*std``: the distance in output units.
    * ``wasserstein_bulk*std``: the same without the 1% of tokens farthest from the median.
    * ``wasserstein``, ``wasserstein_bulk``, ``std``, ``kurtosis``, ``weight_norm``: that variable
      of the run.
    * ``ranks``: the sum of the ranks of ``wasserstein`` and ``std``.
    * ``shuffled``: the ranks of ``wasserstein*std``, permuted over the layer; the control.
    * ``trim``: TRIM's rule. It needs the inputs, so the layer's total is returned.

    Across blocks, densities are linear in a score (see `sparsity_by_score`), by ``across``:

    * ``entanglement``: the share of neurons with a distance above 0.15 std.
    * ``shuffled``: these shares, permuted over the blocks; the control.
    * ``depth``: early blocks are denser.
    * ``owl``, ``lsa``: the ``importance`` of the blocks (see `block_importance`).

    With ``across`` ``search`` each block has as many zeros as ``blocks`` says, and its layers are
    pruned alike.

    Raises:
        LookupError: the run lacks a layer, a neuron or the variable.
        ValueError: the run, the blocks' importance or zeros are needed and missing, or those are
            of other blocks or another total; or ``across`` is not
            uniform, and all layers are of one block or all blocks have the same share of entangled
            neurons.
    """
    budget, across, sparsity = pruning.budget, pruning.across, pruning.sparsity
    if not pruning.budgeted:
        return {}
    if pruning.needs_run and run is None:
        raise ValueError(f"budget {budget} across {across} needs a measured run: pass it as run")
    sizes = np.array([layer.neurons * layer.inputs for layer in layers])
    totals = np.array([layer.neurons * round(sparsity.share * layer.inputs) for layer in layers])
    of_block = np.array([layer.block for layer in layers])
    if across == SEARCH:
        parts = _check_blocks(blocks, of_block, sizes, int(totals.sum()))
        for block, total in parts.items():
            here = of_block == block
            totals[here] = _divided(total, sizes[here])
    elif across != UNIFORM:
        of_blocks = _scores(layers, across, run, importance, seed)
        if len(of_blocks) == 1:
            raise ValueError(
                f"across {across} moves weights between blocks, but all chosen layers are in block "
                f"{layers[0].block}: choose layers of several blocks, or across uniform"
            )
        weights = [sizes[of_block == block].sum() for block in of_blocks]
        width = WIDTH if across in {"depth", *BY_INPUTS} else ENTANGLED_WIDTH
        by_score = sparsity_by_score(sparsity.share, [*of_blocks.values()], weights, width)
        by_block = dict(zip(of_blocks, by_score, strict=True))
        shares = np.array([by_block[block] for block in of_block.tolist()])
        totals = largest_remainder(shares, sizes, int(totals.sum()))
    return _of_rows(layers, totals, pruning, run, seed)


def zeros_of_block(
    layers: Sequence[LinearLayer], total: int, pruning: Pruning, run: xr.Dataset | None
) -> Zeros:
    """Return the number of weights to prune in each row of a block's layers, ``total`` in all.

    The layers are pruned alike, and their rows differ by the budget as in `zeros_of`.
    """
    sizes = np.array([layer.neurons * layer.inputs for layer in layers])
    return _of_rows(layers, _divided(total, sizes), pruning, run, 0)


def _divided(total: int, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Divide a block's zeros among its layers, which have the same share."""
    return largest_remainder(np.full(len(sizes), total / sizes.sum()), sizes, total)


def _check_blocks(
    blocks: Mapping[int, int] | None,
    of_block: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    total: int,
) -> Mapping[int, int]:
    """Return the zeros of each block, if they are of these layers and have this total.

    Raises:
        ValueError: they are missing, or have other blocks, more zeros than weights or another total.
    """
    if blocks is None:
        raise ValueError(
            f"across {SEARCH} needs the zeros of each block: pass those that choose_budget found as blocks"
        )
    expected = sorted({*of_block.tolist()})
    if sorted(blocks) != expected:
        raise ValueError(
            f"the zeros are of blocks {sorted(blocks)}, but the chosen layers are in blocks "
            f"{expected}: choose the layers of the search"
        )
    for block, zeros in blocks.items():
        size = int(sizes[of_block == block].sum())
        if not 0 <= zeros <= size:
            raise ValueError(f"block {block} has {size:,} weights, but {zeros:,} are to be zero")
    if sum(blocks.values()) != total:
        raise ValueError(
            f"the blocks have {sum(blocks.values()):,} zeros in all, but this sparsity prunes {total:,} "
            "weights: use the sparsity and the layers of the search"
        )
    return blocks


def _of_rows(
    layers: Sequence[LinearLayer],
    totals: npt.NDArray[np.int64],
    pruning: Pruning,
    run: xr.Dataset | None,
    seed: int,
) -> Zeros:
    """Divide each layer's total among its rows."""
    budget = pruning.budget
    if budget == TRIM:
        return {layer.name: int(total) for layer, total in zip(layers, totals, strict=True)}
    zeros: Zeros = {}
    rng = np.random.default_rng(seed)
    for layer, total in zip(layers, totals, strict=True):
        rank = np.full(layer.neurons, 0.5)
        if run is not None and budget != UNIFORM:
            rank = ranks_of(_values(layer, budget, run))
            rank = rng.permutation(rank) if budget == SHUFFLED else rank
        size = layer.neurons * layer.inputs
        rows = sparsity_by_rank(total / size, rank, pruning.strength)
        counts = largest_remainder(rows, np.full(layer.neurons, layer.inputs), int(total))
        zeros[layer.name] = torch.from_numpy(counts)
    return zeros


def block_importance(
    across: str, walk: BlockWalk, layers: Sequence[LinearLayer]
) -> dict[int, float]:
    """Run the dense model and return the importance of each block by a rule that needs its inputs.

    * ``owl``: the outlier ratio of all weights of the block (see `outlier_ratio`; arXiv 2310.05175).
    * ``lsa``: one minus the block's share of all blocks' errors (LSA, ICLR 2026). A block's error is
      the mean over its layers of ‖(W - V)X‖² / ‖WX‖², the least that is possible when the half of each
      row's weights with the lowest scores of Wanda are zero.
    """
    measure = {"owl": _outliers, "lsa": _least_error}[across]
    found = {}
    for block in range(max(layer.block for layer in layers) + 1):
        here = [layer for layer in layers if layer.block == block]
        if here:
            found[block] = measure(here, calibrate(walk, here, advance=True)[ONE])
        else:
            walk.advance()
    if across == "owl":
        return found
    return {block: 1 - error / sum(found.values()) for block, error in found.items()}


def _outliers(layers: Sequence[LinearLayer], calibrations: Calibrations) -> float:
    scores = [wanda_scores(weight_of(x), calibrations[x.name].used.squares) for x in layers]
    return outlier_ratio(torch.cat([one.flatten() for one in scores]))


def _least_error(layers: Sequence[LinearLayer], calibrations: Calibrations) -> float:
    errors = []
    for layer in layers:
        weight, one = weight_of(layer), calibrations[layer.name]
        with naming(layer):
            pruned = prune(weight, one.used, Sparsity(0.5), method="wanda", solve="exact").weight
        lost = float(output_energy(pruned.double() - weight.double(), one.moments).sum())
        errors.append(lost / one.energy if one.energy else 0.0)
    return sum(errors) / len(errors)


def _scores(
    layers: Sequence[LinearLayer],
    across: str,
    data: xr.Dataset | None,
    importance: Mapping[int, float] | None,
    seed: int,
) -> dict[int, float]:
    """Return each block's score.

    Raises:
        ValueError: the importance of OWL or LSA is missing, or all blocks have the same share of
            entangled neurons.
    """
    blocks = sorted({layer.block for layer in layers})
    if across == "depth":
        return {block: -float(block) for block in blocks}
    if across in BY_INPUTS:
        if importance is None:
            raise ValueError(
                f"across {across} needs the importance of the blocks: pass that of block_importance"
            )
        return {block: importance[block] for block in blocks}
    assert data is not None  # needs_run
    found = {}
    for block in blocks:
        distances = [_values(one, "wasserstein", data) for one in layers if one.block == block]
        found[block] = float((np.concatenate(distances) > ENTANGLED).mean())
    shares = [*found.values()]
    if len(blocks) > 1 and len({*shares}) == 1:
        raise ValueError(
            f"across {across} needs blocks that differ, but all blocks have the same share of "
            f"neurons with a distance above {ENTANGLED}, {shares[0]:.3g}: choose another value of across"
        )
    if across == SHUFFLED and len(blocks) > 1:
        rng, drawn = np.random.default_rng(seed), shares
        while drawn == shares:  # the same order would be no control
            drawn = rng.permutation(shares).tolist()
        found = dict(zip(found, drawn, strict=True))
    return found


def _values(layer: LinearLayer, variable: str, data: xr.Dataset) -> Floats:
    """Return a variable of a layer's neurons (neurons,), NaN for those without a distance.

    Raises:
        LookupError: the run lacks the variable or a neuron.
    """

    def of(name: str) -> Floats:
        return values_of(data, name, layer.name, range(layer.neurons))

    distance = of("wasserstein")
    if variable == "ranks":
        values = ranks_of(distance) + ranks_of(of("std"))
    elif variable in {DISTANCE, SHUFFLED}:
        values = distance * of("std")
    elif variable == "wasserstein_bulk*std":
        values = of("wasserstein_bulk") * of("std")
    else:
        values = of(variable)
    return np.where(np.isnan(distance), np.nan, values)  # NaN has rank ½
