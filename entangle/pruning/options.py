"""The options of pruning, each declared once: a field of `Pruning`.

The command line's flags, the keyword arguments of `sparsify` and `sweep`, the entries of run.json
and the columns of tables are made from the fields.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import (
    Annotated,
    Any,
    Literal,
    Required,
    Self,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
)

from entangle.numerics.sparsity import Mask, Method, Solve, Sparsity

NONE: Literal["none"] = "none"
MethodOption = Literal[Method, "none"]
SolveOption = Literal["auto", Solve]
Propagate = Literal["sparse", "dense"]
Assign = Literal["kmeans", "random"]
Reconstruct = Literal["none", "mlp"]
Budget = Literal[
    "uniform",
    "wasserstein*std",
    "ranks",
    "wasserstein",
    "wasserstein_bulk*std",
    "wasserstein_bulk",
    "std",
    "kurtosis",
    "weight_norm",
    "shuffled",
    "trim",
]
Across = Literal["uniform", "entanglement", "shuffled", "depth", "owl", "lsa", "search"]
Inputs = Literal["dense", "teal", "wina"]
InputShares = Literal["greedy", "uniform"]
# Which prunings have it: every, those of weights, with several experts, a budget, a search, sparse inputs.
Scope = Literal["every", "weights", "experts", "budget", "search", "inputs"]

Value = TypeVar("Value")

UNIFORM: Literal["uniform"] = "uniform"
TRIM: Literal["trim"] = "trim"
SEARCH: Literal["search"] = "search"
SHUFFLED: Literal["shuffled"] = "shuffled"
SOLVE: Solve = "exact"  # of SparseGPT, unless another is given
DISTANCE: Budget = "wasserstein*std"  # the distance in output units; the default budget of a run


@dataclasses.dataclass(frozen=True)
class Clustering:
    """How a layer's inputs are split among experts."""

    experts: int = 1
    assign: Assign = "kmeans"
    components: int | None = None  # of PCA; None is inputs // 32


ONE = Clustering()


def read_count(text: str) -> int:
    """Read a whole number.

    Raises:
        ValueError: the text is no whole number.
    """
    return _read(int, text, "a whole number such as 16")


def read_number(text: str) -> float:
    """Read a number.

    Raises:
        ValueError: the text is no number.
    """
    return _read(float, text, "a number such as 0.25")


def _count_or_auto(text: str) -> int | None:
    return None if text == "auto" else _read(int, text, "a number or auto")


def _number_or_auto(text: str) -> float | str:
    return text if text == "auto" else _read(float, text, "a number or auto")


