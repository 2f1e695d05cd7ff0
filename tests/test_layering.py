"""The rooms and their order: who may import whom, read from the imports themselves."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import entangle

PACKAGE = Path(entangle.__file__).parent

# A room imports only from rooms above it; inside a room, a module only from those before it.
ROOMS = {
    "numerics": (
        "kernels.bins",
        "kernels.simd",
        "kernels.histograms_cpu",
        "kernels.histograms_triton",
        "kernels.distances_cpu",
        "kernels.bulk_cpu",
        "kernels.masks_cpu",
        "kernels.masks_triton",
        "kernels.sparse_cpu",
        "kernels.sparse_triton",
        "threads",
        "torch_settings",
        "processors",
        "gaussian",
        "bulk",
        "histograms",
        "wasserstein",
        "contributions",
        "difficulty",
        "moments",
        "rounding",
        "rounding",
        "levels",
        "places",
        "sparsity",
        "solving",
        "masks",
        "shares",
        "clustering",
        "routing",
        "sparse",
        "device_weights",
        "evolution",
        "input_rules",
    ),
    "model": (
        "folders",
        "ranks",
        "documents",
        "limits",
        "progress",
        "text",
        "pieces",
        "sliding",
        "mixing",
        "overlap",
        "experts",
        "patterns",
        "fused",
        "eager",
        "layers",
        "sides",
        "placing",
        "hooks",
        "sparse_inputs",
        "prunable",
        "hashing",
        "classes",
        "quantised",
        "integrity",
        "packing",
        "loading",
        "reloading",
        "causality",
        "tokenwise",
        "gating",
        "calls",
        "silence",
        "stream",
        "blocks",
        "kept_logits",
        "sampling",
        "divergence",
        "score",
        "scoring",
        "generating",
        "repeating",
        "steering",
        "writing",
    ),
    "runs": (
        "dataset",
        "shapes",
        "store",
        "forms",
        "contexts_file",
        "descriptions",
        "words_file",
        "own_text",
        "resuming",
        "labelling",
        "setup",
        "markdown",
    ),
    "measurement": (
        "ranking",
        "comparing",
        "recording",
        "measuring",
        "rerunning",
        "resolving",
        "merging",
        "vocabulary",
        "explainers",
        "window_choice",
        "sign_cases",
        "token_kinds",
        "context_search",
        "prompting",
        "checking",
    ),
    "pruning": (
        "options",
        "calibration",
        "budgets",
        "costs",
        "inputs",
        "reconstruction",
        "block",
        "neurons",
        "checkpoint",
        "levels",
        "searching",
        "sparsifying",
    ),
    "experiments": (
        "sweep_table",
        "sweeping",
        "interventions",
        "ablation_table",
        "ablating",
        "held_out",
        "disentangle_table",
        "disentangling",
        "budget_search",
        "steering",
        "planning",
    ),
    "show": (
        "panels",
        "arms",
        "relations",
        "outputs",
        "sketches",
        "plots",
        "cut_windows",
        "coloured",
        "notebook",
        "reporting",
    ),
}
PLUGIN = "entangle.lm_eval"  # for lm-eval and its users: none of our modules imports it
ORDER = [f"entangle.{room}.{module}" for room, modules in ROOMS.items() for module in modules]
ORDER.append(PLUGIN)
PACKAGES = {f"entangle.{room}" for room in ROOMS} | {"entangle.numerics.kernels"}
MODULES = {name.rpartition(".")[2] for name in ORDER} | set(ROOMS)
OPTIONAL = {"datasets", "ot", "pyarrow", "resource", "triton"}
TRITON = re.compile(r"entangle\.numerics\.kernels\.\w+_triton")  # these import it at their top
LAZY = {
    "entangle",
    *(f"entangle.{name}" for name in ("__main__", "arguments", "commands", "printed")),
}
WRITERS = {"entangle.model.folders", "entangle.model.loading", "entangle.runs.store"}
WRITERS |= {"entangle.show.reporting", "entangle.model.packing"}
VAGUE = {"utils", "util", "helpers", "helper", "misc", "common", "base", "manager", "core"}
WRITING = {"write_text", "write_bytes", "mkdir", "touch", "unlink", "rename", "replace", "rmdir"}
WRITING |= {"to_csv", "to_zarr", "to_netcdf", "save_pretrained", "save_file", "rmtree"}


def sources() -> dict[str, str]:
    """Return the text of each module of the package by its dotted name."""
    texts = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ("entangle", *file.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts).removesuffix(".__init__")
        texts[name] = file.read_text(encoding="utf-8")
    return texts


def imported(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Give each module that is imported, and whether that is inside a function."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            names = [f"{start}.{alias.name}" for alias in node.names]  # a module or a name in one
        else:
            continue
        yield from ((name, id(node) in inside) for name in names)


def violations(name: str, source: str) -> list[str]:
    """Say what in a module breaks the rules."""
    tree = ast.parse(source)
    wrong = []
    room = name.split(".")[1] if "." in name else ""
    if set(name.split(".")) & VAGUE:
        wrong.append(f"{name} is a vague name")
    if name not in ORDER and name not in {*LAZY, *PACKAGES}:
        wrong.append(f"{name} has no place in ROOMS")
    for target, inside in imported(tree):
        optional = target.split(".")[0] in OPTIONAL or TRITON.fullmatch(target)
        if inside and name not in LAZY and not optional:
            wrong.append(f"{name} imports {target} inside a function")
        if target.startswith("."):
            wrong.append(f"{name} imports {target}: say the whole name")
        if f"{target}.".startswith((f"{PLUGIN}.", "lm_eval.")) and name != PLUGIN:
            wrong.append(f"{name} imports {target}, which takes seconds")
        if name in LAZY or target.split(".")[0] != "entangle":
            continue
        above = ORDER[: ORDER.index(name)] if name in ORDER else []
        if not any(f"{target}.".startswith(f"{module}.") for module in above):
            wrong.append(f"{name} imports {target}, which is not above it")
    if name not in LAZY:
        own = {module for module in ROOMS.get(room, ()) if f"entangle.{room}.{module}" in sources()}
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        wrong += [f"{name}.{function} is named like a module" for function in defined & own]
    if name not in WRITERS:
        calls = (n.func for n in ast.walk(tree) if isinstance(n, ast.Call))
        written = {f.attr for f in calls if isinstance(f, ast.Attribute)} & WRITING
        strings = {"replace"}  # str.replace and dataclasses.replace look the same from here
        wrong += [f"{name} writes files: {method}" for method in written - strings]
    return wrong


@pytest.mark.parametrize("name", sources())
def test_the_package_keeps_the_rules(name: str) -> None:
    assert violations(name, sources()[name]) == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("model.text", "from entangle.runs.store import open_run", "not above it"),
        ("model.text", "from entangle.runs import store", "not above it"),
        ("model.text", "import entangle.runs.store", "not above it"),
        ("model.text", "from entangle import load_model", "not above it"),
        ("model.folders", "from entangle.model.text import TokenWindows", "not above it"),
        ("model.text", "from entangle.model import text", "not above it"),
        ("numerics.wasserstein", "from . import histograms", "say the whole name"),
        ("runs.dataset", "def f():\n    import torch", "inside a function"),
        (
            "runs.dataset",
            "class A:\n    def f(self):\n        from os import path",
            "inside a fun",
        ),
        ("measurement.ranking", "def merging(): ...", "named like a module"),
        (
            "measurement.ranking",
            "def f(file):\n    file.write_text('')",
            "writes files: write_text",
        ),
        (
            "numerics.histograms",
            "def f():\n    from entangle.numerics.kernels import bins",
            "inside a fun",
        ),
        ("commands", "def f():\n    from entangle import lm_eval", "takes seconds"),
        ("show.plots", "from entangle.lm_eval import EntangleLM", "takes seconds"),
        ("model.text", "import lm_eval", "takes seconds"),
        ("runs.misc", "", "vague name"),
        ("model.utils.text", "", "vague name"),
        ("runs.novelty", "", "has no place in ROOMS"),
    ],
)
def test_a_broken_rule_is_found(name: str, source: str, expected: str) -> None:
    assert any(expected in wrong for wrong in violations(f"entangle.{name}", source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("entangle.runs.store", "from entangle.model import folders, text"),
        ("entangle.runs.store", "from entangle.numerics.histograms import Histograms"),
        ("entangle.show.plots", "from entangle.runs.dataset import dataset_of"),
        ("entangle.model.text", "def f():\n    import datasets"),
        (
            "entangle.numerics.histograms",
            "def f():\n    from entangle.numerics.kernels import histograms_triton",
        ),
        ("entangle.commands", "def f():\n    from entangle.runs import dataset"),
    ],
)
def test_what_is_allowed_is_not_found(name: str, source: str) -> None:
    assert violations(name, source) == []


def test_no_public_name_is_hidden_by_a_module() -> None:
    assert set(entangle.__all__) & MODULES == {"plots"}  # which is the module itself
