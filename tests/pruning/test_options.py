"""Options of pruning: the same in Python, on the command line and in tables, and their arms."""

import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import numpy as np
import pytest

import entangle
from entangle import arguments, commands
from entangle.experiments.budget_search import STRENGTHS, VARIABLES
from entangle.numerics.sparsity import Mask, Method, Sparsity
from entangle.pruning.options import (
    EXPERT_DEFAULTS,
    METHODS,
    ONE,
    OPTIONS,
    SHRINKAGE,
    STRENGTH,
    UNBUDGETED,
    Across,
    Assign,
    Budget,
    Clustering,
    Inputs,
    InputShares,
    MethodOption,
    Propagate,
    Pruning,
    PruningOptions,
    Reconstruct,
    Several,
    SolveOption,
    arms_of,
    needs_run,
)

PACKAGE = Path(entangle.__file__).parent

COMMANDS: dict[str, list[str]] = {
    "sparsify": ["sparsify", "MODEL", "--text", "TEXT", "--out", "NEW", "--sparsity", "0.5"],
    "sweep": [
        *("sweep", "MODEL", "--text", "TEXT", "--out", "NEW", "--sparsity", "0.5"),
        *("--evaluation", "OTHER"),
    ],
}
CHOICES: dict[str, Any] = {
    "method": MethodOption,
    "mask": Mask,
    "solve": SolveOption,
    "propagate": Propagate,
    "reconstruct": Reconstruct,
    "assign": Assign,
    "budget": Budget,
    "across": Across,
    "inputs": Inputs,
    "input_shares": InputShares,
}
NAMES = [field.name for field in fields(Pruning)]