def _read(kind: Callable[[str], Value], text: str, expected: str) -> Value:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"expected {expected}, got {text!r}") from error


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of pruning; name, default and choices are taken from its field."""

    help: str
    read: Callable[[str], Any] = str  # a value from text; raises ValueError
    metavar: str | None = None
    scope: Scope = "every"
    name: str = ""
    default: Any = ...  # required
    choices: tuple[str, ...] = ()  # empty if any value of the type is allowed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """How the layers of a model are pruned."""

    method: Annotated[
        MethodOption,
        Option("method of pruning; none leaves the weights dense, and is that of sparsity 0"),
    ] = "sparsegpt"
    mask: Annotated[
        Mask,
        Option(
            "mask of the zeros: with row each neuron has exactly the sparsity, with block zeros are "
            "chosen per 128 columns over all rows",
            scope="weights",
        ),
    ] = "row"
    solve: Annotated[
        SolveOption,
        Option(
            "how the kept weights are computed: greedy, by the method as published; exact, the "
            "weights with the least error that the method's mask allows; admm, by a better mask too; "
            "auto, exact for sparsegpt and greedy for wanda and magnitude",
            scope="weights",
        ),
    ] = "auto"
    propagate: Annotated[
        Propagate,
        Option(
            "inputs that a block is calibrated on: from the pruned blocks before it (sparse), or from "
            "the dense blocks (dense)",
            scope="weights",
        ),
    ] = "sparse"
    reconstruct: Annotated[
        Reconstruct,
        Option(
            "after a block is pruned, tune the weights that its MLP has kept until the hidden states "
            "behind the block are the dense model's (mlp), or not (none)",
            scope="weights",
        ),
    ] = "none"
    experts: Annotated[
        int,
        Option(
            "number of pruned copies of each layer, one for each cluster of its inputs; 1 is plain "
            "pruning",
            read_count,
            "N",
        ),
    ] = 1
    assign: Annotated[
        Assign,
        Option(
            "how tokens are assigned to experts: by k-means (kmeans), or at random as a control "
            "(random)",
            scope="experts",
        ),
    ] = "kmeans"
    components: Annotated[
        int | None,
        Option(
            "number of PCA components before k-means; 0: no PCA; auto: inputs // 32",
            _count_or_auto,
            "N",
            "experts",
        ),
    ] = None
    shrinkage: Annotated[
        float,
        Option(
            "shrinkage of each expert's Gram towards the pooled Gram: the number of average tokens "
            "that are added to it, divided by the layer's inputs; 0: no shrinkage",
            read_number,
            "X",
            "experts",
        ),
    ] = 0.5
    budget: Annotated[
        Budget,
        Option(
            "how a layer's weights are divided among its rows: uniform, trim (TRIM's rule), or "
            "RUN[:VARIABLE], by a variable of the measured run RUN: wasserstein*std (default), "
            "wasserstein, std, ranks (the sum of the ranks of these two), wasserstein_bulk*std, "
            "wasserstein_bulk (of the bulk, without outliers), kurtosis, weight_norm, "
            "shuffled (the default one shuffled, as a control) or uniform (if only --across uses RUN)",
            metavar="RUN[:VARIABLE]",
            scope="budget",
        ),
    ] = UNIFORM
    strength: Annotated[
        float,
        Option(
            "how much the sparsities of a layer's rows differ if --budget is by a variable of RUN, "
            "from 0 (not at all) to 1",
            _number_or_auto,
            "X",
            "budget",
        ),
    ] = 0.25
    across: Annotated[
        Across,
        Option(
            "how weights are divided among blocks: uniform; entanglement, by each block's share of "
            "entangled neurons in --budget's RUN; shuffled, these shares shuffled as a control; "
            "depth, more in early blocks; owl, OWL's rule; lsa, LSA's rule; or search, as an "
            "evolutionary search finds for this text, which takes a while",
            scope="budget",
        ),
    ] = UNIFORM
    scores: Annotated[
        int,
        Option(
            "number of scores that --across search takes at most",
            read_count,
            "N",
            "search",
        ),
    ] = 440
    inputs: Annotated[
        Inputs,
        Option(
            "which inputs of a layer are zero for a token: dense, none; teal, those whose absolute "
            "value is below the layer's threshold; wina, all but those with the largest product of "
            "the absolute value and the norm of its column of weights. The first token of each "
            "window keeps its inputs"
        ),
    ] = "dense"
    input_sparsity: Annotated[
        float,
        Option(
            "share of a token's inputs that are zero, such as 0.5; the thresholds are those of this "
            "share of the calibration inputs",
            read_number,
            "X",
            "inputs",
        ),
    ] = 0.5
    input_shares: Annotated[
        InputShares,
        Option(
            "how the zero inputs are divided among the layers of a block: greedy, step by step where "
            "the block's outputs change the least; or uniform",
            scope="inputs",
        ),
    ] = "greedy"
    sparsity: Annotated[
        Sparsity,
        Option(
            "share of zeros, such as 0.8, or n:m, such as 2:4: of every m weights n are kept; 0 "
            "leaves the weights dense",
            metavar="S",
        ),
    ]

    def __post_init__(self) -> None:
        """Replace ``auto`` by what it is for the method, and the method of sparsity 0 by ``none``."""
        if self.sparsity.share == 0:
            object.__setattr__(self, "method", NONE)
        if self.solve == "auto":
            solve = SOLVE if self.method == "sparsegpt" else "greedy"
            object.__setattr__(self, "solve", solve)

    @classmethod
    def of(cls, **options: Unpack["PruningOptions"]) -> Self:
        """Return the pruning with these options, one value each.

        Raises:
            TypeError: an option is unknown, or the sparsity is missing.
            ValueError: a value is not among the choices, out of range or no sparsity, or an option
                has several values.
        """
        values: dict[str, Any] = dict(options)
        check_names(values)
        for name, value in values.items():
            if _is_several(value):
                raise ValueError(
                    f"{name} takes one value here, got {value!r}: use sweep for several values"
                )
            choices = OPTIONS[name].choices
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if not isinstance(values["sparsity"], Sparsity):
            values["sparsity"] = Sparsity.parse(values["sparsity"])
        pruning = cls(**values)
        pruning._check()
        return pruning

    def _check(self) -> None:
        """Check that numbers are in range and that the options can be combined.

        Raises:
            ValueError: a number is out of range, or options exclude each other.
        """
        if not isinstance(self.experts, int) or self.experts < 1:
            raise ValueError(f"a layer needs at least 1 expert, got experts={self.experts!r}")
        components = self.components
        if components is not None and (not isinstance(components, int) or components < 0):
            raise ValueError(
                f"components must be a number that is not negative (0: no PCA), got {components!r}"
            )
        if not isinstance(self.shrinkage, int | float) or not 0 <= self.shrinkage < math.inf:
            raise ValueError(
                f"shrinkage must be a number that is not negative, got {self.shrinkage!r}"
            )
        if self.method == NONE:
            self._check_dense()
        if not isinstance(self.input_sparsity, int | float) or not 0 < self.input_sparsity < 1:
            raise ValueError(
                f"input_sparsity must be a number between 0 and 1, got {self.input_sparsity!r}; inputs "
                "dense has no zero inputs"
            )
        if self.experts > 1 and self.method != "sparsegpt":
            raise ValueError(
                f"several experts need method sparsegpt, got {self.experts} experts and method "
                f"{self.method}: use sparsegpt, or one expert"
            )
        if self.reconstruct != "none" and self.propagate == "dense":
            raise ValueError(
                f"reconstruct {self.reconstruct} makes up for what the pruned blocks before a block "
                "have lost, but propagate dense gives each block the dense model's inputs: use "
                "propagate sparse"
            )
        if not isinstance(self.strength, int | float) or not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be a number from 0 to 1, got {self.strength!r}")
        if not isinstance(self.scores, int) or self.scores < 1:
            raise ValueError(f"a search needs at least 1 score, got scores={self.scores!r}")
        if self.budgeted and (self.mask == "block" or self.sparsity.group):
            why = "mask block chooses the zeros among all rows"
            why = (
                f"sparsity {self.sparsity} fixes every row's zeros" if self.sparsity.group else why
            )
            raise ValueError(
                f"budget {self.budget} across {self.across} sets the number of weights that each "
                f"row keeps, but {why}: use mask row and a share of zeros"
            )

    def _check_dense(self) -> None:
        """Check that the weights may stay dense.

        Raises:
            ValueError: the sparsity is not 0, an option needs pruned weights, or inputs are dense too.
        """
        if self.sparsity.share:
            raise ValueError(
                f"method none leaves the weights dense, got sparsity {self.sparsity}: use sparsity 0"
            )
        asked = {"experts": self.experts > 1, "reconstruct": self.reconstruct != "none"}
        asked |= {"budget": self.budget != UNIFORM, "across": self.across != UNIFORM}
        for name, is_asked in asked.items():
            if is_asked:
                raise ValueError(
                    f"sparsity 0 leaves the weights dense, but {name} {getattr(self, name)} needs "
                    "pruned weights: leave it out, or use another sparsity"
                )
        if not self.sparse_inputs:
            raise ValueError(
                "sparsity 0 with dense inputs leaves the model as it is: give another sparsity, or "
                "inputs teal or wina"
            )

    @property
    def sparse_inputs(self) -> bool:
        """Whether some of the layers' inputs are set to zero."""
        return self.inputs != "dense"

    @property
    def budgeted(self) -> bool:
        """Whether the sparsity differs between rows or blocks."""
        return (self.budget, self.across) != (UNIFORM, UNIFORM)

    @property
    def needs_run(self) -> bool:
        """Whether the budget is made from a measured run."""
        return needs_run(self.budget, self.across)

    @property
    def clustering(self) -> Clustering:
        """How the inputs of a layer are split among experts."""
        return ONE if self.experts == 1 else Clustering(self.experts, self.assign, self.components)

    def settings(self) -> dict[str, Any]:
        """Return the options for run.json, without those that are unused."""
        scopes = {"every": True, "weights": self.method != NONE, "experts": self.experts > 1}
        scopes |= {"budget": self.budgeted, "inputs": self.sparse_inputs}
        scopes |= {"search": self.across == SEARCH}
        options = {name: getattr(self, name) for name, one in OPTIONS.items() if scopes[one.scope]}
        options |= {"sparsity": str(self.sparsity)}
        if options.get("components", 0) is None:
            options["components"] = "auto"
        if "strength" in options and self.budget in {UNIFORM, TRIM}:  # these have no strength
            options["strength"] = ""
        return options


