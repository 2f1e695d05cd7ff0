"""Who reads a run need not wait for torch: what is imported by commands and modules that only read."""

import functools
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import entangle
from entangle import show
from tests.tiny_models import tiny_model, tiny_tokenizer

ROOT = Path(entangle.__file__).parents[1]
HEAVY = ("torch", "transformers", "sklearn", "triton", "lm_eval")
LIGHT = [
    "arguments",
    "commands",
    "printed",
    "numerics.gaussian",
    "model.folders",
    "model.ranks",
    "runs.dataset",
    "runs.descriptions",
    "runs.forms",
    "runs.store",
    "runs.markdown",
    "measurement.ranking",
    "measurement.comparing",
    "experiments.sweep_table",
    "experiments.ablation_table",
    "experiments.disentangle_table",
    "experiments.interventions",
    "pruning.options",
    *(f"show.{module.name}" for module in pkgutil.iter_modules(show.__path__)),
]
UP = "model.layers.1.mlp.up_proj"
COMMANDS = {
    "help": "--help",
    "rank": "rank RUN --json --csv RUN/rank.csv",
    "diff": "diff RUN OTHER --out RUN/diff.png",
    "heatmap": "plot RUN heatmap",
    "neuron": f"plot RUN neuron {UP}:3",
    "report": "report RUN OTHER",
}

# Each module's lines of the package that asked for it first, by a finder that finds nothing.
WATCH = """
import importlib, json, sys, traceback

asked = {}

class Watch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in HEAVY:
            frames = [f for f in traceback.extract_stack() if "/entangle/" in f.filename]
            asked.setdefault(name, [f"{f.filename}:{f.lineno}" for f in frames])

def loaded():
    return {name: asked.get(name, []) for name in HEAVY if name in sys.modules}

sys.meta_path.insert(0, Watch)
"""
IMPORTED = """
found = {}
for name in sys.argv[1:]:
    before = loaded()
    importlib.import_module(f"entangle.{name}")
    found[name] = {heavy: lines for heavy, lines in loaded().items() if heavy not in before}
print(json.dumps(found))
"""
RAN = """
from entangle.__main__ import main

found = {}
for name, words in json.loads(sys.argv[1]).items():
    before = loaded()
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert not code, (name, code)
    found[name] = {heavy: lines for heavy, lines in loaded().items() if heavy not in before}
print("\\n" + json.dumps(found))
"""

Loaded = dict[str, list[str]]  # the heavy modules, each with the lines that led to it


def said(code: str, *words: str) -> str:
    """Return the last line that a program prints."""
    program = [sys.executable, "-c", f"HEAVY = {HEAVY}\n{WATCH}{code}", *words]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@functools.cache
def imported(*modules: str) -> dict[str, Loaded]:
    """Return what each module adds to those imported before it, in one process."""
    found: dict[str, Loaded] = json.loads(said(IMPORTED, *modules))
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """Return what each command adds to those before it, in one process; the runs are of one text."""
    folder = tmp_path_factory.mktemp("place")
    texts = ["The quick brown fox jumps over the lazy dog. " * 40]
    windows, model = entangle.token_windows(texts, tiny_tokenizer(), length=32), tiny_model()
    for name, size in (("run", 4), ("other", 2)):
        entangle.measure(model, windows, layers="*.up_proj", batch_size=size, out=folder / name)
    commands = {
        name: words.replace("RUN", str(folder / "run"))
        .replace("OTHER", str(folder / "other"))
        .split()
        for name, words in COMMANDS.items()
    }
    found: dict[str, Loaded] = json.loads(said(RAN, json.dumps(commands)))
    return found


@pytest.mark.parametrize("heavy", HEAVY)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_only_reads_imports_nothing_heavy(
    command: str, heavy: str, ran: dict[str, Loaded]
) -> None:
    assert heavy not in ran[command]


@pytest.mark.parametrize("module", LIGHT)
def test_a_module_that_only_reads_imports_nothing_heavy(module: str) -> None:
    assert imported(*LIGHT)[module] == {}


def test_what_is_imported_is_seen_with_the_lines_that_led_to_it() -> None:
    first, second, third = imported("runs.dataset", "pruning.sparsifying", "runs.setup").values()
    assert first == third == {}  # the second imports it all
    # transformers imports triton if it is there; none of our modules imports lm_eval
    assert {*second} - {"triton"} == {*HEAVY} - {"triton", "lm_eval"}
    for lines in second.values():
        assert "entangle/pruning/sparsifying.py:" in lines[0]
