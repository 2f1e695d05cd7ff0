"""The options of pruning, each declared once."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, Self

from entangle.numerics.sparsity import Mask, Method, Sparsity

UNIFORM, TRIM, SHUFFLED = "uniform", "trim", "shuffled"
BUDGET = "wasserstein*std"  # the distance in output units
ROWS = (UNIFORM, BUDGET, "ranks", "wasserstein", "std", "kurtosis", "weight_norm", SHUFFLED, TRIM)
ACROSS = (UNIFORM, "entanglement", SHUFFLED, "depth", "owl")
STRENGTH = 0.25


def needs_run(budget: str, across: str) -> bool:
    """Say whether a budget is made of what a run measured."""
    return budget not in {UNIFORM, TRIM} or across in {"entanglement", SHUFFLED}


Assign = Literal["kmeans", "random"]


@dataclasses.dataclass(frozen=True)
class Clustering:
    """How a layer's inputs are split among experts."""

    experts: int = 1
    assign: Assign = "kmeans"
    components: int | None = None  # of PCA; None is inputs // 32


ONE = Clustering()
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
