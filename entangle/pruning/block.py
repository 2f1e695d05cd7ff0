"""Pruning one block's layers."""

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
from entangle.numerics.moments import InputMoments, output_energy
from entangle.numerics.routing import Router
from entangle.numerics.shares import largest_remainder, sparsity_by_quality
from entangle.pruning import costs
from entangle.pruning.calibration import Calibration, Calibrations
from entangle.pruning.options import Pruning


@dataclasses.dataclass(frozen=True, eq=False)
class PrunedLayer:
    """The result of pruning a layer."""

    row: dict[str, Any]  # its row in `Sparsified.layers`
    lost: torch.Tensor  # (neurons,) float64: ‖(w - ŵ)X‖² over the calibration inputs X
    held_out: torch.Tensor  # the same over held-out inputs; empty without them


def prune_layers(
    model: PreTrainedModel,
    layers: Sequence[LinearLayer],
    calibrations: Calibrations,
    pruning: Pruning,
    *,
    held_out: Mapping[str, torch.Tensor] | None = None,
    zeros: Mapping[str, torch.Tensor | int] | None = None,
) -> list[PrunedLayer]:
    """Prune layers in place, or replace them by mixtures of experts.

    ``zeros`` is the number of weights to prune in each row (neurons,) of a layer, or in the whole
    layer; TRIM's rule distributes the latter over the rows. Without it each row has the sparsity.
    ``held_out`` has inputs (tokens, inputs) for the held-out error. The columns of the resulting
    rows are listed in `Sparsified`.

    Under torchrun each process prunes some of the experts, and all processes receive all of them.

    Raises:
        ValueError: as `prune`; the message names the layer.
    """
    zeros, held_out = zeros or {}, held_out or {}
    experts = [calibrations[layer.name].moments.count.numel() for layer in layers]
    sizes = [layer.inputs**2 * (layer.neurons + layer.inputs / 3) for layer in layers]
    owners = ranks.assign_ranks(
        [size for size, n in zip(sizes, experts, strict=True) for _ in range(n)]
    )
    pruned: list[_Weights] = []
    with ranks.raise_on_all_ranks():
        for layer, count in zip(layers, experts, strict=True):
            expert_owners, owners = owners[:count], owners[count:]
            calibration, rows = calibrations[layer.name], zeros.get(layer.name)
            with naming(layer):
                pruned.append(_prune_own(layer, calibration, pruning, rows, expert_owners))
    found = []
    layer_owners = ranks.assign_ranks(sizes)
    for layer, weights, owner in zip(layers, pruned, layer_owners, strict=True):
        weights.share()
        calibration, unseen = calibrations[layer.name], held_out.get(layer.name)
        found.append(_place(model, layer, calibration, weights, unseen, owner))
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Weights:
    """A layer's pruned experts; before `share` only those that this process pruned."""

    weight: torch.Tensor  # ([experts,] neurons, inputs)
    damping: list[float]
    owners: list[int]

    def share(self) -> None:
        """Broadcast each expert from the process that pruned it."""
        if ranks.count() > 1:
            for one, owner in zip(
                self.weight.view(-1, *self.weight.shape[-2:]), self.owners, strict=True
            ):
                ranks.broadcast_(one, owner)
            self.damping[:] = map(max, zip(*ranks.all_gather(self.damping), strict=True))


def _prune_own(
    layer: LinearLayer,
    calibration: Calibration,
    pruning: Pruning,
    zeros: torch.Tensor | int | None,
    owners: list[int],
) -> _Weights:
    """Prune the experts of a layer that this process owns."""
    weight, moments, router = weight_of(layer), calibration.moments, calibration.router
    if isinstance(zeros, int):
        pooled = moments if router is None else moments.pooled()
        shares = sparsity_by_quality(weight, pooled, zeros / weight.numel())
        sizes = [layer.inputs] * layer.neurons
        zeros = torch.from_numpy(largest_remainder(shares, sizes, zeros))
    options: dict[str, Any] = {"method": pruning.method, "mask": pruning.mask}
    options |= {"solve": pruning.solve, "shrinkage": pruning.shrinkage}
    share = pruning.sparsity if zeros is None else zeros
    own = [expert for expert, owner in enumerate(owners) if owner == ranks.rank()]
    if not own:
        whole = weight.new_empty((*moments.count.shape, *weight.shape))
        return _Weights(whole, [0.0] * len(owners), owners)
    pruned = prune(weight, moments, share, experts=own, **options)
    if len(own) == len(owners):
        return _Weights(pruned.weight, list(pruned.damping), owners)
    whole = weight.new_empty((len(owners), *weight.shape))
    whole[own] = pruned.weight
    damping = [0.0] * len(owners)
    for expert, one in zip(own, pruned.damping, strict=True):
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
    """Write the pruned weights into a layer, and return the result with its errors."""
    weight, moments, router = weight_of(layer), calibration.moments, calibration.router
    errors: tuple[torch.Tensor, torch.Tensor, float] | None = None
    if owner == ranks.rank():
        lost = _lost(weight, pruned.weight, moments)
        unseen, unseen_energy = lost.new_empty(0), math.nan
        if held_out is not None:
            unseen = _lost_held_out(weight, pruned.weight, held_out, router)
            unseen_energy = float(_energy(held_out, weight).sum())
        errors = lost.cpu(), unseen.cpu(), unseen_energy
    lost, unseen, unseen_energy = ranks.from_rank(owner, errors)
    experts = moments.count.reshape(-1).tolist()
    if router is None:
        write_weight(layer, pruned.weight)
    else:
        bias = getattr(layer.module, "bias", None)
        owns = calibration.owner == layer.name
        mixture = ExpertLinear(pruned.weight, bias, router, experts, owns_router=owns)
        layer = replace_layer(model, layer, mixture)
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
    return PrunedLayer(row | costs.costs_of(layer), lost, unseen)


def _ratio(lost: float, energy: float) -> float:
    return lost / energy if energy else math.nan


def _lost(weight: torch.Tensor, pruned: torch.Tensor, moments: InputMoments) -> torch.Tensor:
    """Return each neuron's ‖(w - ŵ)X‖² (neurons,), summed over the experts, in float64.

    One expert at a time: the differences in float64 take four times the memory of the experts.
    """
    if pruned.ndim == 2:
        return output_energy(weight.double() - pruned.double(), moments)
    parts = [
        output_energy(weight.double() - one.double(), moments.expert(index))
        for index, one in enumerate(pruned)
    ]
    return torch.stack(parts).sum(dim=0)


def _lost_held_out(
    weight: torch.Tensor, pruned: torch.Tensor, rows: torch.Tensor, router: Router | None
) -> torch.Tensor:
    """Return the same of held-out inputs (tokens, inputs), each with the ŵ of its expert."""
    if router is None:
        return _energy(rows, weight.double() - pruned.double())
    chosen = router.assign(rows)
    parts = [
        _energy(rows[chosen == index], weight.double() - one.double())
        for index, one in enumerate(pruned)
    ]
    return torch.stack(parts).sum(dim=0)


def _energy(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return each neuron's sum of squared outputs (neurons,) on rows (tokens, inputs), in float64.

    Float32 suffices for the outputs; only the sum of squares needs float64.
    """
    return (rows.float() @ weight.float().T).double().square().sum(dim=0)
