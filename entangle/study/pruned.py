"""How layers are pruned: what is asked for, and what becomes of one layer."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from transformers import PreTrainedModel

from entangle.model import ranks
from entangle.model.experts import ExpertLinear
from entangle.model.layers import LinearLayer, replace_layer, weight_of, write_weight
from entangle.numerics.budgets import even_quality, largest_remainder
from entangle.numerics.moments import output_energy
from entangle.numerics.pruning import Mask, Method, Sparsity, prune
from entangle.numerics.routing import Router
from entangle.study import costs
from entangle.study.budgeting import ACROSS, ROWS, STRENGTH, TRIM, UNIFORM
from entangle.study.calibration import (
    ONE,
    Assign,
    Calibration,
    Calibrations,
    Clustering,
    naming,
)

Propagate = Literal["sparse", "dense"]

CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("sparsegpt", "wanda", "magnitude"),
    "mask": ("row", "block"),
    "propagate": ("sparse", "dense"),
    "assign": ("kmeans", "random"),
    "budget": ROWS,
    "across": ACROSS,
}
_ROUTED = ("assign", "components", "pull")
_BUDGETED = ("budget", "strength", "across")
_ORDER = ("propagate", "method", "mask", "experts", *_ROUTED, *_BUDGETED)
PULL = 0.5  # times the number of inputs: the average tokens that each expert's Gram is pulled by


@dataclasses.dataclass(frozen=True)
class Pruning:
    """How the layers of a model are pruned."""

    sparsity: Sparsity
    method: Method = "sparsegpt"
    mask: Mask = "row"
    propagate: Propagate = "sparse"
    experts: int = 1
    assign: Assign = "kmeans"
    components: int | None = None
    pull: float = PULL
    budget: str = UNIFORM
    strength: float = STRENGTH
    across: str = UNIFORM

    @classmethod
    def of(cls, sparsity: str | float | Sparsity, **words: Any) -> Self:
        """Read one from words.

        Raises:
            ValueError: a word that is none of its choices, no sparsity, or a number out of range.
        """
        for name, word in words.items():
            if name in CHOICES and word not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {word!r}")
        if not isinstance(sparsity, Sparsity):
            sparsity = Sparsity.parse(sparsity)
        pruning = cls(sparsity, **words)
        if not isinstance(pruning.experts, int) or pruning.experts < 1:
            raise ValueError(f"a layer needs at least 1 expert, got experts={pruning.experts!r}")
        components = pruning.components
        if components is not None and (not isinstance(components, int) or components < 0):
            raise ValueError(f"components must not be negative (0: no PCA), got {components!r}")
        if not isinstance(pruning.pull, int | float) or not 0 <= pruning.pull < math.inf:
            raise ValueError(f"pull must be a number that is not negative, got {pruning.pull!r}")
        if pruning.experts > 1 and pruning.method != "sparsegpt":
            raise ValueError(
                f"experts are pruned by sparsegpt, got {pruning.experts} experts and "
                f"{pruning.method}: use one expert or method sparsegpt"
            )
        if not isinstance(pruning.strength, int | float) or not 0 <= pruning.strength <= 1:
            raise ValueError(f"strength must be from 0 to 1, got {pruning.strength!r}")
        if pruning.budgeted and (pruning.mask == "block" or pruning.sparsity.group):
            why = "a mask by block chooses among all rows"
            why = f"{pruning.sparsity} fixes every row's zeros" if pruning.sparsity.group else why
            raise ValueError(
                f"budget {pruning.budget} across {pruning.across} says how many weights each row "
                f"keeps, but {why}: use a mask by row and a share of zeros"
            )
        return pruning

    @property
    def budgeted(self) -> bool:
        """Whether rows or blocks differ in how much of them is pruned."""
        return (self.budget, self.across) != (UNIFORM, UNIFORM)

    @property
    def clustering(self) -> Clustering:
        """How it splits the inputs of a layer."""
        return ONE if self.experts == 1 else Clustering(self.experts, self.assign, self.components)

    def words(self) -> dict[str, Any]:
        """Return it as it was written; what only matters to several experts only with them."""
        words: dict[str, Any] = {
            name: getattr(self, name) for name in ("method", "mask", "propagate", "experts")
        }
        if self.experts > 1:
            components = "auto" if self.components is None else self.components
            words |= {"assign": self.assign, "components": components, "pull": self.pull}
        if self.budgeted:
            strength = "" if self.budget in {UNIFORM, TRIM} else self.strength
            words |= {"budget": self.budget, "strength": strength, "across": self.across}
        return words | {"sparsity": str(self.sparsity)}


def arms_of(sparsities: Sequence[str | float], **words: Sequence[Any]) -> list[Pruning]:
    """Return the prunings of all combinations of words (see `Pruning`), each once.

    Raises:
        ValueError: a word that is none of the choices, no sparsity, or nothing to combine.
    """
    for name, several in {"sparsity": sparsities, **words}.items():
        if not several:
            raise ValueError(f"a sweep needs at least one value of {name}")
    if max(words.get("experts", [1])) > 1 and "sparsegpt" not in words.get("method", ["sparsegpt"]):
        raise ValueError(
            "experts are pruned by sparsegpt: add it to the methods, or use one expert"
        )
    arms: dict[Pruning, None] = {}
    order = sorted(words, key=_ORDER.index)
    grouped = [bool(Sparsity.parse(str(one)).group) for one in sparsities]
    for combination in itertools.product(*(words[name] for name in order), sparsities):
        arm = dict(zip(order, combination[:-1], strict=True))
        if arm.get("method") == "magnitude" and arm.get("budget") != TRIM:  # it sees no inputs
            arm["propagate"] = words.get("propagate", ["sparse"])[0]
        if arm.get("method", "sparsegpt") != "sparsegpt":  # a rival of experts, and none itself
            arm["experts"] = 1
        if arm.get("experts", 1) == 1:  # and so no router
            arm = {name: word for name, word in arm.items() if name not in _ROUTED}
        fixed = ":" in str(combination[-1]) and not all(grouped)
        if fixed or (arm.get("mask") == "block" and "row" in words["mask"]):  # the arm as published
            arm = {name: word for name, word in arm.items() if name not in _BUDGETED}
        if arm.get("budget", UNIFORM) in {UNIFORM, TRIM}:
            arm.pop("strength", None)
        pruning = Pruning.of(combination[-1], **arm)
        if pruning.sparsity.group:  # groups lie in a row
            pruning = dataclasses.replace(pruning, mask="row")
        arms[pruning] = None
    return list(arms)


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

    ``zeros`` are those of a layer's rows (neurons,), or the layer's, which TRIM's rule hands to the
    rows; without them each row has the sparsity. `least` and `most` are the smallest and the largest
    share of zeros of a row.
    ``error`` is ‖(W - Ŵ)X‖² / ‖WX‖² over the calibration's inputs X, each with the Ŵ of its expert;
    NaN for a layer without output. ``held_out_error`` is the same over the inputs (tokens, inputs)
    ``held_out``. ``zeros`` are counted in the weights themselves.

    Under torchrun each process prunes some of the experts, and all place all of them.

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
