"""Budgets: how many weights of each row are pruned, by what a run knows of its neuron.

Two rules, one within layers and one across blocks, and totals that are those of uniform rows to the
last weight, so that arms differ only in who has the weights.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer, weight_of
from entangle.model.ranks import add_
from entangle.numerics.masks import wanda_scores
from entangle.numerics.shares import graded, largest_remainder, outlier_ratio, ranks, spread
from entangle.pruning.options import DISTANCE, SHUFFLED, TRIM, UNIFORM, Pruning
from entangle.runs.dataset import values_of

Floats = npt.NDArray[np.float64]
Zeros = dict[str, torch.Tensor | int]  # of a layer's rows (neurons,), or its total for TRIM's rule
ENTANGLED = 0.15  # std: from here on a neuron counts as entangled
WIDTH = 0.08  # of densities across blocks, to either side: OWL's λ as published
ENTANGLED_WIDTH = 0.16  # where the score is the share of entangled neurons


def zeros_of(
    layers: Sequence[LinearLayer],
    pruning: Pruning,
    *,
    run: xr.Dataset | None = None,
    outliers: Mapping[int, float] | None = None,
    seed: int = 0,
) -> Zeros:
    """Return how many weights of each row of each layer to prune; nothing for uniform rows.

    All budgets prune as many weights as uniform rows do. Within a layer rows are graded by the rank
    of a variable of the run (see `numerics.shares.graded`): ``wasserstein*std`` is the distance in
    output units, ``ranks`` the sum of the ranks of both, ``shuffled`` the control, ranks of
    ``wasserstein*std`` that are another neuron's. Of ``trim`` each layer's total is returned: the
    rule needs its inputs. Across blocks densities are linear in a score (see `spread`): the share
    of neurons with a distance above 0.15, the same ``shuffled`` over the blocks, the ``depth``
    (early blocks are denser), or ``owl``, the outlier ratios of the blocks.

    Raises:
        LookupError: the run lacks a layer, a neuron or the variable.
        ValueError: no run or no outlier ratios where they are needed, or layers of a single block,
            across which there is nothing to move.
    """
    budget, across, sparsity = pruning.budget, pruning.across, pruning.sparsity
    if not pruning.budgeted:
        return {}
    if pruning.needs_run and run is None:
        raise ValueError(f"budget {budget} across {across} needs a measured run: give one")
    sizes = np.array([layer.neurons * layer.inputs for layer in layers])
    totals = np.array([layer.neurons * round(sparsity.share * layer.inputs) for layer in layers])
    if across != UNIFORM:
        scores = _scores(layers, across, run, outliers, seed)
        if len(scores) == 1:
            raise ValueError(
                f"across {across} moves weights between blocks, but all layers are of block "
                f"{layers[0].block}: choose more layers, or across uniform"
            )
        blocks = np.array([layer.block for layer in layers])
        weights = [sizes[blocks == block].sum() for block in scores]
        width = WIDTH if across in {"depth", "owl"} else ENTANGLED_WIDTH
        spread_out = spread(sparsity.share, [*scores.values()], weights, width)
        spared = dict(zip(scores, spread_out, strict=True))
        shares = np.array([spared[block] for block in blocks.tolist()])
        totals = largest_remainder(shares, sizes, int(totals.sum()))
    if budget == TRIM:
        return {layer.name: int(total) for layer, total in zip(layers, totals, strict=True)}
    zeros: Zeros = {}
    rng = np.random.default_rng(seed)
    for layer, total, size in zip(layers, totals, sizes, strict=True):
        rank = np.full(layer.neurons, 0.5)
        if run is not None and budget != UNIFORM:
            rank = ranks(_values(layer, budget, run))
            rank = rng.permutation(rank) if budget == SHUFFLED else rank
        rows = graded(total / size, rank, pruning.strength)
        counts = largest_remainder(rows, np.full(layer.neurons, layer.inputs), int(total))
        zeros[layer.name] = torch.from_numpy(counts)
    return zeros


def block_outliers(walk: BlockWalk, layers: Sequence[LinearLayer]) -> dict[int, float]:
    """Run the dense model and return each block's outlier ratio (see `outlier_ratio`).

    As published the weights of all layers of a block have one mean.
    """
    found = {}
    for block in range(max(layer.block for layer in layers) + 1):
        here = [layer for layer in layers if layer.block == block]
        if not here:
            walk.advance()
            continue
        squares: dict[str, torch.Tensor] = {}

        def on_inputs(
            layer: LinearLayer, rows: torch.Tensor, into: dict[str, torch.Tensor] = squares
        ) -> None:
            with torch.inference_mode(False):
                added = rows.detach().double().square().sum(dim=0)
                into[layer.name] = into.get(layer.name, 0) + added

        first = walk.listen(here, on_inputs, advance=True)
        for one in squares.values():
            add_(one)
        scores = [
            wanda_scores(weight_of(layer), squares[first[layer.name]].float()).flatten()
            for layer in here
        ]
        found[block] = outlier_ratio(torch.cat(scores))
    return found


def _scores(
    layers: Sequence[LinearLayer],
    across: str,
    data: xr.Dataset | None,
    outliers: Mapping[int, float] | None,
    seed: int,
) -> dict[int, float]:
    """Return each block's score.

    Raises:
        ValueError: it is OWL's, and there are no outlier ratios, or all have the same share.
    """
    blocks = sorted({layer.block for layer in layers})
    if across == "depth":
        return {block: -float(block) for block in blocks}
    if across == "owl":
        if outliers is None:
            raise ValueError("across owl needs the outlier ratios of the blocks")
        return {block: outliers[block] for block in blocks}
    assert data is not None  # needs_run
    found = {}
    for block in blocks:
        distances = [_values(one, "wasserstein", data) for one in layers if one.block == block]
        found[block] = float((np.concatenate(distances) > ENTANGLED).mean())
    shares = [*found.values()]
    if len(blocks) > 1 and len({*shares}) == 1:
        raise ValueError(
            f"across {across} has nothing to go by: all blocks have the same share of neurons with "
            f"a distance above {ENTANGLED}, {shares[0]:.3g}"
        )
    if across == SHUFFLED and len(blocks) > 1:
        rng, drawn = np.random.default_rng(seed), shares
        while drawn == shares:  # which would be no control
            drawn = rng.permutation(shares).tolist()
        found = dict(zip(found, drawn, strict=True))
    return found


def _values(layer: LinearLayer, variable: str, data: xr.Dataset) -> Floats:
    """Return a variable of a layer's neurons, in their order.

    Raises:
        LookupError: the run lacks it, or a neuron.
    """

    def of(name: str) -> Floats:
        return values_of(data, name, layer.name, range(layer.neurons))

    distance = of("wasserstein")
    if variable == "ranks":
        values = ranks(distance) + ranks(of("std"))
    elif variable in {DISTANCE, SHUFFLED}:
        values = distance * of("std")
    else:
        values = of(variable)
    return np.where(np.isnan(distance), np.nan, values)  # without a distance: rank ½
