"""Pruning one block's layers."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
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
from entangle.pruning.inputs import NO_ROW
from entangle.pruning.options import Pruning
from entangle.pruning.reconstruction import Reconstruction


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
    reconstruct: Callable[[], Reconstruction] | None = None,
) -> list[PrunedLayer]:
    """Prune a block's layers in place, or replace them by mixtures of experts.

    ``zeros`` is the number of weights to prune in each row (neurons,) of a layer, or in the whole
    layer; TRIM's rule distributes the latter over the rows. Without it each row has the sparsity.
    ``held_out`` has inputs (tokens, inputs) for the held-out error. The columns of the resulting
    rows are listed in `Sparsified`. ``reconstruct`` tunes the pruned block before the errors are
    measured.

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
    dense = [weight_of(layer).clone() for layer in layers]
    for weights in pruned:
        weights.share()
    placed = [
        _place(model, layer, calibrations[layer.name], weights.weight)
        for layer, weights in zip(layers, pruned, strict=True)
    ]
    reconstruction = reconstruct() if reconstruct else None
    found = []
    layer_owners = ranks.assign_ranks(sizes)
    for layer, before, weights, owner in zip(placed, dense, pruned, layer_owners, strict=True):
        calibration, unseen = calibrations[layer.name], held_out.get(layer.name)
        row = {
            "damping": max(weights.damping),
            "mlp_error_before": reconstruction.before if reconstruction else math.nan,
            "mlp_error": reconstruction.after if reconstruction else math.nan,
        }
        found.append(_described(layer, before, calibration, unseen, owner, row))
    return found


def dense_layers(layers: Sequence[LinearLayer], tokens: int) -> list[PrunedLayer]:
    """Return the results of layers whose weights stay dense; ``tokens`` are those of the calibration."""
    found = []
    for layer in layers:
        more = {"damping": 0.0, "mlp_error_before": math.nan, "mlp_error": math.nan}
        row = _row(layer, [tokens]) | {"error": 0.0, "held_out_error": 0.0, **more}
        row |= {"tokens": tokens, "held_out_tokens": 0}
        nothing = torch.zeros(layer.neurons, dtype=torch.float64)
        found.append(PrunedLayer(row | costs.costs_of(layer) | NO_ROW, nothing, nothing))
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
    weight, moments, router = weight_of(layer), calibration.used, calibration.router
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
    model: PreTrainedModel, layer: LinearLayer, calibration: Calibration, weight: torch.Tensor
) -> LinearLayer:
    """Write pruned weights ([experts,] neurons, inputs) into a layer, and return the layer."""
    if calibration.router is None:
        write_weight(layer, weight)
        return layer
    bias = getattr(layer.module, "bias", None)
    owns = calibration.owner == layer.name
    counts = calibration.moments.count.tolist()
    mixture = ExpertLinear(weight, bias, calibration.router, counts, owns_router=owns)
    return replace_layer(model, layer, mixture)


def _described(
    layer: LinearLayer,
    dense: torch.Tensor,
    calibration: Calibration,
    held_out: torch.Tensor | None,
    owner: int,
    more: Mapping[str, float],
) -> PrunedLayer:
    """Return a pruned layer's result; the rank ``owner`` measures its errors."""
    weight, moments, router = weight_of(layer), calibration.moments, calibration.router
    errors: tuple[torch.Tensor, torch.Tensor, float] | None = None
    if owner == ranks.rank():
        lost = _lost(dense, weight, moments)
        unseen, unseen_energy = lost.new_empty(0), math.nan
        if held_out is not None:
            unseen = _lost_held_out(dense, weight, held_out, router)
            unseen_energy = float(_energy(held_out, dense).sum())
        errors = lost.cpu(), unseen.cpu(), unseen_energy
    lost, unseen, unseen_energy = ranks.from_rank(owner, errors)
    experts = moments.count.reshape(-1).tolist()
    row = _row(layer, experts) | {
        "error": _ratio(float(lost.sum()), calibration.energy),
        "held_out_error": _ratio(float(unseen.sum()), unseen_energy),
        **more,
        "tokens": sum(experts),
        "held_out_tokens": 0 if held_out is None else len(held_out),
    }
    return PrunedLayer(row | costs.costs_of(layer) | NO_ROW, lost, unseen)


def _row(layer: LinearLayer, experts: Sequence[int]) -> dict[str, Any]:
    """Return the shape and the zeros of a layer; ``experts`` are the tokens of each expert."""
    weight = weight_of(layer)
    zero = weight == 0
    missing = zero.sum(dim=-1).double() / layer.inputs
    total = int(zero.sum())
    return {
        "layer": layer.name,
        "block": layer.block,
        "role": layer.role,
        "neurons": layer.neurons,
        "inputs": layer.inputs,
        "clusters": len(experts),
        "smallest_cluster": min(experts),
        "largest_cluster": max(experts),
        "weights": weight.numel(),
        "zeros": total,
        "realised": total / weight.numel(),
        "least": float(missing.min()),
        "most": float(missing.max()),
    }


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
