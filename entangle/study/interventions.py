"""What an ablation does to which neurons: its arms, the sets of neurons, and the outputs changed.

An arm changes outputs of chosen neurons while the model runs, and no weight of it: adding an arm
costs one evaluation.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from torch.nn import functional

from entangle.model.experts import ExpertLinear
from entangle.model.layers import LinearLayer
from entangle.numerics.pruning import Sparsity
from entangle.numerics.routing import Router
from entangle.study.calibration import ONE, Clustering
from entangle.study.dataset import dataset_of
from entangle.study.ranking import Neurons, matched_random, top_by_layer

INTERVENTIONS = ("sparsify", "zero", "mean", "negative")
RANDOM, BOTTOM = "random", "bottom"
RIVALS = ("kurtosis", "weight_norm", "std", "difficulty")
SETS = ("wasserstein", BOTTOM, RANDOM, *RIVALS)

Outputs = Callable[[torch.Tensor], torch.Tensor]  # of chosen neurons, from a layer's inputs


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is done to which neurons."""

    intervention: str
    sparsity: Sparsity | None  # of `sparsify` alone
    experts: int
    neurons: str  # one of SETS
    share: float  # of each layer's neurons
    seed: int | None  # of a random set
    block: int | None  # None: all blocks at once

    @property
    def clustering(self) -> Clustering:
        """How the inputs of a layer are split."""
        return ONE if self.experts == 1 else Clustering(self.experts)

    def words(self) -> dict[str, Any]:
        """Return it as a row of a table begins."""
        sparsity = "" if self.sparsity is None else str(self.sparsity)
        return dataclasses.asdict(self) | {"sparsity": sparsity}


def arms_of(
    run: xr.DataTree | xr.Dataset,
    *,
    interventions: Sequence[str],
    sparsities: Sequence[str | float],
    experts: Sequence[int],
    sets: Sequence[str],
    shares: Sequence[float],
    seeds: int,
    blocks: Sequence[int | None],
) -> list[Arm]:
    """Return the arms of all combinations, each once; a set that the run has no variable for is not.

    Raises:
        ValueError: a word that is none of the choices, or a number out of range.
    """
    check_words(interventions, sparsities, experts, sets, shares, seeds)
    known = [name for name in dict.fromkeys(sets) if _has(run, name)]
    kinds: list[tuple[str, Sparsity | None, int]] = []
    for intervention in interventions:
        if intervention == "sparsify":
            parsed = [Sparsity.parse(sparsity) for sparsity in sparsities]
            kinds += [(intervention, one, count) for count in experts for one in parsed]
        else:
            kinds.append((intervention, None, 1))
    arms: dict[Arm, None] = {}
    for kind, share, name, block in itertools.product(kinds, shares, known, blocks):
        for seed in range(seeds) if name == RANDOM else [None]:
            arms[Arm(*kind, name, share, seed, block)] = None
    return list(arms)


def check_words(
    interventions: Sequence[str],
    sparsities: Sequence[str | float],
    experts: Sequence[int],
    sets: Sequence[str],
    shares: Sequence[float],
    seeds: int,
) -> None:
    """See that arms can be made of words, before a model is loaded.

    Raises:
        ValueError: a word that is none of the choices, or a number out of range.
    """
    for words, choices in ((interventions, INTERVENTIONS), (sets, SETS)):
        for word in words:
            if word not in choices:
                raise ValueError(f"expected one of {', '.join(choices)}, got {word!r}")
    for sparsity in sparsities:
        Sparsity.parse(sparsity)
    named = {"interventions": interventions, "sparsities": sparsities, "experts": experts}
    for name, values in (named | {"sets": sets, "shares": shares}).items():
        if not values:
            raise ValueError(f"an ablation needs at least one of {name}")
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"expected a share of neurons above 0 and at most 1, got {share}")
    if min(experts) < 1:
        raise ValueError(f"a layer needs at least 1 expert, got {min(experts)}")
    if seeds < 1 and RANDOM in sets:
        raise ValueError(f"random neurons need at least 1 seed, got {seeds}")


def missing_sets(run: xr.DataTree | xr.Dataset, sets: Sequence[str]) -> list[str]:
    """Return the sets that the run has no variable for."""
    return [name for name in dict.fromkeys(sets) if not _has(run, name)]


def _has(run: xr.DataTree | xr.Dataset, name: str) -> bool:
    return name in {RANDOM, BOTTOM} or name in dataset_of(run)


def neurons_of(run: xr.DataTree | xr.Dataset, arm: Arm, layers: Sequence[LinearLayer]) -> Neurons:
    """Return which neurons of these layers, those of its block if it has one, an arm treats."""
    names = [layer.name for layer in layers if arm.block in {None, layer.block}]
    if arm.neurons == RANDOM:
        top = top_by_layer(run, arm.share, layers=names)
        return matched_random(run, top, seed=arm.seed or 0)
    by = "wasserstein" if arm.neurons == BOTTOM else arm.neurons
    return top_by_layer(run, arm.share, by=by, lowest=arm.neurons == BOTTOM, layers=names)


@dataclasses.dataclass(frozen=True, eq=False)
class SparseRows:
    """The pruned weights of some neurons of a layer, for one expert or several."""

    neurons: torch.Tensor  # (some,) int64, ascending
    weight: torch.Tensor  # ([experts,] some, inputs)
    router: Router | None
    counts: list[int]  # the calibration's tokens of each expert

    def among(self, neurons: torch.Tensor) -> "SparseRows":
        """Return those of fewer neurons, which must be among these."""
        places = torch.searchsorted(self.neurons, neurons)
        weight = self.weight.index_select(-2, places)
        return dataclasses.replace(self, neurons=neurons, weight=weight)

    def outputs(self, layer: LinearLayer) -> Outputs:
        """Return what gives their outputs (..., some) from the layer's inputs, its bias included."""
        bias = getattr(layer.module, "bias", None)
        bias = None if bias is None else bias.detach()[self.neurons]
        if self.router is not None:
            return ExpertLinear(self.weight, bias, self.router, self.counts)
        return lambda inputs: functional.linear(inputs, self.weight, bias)


def changed_outputs(
    intervention: str,
    neurons: Mapping[str, torch.Tensor],
    *,
    means: Mapping[str, torch.Tensor],
    sparse: Mapping[str, Outputs],
) -> Callable[[LinearLayer, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return what changes the outputs of the neurons of each layer (see `hooks.intervening`).

    ``zero`` makes them zero, ``mean`` their ``means``, and ``negative`` only those below zero zero
    (arXiv 2509.24198); ``sparsify`` gives those of ``sparse`` weights.
    """

    def change(layer: LinearLayer, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        chosen = neurons[layer.name]
        if intervention == "sparsify":
            new = sparse[layer.name](inputs)
        elif intervention == "negative":
            new = outputs.index_select(-1, chosen).clamp(min=0)
        else:
            new = outputs.new_zeros(*outputs.shape[:-1], len(chosen))
            if intervention == "mean":
                new = new + means[layer.name].to(new)
        return outputs.index_copy(-1, chosen, new)

    return change