Several: TypeAlias = Value | Sequence[Value]


def several(value: Any) -> list[Any]:
    """Return one or several values as a list."""
    return [*value] if _is_several(value) else [value]


def _is_several(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


class PruningOptions(TypedDict, total=False):
    """The fields of `Pruning` as keyword arguments; `sweep` takes several values of each.

    Type checkers and editors need them written out; a test checks that they match the fields.
    """

    method: Several[MethodOption]
    mask: Several[Mask]
    solve: Several[SolveOption]
    propagate: Several[Propagate]
    reconstruct: Several[Reconstruct]
    experts: Several[int]
    assign: Several[Assign]
    components: Several[int | None]
    shrinkage: Several[float]
    budget: Several[Budget]
    strength: Several[float]
    across: Several[Across]
    scores: Several[int]
    inputs: Several[Inputs]
    input_sparsity: Several[float]
    input_shares: Several[InputShares]
    sparsity: Required[Several[str | float]]


def _options() -> Iterator[Option]:
    types = get_type_hints(Pruning, include_extras=True)
    for field in dataclasses.fields(Pruning):
        kind, option = get_args(types[field.name])
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        default = ... if field.default is dataclasses.MISSING else field.default
        yield dataclasses.replace(option, name=field.name, default=default, choices=choices)


OPTIONS: Mapping[str, Option] = {option.name: option for option in _options()}

EXPERT_DEFAULTS = {  # defaults of the options of several experts, as text in tables
    name: "auto" if option.default is None else str(option.default)
    for name, option in OPTIONS.items()
    if option.scope == "experts"
}
UNBUDGETED = {  # text in tables for arms without a budget
    name: "" if name in {"strength", "scores"} else str(option.default)
    for name, option in OPTIONS.items()
    if option.scope in {"budget", "search"}
}
OF_INPUTS = ("inputs", *(n for n, option in OPTIONS.items() if option.scope == "inputs"))
SHRINKAGE: float = OPTIONS["shrinkage"].default
STRENGTH: float = OPTIONS["strength"].default
METHODS: tuple[Method, ...] = get_args(Method)
SOLVERS: tuple[Solve, ...] = get_args(Solve)


def check_solve(solve: str) -> None:
    """Check the solver of a command that prunes by SparseGPT alone.

    Raises:
        ValueError: it is none.
    """
    if solve not in SOLVERS:
        raise ValueError(f"solve must be one of {', '.join(SOLVERS)}, got {solve!r}")


def needs_run(budget: str, across: str) -> bool:
    """Return whether a budget is made from a measured run."""
    return budget not in {UNIFORM, TRIM} or across in {"entanglement", SHUFFLED}


def check_names(names: Collection[str]) -> None:
    """Check that these are names of options, and that sparsity is among them.

    Raises:
        TypeError: a name is unknown, or sparsity is missing.
    """
    for name in names:
        if name not in OPTIONS:
            near = get_close_matches(name, OPTIONS, 1)
            expected = near[0] if near else f"one of {', '.join(OPTIONS)}"
            raise TypeError(f"unknown option {name!r}: expected {expected}")
    if "sparsity" not in names:
        raise TypeError(
            "sparsity is missing: give a share of zeros such as 0.5, or n:m such as 2:4"
        )


Function = TypeVar("Function", bound=Callable[..., Any])


def with_options(**defaults: Any) -> Callable[[Function], Function]:
    """Return a decorator that lists the options of pruning in a function's signature.

    So `help` and notebooks show them. ``defaults`` are the function's own defaults, where they
    differ from those of the options.
    """

    def shown(function: Function) -> Function:
        signature = inspect.signature(function)
        parameters = [
            one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD
        ]
        for option in OPTIONS.values():
            default = defaults.get(option.name, option.default)
            default = inspect.Parameter.empty if default is ... else default
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(option.name, kind, default=default))
        signature = signature.replace(parameters=parameters)
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return shown


