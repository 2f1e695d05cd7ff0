"""How layers are pruned: what is asked for, and what becomes of one layer."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from entangle.model import ranks
from entangle.model.experts import ExpertLinear
from entangle.model.layers import LinearLayer, naming, replace_layer, weight_of, write_weight
from entangle.numerics.masks import prune
from entangle.numerics.moments import output_energy
from entangle.numerics.routing import Router
from entangle.numerics.shares import even_quality, largest_remainder
from entangle.pruning import costs
from entangle.pruning.calibration import Calibration, Calibrations
from entangle.pruning.options import Pruning


@dataclasses.dataclass(frozen=True, eq=False)
class PrunedLayer:
    """What became of a layer."""

    row: dict[str, Any]  # a row of a table
    lost: torch.Tensor  # (neurons,) float64: each one's ‖(w - ŵ)X‖² over the calibration's inputs X
    held_out: torch.Tensor  # the same over inputs from other text; empty where there is none


def prune_layers(
    model: PreTrainedModel,
    layers: Sequence[LinearLayer],
    calibrations: Calibrations,
    pruning: Pruning,
    *,
    held_out: Mapping[str, torch.Tensor] | None = None,
    zeros: Mapping[str, torch.Tensor | int] | None = None,
) -> list[PrunedLayer]:
    """Prune layers in place, or put mixtures of experts in their places.

    The argument ``zeros`` says how many weights to prune: of each row (neurons,), or of the whole
    layer, which TRIM's rule spreads over the rows. Without it each row has the sparsity.

    In the result's row ``zeros`` counts the zeros that the weights have, and ``least`` and ``most``
    are the smallest and the largest share of zeros of a row. ``error`` is ‖(W - Ŵ)X‖² / ‖WX‖² over
    the calibration's inputs X, each with the Ŵ of its expert; it is NaN for a layer without output.
    ``held_out_error`` is the same over the inputs ``held_out`` (tokens, inputs).

    Under torchrun each process prunes some of the experts, and each places all of them.

    Raises:
        ValueError: as `prune` says; the message names the layer.
    """
    zeros, held_out = zeros or {}, held_out or {}
    experts = [calibrations[layer.name].moments.count.numel() for layer in layers]
    sizes = [layer.inputs**2 * (layer.neurons + layer.inputs / 3) for layer in layers]
    owners = ranks.spread([size for size, n in zip(sizes, experts, strict=True) for _ in range(n)])
    pruned: list[_Weights] = []
    with ranks.together():
        for layer, count in zip(layers, experts, strict=True):
            whose, owners = owners[:count], owners[count:]
            calibration, rows = calibrations[layer.name], zeros.get(layer.name)
            with naming(layer):
                pruned.append(_prune_mine(layer, calibration, pruning, rows, whose))
    found = []
    whose = ranks.spread(sizes)
    for layer, weights, owner in zip(layers, pruned, whose, strict=True):
        weights.share()
        calibration, unseen = calibrations[layer.name], held_out.get(layer.name)
        found.append(_place(model, layer, calibration, weights, unseen, owner))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Weights:
    """A layer's pruned experts, of which this process has its own."""

    weight: torch.Tensor  # ([experts,] neurons, inputs)
    damping: list[float]
    owners: list[int]

    def share(self) -> None:
        """Give all processes each one's."""
        if ranks.count() > 1:
            for one, owner in zip(
                self.weight.view(-1, *self.weight.shape[-2:]), self.owners, strict=True
            ):
                ranks.broadcast_(one, owner)
            self.damping[:] = map(max, zip(*ranks.everyone(self.damping), strict=True))


