"""What an ablation does to which neurons: its arms, the sets of neurons, and the outputs changed.

An arm changes outputs of chosen neurons while the model runs, and no weight of it: adding an arm
costs one evaluation.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import xarray as xr

from entangle.measurement.ranking import Neurons, matched_random, top_by_layer
from entangle.model.layers import LinearLayer
from entangle.numerics.sparsity import Sparsity
from entangle.pruning.options import ONE, Clustering
from entangle.runs.dataset import dataset_of

INTERVENTIONS = ("sparsify", "zero", "mean", "negative")
RANDOM, BOTTOM = "random", "bottom"
RIVALS = ("kurtosis", "weight_norm", "std", "difficulty")
SETS = ("wasserstein", BOTTOM, RANDOM, *RIVALS)


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
    """Return which neurons of these layers, those of its block if it has one, an arm treats.

    Layers that have none, since all their neurons are dead, are left out.
    """
    names = [layer.name for layer in layers if arm.block in {None, layer.block}]
    by = "wasserstein" if arm.neurons in {RANDOM, BOTTOM} else arm.neurons
    chosen = top_by_layer(run, arm.share, by=by, lowest=arm.neurons == BOTTOM, layers=names)
    if arm.neurons == RANDOM:
        chosen = matched_random(run, chosen, seed=arm.seed or 0)
    return {name: neurons for name, neurons in chosen.items() if len(neurons)}
