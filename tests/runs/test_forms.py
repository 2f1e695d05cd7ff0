"""Files that commands add to a run: what has another form is refused by all that read it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from entangle.runs import store
from entangle.runs.contexts_file import add_contexts, read_contexts
from entangle.runs.descriptions import read_descriptions
from entangle.runs.words_file import read_words
from tests.runs.test_contexts_file import OLDER, neuron

WORD = {"token": " a", "value": 0.5, "deviation": 2}
SIDE = {"side": "reads", "neuron": "a:0", "what": "row", "through": [], "top": [WORD], "bottom": []}
UNIT: dict[str, Any] = {"gate": "g:0", "up": "u:0", "product": "d:input:0", "cases": []}
UNIT |= {"wasserstein": {"gate": 0.1, "up": 0.2, "product": None}}
CONTEXTS = {"neurons": {"a:0": neuron(3) | {"unit": UNIT}}, "windows": {"3": [" t"] * 5}}
FILES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "contexts": (read_contexts, CONTEXTS),
    "words": (read_words, {"a:0": {"words": [SIDE], "missing": []}}),
    "describe": (read_descriptions, {"a:0": "capitals"}),
}
NAMES = {"describe": "descriptions"}


def written(folder: Path, command: str, content: Any) -> Path:
    file = folder / f"{NAMES.get(command, command)}.json"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("command", FILES)
def test_what_the_command_writes_is_read(command: str, tmp_path: Path) -> None:
    read, content = FILES[command]
    written(tmp_path, command, content)
    read(tmp_path)


@pytest.mark.parametrize(
    ("command", "path", "value", "reason"),
    [
        ("contexts", ["neurons", "a:0", "contexts", 0, "output"], "x", "'x'"),
        ("contexts", ["neurons", "a:0", "contexts", 0, "token"], ..., "token"),
        ("contexts", ["neurons", "a:0", "positions"], {}, "positions"),
        ("contexts", ["neurons", "a:0", "wasserstein"], None, "a number"),
        ("contexts", ["neurons", "a:0", "tokens"], True, "'True'"),
        ("contexts", ["neurons", "a:0", "scale", "step"], ..., "step"),
        ("contexts", ["neurons", "a:0", "windows", 0, "window"], 4, "window 4"),
        ("contexts", ["neurons", "a:0", "windows", 0, "levels"], "é", "ASCII"),
        ("contexts", ["neurons", "a:0", "unit", "cases"], [{}], "gate"),
        ("contexts", ["windows", "3"], ["t"], "window 3"),
        ("contexts", ["windows", "3"], "text", "a list"),
        ("contexts", ["windows"], ..., "neurons has no tokens"),
        ("words", ["a:0", "words", 0, "top", 0, "value"], None, "null|None"),
        ("words", ["a:0"], [], "an object"),
        ("describe", ["a:0"], 3, "a text"),
    ],
)
def test_another_form_is_refused_with_the_file_and_what_to_do(
    command: str, path: list[Any], value: Any, reason: str, tmp_path: Path
) -> None:
    read, content = FILES[command]
    content = copy.deepcopy(content)
    *above, last = path
    place = content
    for key in above:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    file = written(tmp_path, command, content)
    with pytest.raises(
        ValueError, match=rf"{file} .*{reason}.*delete it and run entangle {command}"
    ):
        read(tmp_path)


def test_nothing_is_added_to_a_file_of_another_form(tmp_path: Path) -> None:
    file = written(tmp_path, "contexts", {"a:0": OLDER, "a:1": {"contexts": []}})
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"a:1 has no tokens"):
        add_contexts(tmp_path, {"a:0": neuron(3)}, {3: ["t"] * 5})
    assert file.read_bytes() == before
    store.write_json(file, {"a:0": OLDER})
    add_contexts(tmp_path, {"a:1": neuron(3)}, {3: ["t"] * 5})
    assert {*read_contexts(tmp_path).neurons} == {"a:0", "a:1"}