def _prune_mine(
    layer: LinearLayer,
    calibration: Calibration,
    pruning: Pruning,
    zeros: torch.Tensor | int | None,
    owners: list[int],
) -> _Weights:
    weight, moments, router = weight_of(layer), calibration.moments, calibration.router
    if isinstance(zeros, int):
        pooled = moments if router is None else moments.pooled()
        shares = even_quality(weight, pooled, zeros / weight.numel())
        sizes = [layer.inputs] * layer.neurons
        zeros = torch.from_numpy(largest_remainder(shares, sizes, zeros))
    words: dict[str, Any] = {"method": pruning.method, "mask": pruning.mask}
    share = pruning.sparsity if zeros is None else zeros
    mine = [expert for expert, owner in enumerate(owners) if owner == ranks.rank()]
    if len(mine) == len(owners):
        moments = moments if router is None else moments.pulled(pruning.pull)
        pruned = prune(weight, moments, share, **words)
        return _Weights(pruned.weight, list(pruned.damping), owners)
    whole = weight.new_empty((*moments.count.shape, *weight.shape))
    damping = [0.0] * len(owners)
    if mine:
        some = moments if router is None else moments.pulled(pruning.pull).some(mine)
        pruned = prune(weight, some, share, **words)
        whole[mine] = pruned.weight
        for expert, one in zip(mine, pruned.damping, strict=True):
            damping[expert] = one
    return _Weights(whole, damping, owners)


def _place(
    model: PreTrainedModel,
    layer: LinearLayer,
    calibration: Calibration,
    pruned: _Weights,
    held_out: torch.Tensor | None,
    owner: int,
) -> PrunedLayer:
    """Give a layer its pruned weights, and say what became of it."""
    weight, moments, router = weight_of(layer), calibration.moments, calibration.router
    errors: tuple[torch.Tensor, torch.Tensor, float] | None = None
    if owner == ranks.rank():
        change = weight.double() - pruned.weight.double()
        lost = output_energy(change, moments).reshape(-1, layer.neurons).sum(dim=0)
        unseen, unseen_energy = lost.new_empty(0), math.nan
        if held_out is not None:
            unseen = _energy(held_out, change, router)
            unseen_energy = float(_energy(held_out, weight, None).sum())
        errors = lost.cpu(), unseen.cpu(), unseen_energy
        del change
    lost, unseen, unseen_energy = ranks.from_rank(owner, errors)
    experts = moments.count.reshape(-1).tolist()
    if router is None:
        write_weight(layer, pruned.weight)
    else:
        bias = getattr(layer.module, "bias", None)
        mixture = ExpertLinear(pruned.weight, bias, router, experts)
        layer = replace_layer(model, layer, mixture)
    first = router is None or router.layers == 1  # of the layers that share it
    missing = (weight_of(layer) == 0).sum(dim=-1).double() / layer.inputs
    total = int((weight_of(layer) == 0).sum())
    row = {
        "layer": layer.name,
        "block": layer.block,
        "role": layer.role,
        "neurons": layer.neurons,
        "inputs": layer.inputs,
        "clusters": len(experts),
        "smallest_cluster": min(experts),
        "largest_cluster": max(experts),
        "weights": weight_of(layer).numel(),
        "zeros": total,
        "realised": total / weight_of(layer).numel(),
        "least": float(missing.min()),
        "most": float(missing.max()),
        "error": _ratio(float(lost.sum()), calibration.energy),
        "held_out_error": _ratio(float(unseen.sum()), unseen_energy),
        "damping": max(pruned.damping),
        "tokens": sum(experts),
        "held_out_tokens": 0 if held_out is None else len(held_out),
    }
    return PrunedLayer(row | costs.costs_of(layer, with_router=first), lost, unseen)


def _ratio(lost: float, energy: float) -> float:
    return lost / energy if energy else math.nan


def _energy(rows: torch.Tensor, weight: torch.Tensor, router: Router | None) -> torch.Tensor:
    """Return each neuron's sum of squared outputs (neurons,) of rows (tokens, inputs), in float64.

    Outputs themselves have no sum that cancels, so that float32 is enough for them.
    """
    if router is None:
        return (rows.float() @ weight.float().T).double().square().sum(dim=0)
    chosen = router.assign(rows)
    parts = [_energy(rows[chosen == index], one, None) for index, one in enumerate(weight)]
    return torch.stack(parts).sum(dim=0)