def flags_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the flags that the help of a command lists, without their dashes."""
    with pytest.raises(SystemExit):
        arguments.parser().parse_args([command, "--help"])
    return {*re.findall(r"^  (?:-h, )?--([\w-]+)", capsys.readouterr().out, re.MULTILINE)}


def parsed(command: str, *words: str) -> dict[str, Any]:
    """Return the options of pruning that a command reads from words."""
    found = vars(arguments.parser().parse_args([*COMMANDS[command], *words]))
    return {name: found[name] for name in NAMES if name in found}


# Declared once.


def test_the_fields_are_the_options_and_the_keyword_arguments() -> None:
    hints, several = get_type_hints(PruningOptions), cast("Any", Several)
    assert NAMES == [*hints] == [*OPTIONS]
    for name, kind in get_type_hints(Pruning).items():
        assert hints[name] == several[str | float if name == "sparsity" else kind]
    needed = {field.name for field in fields(Pruning) if field.default is MISSING}
    assert needed == PruningOptions.__required_keys__ == {"sparsity"}
    for name, option in OPTIONS.items():
        assert option.name == name
        assert option.choices == get_args(CHOICES.get(name))
        assert option.help
    assert get_args(Method) == METHODS


@pytest.mark.parametrize("command", COMMANDS)
def test_the_fields_are_the_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    # What a sweep takes beside: all that measure takes too, and what is scored.
    beside = flags_of("measure", capsys) | {"evaluation", "evaluation-windows", "rounded", "speed"}
    assert flags_of(command, capsys) - beside == {name.replace("_", "-") for name in NAMES}


def test_defaults_agree() -> None:
    usual = Pruning(sparsity=Sparsity(0.5))
    one = parsed("sparsify")
    assert (one["solve"], usual.solve) == ("auto", "exact")
    assert one.pop("strength") is None  # it needs a budget, if it is said
    routed = {"assign", "components", "shrinkage"}  # they need experts, if they are said
    of_inputs = {"input_sparsity", "input_shares"}
    assert {*NAMES} - {*one} == {"strength", "scores"} | routed | of_inputs
    said = {"sparsity": "0.5", "solve": "auto"}
    assert one == {name: getattr(usual, name) for name in one} | said
    assert Pruning.of(**one) == Pruning.of(sparsity=0.5) == usual
    some = parsed("sweep")
    assert some.pop("strength") is None
    words = {name: (value,) for name, value in one.items()}
    assert some == words | {"method": METHODS}
    assert arms_of(**some) == [Pruning.of(sparsity=0.5, method=method) for method in METHODS]
    assert arms_of(sparsity=0.5) == [usual]
    assert (OPTIONS["sparsity"].default, SHRINKAGE, STRENGTH) == (
        ...,
        usual.shrinkage,
        usual.strength,
    )


VALUES: dict[str, list[Any]] = {
    "experts": [1, 16],
    "components": [None, 0],
    "shrinkage": [0.0, 2.5],
    "strength": [0.1, 1.0],
    "scores": [110, 22],
    "input_sparsity": [0.4, 0.5],
    "sparsity": ["0.25", "2:4"],
}


@pytest.mark.parametrize("name", NAMES)
def test_flags_read_one_value_or_several(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = VALUES.get(name) or [*OPTIONS[name].choices]
    words = ["auto" if value is None else str(value) for value in values]
    flag = f"--{name.replace('_', '-')}"
    for word, value in zip(words, values, strict=True):
        assert parsed("sparsify", flag, word)[name] == value
    assert parsed("sweep", flag, ", ".join(words))[name] == tuple(values)
    if name in VALUES and name != "sparsity":
        for command in COMMANDS:
            with pytest.raises(SystemExit):
                parsed(command, flag, "luck")
            assert re.search(f"argument {flag}: .*'luck'", capsys.readouterr().err)


def test_columns_of_tables_are_those_of_experts_and_budgets() -> None:
    assert EXPERT_DEFAULTS == {"assign": "kmeans", "components": "auto", "shrinkage": "0.5"}
    assert UNBUDGETED == {"budget": "uniform", "strength": "", "across": "uniform", "scores": ""}


# One of each.


@pytest.mark.parametrize("name", CHOICES)
def test_a_word_that_is_no_choice_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words: dict[str, Any] = {"sparsity": 0.5, name: "luck"}
    words |= {"experts": 4} if name == "assign" else {}  # of one expert it is not read
    words |= {"inputs": "teal"} if name == "input_shares" else {}  # nor this of dense inputs
    listed = ", ".join(get_args(CHOICES[name]))
    for make in (Pruning.of, arms_of):
        with pytest.raises(ValueError, match=rf"^{name}\b.*'luck'") as error:
            make(**words)
        assert listed in str(error.value)
    if name != "budget":  # which may be a folder
        with pytest.raises(SystemExit):
            parsed("sparsify", f"--{name.replace('_', '-')}", "luck")
        assert (
            f"argument --{name.replace('_', '-')}: invalid choice: 'luck'"
            in capsys.readouterr().err
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [list, tuple])
def test_several_values_are_no_pruning(name: str, kind: type) -> None:
    value = VALUES.get(name, OPTIONS[name].choices)[0]
    words: dict[str, Any] = {"sparsity": 0.5, name: kind([value])}
    with pytest.raises(ValueError, match=rf"^{name}\b.*one value.*{re.escape(repr(words[name]))}"):
        Pruning.of(**words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"sparsity": "much"}, "sparsity.*n:m.*'much'"),
        ({"strength": -0.1}, r"strength.*-0\.1"),
        ({"strength": 1.5}, r"strength.*\b1\.5"),
        ({"strength": "auto"}, "strength.*'auto'"),
        ({"experts": 2, "method": "wanda"}, r"experts.*sparsegpt.*\b2 experts.*wanda"),
        ({"budget": "std", "sparsity": "2:4"}, r"budget std.*\b2:4\b"),
        ({"across": "owl", "mask": "block"}, r"across owl.*mask.*\bblock\b"),
        ({"inputs": "teal", "input_sparsity": 1.0}, r"input_sparsity.*between 0 and 1\b.*\b1\.0"),
        ({"inputs": "teal", "input_sparsity": 0}, r"input_sparsity.*between 0 and 1\b.*\b0\b"),
        ({"inputs": "teal", "input_sparsity": "much"}, "input_sparsity.*'much'"),
        ({"method": "none"}, r"none.*dense.*\b0\.5\b.*sparsity 0"),
        ({"sparsity": 0, "experts": 4}, "sparsity 0.*dense.*experts 4"),
        ({"sparsity": "0", "budget": "trim"}, "sparsity 0.*dense.*budget trim"),
        ({"sparsity": 0}, "sparsity 0.*dense inputs.*teal"),
    ],
)
def test_what_makes_no_pruning_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pruning.of(**{"sparsity": 0.5} | words)


def test_one_expert_is_one_clustering() -> None:
    assert Pruning.of(sparsity=0.5, assign="random", components=3).clustering == ONE
    four = Pruning.of(sparsity=0.5, experts=4, assign="random", components=3)
    assert four.clustering == Clustering(4, "random", 3)


def test_words_leave_out_what_is_of_experts_or_a_budget_where_there_are_none() -> None:
    every = {"method": "sparsegpt", "mask": "row", "solve": "exact", "propagate": "sparse"}
    every |= {"reconstruct": "none", "inputs": "dense"}
    routed = {"assign": "random", "shrinkage": 2.0}
    plain = Pruning.of(sparsity=0.5, assign="random", components=0, shrinkage=2.0, strength=0.75)
    assert plain.settings() == every | {"experts": 1, "sparsity": "0.5"}
    for components, word in ((None, "auto"), (0, 0), (3, 3)):
        mixture = Pruning.of(
            sparsity="2:4", experts=4, assign="random", components=components, shrinkage=2.0
        )
        expected = every | {"experts": 4, "components": word, "sparsity": "2:4"} | routed
        assert mixture.settings() == expected
    kinds: list[tuple[Any, Any, Any]] = [
        ("std", "uniform", 0.75),
        ("trim", "uniform", ""),
        ("uniform", "owl", ""),
        ("trim", "depth", ""),
        ("ranks", "shuffled", 0.75),
    ]
    for budget, across, strength in kinds:
        found = Pruning.of(sparsity=0.5, budget=budget, across=across, strength=0.75).settings()
        graded = {"budget": budget, "strength": strength, "across": across}
        assert found == every | {"experts": 1, "sparsity": "0.5"} | graded
    search = Pruning.of(sparsity=0.5, across="search", scores=33).settings()
    graded = {"budget": "uniform", "strength": "", "across": "search", "scores": 33}
    assert search == every | {"experts": 1, "sparsity": "0.5"} | graded
    both = Pruning.of(
        sparsity=0.5, experts=4, budget="std", across="search", inputs="teal"
    ).settings()
    assert [*both] == NAMES  # in their order
    dense = Pruning.of(sparsity=0, inputs="wina", input_sparsity=0.4).settings()
    of_inputs = {"inputs": "wina", "input_sparsity": 0.4, "input_shares": "greedy"}
    assert dense == {"method": "none", "experts": 1, "sparsity": "0"} | of_inputs


def test_a_run_is_needed_by_what_is_made_of_it() -> None:
    of_run = {*get_args(Budget)} - {"uniform", "trim"}
    for budget, across in itertools.product(get_args(Budget), get_args(Across)):
        needed = budget in of_run or across in {"entanglement", "shuffled"}
        assert needs_run(budget, across) is needed
        pruning = Pruning.of(sparsity=0.5, budget=budget, across=across)
        assert pruning.needs_run is needed
        assert pruning.budgeted is ((budget, across) != ("uniform", "uniform"))


# Arms.


def test_arms_that_would_be_the_same_run_once() -> None:
    arms = arms_of(
        sparsity=["0.5", "2:4"],
        method=METHODS,
        mask=("block", "row"),
        propagate=("sparse", "dense"),
    )
    words = ["-".join(map(str, arm.settings().values())) for arm in arms]
    assert len(words) == len(set(words)) == 15
    assert [word for word in words if word.startswith("magnitude")] == [
        "magnitude-block-greedy-sparse-none-1-dense-0.5",
        "magnitude-row-greedy-sparse-none-1-dense-2:4",
        "magnitude-row-greedy-sparse-none-1-dense-0.5",
    ]
    with pytest.raises(ValueError, match=r"one value.*\bsparsity\b"):
        arms_of(sparsity=[], method=METHODS, mask=("row",))


def test_only_sparsegpt_has_experts_and_one_expert_has_no_router() -> None:
    arms = arms_of(
        sparsity=[0.5],
        method=METHODS,
        experts=(1, 4, 16),
        assign=("random", "kmeans"),
        components=(None, 0),
        shrinkage=(0.0, 0.5),
    )
    kinds = [(arm.method, arm.experts, arm.assign, arm.components, arm.shrinkage) for arm in arms]
    mixtures = [kind for kind in kinds if kind[1] > 1]
    expected = itertools.product((4, 16), ("random", "kmeans"), (None, 0), (0.0, 0.5))
    assert mixtures == [("sparsegpt", *kind) for kind in expected]
    assert [kind for kind in kinds if kind[1] == 1] == [
        (method, 1, "kmeans", None, 0.5) for method in METHODS
    ]
    (grouped,) = arms_of(sparsity=["2:4"], mask=("block",), experts=(4,))
    assert (grouped.mask, grouped.experts) == ("row", 4)


def test_auto_is_exact_for_sparsegpt_and_greedy_for_the_others() -> None:
    resolved = {"sparsegpt": "exact", "wanda": "greedy", "magnitude": "greedy"}
    arms = arms_of(sparsity=0.5, method=METHODS)
    assert {arm.method: arm.solve for arm in arms} == resolved
    assert {arm.method: arm.settings()["solve"] for arm in arms} == resolved
    assert arms_of(sparsity=0.5, method=METHODS, solve=["auto", "greedy", "exact"]) == [
        Pruning.of(sparsity=0.5, method=method, solve=solve)
        for method in METHODS
        for solve in (("exact", "greedy") if method == "sparsegpt" else ("greedy", "exact"))
    ]


def test_magnitude_that_is_solved_again_sees_inputs() -> None:
    cases: dict[SolveOption, list[str]] = {"greedy": ["sparse"], "exact": ["sparse", "dense"]}
    for solve, seen in cases.items():
        arms = arms_of(sparsity=0.5, method="magnitude", solve=solve, propagate=["sparse", "dense"])
        assert [arm.propagate for arm in arms] == seen


def test_magnitude_by_trims_rule_sees_inputs() -> None:
    kinds = arms_of(
        sparsity=[0.7], method=["magnitude"], propagate=["sparse", "dense"], budget=["trim"]
    )
    assert [kind.propagate for kind in kinds] == ["sparse", "dense"]


def test_dense_inputs_are_not_reconstructed() -> None:
    kinds = arms_of(
        sparsity=[0.7],
        method=["magnitude", "sparsegpt"],
        propagate=["dense", "sparse"],
        reconstruct=["mlp", "none"],
    )
    assert [(kind.method, kind.propagate, kind.reconstruct) for kind in kinds] == [
        ("magnitude", "dense", "none"),
        ("sparsegpt", "dense", "none"),
        ("magnitude", "sparse", "mlp"),
        ("sparsegpt", "sparse", "mlp"),
        ("sparsegpt", "sparse", "none"),
    ]
    with pytest.raises(ValueError, match=r"reconstruct.*propagate sparse"):
        arms_of(sparsity=[0.7], propagate=["dense"], reconstruct=["mlp", "none"])


def test_dense_weights_and_dense_inputs_are_arms_only_of_the_other() -> None:
    arms = arms_of(
        sparsity=["0", 0.5],
        method=METHODS,
        mask=("row", "block"),
        inputs=["dense", "teal", "wina"],
        input_sparsity=[0.4, 0.5],
        input_shares="uniform",
    )
    kinds = [(arm.method, arm.mask, arm.inputs, arm.input_sparsity) for arm in arms]
    sparse = [*itertools.product(("teal", "wina"), (0.4, 0.5))]
    assert [kind for kind in kinds if kind[0] == "none"] == [
        ("none", "row", *one) for one in sparse
    ]
    pruned = [kind for kind in kinds if kind[0] != "none"]
    each = [*itertools.product(METHODS, ("row", "block"))]
    assert {*pruned} == {(*a, *b) for a in each for b in [("dense", 0.5), *sparse]}
    assert len(kinds) == len({*kinds})
    with pytest.raises(ValueError, match="dense model"):
        arms_of(sparsity=["0"], method=METHODS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--input-sparsity", "--input-shares"])
def test_options_of_sparse_inputs_need_them(command: str, flag: str) -> None:
    value = {"--input-sparsity": "0.4", "--input-shares": "uniform"}[flag]
    words = [*COMMANDS[command], flag, value]
    with pytest.raises(ValueError, match=f"{flag} has an effect only.*--inputs"):
        commands._options(arguments.parser().parse_args(words))
    options, _ = commands._options(arguments.parser().parse_args([*words, "--inputs", "teal"]))
    assert {"inputs", flag[2:].replace("-", "_")} <= {*options}


def test_one_value_is_as_several_of_one() -> None:
    several: dict[str, Any] = {"sparsity": ["2:4"], "method": ["wanda"], "components": [None]}
    one: dict[str, Any] = {name: values[0] for name, values in several.items()}
    assert arms_of(**one) == arms_of(**several) == [Pruning.of(**one)]


@pytest.mark.parametrize("name", NAMES)
def test_no_value_makes_no_arm(name: str) -> None:
    words: dict[str, Any] = {"sparsity": [0.5], name: []}
    with pytest.raises(ValueError, match=rf"sweep.*one value.*\b{name}\b"):
        arms_of(**words)


# A new option.

FIELD = """    flavour: Annotated[
        Literal["plain", "sweet"], Option("what a dummy option tastes of")
    ] = "plain"
    sparsity: Annotated[
        Sparsity,"""

LOOK = """
import json, sys
import matplotlib as mpl
mpl.use("Agg")
import pandas as pd
from entangle import printed
from entangle.arguments import parser
from entangle.experiments.sweep_table import tables_of
from entangle.pruning.options import Pruning, arms_of
from entangle.show import plots

common = ["--text", "t", "--evaluation", "t", "--out", "o", "--sparsity", "0.5"]
swept = parser().parse_args(["sweep", "m", *common, "--flavour", "plain,sweet"])
alone = parser().parse_args(["sparsify", "m", *common[:2], *common[4:], "--flavour", "sweet"])
arms = arms_of(sparsity=[0.5, 0.6], flavour=list(swept.flavour))
row = {"error": 0.1, "held_out_error": 0.1, "damping": 0.01, "neurons": 1, "density": 0.5}
dense = {"method": "dense", "window_nats": [1.0, 2.0], "tokens": 4, "layers": []}
results = [
    arm.settings() | {"window_nats": [2.0, 2.5 + place], "tokens": 4, "layers": [row], "costs": row}
    for place, arm in enumerate(arms)
]
table = tables_of([dense, *results], {"t": [0, 1]})[0]
names = [text.get_text() for text in plots.sweep(table).axes[0].get_legend().get_texts()]
result = arms[-1].settings() | {
    "model": "m", "text": "t", "folder": "o", "layers": [row | {"layer": "l", "damping": 0.01}],
    "log": {"seconds": 1.0, "peak_memory_bytes": 1}, "skipped_parameters": [],
} | dict.fromkeys(
    ("tokens", "windows", "length", "realised", "error", "model_multiply_adds", "density",
     "model_dense_multiply_adds", "stored", "dense_multiply_adds", "disk_bytes", "memory_bytes"), 1
)
print(json.dumps({
    "flags": [alone.flavour, *swept.flavour],
    "words": [arm.settings()["flavour"] for arm in arms],
    "column": table["flavour"].tolist(),
    "labels": names,
    "printed": printed.sparsified(result),
}))
"""


def test_a_new_option_is_a_field_and_is_everywhere(tmp_path: Path) -> None:
    copied = tmp_path / "entangle"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    options = copied / "pruning" / "options.py"
    source = options.read_text()
    place = "    sparsity: Annotated[\n        Sparsity,"
    assert source.count(place) == 1
    options.write_text(source.replace(place, FIELD))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-W", "error", "-c", LOOK]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["flags"] == ["sweet", "plain", "sweet"]
    assert sorted(found["words"]) == ["plain", "plain", "sweet", "sweet"]
    assert sorted(found["column"]) == ["", "plain", "plain", "sweet", "sweet"]
    assert [name for name in found["labels"] if "flavour sweet" in name]
    assert [name for name in found["labels"] if "flavour plain" in name]
    settings = "mask row, solve exact, propagate sparse, reconstruct none, flavour sweet"
    assert settings in found["printed"]


# Slips in Python.


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sparsity": 0.5, "methods": ["wanda"]}, "'methods'.*method"),
        ({"sparsity": 0.5, "overwite": True}, "'overwite'"),
        ({"method": "wanda"}, "sparsity.*n:m"),
    ],
)
@pytest.mark.parametrize("read", [arms_of, Pruning.of])
def test_an_unknown_option_or_no_sparsity_is_a_type_error(
    read: Any, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(TypeError, match=told):
        read(**options)


def test_several_values_may_be_any_sequence() -> None:
    expected = arms_of(sparsity=[0.25, 0.5], experts=[1, 2])
    arrays: dict[str, Any] = {"sparsity": np.array([0.25, 0.5]), "experts": range(1, 3)}
    assert arms_of(**arrays) == expected
    with pytest.raises(ValueError, match=r"experts.*one value.*range\(1, 3\)"):
        Pruning.of(sparsity=0.5, experts=range(1, 3))


def test_help_shows_each_option_with_its_default() -> None:
    for function, others in (
        (entangle.sparsify, {}),
        (entangle.sweep, {"method": METHODS}),
        (entangle.choose_budget, {"budget": VARIABLES, "strength": STRENGTHS}),
    ):
        parameters = inspect.signature(function).parameters
        shown = {name: one.default for name, one in parameters.items() if name in OPTIONS}
        usual = {name: option.default for name, option in OPTIONS.items()} | others
        assert shown == usual | {"sparsity": inspect.Parameter.empty}
        assert "options" not in parameters
