"""Run folders: what is written is what is opened, by plain xarray too."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
import xarray as xr

import entangle
from entangle.model.layers import find_layers
from entangle.numerics.histograms import Histograms
from entangle.runs import labelling, setup, store
from tests.tiny_models import tiny_model

ABOUT = {"model": "tiny", "revision": None, "layers": ["*"], "versions": {"torch": "2"}}


@pytest.fixture
def tree() -> xr.DataTree:
    layers = find_layers(tiny_model("opt"))
    neurons = sum(layer.neurons for layer in layers)
    rows = torch.randn(300, neurons, generator=torch.Generator().manual_seed(2))
    rows[:, 3] = 0
    return labelling.to_tree(Histograms.from_rows(rows), layers, ABOUT)


def test_an_opened_run_is_what_was_written(tree: xr.DataTree, tmp_path: Path) -> None:
    store.write_run(tmp_path, [tree], ABOUT, lambda: {"seconds": 1.0})
    assert entangle.open_run(tmp_path).identical(tree)
    assert json.loads((tmp_path / "run.json").read_text()) == ABOUT
    assert tree.attrs == {"model": "tiny", "layers": ["*"], "versions": '{"torch": "2"}'}
    assert json.loads((tmp_path / "log.json").read_text())["seconds"] == 1.0
    state = labelling.from_tree(entangle.open_run(tmp_path))
    assert torch.equal(state.counts, torch.from_numpy(tree["histogram/counts"].to_numpy()))


def test_plain_xarray_opens_it(tree: xr.DataTree, tmp_path: Path) -> None:
    store.write_run(tmp_path, [tree], ABOUT, dict)
    opened = xr.open_zarr(tmp_path / "neurons.zarr", chunks=None)
    assert opened.identical(tree.to_dataset())
    assert opened["layer"].dtype.kind == "U"
    histogram = xr.open_zarr(tmp_path / "neurons.zarr", group="histogram", chunks=None)
    assert histogram.identical(tree.children["histogram"].to_dataset(inherit=False))


def test_a_folder_that_holds_no_run_is_refused(tree: xr.DataTree, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"/nowhere .*not exist"):
        entangle.open_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} .*no run\.json"):
        entangle.open_run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/file .*not a folder"):
        entangle.open_run(tmp_path / "file")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{tmp_path} .*damaged.*log\.json is missing"):
        entangle.open_run(tmp_path)
    store.write_run(tmp_path, [tree], ABOUT, dict)
    log = (tmp_path / "log.json").read_text()
    for name, text, message in [
        ("log.json", "", r"log\.json is empty"),
        ("log.json", "[]", r"log\.json .*no JSON object"),
        ("log.json", "{}", r"log\.json .*no SHA-256 sum"),
        ("run.json", "", r"run\.json.*not match.*SHA-256 sum"),
        ("run.json", "{}", r"run\.json.*not match.*SHA-256 sum"),
    ]:
        (tmp_path / "log.json").write_text(log)
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{tmp_path} .*damaged.*{message}"):
            entangle.open_run(tmp_path)


@pytest.mark.parametrize("name", ["seconds", "peak_memory_bytes", "machine", "started"])
@pytest.mark.parametrize("value", [None, [], {"a": 1}])
def test_a_log_of_other_types_is_damaged(name: str, value: object, tmp_path: Path) -> None:
    good = {"seconds": 1.5, "peak_memory_bytes": 2, "machine": "a", "started": "now"}
    store.write_json(tmp_path / "log.json", good)
    assert store.read_log(tmp_path) == good
    store.write_json(tmp_path / "log.json", good | {name: value})
    with pytest.raises(ValueError, match=rf"log\.json is damaged \({name} is .*--overwrite"):
        store.read_log(tmp_path)


@pytest.mark.parametrize(
    ("name", "advice", "kind"),
    [
        ("run.json", "--overwrite", ValueError),
        ("log.json", "--overwrite", ValueError),
        ("contexts.json", "delete .*json", OSError),
    ],
)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("[1]", "no JSON object"),
        ("{", "Expecting"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_json_file_is_told_with_what_to_delete(
    name: str, advice: str, kind: type[Exception], text: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    message = rf"{tmp_path}/{name} .*damaged.*{reason}.*{advice}"
    with pytest.raises(kind, match=message):
        store.read_json(tmp_path / name)


def test_the_log_has_time_and_memory() -> None:
    log = setup.Stopwatch().log()
    assert 0 <= log["seconds"] < 10
    assert 5e7 < log["peak_memory_bytes"] < log["memory_bytes"]


def test_the_name_of_a_table_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = store.save_table(pd.DataFrame({"a": [1]}), "http://127.0.0.1:1/a.csv")
    assert (tmp_path / file).read_text() == "a\n1\n"


def test_tables_keep_numbers_in_full(tmp_path: Path) -> None:
    table = pd.DataFrame({"neuron": ["a:1", "b:2"], "wasserstein": [1 / 3, 1e-17]})
    file = store.save_table(table, tmp_path / "deep" / "table.csv")
    assert pd.read_csv(file).equals(table)


def test_figures_take_the_format_of_their_ending(tmp_path: Path) -> None:
    figure = plt.figure()
    assert store.save_figure(figure, tmp_path / "a").name == "a.png"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    store.save_figure(figure, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="wrong"):
        store.save_figure(figure, tmp_path / "a.wrong")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png"]
    plt.close(figure)


@pytest.mark.parametrize("chunk", ["wasserstein/0", "layer/0", "histogram/counts/0.0"])
def test_a_run_with_a_missing_piece_is_refused(
    tree: xr.DataTree, tmp_path: Path, chunk: str
) -> None:
    store.write_run(tmp_path, [tree], ABOUT, dict)
    (tmp_path / "neurons.zarr" / chunk).unlink()
    with pytest.raises(
        ValueError, match=rf"{tmp_path} .*damaged.*neurons\.zarr/{chunk} is missing"
    ):
        entangle.open_run(tmp_path)
