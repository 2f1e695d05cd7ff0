"""Descriptions are read from people's files and from delphi's, and shown wherever a neuron is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import entangle
from entangle.__main__ import main
from entangle.measurement.measuring import measure
from entangle.runs.descriptions import describe, read_descriptions
from tests.measurement.test_context_search import drawn_windows
from tests.tiny_models import tiny_model

UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place") / "run"
    measure(tiny_model(), drawn_windows(3, 16), layers=UP, input_layers=DOWN, out=folder)
    return folder


@pytest.fixture
def run(measured: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured, tmp_path / "run"))


def written(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content))
    return file


def test_descriptions_of_a_file_are_added_and_replaced(run: Path, tmp_path: Path) -> None:
    first = {f"{UP}:3": "capitals", f"{DOWN}:input:5": " ends of sentences\n"}
    assert describe(run, written(tmp_path / "a.json", first)) == {
        f"{UP}:3": "capitals",
        f"{DOWN}:input:5": "ends of sentences",
    }
    describe(run, written(tmp_path / "b.json", {f"{UP}:3": "names", f"{UP}:4": "dates"}))
    assert read_descriptions(run) == {
        f"{UP}:3": "names",
        f"{DOWN}:input:5": "ends of sentences",
        f"{UP}:4": "dates",
    }


def test_delphis_explanations_are_those_of_the_neurons_ends(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "explanations"
    folder.mkdir()
    written(folder / f"{UP}.high_latent3.txt", "capital letters")
    written(folder / f"{UP}.low_latent3.txt", "spaces")
    (folder / f"{DOWN}.input.low_latent12.txt").write_text("plain text\n")
    (folder / "notes.txt").write_text("of somebody")
    assert describe(run, folder) == {
        f"{UP}:3": "high: capital letters; low: spaces",
        f"{DOWN}:input:12": "low: plain text",
    }


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ({}, ValueError, "no description"),
        ([1], ValueError, "list"),
        ({f"{UP}:3": 4}, ValueError, "no text"),
        ({f"{UP}:3": " "}, ValueError, "no text"),
        ({f"{UP}:999": "what"}, LookupError, "999"),
    ],
)
def test_other_content_is_refused_and_nothing_is_written(
    run: Path, tmp_path: Path, content: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        describe(run, written(tmp_path / "a.json", content))
    assert read_descriptions(run) == {}
    (tmp_path / "b.json").write_text("no JSON")
    with pytest.raises(ValueError, match="no JSON file"):
        describe(run, tmp_path / "b.json")


def test_rank_and_notebooks_show_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank", str(run), "--top", "2", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["neurons"]
    assert "description" not in plain[0]
    name = plain[0]["neuron"]
    file = written(tmp_path / "a.json", {name: "<b>names"})
    assert main(["describe", str(run), str(file)]) == 0
    assert "1 descriptions" in capsys.readouterr().out
    assert main(["rank", str(run), "--top", "2", "--json", "--csv", str(tmp_path / "a.csv")]) == 0
    shown = json.loads(capsys.readouterr().out)["neurons"]
    assert [one["description"] for one in shown] == ["<b>names", ""]
    assert "<b>names" in (tmp_path / "a.csv").read_text()
    neuron = entangle.open_run(run).entangle.neuron(name)
    assert neuron.description == "<b>names"
    assert "&lt;b&gt;names" in neuron._repr_html_()
    other = entangle.open_run(run).entangle.neuron(plain[1]["neuron"])
    assert other.description is None
