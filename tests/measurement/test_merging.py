"""Shards of a run become, merged, the run that one process measures; runs are written part by part."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import entangle
from entangle.__main__ import main
from entangle.measurement import merging
from entangle.measurement.measuring import measure
from entangle.measurement.merging import merge
from entangle.model.layers import find_layers
from entangle.numerics.histograms import Histograms
from entangle.runs import labelling, store
from entangle.runs.dataset import attributes_of
from entangle.runs.setup import Setup
from entangle.runs.store import open_run
from tests.command_lines import running
from tests.measurement.test_recording import tokens, windows_of
from tests.model.test_ranks import LOOSE, WORDS, assert_same_run
from tests.tiny_models import save_tiny, tiny_model

ABOUT = {"model": "tiny", "no": None}
WINDOWS = 7  # in batches of two: four batches, the last of one window


def measured(out: Path, shard: str | None = None, name: str = "llama", **options: Any) -> Path:
    """Measure a whole run or a shard of it, and return its folder."""
    words: dict[str, Any] = {"batch_size": 2, "command": "as said", "seed": 0} | options
    model, seed = tiny_model(name, seed=words.pop("seed")), words.pop("text", 0)
    count = words.pop("windows", WINDOWS)
    with running(words.pop("command")):
        measure(model, windows_of(tokens(count, seed=seed)), shard=shard, out=out, **words)
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run and its three shards; their files are not to be changed."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place")
    measured(folder / "whole")
    for number in (1, 2, 3):
        measured(folder / str(number), f"{number}/3")
    return folder


def shards(place: Path, numbers: Sequence[int] = (1, 2, 3)) -> list[Path]:
    return [place / str(number) for number in numbers]


# What is merged.


@pytest.mark.parametrize(
    ("neurons", "order"),
    [(2**16, (1, 2, 3)), (486, (3, 1, 2)), (485, (2, 3, 1)), (100, (3, 1, 2))],
)
def test_merged_shards_are_what_one_process_measured(
    order: tuple[int, ...],
    neurons: int,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = open_run(place / "whole")
    assert (
        whole.sizes["neuron"] == 486
    )  # so many at a time: in one span, or several with a shorter last
    monkeypatch.setattr(merging, "NEURONS", neurons)
    merged = merge(shards(place, order), out=tmp_path / "run")
    assert_same_run(merged, whole)
    assert_same_run(open_run(str(tmp_path / "run")), whole)
    written = (tmp_path / "run" / "run.json").read_bytes()
    assert written == (place / "whole" / "run.json").read_bytes()
    assert merged.attrs == attributes_of(json.loads(written))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    assert {"started", "seconds", "peak_memory_bytes", "sha256"} <= set(log)


@pytest.mark.parametrize("neurons", [2**16, 50])
def test_on_disk_only_the_float_sums_differ(
    neurons: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "NEURONS", neurons)
    merge(shards(place), out=tmp_path / "run")
    files = {path.relative_to(place / "whole") for path in (place / "whole").rglob("*")}
    assert files == {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*")}
    compared = 0
    for file in files:
        if (tmp_path / "run" / file).is_file() and not {*file.parts} & {*LOOSE, "log.json"}:
            one, other = (
                (folder / file).read_bytes() for folder in (place / "whole", tmp_path / "run")
            )
            assert one == other, file
            compared += 1
    assert compared > 40


@pytest.mark.parametrize(
    ("of", "options"),
    [
        (1, {}),
        (4, {"name": "gpt2"}),  # as many as there are batches
        (2, {"name": "mixtral", "windows": 5, "skip_first": 3}),
        (2, {"name": "opt", "batch_size": 4, "bins": 64, "layers": ["*.1.*", "*.q_proj"]}),
        (5, {"name": "qwen2", "batch_size": 1, "input_layers": ["*.1.*"]}),
    ],
)
def test_of_any_number_of_shards_and_any_options(
    of: int, options: dict[str, Any], tmp_path: Path
) -> None:
    whole = open_run(measured(tmp_path / "whole", **options))
    parts = [measured(tmp_path / str(n), f"{n}/{of}", **options) for n in range(1, of + 1)]
    merged = merge([str(part) for part in parts], out=tmp_path / "run")
    assert_same_run(merged, whole)
    assert sum(open_run(part).attrs["tokens"] for part in parts) == whole.attrs["tokens"]
    one, other = ((tmp_path / name / "run.json").read_bytes() for name in ("whole", "run"))
    assert one == other


def test_broken_and_dead_neurons_are_merged_too(tmp_path: Path) -> None:
    model: Any = tiny_model("gpt2")
    with torch.no_grad():
        last = model.get_submodule("transformer.h.1.mlp.c_proj")
        last.weight[:, 3] = 0.0
        last.weight[0, 5] = torch.nan
    words: dict[str, Any] = {"batch_size": 2}
    windows = windows_of(tokens(WINDOWS))
    whole = measure(model, windows, **words)
    for number in (1, 2):
        measure(model, windows, **words, shard=f"{number}/2", out=tmp_path / str(number))
    merged = merge(shards(tmp_path, (2, 1)), out=tmp_path / "run")
    assert_same_run(merged, whole)
    assert int(np.isnan(merged["wasserstein"]).sum()) == 2


# What is refused.


def refused(folders: Sequence[Path], out: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        merge(folders, out=out, **options)
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("numbers", "missing"), [((1, 3), "2/3"), ((3,), "1/3, 2/3"), ((2, 1), "3/3")]
)
def test_a_shard_that_is_missing_is_named(
    numbers: tuple[int, ...], missing: str, place: Path, tmp_path: Path
) -> None:
    said = refused(shards(place, numbers), tmp_path / "run")
    assert re.search(r"\b3 shards\b.*missing", said)
    assert re.findall(r"\d/\d", said) == missing.split(", ")


def test_a_shard_that_is_given_twice_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "2", tmp_path / "again")
    said = refused([*shards(place), tmp_path / "again"], tmp_path / "run")
    assert re.search(rf"{place / '2'} .*{tmp_path / 'again'} .*same.*\b2/3\b", said)


def test_a_path_that_is_given_twice_is_refused(place: Path, tmp_path: Path) -> None:
    for again in (place / "2", place / "." / "1" / ".." / "2"):
        said = refused([*shards(place), again], tmp_path / "run")
        assert re.search(rf"{place / '2'} .*twice", said)


def test_a_whole_run_is_no_shard(place: Path, tmp_path: Path) -> None:
    for folders in ([*shards(place), place / "whole"], [place / "whole"]):
        said = refused(folders, tmp_path / "run")
        assert re.search(f"{place / 'whole'} .*whole run", said)


@pytest.mark.parametrize(
    ("options", "attribute"),
    [
        ({"bins": 64}, r"bins\D+64\D+1024\b"),
        ({"batch_size": 1}, r"batch_size\D+1\D+2\b"),
        ({"skip_first": 1}, r"skip_first\D+1\D+0\b"),
        ({"layers": "*.mlp.*"}, r"layers .*\['\*\.mlp\.\*'\].+\['\*'\]"),
        ({"command": "otherwise"}, "command .*'otherwise'.*'as said'"),
        ({"bins": 64, "command": "otherwise"}, r"bins\D+64\D+1024\b"),  # what is otherwise
        ({"seed": 1}, "weights .*'xxh3-128:[0-9a-f]{8}.*'xxh3-128:[0-9a-f]{8}"),
        ({"text": 1}, "fingerprint .*'[0-9a-f]{8}.*'[0-9a-f]{8}"),
        ({"windows": 6}, r"available_windows\D+6\D+7\b"),
        ({"name": "gpt2"}, "class .*'GPT2LMHeadModel'.*'LlamaForCausalLM'"),
    ],
)
def test_shards_of_different_runs_are_refused_and_the_difference_is_said(
    options: dict[str, Any], attribute: str, place: Path, tmp_path: Path
) -> None:
    other = measured(tmp_path / "other", "3/3", **options)
    said = refused([place / "1", place / "2", other], tmp_path / "run")
    assert re.search(rf"{other} .*{place / '1'} .*shards.*\b{attribute}", said)


def test_shards_of_different_numbers_are_refused(place: Path, tmp_path: Path) -> None:
    other = measured(tmp_path / "other", "2/2")
    said = refused([place / "1", other], tmp_path / "run")
    assert re.search(r"shards.*\b1/3\b.*\b2/2\b", said)


def test_a_shard_is_not_where_the_whole_is_written(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "2", tmp_path / "2")
    parts = [place / "1", tmp_path / "2", place / "3"]
    with pytest.raises(ValueError, match=f"{tmp_path / '2'} .*shards"):
        merge(parts, out=tmp_path / "2", overwrite=True)
    assert open_run(tmp_path / "2").attrs["shard"] == "2/3"


def test_what_needs_a_whole_run_refuses_a_shard_and_its_table_says_what_it_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    Setup.of(model, None, run=open_run(place / "whole"))
    with pytest.raises(ValueError, match=r"shard 2/3\b.*entangle merge"):
        Setup.of(model, None, run=open_run(place / "2"))
    for folder in ("whole", "2"):
        assert main(["rank", str(place / folder), "--top", "1"]) == 0
        said = capsys.readouterr().out
        assert ("shard 2/3" in said.splitlines()[0]) == (folder == "2")


def test_no_shards_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shards.*none"):
        merge([], out=tmp_path / "run")


def test_what_is_no_run_or_damaged_is_named_and_nothing_is_written(
    place: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'nowhere'} .*--out"):
        merge([place / "1", tmp_path / "nowhere"], out=tmp_path / "run")
    shutil.copytree(place / "2", tmp_path / "broken")
    file = tmp_path / "broken" / "neurons.zarr" / "histogram" / "counts" / "0.0"
    file.write_bytes(file.read_bytes()[:-1])
    said = refused([place / "1", tmp_path / "broken", place / "3"], tmp_path / "run")
    assert re.search(f"{tmp_path / 'broken'} .*damaged", said)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_run_that_is_there_is_replaced_only_when_told(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    measured(out, name="gpt2")
    before = open_run(out).load()
    with pytest.raises(FileExistsError, match=r"run exists.*--overwrite"):
        merge(shards(place), out=out)
    said = refused_and_left(shards(place, (1, 2)), out)
    assert re.search(r"\b3 shards\b.*\b3/3\b", said)
    assert open_run(out).load().identical(before)
    assert_same_run(merge(shards(place), out=out, overwrite=True), open_run(place / "whole"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def refused_and_left(folders: Sequence[Path], out: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        merge(folders, out=out, overwrite=True)
    return str(caught.value)


def test_an_error_in_the_middle_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "NEURONS", 100)
    merged, spans = Histograms.merged, []

    def fail(self: Histograms, other: Histograms) -> Histograms:
        spans.append(1)
        if len(spans) == 6:  # in the third span
            raise OSError(5, "input/output error")
        return merged(self, other)

    monkeypatch.setattr(Histograms, "merged", fail)
    with pytest.raises(OSError, match="input/output error"):
        merge(shards(place), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# The command line.


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    save_tiny(folder / "model", "gpt2")
    (folder / "text.txt").write_text(WORDS * 60)
    return folder


def command(place: Path, out: Path, *options: str) -> list[str]:
    words = ["measure", str(place / "model"), "--text", str(place / "text.txt"), "--length", "32"]
    return [*words, "--windows", "13", "--skip-first", "2", *options, "--out", str(out)]


def test_shards_are_measured_and_merged_on_the_command_line(
    commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(commands, tmp_path / "whole")) == 0
    for shard in ("1/3", "2/3", "3/3"):
        assert main(command(commands, tmp_path / shard[0], "--shard", shard)) == 0
    tokens_of = [open_run(tmp_path / str(n)).attrs["tokens"] for n in (1, 2, 3)]
    assert tokens_of == [30 * 5, 30 * 4, 30 * 4]  # batches of 4, 4, 4 and 1 windows
    capsys.readouterr()
    words = ["merge", *(str(tmp_path / str(n)) for n in (2, 3, 1)), "--out", str(tmp_path / "run")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "390 tokens" in said
    assert str(tmp_path / "run") in said
    assert_same_run(open_run(tmp_path / "run"), open_run(tmp_path / "whole"))
    one, other = ((tmp_path / name / "run.json").read_bytes() for name in ("whole", "run"))
    assert one == other
    assert main([*words, "--overwrite", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["tokens"], numbers["run"]) == (390, str(tmp_path / "run"))
    largest = float(open_run(tmp_path / "whole")["wasserstein"].max())
    assert numbers["largest"] == largest


def test_slips_in_merging_are_told_on_the_command_line(
    commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard, out = str(tmp_path / "1"), ["--out", str(tmp_path / "run")]
    assert main(command(commands, tmp_path / "1", "--shard", "1/2")) == 0
    for folders, message in [
        ([shard], r"\b2 shards\b.*\b2/2\b.*missing"),
        ([str(tmp_path / "nowhere")], "nowhere .*--out"),
    ]:
        capsys.readouterr()
        assert main(["merge", *folders, *out]) == 2
        said = capsys.readouterr().err
        assert re.search(message, said)
        assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


# Runs that are written part by part.


@pytest.fixture
def tree() -> xr.DataTree:
    layers = find_layers(tiny_model("opt"))
    neurons = sum(layer.neurons for layer in layers)
    rows = torch.randn(300, neurons, generator=torch.Generator().manual_seed(2))
    rows[:, 3] = 0
    return labelling.to_tree(Histograms.from_rows(rows, bins=64), layers, ABOUT)


def parts_of(tree: xr.DataTree, ends: Sequence[int]) -> list[xr.DataTree]:
    """Return the runs of spans of the neurons."""
    size = tree.sizes["neuron"]
    spans = [slice(*pair) for pair in zip([0, *ends], [*ends, size], strict=True)]
    return [tree.isel(neuron=span) for span in spans]


@pytest.mark.parametrize(
    ("ends", "chunk"), [((1,), 7), ((63, 65), 7), ((7, 14, 200), 7), ((63, 65), 4096)]
)
def test_a_run_written_in_parts_is_the_run_written_at_once(
    ends: tuple[int, ...],
    chunk: int,
    tree: xr.DataTree,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "CHUNK", chunk)
    for name, trees in (("parts", parts_of(tree, ends)), ("once", [tree])):
        (tmp_path / name).mkdir()
        store.write_run(tmp_path / name, iter(trees), ABOUT, lambda: {"seconds": 1.0})
    assert open_run(tmp_path / "parts").identical(tree)
    files = {path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*")}
    assert files == {
        path.relative_to(tmp_path / "parts") for path in (tmp_path / "parts").rglob("*")
    }
    for file in files:
        if (tmp_path / "once" / file).is_file():  # log.json too: the sums are those of the files
            one, other = ((tmp_path / name / file).read_bytes() for name in ("once", "parts"))
            assert one == other, file
    plain = xr.open_zarr(tmp_path / "parts" / "neurons.zarr", chunks=None)
    assert plain.identical(tree.to_dataset())


def test_attributes_may_be_told_and_a_run_is_written_over(
    tree: xr.DataTree, tmp_path: Path
) -> None:
    store.write_run(tmp_path, [tree], ABOUT, dict)
    first = json.loads((tmp_path / "log.json").read_text())["sha256"]
    some = parts_of(tree, (10, 20))[:2]
    store.write_run(tmp_path, some, {"other": [1, None]}, dict)
    assert json.loads((tmp_path / "run.json").read_text()) == {"other": [1, None]}
    opened = open_run(tmp_path)
    assert opened.sizes["neuron"] == 20  # nothing of the first is left
    assert opened.load().identical(tree.isel(neuron=slice(20)))
    second = json.loads((tmp_path / "log.json").read_text())["sha256"]
    assert first != second
    assert len(bytes.fromhex(first)) == len(bytes.fromhex(second)) == 32


def test_the_sum_is_of_the_dataset_and_run_json_alone(tree: xr.DataTree, tmp_path: Path) -> None:
    log = {"seconds": 1.0, "machine": "some"}
    store.write_run(tmp_path, [tree], ABOUT, lambda: log)
    written = json.loads((tmp_path / "log.json").read_text())
    files = written["files"]
    assert written == log | {"sha256": written["sha256"], "files": files}
    assert next(iter(files)) == "run.json"
    assert {name.partition("/")[0] for name in files} == {"run.json", "neurons.zarr"}
    for name in ("figures/a.png", "tables/a.csv", "contexts.json"):  # which come later
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    store.write_json(tmp_path / "log.json", written | {"seconds": 2.0})
    assert open_run(tmp_path).identical(tree)
    (tmp_path / "neurons.zarr" / "more").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path} .*damaged.*neurons.zarr/more"):
        open_run(tmp_path)


def test_a_run_without_a_sum_is_refused(tree: xr.DataTree, tmp_path: Path) -> None:
    store.write_run(tmp_path, [tree], ABOUT, dict)
    digest = json.loads((tmp_path / "log.json").read_text())["sha256"]
    for sha256, message in [
        (None, r"\bno SHA-256 sum\b"),
        (digest[:-1] + ("0" if digest[-1] != "0" else "1"), "files.*written"),
    ]:
        store.write_json(tmp_path / "log.json", {} if sha256 is None else {"sha256": sha256})
        with pytest.raises(ValueError, match=f"{tmp_path} .*damaged.*{message}"):
            entangle.open_run(tmp_path)
    store.write_json(tmp_path / "log.json", {"sha256": digest})
    assert entangle.open_run(tmp_path).identical(tree)


def test_a_folder_may_be_named_as_a_home_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = measure(tiny_model("gpt2"), windows_of(tokens(4)), out="~")
    assert open_run("~").load().identical(run)
    assert [path.name for path in tmp_path.iterdir()] == ["~"]


def test_a_loop_of_links_is_no_bug(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((OSError, ValueError), match="loop"):
        merge([tmp_path / "loop"], out=tmp_path / "new")