def arms_of(**options: Unpack[PruningOptions]) -> list[Pruning]:
    """Return a pruning for each combination of the options' values, without duplicates.

    Arms that differ only in options without effect are one arm: ``propagate`` of magnitude, which
    uses no inputs unless it is solved or reconstructed; the router's options with one expert; the
    strength of budgets without one; the scores without a search; all options of the weights with
    sparsity 0; those of sparse inputs with dense ones. Dense weights with dense inputs are no arm. Wanda and magnitude have one expert. If arms with sparse
    propagation are run too, those with dense propagation are not reconstructed. If masks by row are
    run too, masks by block have no
    budget; if shares of zeros are run too, n:m has none. Both are as published.

    Raises:
        TypeError: an option is unknown, or the sparsity is missing.
        ValueError: a value is not among the choices, out of range or no sparsity, an option has no
            value, or options exclude each other.
    """
    check_names(options)
    values: dict[str, list[Any]] = {name: several(value) for name, value in options.items()}
    for name, listed in values.items():
        if not listed:
            raise ValueError(f"a sweep needs at least one value of {name}")
    experts, methods = values.get("experts", [1]), values.get("method", ["sparsegpt"])
    if max(experts) > 1 and "sparsegpt" not in methods:
        raise ValueError(
            f"several experts need method sparsegpt, got methods {', '.join(methods)}: add "
            "sparsegpt, or use one expert"
        )
    all_grouped = all(Sparsity.parse(one).group for one in values["sparsity"])
    # Arms with dense propagation come together, since they share one pass over the windows.
    order = sorted(values, key=[*sorted(OPTIONS, key=lambda name: name != "propagate")].index)
    arms: dict[Pruning, None] = {}
    for combination in itertools.product(*(values[name] for name in order)):
        arm = dict(zip(order, combination, strict=True))
        if arm.get("inputs", "dense") == "dense":
            arm = _without(arm, "inputs")
        if Sparsity.parse(arm["sparsity"]).share == 0:  # nothing is done to the weights
            of_inputs = {n: arm[n] for n in arm if n == "inputs" or OPTIONS[n].scope == "inputs"}
            if of_inputs.get("inputs", "dense") != "dense":
                arms[Pruning.of(**of_inputs, sparsity="0")] = None
            continue
        if arm.get("propagate") == "dense" and "sparse" in values["propagate"]:
            arm["reconstruct"] = "none"
        greedy = arm.get("solve", "auto") in {"auto", "greedy"}
        if (
            arm.get("method") == "magnitude"
            and greedy
            and arm.get("reconstruct", "none") == "none"
            and arm.get("budget") != TRIM
        ):  # it uses no inputs
            arm["propagate"] = values.get("propagate", ["sparse"])[0]
        if arm.get("method", "sparsegpt") != "sparsegpt":  # a method without experts
            arm["experts"] = 1
        if arm.get("experts", 1) == 1:  # no router
            arm = _without(arm, "experts")
        fixed = bool(Sparsity.parse(arm["sparsity"]).group) and not all_grouped
        if fixed or (arm.get("mask") == "block" and "row" in values["mask"]):  # as published
            arm = _without(arm, "budget")
        if arm.get("budget", UNIFORM) in {UNIFORM, TRIM}:
            arm.pop("strength", None)
        if arm.get("across", UNIFORM) != SEARCH:
            arm = _without(arm, "search")
        pruning = Pruning.of(**arm)
        if pruning.sparsity.group:  # groups of n:m lie within a row
            pruning = dataclasses.replace(pruning, mask="row")
        arms[pruning] = None
    if not arms:
        raise ValueError(
            "sparsity 0 with dense inputs is the dense model, which is scored in any case: give "
            "another sparsity, or inputs teal or wina"
        )
    return list(arms)


def _without(arm: Mapping[str, Any], scope: Scope) -> dict[str, Any]:
    return {name: value for name, value in arm.items() if OPTIONS[name].scope != scope}
