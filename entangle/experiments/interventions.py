"""The arms of an ablation: interventions on sets of neurons.

An arm changes the outputs of chosen neurons while the model runs, and no weights. So each arm costs
one evaluation.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Self

from entangle.numerics.sparsity import Solve, Sparsity
from entangle.pruning.options import ONE, SOLVE, Clustering, Several, check_solve, several

INTERVENTIONS = ("sparsify", "zero", "mean", "negative")
RANDOM, BOTTOM = "random", "bottom"
RIVALS = ("kurtosis", "weight_norm", "std", "difficulty", "wasserstein_bulk")
SETS = ("wasserstein", BOTTOM, RANDOM, *RIVALS)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One intervention on one set of neurons."""

    intervention: str
    sparsity: Sparsity | None  # None unless the intervention is `sparsify`
    experts: int
    neurons: str  # one of SETS
    share: float  # of each layer's neurons
    seed: int | None  # None unless the set is random
    block: int | None  # None: all blocks at once

    @property
    def clustering(self) -> Clustering:
        """How the inputs of a layer are split among experts."""
        return ONE if self.experts == 1 else Clustering(self.experts)

    def settings(self) -> dict[str, Any]:
        """Return the fields of the arm for tables and JSON."""
        sparsity = "" if self.sparsity is None else str(self.sparsity)
        return dataclasses.asdict(self) | {"sparsity": sparsity}


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Interventions and sets of neurons, to be run in all combinations."""

    intervention: Sequence[str]
    sparsity: Sequence[Sparsity]  # used by `sparsify` only, like experts
    experts: Sequence[int]
    sets: Sequence[str]
    share: Sequence[float]
    seeds: int  # number of random sets
    solve: Solve  # used by `sparsify` only

    @classmethod
    def of(
        cls,
        *,
        intervention: Several[str] = "sparsify",
        sparsity: Several[str | float] = 0.9,
        experts: Several[int] = 1,
        sets: Several[str] = SETS,
        share: Several[float] = 0.03,
        seeds: int = 5,
        solve: Solve = SOLVE,
    ) -> Self:
        """Return an ablation of one or several values each; needs no model.

        Raises:
            ValueError: a value is missing, not among the choices, or out of range.
        """
        sparsities = [Sparsity.parse(one) for one in several(sparsity)]
        ablation = cls(
            several(intervention),
            sparsities,
            several(experts),
            several(sets),
            several(share),
            seeds,
            solve,
        )
        ablation._check()
        return ablation

    def _check(self) -> None:
        """Check that values are among the choices and in range.

        Raises:
            ValueError: a value is missing, not among the choices, or out of range.
        """
        for name, choices in (("intervention", INTERVENTIONS), ("sets", SETS)):
            for value in getattr(self, name):
                if value not in choices:
                    raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        check_solve(self.solve)
        for name in ("intervention", "sparsity", "experts", "sets", "share"):
            if not getattr(self, name):
                raise ValueError(f"an ablation needs at least one value of {name}")
        for share in self.share:
            if not 0 < share <= 1:
                raise ValueError(f"expected a share of neurons above 0 and at most 1, got {share}")
        if min(self.experts) < 1:
            raise ValueError(f"a layer needs at least 1 expert, got {min(self.experts)}")
        if self.seeds < 0:
            raise ValueError(f"seeds must not be negative, got {self.seeds}")
        if self.seeds == 0 and RANDOM in self.sets:
            raise ValueError(f"random neurons need at least 1 seed, got {self.seeds}")

    def arms(self, sets: Sequence[str], blocks: Sequence[int | None]) -> list[Arm]:
        """Return the arms of all combinations with these sets and blocks, without duplicates."""
        kinds: list[tuple[str, Sparsity | None, int]] = []
        for intervention in self.intervention:
            if intervention == "sparsify":
                kinds += [(intervention, s, count) for count in self.experts for s in self.sparsity]
            else:
                kinds.append((intervention, None, 1))
        arms: dict[Arm, None] = {}
        for kind, share, name, block in itertools.product(kinds, self.share, sets, blocks):
            for seed in range(self.seeds) if name == RANDOM else [None]:
                arms[Arm(*kind, name, share, seed, block)] = None
        return list(arms)
