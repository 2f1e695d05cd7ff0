"""The command line as a user meets it: commands, messages, exit codes, what is left on disk."""

import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest
import torch
import xarray as xr

import entangle
from entangle import arguments
from entangle.__main__ import main
from entangle.commands import COMMANDS
from entangle.experiments import ablation_table, sweep_table
from entangle.experiments.budget_search import STRENGTHS, VARIABLES
from entangle.numerics.gaussian import from_samples
from entangle.runs import store
from entangle.runs.dataset import UNITS
from tests.forking import Forked
from tests.model.test_ranks import ROOT
from tests.model.test_text import few
from tests.tiny_models import ARCHITECTURES, CONTEXT, save_tiny

WORDS = "The quick brown fox jumps over the lazy dog; a wizard's job is to vex chumps quickly. "


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text and a run of them."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model", "llama")
    (folder / "text.txt").write_text(WORDS * 60)
    assert main(_measure(folder, "run")) == 0
    return folder


def _measure(place: Path, out: str, *options: str) -> list[str]:
    words = ["measure", str(place / "model"), "--text", str(place / "text.txt")]
    return [*words, "--length", "32", "--windows", "20", *options, "--out", str(place / out)]


def _contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_help_and_import_do_not_import_torch() -> None:
    code = (
        "import sys, entangle; from entangle.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'xarray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("measure", "perplexity", "generate", "sparsify", "sweep", "rank", "plot"):
        assert command in done.stdout


def test_measure_says_what_it_measured_and_found_and_no_more(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(_measure(place, "said")) == 0
    said = capfd.readouterr()
    run = entangle.open_run(place / "said")
    assert "640 tokens" in said.out
    assert "20 windows of 32" in said.out
    assert re.search(rf"\b{run.sizes['neuron']:,} neurons.*\b21 layers\b", said.out)
    assert f"{float(run['wasserstein'].max()):.4f}" in said.out
    assert "noise floor 0.0329" in said.out  # 0.833 / √640
    assert said.err == ""


def test_resolving_a_run_needs_the_text_that_it_was_measured_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model", "llama")
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 60)
    assert main(_measure(tmp_path, "run", "--layers", "*.1.mlp.up_proj")) == 0
    words = ["measure", str(tmp_path / "model"), "--resolve", str(tmp_path / "run")]
    assert main(words) == 0
    assert "0 neurons have a second histogram" in capsys.readouterr().out
    text.write_text(WORDS.upper() * 60)
    assert main(words) == 2
    _one_message(capsys, ["other windows", str(text)])


def test_unknown_tokens_are_said_and_noted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "few"
    save_tiny(folder)
    few().save_pretrained(folder)
    text = place / "few.txt"
    text.write_text(("a" * 15 + "é") * 20, encoding="utf-8")
    words = ["measure", str(folder), "--text", str(text), "--length", "32"]
    assert main([*words, "--out", str(place / "few.run")]) == 0
    said = capsys.readouterr().err
    assert re.fullmatch(rf"entangle: 6\.2% .*{text}.* unknown token <unk>\n", said)
    noted = json.loads((place / "few.run" / "run.json").read_text())["notes"]
    assert [f"entangle: {note}\n" for note in noted] == [said]
    text.write_text("é" * 999, encoding="utf-8")
    assert main([*words, "--out", str(place / "none.run")]) == 2
    assert "100.0% of the tokens" in capsys.readouterr().err


def test_a_command_is_over_when_it_has_run(place: Path) -> None:
    assert main(_measure(place, "over")) == 0
    tokenizer = entangle.load_tokenizer(place / "model")
    windows = entangle.token_windows(place / "text.txt", tokenizer, windows=3, length=32)
    run = entangle.measure(entangle.load_model(place / "model"), windows, out=place / "after")
    assert "command" not in run.attrs
    assert json.loads((place / "after" / "run.json").read_text())["command"] is None


def test_measure_again_gives_the_same_bytes(place: Path) -> None:
    first = _contents(place / "run")
    assert main(_measure(place, "run", "--overwrite")) == 0
    second = _contents(place / "run")
    assert first.pop("log.json") != second.pop("log.json")
    assert first == second
    assert set(first) > {"run.json", "neurons.zarr/.zmetadata", "neurons.zarr/wasserstein/.zarray"}


def test_the_users_environment_changes_no_byte(place: Path, tmp_path: Path) -> None:
    """Hash seed, locale without UTF-8, time zone and current folder; a name that is no formula."""
    (place / "$_{$.txt").write_text("".join(random.Random(0).choices(string.printable, k=600)))
    sweep = ["sweep", str(place / "model"), "--text", str(place / "text.txt"), "--length", "32"]
    sweep += [
        "--evaluation",
        str(place / "$_{$.txt"),
        "--windows",
        "5",
        "--sparsity",
        "0.5",
    ]
    commands = [_measure(place, "local"), [*sweep, "--out", str(place / "swept")]]
    assert [main(command) for command in commands] == [0, 0]
    folders = [place / "local", place / "swept"]
    before = [_contents(folder) for folder in folders]
    for folder in folders:
        shutil.rmtree(folder)
    code = "import sys, json, entangle.__main__ as program\n" + "\n".join(
        f"sys.argv[1:] = json.loads({json.dumps(command)!r})\n"
        "try: program.run()\n"
        "except SystemExit as end: assert not end.code, end"
        for command in commands
    )
    environment = {"PYTHONHASHSEED": "7", "TZ": "Asia/Kathmandu", "LC_ALL": "C"}
    environment |= {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "±" in done.stdout
    for folder, expected in zip(folders, before, strict=True):
        found = _contents(folder)
        assert found.pop("log.json") != expected.pop("log.json")
        # Figures are drawn by other libraries, which write no time.
        assert found == expected
    evaluation = json.loads((place / "swept" / "run.json").read_text())["evaluation"]
    assert evaluation == str(place / "$_{$.txt")


def test_run_json_has_the_command_that_repeats_it(place: Path) -> None:
    options = ["--layers", "*.mlp.*", "*.q_proj", "--skip-first", "2", "--bos", "always"]
    assert main(_measure(place, "narrow", *options)) == 0
    noted = json.loads((place / "narrow" / "run.json").read_text())
    words = noted["command"].split()
    assert words[0] == "entangle"
    command = noted["command"].replace("'", "").split()[1:]
    assert main([*command, "--out", str(place / "again")]) == 0
    repeated = json.loads((place / "again" / "run.json").read_text())
    assert repeated == noted
    assert noted["tokens"] == 20 * 30
    assert noted["layers"] == ["*.mlp.*", "*.q_proj"]
    assert set(entangle.open_run(place / "narrow").to_dataset()["role"].to_numpy()) == {
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj")
    }


def test_rank_prints_the_order_of_the_dataset(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "top.csv"
    assert main(["rank", str(place / "run"), "--top", "7", "--csv", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    frame = xr.open_zarr(place / "run" / "neurons.zarr", chunks=None).to_dataframe()
    frame = frame.sort_values("wasserstein", ascending=False, kind="stable").head(7)
    expected = [
        f"{layer}:{index}" for layer, index in zip(frame["layer"], frame["index"], strict=True)
    ]
    assert [line.split()[1] for line in lines[-7:]] == expected
    assert any(line.startswith("kind is an estimate") for line in lines)
    table = pd.read_csv(file)
    assert list(table["neuron"]) == expected
    assert table["wasserstein"].tolist() == frame["wasserstein"].tolist()

    assert main(["rank", str(place / "run"), "--top", "7", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["neuron"] for row in printed["neurons"]] == expected
    assert printed["tokens"] == 640


def test_rank_by_another_variable_and_of_some_layers(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rank", str(place / "run"), "--by", "kurtosis", "--layers", "*.up_proj", "--top", "3"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["neurons"]
    run = entangle.open_run(place / "run").to_dataset()
    up = run.where(run["role"] == "mlp.up_proj", drop=True)
    assert [row["kurtosis"] for row in rows] == sorted(up["kurtosis"].values, reverse=True)[:3]
    assert all(".up_proj:" in row["neuron"] for row in rows)


def test_plots_are_written_into_the_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(place / "run")
    for kind in ("heatmap", "layers", "ranks"):
        assert main(["plot", run, kind]) == 0
        file = Path(capsys.readouterr().out.strip())
        assert file == place / "run" / "figures" / f"{kind}.png"
        picture = matplotlib.image.imread(file)
        assert picture[..., :3].std() > 0.01  # something is on it
    assert main(["plot", run, "neuron", "model.layers.1.mlp.up_proj:5"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    several = [f"model.layers.1.mlp.up_proj:{index}" for index in (5, 6, 7)]
    assert main(["plot", run, "neuron", *several]) == 0
    file = Path(capsys.readouterr().out.strip())
    assert file.name == "neurons.png"
    assert matplotlib.image.imread(file)[..., :3].std() > 0.01
    assert main(["plot", run, "layers", "--out", str(place / "a.svg")]) == 0
    assert (place / "a.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["measure", "./nowhere", "--text", "TEXT"], ["nowhere", "no model"]),
        (["measure", "nobody/nothing", "--text", "TEXT"], ["nobody/nothing"]),
        (["measure", "MODEL", "--text", "missing.txt"], ["missing.txt", "hub:"]),
        (["measure", "MODEL", "--text", "TEXT", "missing.txt"], ["missing.txt", "hub:"]),
        (["measure", "MODEL", "--text", "TEXT", "TEXT"], ["text.txt is given twice"]),
        (["measure", "MODEL", "--text", "self:", "self:"], ["self: is given twice"]),
        (["measure", "MODEL", "--text", "self:", "TEXT", "--windows", "1"], ["2 texts", "1 wind"]),
        (["measure", "MODEL", "--text", "self:", "--length", "999"], ["999 tokens", str(CONTEXT)]),
        (["perplexity", "MODEL", "--text", "self:"], ["self:", "writes itself"]),
        (["perplexity", "MODEL", "--text", "TEXT", "OTHER"], ["a score", "got 2", "OTHER"]),
        (["plan", "MODEL", "--text", "TEXT", "self:"], ["self:", "plan loads no weights"]),
        (["measure", "MODEL", "--text", "TEXT", "--layers", "*.mlp.up_prj"], ["*.mlp.up_proj"]),
        (["measure", "MODEL", "--text", "SHORT"], ["window of 32", "20 tokens"]),
        (["measure", "MODEL", "--text", "TEXT", "--length", "999"], ["999", str(CONTEXT)]),
        (["measure", "MODEL", "--text", "TEXT", "--skip-first", "32"], ["skip_first", "31"]),
        (["measure", "MODEL", "--text", "TEXT", "--skip-first", "-1"], ["skip_first", "-1"]),
        (["measure", "MODEL", "--text", "TEXT", "--windows", "0"], ["1 window", "0 windows of 32"]),
        (["measure", "MODEL", "--text", "TEXT", "--batch-size", "0"], ["batch size 0"]),
        (["measure", "MODEL", "--text", "TEXT", "--bins", "4096"], ["2048", "4096"]),
        (["measure", "MODEL", "--text", "TEXT", "--device", "cuda:7"], ["cuda:7"]),
        (["measure", "MODEL", "--text", "TEXT", "--device", "gpu"], ["gpu"]),
        (["measure", "MODEL", "--text", "TEXT", "--device", "meta"], ["meta", "use cpu"]),
        (["rank", "MODEL"], ["run.json"]),
        (["rank", "Gr\udcf6\udcdfe"], [r"\udcf6", "not UTF-8", "rename"]),
        (["measure", "MODEL", "--text", "TEXT\0"], [r"\x00", "not UTF-8"]),
        (["measure", "MODEL", "--text", "TEXT", "--seed", "-1"], ["--seed", "at least 0", "-1"]),
        (["measure", "MODEL"], ["--text TEXT", "--out RUN", "--resolve RUN"]),
        (["measure", "MODEL", "--resolve", "RUN"], ["--resolve adds", "leave --out"]),
        (["measure", "MODEL", "--resolve", "RUN", "--batch-size", "2"], ["--batch-size out"]),
        (
            ["words", "RUN", "a:1", "--layers", "*.mlp.*"],
            ["--layers has an effect only with --top"],
        ),
        (["contexts", "RUN", "a:1", "--exclude", "*.mlp.*"], ["--exclude", "only with --top"]),
        (["rank", "RUN", "--top", "-3"], ["--top", "at least 1", "-3"]),
        (["rank", "RUN", "--top", "0"], ["--top", "at least 1", "got 0"]),
        (["diff", "RUN", "RUN", "--top", "-3"], ["--top", "at least 1", "-3"]),
        (["rank", "RUN", "--by", "beauty"], ["beauty", "wasserstein"]),
        (["rank", "RUN", "--layers", "*.nothing"], ["*.nothing"]),
        (["plot", "RUN", "neuron"], ["LAYER:INDEX"]),
        (["plot", "RUN", "heatmap", "a:1"], ["a:1"]),
        (["plot", "RUN", "neuron", "a:1", "--by", "std"], ["takes no --by", "std"]),
        (["plot", "RUN", "ranks", "--by", "std"], ["wasserstein_bulk", "std"]),
        (["plot", "RUN", "neuron", "model.layers.1.mlp.up_prj:5"], ["model.layers.1.mlp.up_proj"]),
        (["plot", "RUN", "neuron", "model.layers.1.mlp.up_proj:99"], ["99", "37"]),
        (["plot", "RUN", "layers", "--out", "x.wrong"], ["wrong"]),
        (["plot", "RUN", "clusters", "a:1", "b:2"], ["clusters", "one neuron", "a:1 b:2"]),
    ],
)
def test_bad_input_gets_one_message(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    messages: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (place / "short.txt").write_text(WORDS[:20])
    names = {"MODEL": "model", "RUN": "run", "TEXT": "text.txt", "SHORT": "short.txt"}
    words = [str(place / names[word]) if word in names else word for word in words]
    if words[0] == "measure":
        length = [] if "--length" in words else ["--length", "32"]
        words += [*length, "--out", str(tmp_path / "out")]
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("entangle: ")
    assert "Traceback" not in said.err
    for message in messages:
        assert message in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["rank", ""],
        ["rank", "RUN", "--csv", ""],
        ["plot", "RUN", "heatmap", "--out="],
        ["report", ""],
    ],
)
def test_an_empty_path_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(place / "run") if word == "RUN" else word for word in words])
    assert stopped.value.code == 2
    assert re.search(r"argument \S+: expected a path.*empty", capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["RUN", "heatmaps"])
def test_a_kind_of_picture_that_does_not_exist_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    words = ["plot", "heatmap", str(place / "run")] if kind == "RUN" else ["plot", "run", kind]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    message = rf"argument KIND: '{words[2]}'.*entangle plot RUN KIND.*\bheatmap, layers\b"
    assert re.search(message, capsys.readouterr().err)


def test_every_argument_has_a_help_text() -> None:
    for command, parser in arguments.parsers()[1].items():
        for action in parser._actions:
            assert action.help, (command, action.dest)


def test_rank_lists_the_variables_that_a_run_has(place: Path) -> None:
    run = entangle.open_run(place / "run")
    data = run.to_dataset()
    names = [str(name) for name in data if data[name].dims == ("neuron",)]
    assert {*arguments.VARIABLES} == {*names}
    others = {*arguments.DIFFICULTY_VARIABLES, *arguments.HELD_OUT_VARIABLES}
    assert others == {*UNITS} - {*names} - {"improvement", "improvement_halves"} - {
        *("wasserstein_within", "difficulty_within", "wasserstein_share", "difficulty_share"),
        "distance_to_dense",
    }


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["measure", "MODEL", "--text", "a/" * 3000, "--out", "new"], "File name too long"),
        (["rank", "RUN", "--csv", ".."], r"it is a folder\..*"),
        (["diff", "RUN", "RUN", "--out", "."], r"it is a folder\..*"),
        (["report", "RUN", "--out", "b" * 300 + ".html"], "File name too long"),
    ],
)
def test_an_error_of_the_system_has_its_place_and_no_number(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(place / "model"), "RUN": str(place / "run")}
    assert main([names.get(word, word) for word in words]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"entangle: .*\S: {reason}\n", said)
    assert "Errno" not in said
    assert len(said) < 500
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", str(place / "nowhere"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_existing_run_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _contents(place / "run")
    assert main(_measure(place, "run")) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(_measure(place, "model", "--overwrite")) == 2  # a folder that is no run
    assert re.search(rf"{place / 'model'} .*\bentangle\b", capsys.readouterr().err)
    assert main(_measure(place, "text.txt/run")) == 2  # below a file
    assert "text.txt" in capsys.readouterr().err
    assert _contents(place / "run") == before


def test_a_full_disk_leaves_the_old_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = _contents(place / "run")
    monkeypatch.setattr(store, "write_json", full)
    assert main(_measure(place, "run", "--overwrite")) == 2
    assert "No space left" in capsys.readouterr().err
    assert _contents(place / "run") == before
    assert not list(place.glob("*.partial*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_it_leaves_nothing(
    place: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "long.txt").write_text(WORDS * 2_000)
    words = ["-m", "entangle", "measure", str(place / "model"), "--text"]
    words += [str(tmp_path / "long.txt"), "--windows", "10000", "--length", "16"]
    process = Forked([*words, "--batch-size", "1", "--out", str(tmp_path / "out")])
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial").exists():
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.5)
    process.signal(number)
    ended, said = process.wait(60), process.stderr
    assert ended == code, said
    assert re.search("nothing.*written", said)
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]


def test_broken_and_dead_neurons_are_named_and_not_ranked(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = entangle.load_model(place / "model")
    layers = dict(model.named_modules())
    with torch.no_grad():
        # Of the last block's outputs nothing follows, so that only these neurons are touched.
        layers["model.layers.2.mlp.down_proj"].weight[3] = float("nan")
        layers["model.layers.2.mlp.down_proj"].bias[5] = float("inf")
        layers["model.layers.0.mlp.up_proj"].weight[7] = 0.0
    model.save_pretrained(tmp_path / "model")
    entangle.load_tokenizer(place / "model").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(WORDS * 60)
    assert main(_measure(tmp_path, "run")) == 0
    said = capsys.readouterr().out
    last = r"model\.layers\.2\.mlp\.down_proj"
    assert re.search(rf"\b2 .*\bNaN\b.*{last}:3, {last}:5$", said, re.MULTILINE)
    assert re.search(r"\b1 dead.*model\.layers\.0\.mlp\.up_proj:7$", said, re.MULTILINE)
    run = entangle.open_run(tmp_path / "run").to_dataset()
    assert int(run["wasserstein"].isnull().sum()) == 3
    assert int((run["nonfinite"] > 0).sum()) == 2
    assert set(run["nonfinite"].values) == {0, 640}
    assert main(["rank", str(tmp_path / "run"), "--top", "9999", "--json"]) == 0
    ranked = json.loads(capsys.readouterr().out)["neurons"]
    assert len(ranked) == run.sizes["neuron"] - 3
    for kind in ("heatmap", "layers", "ranks"):
        assert main(["plot", str(tmp_path / "run"), kind]) == 0
    assert main(["plot", str(tmp_path / "run"), "neuron", "model.layers.0.mlp.up_proj:7"]) == 2
    assert "dead" in capsys.readouterr().err


def test_head_may_close_the_pipe(place: Path) -> None:
    words = [sys.executable, "-m", "entangle", "rank", str(place / "run"), "--top", "9999"]
    reader, writer = os.pipe()
    process = subprocess.Popen(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    os.close(reader)
    _, said = process.communicate(timeout=60)
    assert said == ""
    assert process.returncode == 0


def test_perplexity_is_that_of_the_python_function(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["perplexity", str(place / "model"), "--text", str(place / "text.txt")]
    words += ["--length", "32", "--windows", "20"]
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    tokenizer = entangle.load_tokenizer(place / "model")
    windows = entangle.token_windows(place / "text.txt", tokenizer, windows=20, length=32)
    score = entangle.perplexity(entangle.load_model(place / "model"), windows)
    assert printed["perplexity"] == score.perplexity
    assert printed["perplexity_error"] == score.perplexity_error
    assert printed["tokens"] == 20 * 31
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"perplexity {score.perplexity:.4f} ± {score.perplexity_error:.4f}" in said
    assert "20 windows of 32" in said


def test_perplexity_against_another_model_on_sliding_windows_and_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("model", "dense")):
        save_tiny(tmp_path / name, seed=seed, max_position_embeddings=200)
    (tmp_path / "text.txt").write_text(WORDS * 6)
    words = ["perplexity", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt")]
    words += ["--length", "64", "--stride", "32", "--windows", "3", "--batch-size", "20"]
    words += ["--against", str(tmp_path / "dense"), "--generate"]
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    models = {name: entangle.load_model(tmp_path / name) for name in ("model", "dense")}
    tokenizer = entangle.load_tokenizer(tmp_path / "model")
    windows = entangle.sliding_windows(
        tmp_path / "text.txt", tokenizer, stride=32, windows=3, length=64
    )
    score = entangle.perplexity(models["model"], windows, against=models["dense"], batch_size=20)
    assert score.divergence is not None
    assert printed["perplexity"] == score.perplexity
    columns = score.divergence.columns()
    assert {name: printed[name] for name in columns} == columns
    assert (printed["tokens"], printed["stride"]) == (3 * 32, 32)
    assert printed["against"] == str(tmp_path / "dense")
    assert [*printed["generation"]] == [str(tmp_path / name) for name in models]
    generated = printed["generation"][str(tmp_path / "dense")]
    assert generated == entangle.repetition(models["dense"], windows, batch_size=20).columns()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"KL divergence {columns['kl']:.5f} ± {columns['kl_error']:.5f}" in said
    assert "3 windows of 64 that slide by 32" in said
    assert re.search(rf"dense .*{generated['distinct_2']:.2f}", said)


def test_models_with_other_tokenizers_are_not_compared(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "dense", adds_bos=True)
    words = ["perplexity", str(place / "model"), "--text", str(place / "text.txt")]
    words += ["--length", "32", "--windows", "3"]
    assert main([*words, "--against", str(tmp_path / "dense")]) == 2
    assert re.search(r"tokenizers of .*model.* and of .*dense.*", capsys.readouterr().err)
    assert main([*words, "--generate"]) == 2
    assert "prompts of 64 tokens" in capsys.readouterr().err
    assert main([*words, "--stride", "32"]) == 2
    assert "stride of 32" in capsys.readouterr().err


def _generated(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> dict[str, Any]:
    words = ["generate", str(folder), "--prompt", "The quick", "--tokens", "6", "--json", *options]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    printed = json.loads(said.out)
    assert isinstance(printed, dict)
    return printed


def test_generate_writes_what_the_python_function_does(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = entangle.load_model(place / "model")
    tokenizer = entangle.load_tokenizer(place / "model")
    expected = entangle.generate(model, tokenizer, "The quick", tokens=6)
    printed = _generated(capsys, place / "model")
    assert (printed["text"], printed["tokens"]) == (expected.text, 6)
    assert (printed["prompt"], printed["prompt_tokens"]) == ("The quick", 9)
    assert (printed["model"], printed["device"]) == (str(place / "model"), str(model.device))
    size = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    assert printed["weight_bytes"] == size
    assert printed["first_seconds"] > 0
    assert printed["tokens_per_second"] == pytest.approx(5 / printed["seconds"])
    words = ["generate", str(place / "model"), "--prompt", "The quick"]
    assert main([*words, "--tokens", "6", "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(expected.text)
    about = rf"{re.escape(str(place / 'model'))} .*\bcpu\b.*\b{size / 1e6:,.0f} MB.*\b\d+\.\d\d s\b"
    about += r".*\b9\b.*prompt.*\b5\b.*\b\d+\.\d\d s\b.*\b\d+\.\d a second with 1 thread"
    assert re.fullmatch(f"\n\n{about}\n", said.removeprefix(expected.text))
    assert main([*words, "--tokens", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_second"] is None
    assert main([*words, "--tokens", "1"]) == 0
    assert re.search(r"\b9\b.*prompt\W*$", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["MODEL", "--prompt", ""], ["prompt", "0 tokens"]),
        (["MODEL", "--prompt", "ab", "--tokens", "0"], ["token", "got 0"]),
        (["MODEL", "--prompt", "ab", "--tokens", "-4"], ["token", "got -4"]),
        (["MODEL", "--prompt", "ab", "--tokens", "63"], ["2 tokens", "63", str(CONTEXT)]),
        (["MODEL", "--prompt", "a" * 65, "--tokens", "1"], ["65 tokens", str(CONTEXT)]),
        (["./nowhere", "--prompt", "ab"], ["no model", "nowhere"]),
        (["MODEL", "--prompt", "ab", "--device", "gpu"], ["gpu"]),
        (["RUN", "--prompt", "ab"], ["no model", "config.json"]),
    ],
)
def test_what_cannot_be_written_gets_one_message(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], messages: list[str]
) -> None:
    names = {"MODEL": str(place / "model"), "RUN": str(place / "run")}
    assert main(["generate", *(names.get(word, word) for word in words)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("entangle: ")
    assert said.err.count("\n") == 1
    for message in messages:
        assert message in said.err


def test_generate_needs_a_prompt(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(place / "model")])
    assert stopped.value.code == 2
    assert "--prompt" in capsys.readouterr().err


@pytest.mark.parametrize("experts", ["1", "2"])
def test_a_sparse_model_is_run_without_its_zeros_unless_told(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    experts: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, asked = tmp_path / "sparse", []
    options = ["--sparsity", "0.8", "--experts", experts, "--layers", "*.mlp.*"]
    assert main(_pruning(place, "sparsify", out, *options)) == 0
    capsys.readouterr()
    packed, whole = _generated(capsys, out), _generated(capsys, out, "--unpacked")
    for key in ("text", "tokens", "prompt_tokens", "model", "device"):
        assert packed[key] == whole[key]
    model = entangle.load_model(out)
    size = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    assert packed["weight_bytes"] < whole["weight_bytes"] == size
    load = entangle.load_model

    def noting(*args: Any, **options: Any) -> Any:
        asked.append(options["packed"])
        return load(*args, **options)

    monkeypatch.setattr(entangle, "load_model", noting)
    words = ["perplexity", str(out), "--text", str(place / "text.txt"), "--length", "32"]
    scores = []
    for more in ([], ["--unpacked"]):
        assert main([*words, "--windows", "6", "--json", *more]) == 0
        scores.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert asked == [True, False]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    tokenizer = entangle.load_tokenizer(out)
    windows = entangle.token_windows(place / "text.txt", tokenizer, windows=6, length=32)
    assert scores[1] == entangle.perplexity(model, windows).perplexity


def _pruning(place: Path, command: str, out: Path, *options: str) -> list[str]:
    words = [command, str(place / "model"), "--text", str(place / "text.txt"), "--out", str(out)]
    if command == "sweep":
        (place / "other.txt").write_text(WORDS[::-1] * 30)
        words += ["--evaluation", str(place / "other.txt"), "--evaluation-windows", "7"]
    return [*words, "--length", "32", "--windows", "20", "--sparsity", "0.5", *options]


def test_a_search_for_blocks_is_told_and_kept(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pruned"
    options = ["--layers", "*.mlp.*", "--across", "search", "--scores", "11"]
    assert main(_pruning(place, "sparsify", out, *options)) == 0
    said = capsys.readouterr().out
    noted = json.loads((out / "search.json").read_text())
    start, found = noted["candidates"]
    assert f"uniform {start['kl']:.4f}, search from uniform {found['kl']:.4f}" in said
    layers = json.loads((out / "sparsity.json").read_text())["layers"]
    zeros = {str(layer["block"]): 0 for layer in layers}
    for layer in layers:
        zeros[str(layer["block"])] += layer["zeros"]
    assert zeros == noted["zeros"]
    assert json.loads((out / "run.json").read_text())["scores"] == 11
    for more, message in (
        (["--scores", "11"], "--scores"),
        (["--across", "search", "--scores", "3"], "11"),
        (["--across", "search", "--strength", "auto"], "--strength auto"),
    ):
        assert main([*_pruning(place, "sparsify", out, *more), "--overwrite"]) == 2
        assert message in capsys.readouterr().err


def test_sparsify_writes_a_model_that_every_command_takes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pruned"
    options = ["--layers", "*.self_attn.*", "--sparsity", "2:4", "--method", "wanda"]
    assert main(_pruning(place, "sparsify", out, *options)) == 0
    said = capsys.readouterr().out
    pruned = (
        r"\b12 layers.*\b2:4\b.*\bwanda\b.*mask row, solve greedy, propagate sparse.*\b640 tokens"
    )
    assert re.search(pruned, said)
    assert re.search(r"\b50\.0000% .*weights", said)
    manifest = json.loads((out / "sparsity.json").read_text())
    assert f"mean {manifest['error']:.4g}" in said
    noted = json.loads((out / "run.json").read_text())
    assert noted["command"].startswith("entangle sparsify ")
    assert "--sparsity 2:4" in noted["command"]
    words = ["--text", str(place / "text.txt"), "--length", "32", "--json"]
    assert main(["perplexity", str(out), *words]) == 0
    pruned = json.loads(capsys.readouterr().out)["perplexity"]
    assert main(["perplexity", str(place / "model"), *words]) == 0
    assert pruned != json.loads(capsys.readouterr().out)["perplexity"]
    assert main(_pruning(place, "sparsify", out, *options)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*_pruning(place, "sparsify", out, *options), "--overwrite", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["realised"], len(printed["layers"])) == (0.5, 12)


def test_sparsify_takes_a_budget_of_a_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = place / "run", tmp_path / "pruned"
    layers = ["--layers", "*.mlp.*"]
    options = ["--budget", f"{run}:ranks", "--strength", "0.4", "--across", "entanglement"]
    assert main([*_pruning(place, "sparsify", out, *layers), *options]) == 0
    said = capsys.readouterr().out
    rows = json.loads((out / "sparsity.json").read_text())["layers"]
    low, high = min(row["least"] for row in rows), max(row["most"] for row in rows)
    assert "budget ranks, strength 0.4, across entanglement" in said
    assert f"{low:.1%} to {high:.1%} of a row" in said
    noted = json.loads((out / "run.json").read_text())
    assert (noted["budget"], noted["strength"], noted["across"]) == ("ranks", 0.4, "entanglement")
    alone = entangle.load_model(place / "model")
    tokenizer = entangle.load_tokenizer(place / "model")
    windows = entangle.token_windows(place / "text.txt", tokenizer, windows=20, length=32)
    words: dict[str, Any] = {"budget": "ranks", "strength": 0.4, "across": "entanglement"}
    opened = entangle.open_run(run)
    entangle.sparsify(alone, windows, sparsity=0.5, layers="*.mlp.*", run=opened, **words)
    written = entangle.load_model(out).state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in alone.state_dict().items())
    # Without a variable it is the distance in output units; auto chooses a strength for it.
    letters = "".join(random.Random(2).choices(string.ascii_letters, k=660))
    (tmp_path / "letters.txt").write_text(letters)  # no part of it is like another
    auto = ["--budget", str(run), "--strength", "auto", "--overwrite"]
    auto += ["--text", str(tmp_path / "letters.txt")]
    assert main([*_pruning(place, "sparsify", out, *layers), *auto]) == 0
    # Uniform rows may be the best: then run.json has no budget.
    chosen = {"budget": "uniform", "strength": 0.0} | json.loads((out / "run.json").read_text())
    assert chosen["budget"] in {"uniform", *VARIABLES}
    assert chosen["strength"] in {0.0, *STRENGTHS}
    assert "--strength auto" in chosen["command"]
    scored = pd.read_csv(out / "budget.csv", dtype={"budget": str})
    assert {*scored["budget"]} == {"uniform", *VARIABLES}
    best = scored[1:].sort_values("nats").iloc[0]
    best = best.fillna({"strength": 0.0})
    assert (best["budget"], best["strength"]) == (chosen["budget"], chosen["strength"])
    said = capsys.readouterr().out
    rows = re.escape(f"{best['budget']} rows")
    against = f"{best['against_uniform']:.3f} ± {best['against_uniform_error']:.3f} nats.*uniform"
    told = rf"{rows}.*\b10 budgets.*\b5 calibration windows"
    assert re.search(told + (f".*{against}" if best["strength"] else ""), said)
    named = ["--budget", f"{run}:std", *auto[2:]]
    assert main([*_pruning(place, "sparsify", out, *layers), *named]) == 0
    assert json.loads((out / "run.json").read_text()).get("budget", "uniform") in {"std", "uniform"}
    scored = pd.read_csv(out / "budget.csv", dtype={"budget": str})
    assert {*scored["budget"]} == {"uniform", "std"}


def test_a_sweep_has_a_line_for_each_budget(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = place / "run", tmp_path / "sweep"
    options = ["--layers", "*.mlp.*", "--method", "sparsegpt", "--propagate", "dense"]
    options += ["--budget", f"uniform,{run},{run}:shuffled,trim", "--across", "uniform,depth"]
    assert main(_pruning(place, "sweep", out, *options)) == 0
    said = capsys.readouterr().out
    table = pd.read_csv(out / "tables" / "sweep.csv", dtype={"budget": str})
    assert table["budget"][1:].tolist() == [
        *["uniform"] * 2, *["wasserstein*std"] * 2, *["shuffled"] * 2, *["trim"] * 2
    ]  # fmt: skip
    assert table["realised"][1:].nunique() == 1
    for row in table[1:].to_dict(orient="records"):
        assert f"{row['least']:.3f} to {row['most']:.3f}" in said
        assert f"{row['least_layer']:.3f} to {row['most_layer']:.3f}" in said
    assert (out / "figures" / "sweep.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "RUN:std", "--mask", "block"], r"budget std.*mask.*\bblock\b"),
        (["--budget", "RUN:std", "--sparsity", "2:4"], r"budget std.*\b2:4\b"),
        (["--strength", "0.5"], "--strength.*measured run.*--budget RUN"),
        (["--budget", "RUN:std", "--strength", "1.5"], r"strength.*\b1\.5\b"),
        (["--budget", "RUN:std", "--strength", "much"], "argument --strength: .*'much'"),
        (["--budget", "uniform", "--strength", "auto"], "--strength.*measured run.*--budget RUN"),
        (["--across", "entanglement"], "--across entanglement.*--budget RUN:uniform"),
        (
            ["--budget", "RUN:uniform", "--strength", "auto"],
            "--strength.*measured run.*--budget RUN",
        ),
        (["--budget", "trim", "--strength", "0.1"], "--strength.*measured run.*--budget RUN"),
        (["--budget", "nowhere:std"], r"\bnowhere .*--out"),
        (["--budget", "RUN:beauty"], "budget.*uniform, .*'beauty'"),
        (["--budget", "OTHER"], "other weights"),
    ],
)
def test_what_is_no_budget_is_told(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    if "OTHER" in options:
        save_tiny(tmp_path / "other", seed=3)
        words = _measure(place, str(tmp_path / "OTHER"))
        words[1] = str(tmp_path / "other")
        assert main(words) == 0
        capsys.readouterr()
    (tmp_path / "RUN").symlink_to(place / "run")
    options = [
        str(tmp_path / word) if word.split(":")[0] in {"RUN", "OTHER"} else word for word in options
    ]
    try:
        code = main([*_pruning(place, "sparsify", tmp_path / "out"), *options])
    except SystemExit as error:  # of the grammar
        code = int(error.code or 0)
    said = capsys.readouterr().err
    assert code == 2
    assert re.search(message, said)
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_mixture_is_made_told_of_and_taken_as_a_model(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mixture"
    options = ["--layers", "*.mlp.*", "--experts", "3", "--assign", "random", "--components", "0"]
    assert main(_pruning(place, "sparsify", out, *options)) == 0
    said = capsys.readouterr().out
    whole = json.loads((out / "sparsity.json").read_text())
    assert re.search(r"\b3 experts.*median 3\b.*\b3\b", said)
    assert "assign random, components 0, shrinkage 0.5" in said
    disk, memory = (f"{whole[f'{kind}_bytes'] / 1e6:,.1f} MB" for kind in ("disk", "memory"))
    assert re.search(rf"\b{whole['density']:.2%} .*multiply-adds", said)
    assert re.search(rf"\b{disk}.*disk.*\b{memory}.*memory", said)
    noted = json.loads((out / "run.json").read_text())
    assert (noted["experts"], noted["assign"], noted["components"]) == (3, "random", 0)
    assert "--components 0" in noted["command"]
    assert "--experts 3" in noted["command"]
    words = ["--text", str(place / "text.txt"), "--length", "32", "--windows", "4"]
    assert main(["perplexity", str(out), *words, "--unpacked", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    model = entangle.load_model(out)
    windows = entangle.token_windows(
        place / "text.txt", entangle.load_tokenizer(out), windows=4, length=32
    )
    assert scored["perplexity"] == entangle.perplexity(model, windows).perplexity
    assert main(["measure", str(out), *words, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["rank", str(tmp_path / "run"), "--json"]) == 0
    layers = {
        row["neuron"].rsplit(":")[0] for row in json.loads(capsys.readouterr().out)["neurons"]
    }
    assert any("mlp" in layer for layer in layers)
    assert main([*_pruning(place, "sparsify", tmp_path / "again"), "--layers", "*"]) == 0
    again = ["sparsify", str(out), *words, "--sparsity", "0.5", "--out", str(tmp_path / "twice")]
    capsys.readouterr()
    assert main(again) == 2
    assert re.search(r"expanded.*\b3 experts", capsys.readouterr().err)
    (out / "experts" / "1.safetensors").write_bytes(b"cut off")
    assert main(["perplexity", str(out), *words]) == 2
    assert re.search(rf"{out} .*damaged.*experts/1\.safetensors", capsys.readouterr().err)


def test_how_many_layers_have_merged_clusters_is_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--experts", "24", "--windows", "8", "--layers", "*.mlp.*"]
    assert main([*_pruning(place, "sparsify", tmp_path / "out", *options)]) == 0
    layers = json.loads((tmp_path / "out" / "sparsity.json").read_text())["layers"]
    clusters = sorted(layer["clusters"] for layer in layers)
    assert clusters[0] < 24
    middle = (clusters[len(clusters) // 2] + clusters[(len(clusters) - 1) // 2]) / 2
    said = capsys.readouterr().out
    assert re.search(rf"\b24 experts.*median {middle:g}\b.*\b{clusters[0]}\b", said)


def test_a_sweep_has_a_line_for_each_number_of_experts(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    options = ["--layers", "*.mlp.*", "--experts", "1,3", "--assign", "kmeans,random"]
    options += ["--components", "auto,0", "--shrinkage", "0,0.5", "--propagate", "dense"]
    assert main(_pruning(place, "sweep", out, *options, "--method", "sparsegpt,wanda")) == 0
    said = capsys.readouterr().out
    heads = next(line for line in said.splitlines() if line.startswith("| method"))
    assert [cell.strip() for cell in heads.split("|")[5:11]] == [
        "reconstruct", "experts", "assign", "components", "shrinkage", "sparsity",
    ]  # fmt: skip
    noted = json.loads((out / "run.json").read_text())["command"]
    assert "--components auto,0" in noted
    assert "--experts 1,3" in noted
    assert "--shrinkage 0.0,0.5" in noted
    table = sweep_table.read_table(out)
    assert len(table) == 1 + 1 + 2 * 2 * 2 + 1
    assert (out / "figures" / "sweep.png").stat().st_size > 10_000


def test_sweep_scores_on_two_texts_side_by_side(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = tmp_path / "second.txt"
    second.write_text(" ".join(reversed(WORDS.split())) * 30)
    words = _pruning(place, "sweep", tmp_path / "run", "--sparsity", "0.5", "--method", "wanda")
    where = words.index("--evaluation") + 2
    assert main([*words[:where], str(second), *words[where:]]) == 0
    said = capsys.readouterr().out
    heads = next(line for line in said.splitlines() if line.startswith("| method"))
    assert re.search(r"\| perplexity, [^|]*/other \|.*\| perplexity, [^|]*/second \|", heads)
    table = sweep_table.read_table(tmp_path / "run")
    assert table["evaluation"].tolist() == [str(place / "other.txt"), str(second)] * 2
    assert table["nats"].nunique() == 4
    assert main(["plot", str(tmp_path / "run"), "sweep"]) == 0


def test_sweep_prints_its_table_and_draws_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    options = ["--sparsity", "0.3, 0.6,0.8", "--method", "wanda,magnitude", "--propagate", "dense"]
    assert main(_pruning(place, "sweep", out, *options)) == 0
    said = capsys.readouterr().out
    assert said.startswith((out / "tables" / "sweep.md").read_text())
    assert "217 tokens" in said  # 7 windows of 32, the first token of each not scored
    table = pd.read_csv(out / "tables" / "sweep.csv", dtype={"sparsity": str})
    assert table["sparsity"].tolist()[1:] == ["0.3", "0.6", "0.8"] * 2
    noted = json.loads((out / "run.json").read_text())["command"]
    assert "--sparsity 0.3,0.6,0.8" in noted
    assert "--method wanda,magnitude" in noted
    picture = (out / "figures" / "sweep.png").read_bytes()
    assert main(["plot", str(out), "sweep", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"figure": str(out / "figures" / "sweep.png")}
    assert (out / "figures" / "sweep.png").read_bytes() == picture
    assert main(["rank", str(out)]) == 2
    assert re.search("measured.*tables", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("sparsify", ["--sparsity", "80"], "sparsity.*n:m.*'80'"),
        ("sparsify", ["--sparsity", "2:4"], r"down_proj.*\b2:4\b.*groups.*\b37\b"),
        ("sweep", ["--method", "wanda,luck"], "method.*sparsegpt, wanda, magnitude.*'luck'"),
        ("sweep", ["--sparsity", ","], r"one value.*\bsparsity\b"),
        (
            "sweep",
            ["--evaluation", "TEXT", "--evaluation-windows", "20"],
            r"\b100\.0% of the tokens of the evaluation",
        ),
        ("sweep", ["--evaluation", "nowhere"], r"no text.*\bnowhere\b"),
        ("sweep", ["--evaluation-windows", "0"], r"\b1 window.*\b0 windows of 32\b"),
        ("sweep", ["--experts", ","], r"one value.*\bexperts\b"),
        ("sweep", ["--experts", "4", "--method", "wanda"], "experts.*sparsegpt.*methods"),
        ("sweep", ["--experts", "1,0"], r"\b1 expert.*\b0\b"),
        ("sweep", ["--experts", "4", "--shrinkage", "-1"], r"shrinkage.*negative.*-1\b"),
        ("sparsify", ["--experts", "4", "--method", "wanda"], r"experts.*\b4 experts.*wanda"),
        ("sparsify", ["--experts", "4", "--components", "-3"], r"components.*negative.*-3\b"),
        ("sparsify", ["--shrinkage", "0.5"], "--shrinkage.*--experts"),
        ("sweep", ["--experts", "1", "--assign", "kmeans"], "--assign.*--experts"),
    ],
)
def test_bad_prunings_get_one_message_and_leave_nothing(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    options: list[str],
    message: str,
) -> None:
    words = [str(place / "text.txt") if word == "TEXT" else word for word in options]
    assert main(_pruning(place, command, tmp_path / "out", *words)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("entangle: ")
    assert re.search(message, said.err)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_sweep_says_where_it_goes_on(place: Path, tmp_path: Path) -> None:
    sparsities = ",".join(str(number / 1000) for number in range(1, 900))
    words = _pruning(place, "sweep", tmp_path / "out", "--sparsity", sparsities)
    process = Forked(["-m", "entangle", *words])
    partial = tmp_path / "out.partial"
    while not (partial / "arms").exists():
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    process.signal(signal.SIGTERM)
    ended, said = process.wait(60), process.stderr
    assert ended == 143
    assert re.search(rf"terminated.*{partial}\b", said)
    assert list((partial / "arms").glob("*.json"))


IN_DESTRUCTOR = """
import os, signal, sys, time
from entangle import __main__

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

def command(args):
    Slow()
    time.sleep(20)
    print("ran on")

__main__.COMMANDS["rank"] = command
sys.exit(__main__.main(["rank", "nowhere"]))
"""


IN_COMPILER = """
import ctypes, os, signal, sys, time
from llvmlite.binding import executionengine
from entangle import __main__

source = "def notify():\\n    os.kill(os.getpid(), signal.SIGTERM)\\n    time.sleep(0.01)"
scope = {"os": os, "signal": signal, "time": time}
exec(compile(source, executionengine.__file__, "exec"), scope)
callback = ctypes.CFUNCTYPE(None)(scope["notify"])  # as the compiler calls back

def command(args):
    callback()
    time.sleep(20)
    print("ran on")

__main__.COMMANDS["rank"] = command
sys.exit(__main__.main(["rank", "nowhere"]))
"""


@pytest.mark.parametrize("code", [IN_DESTRUCTOR, IN_COMPILER], ids=["destructor", "compiler"])
def test_a_signal_that_comes_where_python_ignores_an_exit_is_not_lost(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "")
    assert re.fullmatch(r"entangle: .*terminated.*nothing.*\n", done.stderr)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_not_lost_where_c_code_has_an_error_in_its_place(
    number: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class HalfMade:
        def __del__(self) -> None:
            raise AttributeError("_closed")

    def command(_: object) -> None:
        unfinished = [HalfMade()]
        try:
            signal.raise_signal(number)
        except BaseException:  # noqa: BLE001
            unfinished.clear()  # Python would print the error of __del__ with its traceback
            raise ValueError("could not determine the shape") from None

    monkeypatch.setitem(COMMANDS, "rank", command)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main(["rank", "nowhere"]))
    except SystemExit as error:
        assert error.code == code  # noqa: PT017  # SIGTERM exits by itself
    said = capsys.readouterr().err
    assert "shape" not in said
    assert "_closed" not in said
    assert re.fullmatch(r"entangle: (interrupted|terminated).*nothing.*\n", said)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mixtral"])
def test_every_architecture_is_measured_ranked_and_drawn(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model", name)
    (tmp_path / "text.txt").write_text(WORDS * 20)
    assert main(_measure(tmp_path, "run")) == 0
    capsys.readouterr()
    run = str(tmp_path / "run")
    assert main(["rank", run, "--top", "1", "--json"]) == 0
    top = json.loads(capsys.readouterr().out)["neurons"][0]
    largest = float(entangle.open_run(run)["wasserstein"].max())
    assert top["wasserstein"] == largest
    assert main(["plot", run, "heatmap"]) == 0  # which has a panel for each role
    assert Path(capsys.readouterr().out.strip()).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("option", "word", "message"),
    [
        ("--experts", "1,many", "whole number.*'many'"),
        ("--shrinkage", "half", "number.*'half'"),
        ("--components", "some", "number or auto.*'some'"),
    ],
)
def test_words_that_are_no_numbers_are_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, word: str,
    message: str,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main(_pruning(place, "sweep", tmp_path / "out", option, word))
    assert stopped.value.code == 2
    assert re.search(f"argument {option}: .*{message}", capsys.readouterr().err)


# Ablations, and what clusters make of neurons.


def _treating(place: Path, command: str, out: Path, *options: str) -> list[str]:
    (place / "other.txt").write_text(WORDS[::-1] * 30)
    words = [command, str(place / "run"), "--evaluation", str(place / "other.txt"), "--out"]
    words += [str(out), "--evaluation-windows", "7", "--length", "32", "--windows", "20"]
    if "--text" not in options:
        words += ["--text", str(place / "text.txt")]
    return [*words, "--layers", "*.mlp.*", *options]


def _repeated(out: Path, again: Path) -> bool:
    """Run the command that run.json notes, and see that the same is written."""
    noted = json.loads((out / "run.json").read_text())["command"]
    assert noted.startswith("entangle ")
    assert "--out" not in noted
    assert main([*shlex.split(noted)[1:], "--out", str(again)]) == 0
    both = [_contents(folder) for folder in (out, again)]
    for files in both:
        assert files.pop("log.json")
    assert both[0] == both[1]
    return True


def test_measure_with_difficulty_writes_its_table_and_its_figure(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["measure", str(place / "model"), "--text", str(place / "text.txt"), "--length", "32"]
    assert main([*words, "--windows", "20", "--difficulty", "50", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == str(out)
    run = entangle.open_run(out)
    written = pd.read_csv(out / "tables" / "difficulty.csv")
    expected = entangle.rank_correlations(run, "wasserstein", ["difficulty"])
    pd.testing.assert_frame_equal(written, expected, check_dtype=False, rtol=1e-14)
    assert len(written) == 21
    assert set(run["difficulty_pairs"].to_numpy() + run["difficulty_equal"].to_numpy()) == {50}
    picture = (out / "figures" / "difficulty.png").read_bytes()
    assert main(["plot", str(out), "difficulty"]) == 0
    assert Path(capsys.readouterr().out.strip()) == out / "figures" / "difficulty.png"
    assert (out / "figures" / "difficulty.png").read_bytes() == picture
    assert "--difficulty 50" in json.loads((out / "run.json").read_text())["command"]
    assert _repeated(out, tmp_path / "again")
    plain = json.loads((place / "run" / "run.json").read_text())["command"]
    assert "--difficulty" not in plain
    assert main(["plot", str(place / "run"), "difficulty"]) == 2
    assert re.search("mapping difficulty.*--difficulty", capsys.readouterr().err)


def test_ablate_prints_its_table_and_draws_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "out", ["--share", "0.1,0.3", "--sets", "wasserstein,random"]
    options += ["--seeds", "2", "--intervention", "sparsify,negative", "--experts", "1,3"]
    assert main(_treating(place, "ablate", out, *options, "--sparsity", "0.6")) == 0
    said = capsys.readouterr().out
    assert said.startswith((out / "tables" / "ablation.md").read_text())
    assert re.search(rf"{out}\b.*{out / 'figures' / 'ablation.png'}", said)
    assert "217 tokens" in said  # 7 windows of 32, the first token of each not scored
    table = ablation_table.read_table(out)
    kinds = [("sparsify", "0.6", 1), ("sparsify", "0.6", 3), ("negative", "", 1)]
    arms = [(*kind, share, name) for kind in kinds for share in (0.1, 0.3) for name in
            ("wasserstein", "random")]  # fmt: skip
    names = ["intervention", "sparsity", "experts", "share", "set"]
    assert list(table[names][1:].itertuples(index=False, name=None)) == arms
    tokenizer = entangle.load_tokenizer(place / "model")
    text = entangle.token_windows(place / "text.txt", tokenizer, windows=20, length=32)
    scored = entangle.token_windows(
        place / "other.txt", tokenizer, windows=7, length=32, purpose="evaluation"
    )
    found = entangle.ablate(
        entangle.load_model(place / "model"), text, scored, run=entangle.open_run(place / "run"),
        share=[0.1, 0.3], sparsity=[0.6], experts=[1, 3], layers=["*.mlp.*"], seeds=2,
        intervention=["sparsify", "negative"], sets=["wasserstein", "random"],
    )  # fmt: skip
    assert table["perplexity"].tolist() == found["perplexity"].tolist()
    picture = (out / "figures" / "ablation.png").read_bytes()
    assert main(["plot", str(out), "ablation", "--json"]) == 0
    file = str(out / "figures" / "ablation.png")
    assert json.loads(capsys.readouterr().out) == {"figure": file}
    assert Path(file).read_bytes() == picture
    assert _repeated(out, tmp_path / "again")
    assert main(["rank", str(out)]) == 2
    assert re.search("measured.*tables", capsys.readouterr().err)


def test_ablate_without_a_text_a_block_at_a_time_as_json(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["ablate", str(place / "run"), "--evaluation", str(place / "other.txt")]
    (place / "other.txt").write_text(WORDS[::-1] * 30)
    words += ["--intervention", "zero", "--sets", "bottom", "--per-block", "--length", "32"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["block"] for row in printed["table"]] == ["", "0", "1", "2"]
    assert printed["figure"] == str(out / "figures" / "ablation.png")
    assert printed["table"][1]["realised"] is None  # a NaN, which JSON does not have
    assert not printed["pruned"]
    assert _repeated(out, tmp_path / "again")


def test_disentangle_writes_a_run_with_tables_and_figures(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, name = tmp_path / "out", "model.layers.1.mlp.up_proj:5"
    options = ["--experts", "2,3", "--sparsity", "0.5,0.8"]
    assert main(_treating(place, "disentangle", out, *options, "--neurons", name)) == 0
    said = capsys.readouterr().out
    assert said.startswith((out / "tables" / "disentangle.md").read_text())
    kinds = ["improvement", "clusters", "sparse"]
    files = [out / "figures" / f"{kind}.png" for kind in kinds]
    assert re.search(rf"{out}\b.*{', '.join(map(str, files))}", said)
    assert "224 held-out tokens" in said
    pictures = [file.read_bytes() for file in files]
    for kind, file, picture in zip(kinds, files, pictures, strict=True):
        assert main(["plot", str(out), kind]) == 0
        assert Path(capsys.readouterr().out.strip()) == file
        assert file.read_bytes() == picture
    drawn = []
    for kind in ("clusters", "sparse"):
        assert main(["plot", str(out), kind, name]) == 0
        drawn.append(Path(capsys.readouterr().out.strip()))
        assert drawn[-1].read_bytes() not in pictures  # which are of another neuron
    assert main(["plot", str(out), "heatmap"]) == 0  # it is a run
    drawn.append(Path(capsys.readouterr().out.strip()))
    assert len(set(drawn)) == 3  # none over another
    assert main(["rank", str(out), "--by", "held_out_wasserstein", "--json"]) == 0
    ranked = json.loads(capsys.readouterr().out)["neurons"]
    assert {row["neuron"].split(".")[3] for row in ranked} == {"mlp"}
    for file in drawn:
        file.unlink()
    assert _repeated(out, tmp_path / "again")


def test_disentangle_with_no_neurons_named_can_be_repeated(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = _treating(place, "disentangle", out, "--experts", "2", "--layers", "*.1.mlp.up_proj")
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed.pop("figures")) == ["improvement", "clusters", "sparse"]
    about = json.loads((out / "run.json").read_text())
    assert (about["held_out_tokens"], about["experts"], about["sparsity"]) == (224, [2], ["0.8"])
    assert printed == about
    assert _repeated(out, tmp_path / "again")


def test_disentangle_where_nothing_is_lost_draws_what_can_be_drawn(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--experts", "2", "--layers", "*.1.mlp.up_proj", "--sparsity", "0"]
    assert main(_treating(place, "disentangle", tmp_path / "out", *options)) == 0
    assert re.search(r"improvement\.png.*no neuron", capsys.readouterr().out)
    drawn = sorted(file.name for file in (tmp_path / "out" / "figures").iterdir())
    assert drawn == ["clusters.png", "sparse.png"]
    assert main(["plot", str(tmp_path / "out"), "improvement"]) == 2
    assert re.search("no neuron.*improvement", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("ablate", ["--intervention", "luck"], "sparsify, zero, mean, negative.*'luck'"),
        ("ablate", ["--sets", "beauty"], "wasserstein, bottom, random.*'beauty'"),
        ("ablate", ["--share", "0"], r"share.*\b0\.0\b"),
        ("ablate", ["--share", "0.1,2"], r"share.*\b2\.0\b"),
        ("ablate", ["--share", ","], r"ablation.*one value.*\bshare\b"),
        ("ablate", ["--sparsity", "80"], "sparsity.*n:m.*'80'"),
        ("ablate", ["--sparsity", "2:4"], r"down_proj.*\b2:4\b.*groups.*\b37\b"),
        ("ablate", ["--experts", "0"], r"\b1 expert.*\b0\b"),
        ("ablate", ["--seeds", "0"], r"random.*\b1 seed.*\b0\b"),
        *(
            ("ablate", ["--intervention", "zero,mean", *unused], f"{unused[0]} has an effect only")
            for unused in (["--solve", "exact"], ["--sparsity", "0.9"], ["--experts", "1"])
        ),
        ("ablate", ["--text", "NONE"], r"sparsify.*--text\b"),
        (
            "ablate",
            ["--evaluation", "TEXT", "--evaluation-windows", "20", "--text", "OTHER"],
            r"\b100\.0% of the tokens of the evaluation",
        ),
        (
            "ablate",
            ["--evaluation", "TEXT", "--evaluation-windows", "20"],
            r"\b100\.0% of the tokens of the evaluation",
        ),
        ("ablate", ["--evaluation", "nowhere"], r"no text.*\bnowhere\b"),
        ("ablate", ["--layers", "*.mlp.up_prj"], r"layer.*'\*\.mlp\.up_prj'"),
        ("disentangle", ["--experts", "1"], r"experts.*\b0\.8\D+1\b"),
        ("disentangle", ["--sparsity", "1.5"], r"sparsity.*n:m.*\b1\.5\b"),
        ("disentangle", ["--neurons", "a:1"], "neuron 'a:1'.*LAYER:INDEX"),
        ("disentangle", ["--skip-first", "32"], r"skip_first.*\b31\b.*windows of 32\D+32\b"),
        (
            "disentangle",
            ["--text", "OTHER", "--windows", "7"],
            r"\b100\.0% of the tokens of the evaluation",
        ),
    ],
)
def test_what_cannot_be_treated_gets_one_message_and_leaves_nothing(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    options: list[str],
    message: str,
) -> None:
    words = _treating(place, command, tmp_path / "out", *options)
    if "NONE" in words:
        at = words.index("NONE")
        del words[at - 1 : at + 1]
    files = {"TEXT": str(place / "text.txt"), "OTHER": str(place / "other.txt")}
    assert main([files.get(word, word) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("entangle: ")
    assert "Traceback" not in said.err
    assert re.search(message, said.err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["ablate", "disentangle"])
def test_a_run_of_other_weights_or_none_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    save_tiny(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(WORDS * 60)
    assert main(_measure(tmp_path, "run")) == 0
    save_tiny(tmp_path / "model", "llama", seed=1)
    capsys.readouterr()
    assert main(_treating(tmp_path, command, tmp_path / "out")) == 2
    assert "other weights" in capsys.readouterr().err
    for name, message in (("model", r"run\.json.*--out"), ("nowhere", r"\bnowhere .*--out")):
        words = _treating(place, command, tmp_path / "out")
        words[1] = str(place / name)
        assert main(words) == 2
        assert re.search(message, capsys.readouterr().err)
    assert main(_treating(place, command, place / "run")) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["difficulty", "a:1"], "difficulty.*no neuron.*'a:1'"),
        (["ablation", "a:1"], "ablation.*no neuron.*'a:1'"),
        (["improvement", "a:1"], "improvement.*no neuron.*'a:1'"),
        (["ablation"], r" tables/ablation\.csv.*ablation"),
        (["improvement"], "improvement.*disentangle"),
        (["clusters"], "outputs.*disentangle"),
        (["sparse", "model.layers.1.mlp.up_proj:5"], "outputs.*disentangle"),
    ],
)
def test_pictures_that_a_run_has_not_are_told(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["plot", str(place / "run"), *words]) == 2
    said = capsys.readouterr()
    assert (said.out, "Traceback" in said.err) == ("", False)
    assert re.search(message, said.err)


# Tokens behind neurons.


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A copy of the run, to add to."""
    return Path(shutil.copytree(place / "run", tmp_path / "run"))


def _exact_distance(place: Path, neuron: str) -> float:
    """Return the exact distance of a neuron's outputs, heard with a hook of this test's own."""
    layer, _, index = neuron.rpartition(":")
    tokenizer = entangle.load_tokenizer(place / "model")
    windows = entangle.token_windows(place / "text.txt", tokenizer, windows=20, length=32)
    model = entangle.load_model(place / "model")
    outputs: list[torch.Tensor] = []
    model.get_submodule(layer).register_forward_hook(
        lambda _, __, output: outputs.append(output.flatten(0, -2)[:, int(index)])
    )
    with torch.no_grad():
        model(windows.tokens)
    return float(from_samples(outputs[0][:, None])[0])


def test_contexts_are_printed_and_added_to_the_run(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(run)
    names = ["model.layers.2.mlp.up_proj:36", "model.layers.0.self_attn.q_proj:0"]
    assert main(["contexts", str(run), *names]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    heads = [line for line in lines if ": W1 " in line]
    for head, name in zip(heads, names, strict=True):
        assert head.startswith(f"{name}: W1 {_exact_distance(place, name):.4f}, 95% interval ")
        assert "640 tokens" in head
    assert [lines.count(f"  {why}") for why in ("lowest", "highest", "quantile 0.5")] == [2, 2, 2]
    assert lines[-2].endswith(f" {run / 'contexts.json'}")
    assert lines[-1].endswith(f" report {run}")

    assert main(["contexts", str(run), *names, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["file"] == str(run / "contexts.json")
    assert [one["neuron"] for one in printed["neurons"]] == names
    written = json.loads((run / "contexts.json").read_text())["neurons"]
    assert list(written.values()) == printed["neurons"]
    for case in printed["neurons"][0]["unit"]["cases"]:
        assert f"gate {case['gate']} up {case['up']}  {case['share']:6.1%} of the tokens" in said
    for one, head in zip(printed["neurons"], heads, strict=True):
        assert f"95% interval {one['low']:.4f} to {one['high']:.4f} " in head
        lowest = one["contexts"][0]
        assert f"{lowest['output']:9.3f} {lowest['deviation']:+6.1f} std" in said
        text = lowest["before"] + lowest["token"] + lowest["after"]
        assert text in WORDS * 2
        assert f"[[{lowest['token']}]]" in said

    assert main(["contexts", str(run), "model.layers.1.mlp.up_proj:5"]) == 0
    assert set(json.loads((run / "contexts.json").read_text())["neurons"]) == {
        *names,
        "model.layers.1.mlp.up_proj:5",
    }
    after = _contents(run)
    assert after.pop("contexts.json")
    assert after == before
    assert main(["rank", str(run)]) == 0  # it is still a run


def test_distances_are_checked_and_one_outside_its_bound_is_an_error(
    place: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, up = _contents(run), "model.layers.1.mlp.up_proj"
    assert main(["check", str(run), "--layers", "*.up_proj", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["neurons"]) == 9
    assert all(one["agrees"] for one in found["neurons"])
    assert main(["check", str(run), "--top", "2", "--layers", "*.up_proj"]) == 0
    said = capsys.readouterr().out
    best = entangle.top_by_layer(entangle.open_run(run), count=2, layers="*.up_proj")
    for index in best[up]:
        assert len(re.findall(rf"^{up}:{index} +640 ", said, re.MULTILINE)) == 2
    assert "6 of 6 neurons have every distance within" in said
    assert _contents(run) == before

    tree = entangle.open_run(run).load()
    row = tree["neuron"].to_numpy().tolist().index(f"{up}:5")
    tree["wasserstein"].to_numpy()[row] += 2.1 * float(tree["wasserstein_error"][row])
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    store.write_run(wrong, [tree], json.loads((run / "run.json").read_text()), dict)
    assert main(["check", str(wrong), "--device", "cpu", f"{up}:5", f"{up}:6"]) == 1
    printed = capsys.readouterr()
    stored = float(tree["wasserstein"][row])
    (exact,) = {line.split()[4] for line in printed.out.splitlines() if f" {stored:.6f} " in line}
    assert float(exact) == pytest.approx(_exact_distance(place, f"{up}:5"), abs=1e-6)
    assert re.match(rf"entangle: 1 of 2 neurons .*outside.*: {up}:5\.", printed.err)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["UP:5", "--top", "3"], ["not both"]),
        (["UP:37"], ["36"]),
        (["--layers", "*.nothing"], ["*.nothing"]),
        (["--top", "0"], ["--top", "at least 1"]),
    ],
)
def test_a_slip_in_check_gets_one_message(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], messages: list[str]
) -> None:
    words = [word.replace("UP", "model.layers.1.mlp.up_proj") for word in words]
    assert main(["check", str(run), *words]) == 2
    _one_message(capsys, messages)


def test_words_are_printed_and_added_to_the_run(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(run)
    up, down = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
    assert main(["words", "--device", "cpu", str(run), f"{up}:5", f"{down}:input:5"]) == 0
    said = capsys.readouterr().out
    model = entangle.load_model(place / "model")
    norm = model.get_submodule("model.layers.1.post_attention_layernorm").get_parameter("weight")
    row = model.get_submodule(up).get_parameter("weight")[5] * norm
    embedding = model.get_input_embeddings().get_parameter("weight")
    largest = float(
        (embedding @ row).detach()[: len(entangle.load_tokenizer(place / "model"))].max()
    )
    kept = json.loads((run / "words.json").read_text())
    assert [*kept] == [f"{up}:5", f"{down}:input:5"]
    assert kept[f"{up}:5"]["words"][0]["top"][0]["value"] == pytest.approx(largest, rel=1e-4)
    assert f" {largest:.3g} (+" in said
    assert said.count("  reads (row ") == 4
    assert said.count(f"  writes (column {down}:input:5, through the final RMS norm)") == 2
    assert main(["words", str(run), "--top", "1", "--layers", "*.up_proj", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["neurons"]) == 3
    after = _contents(run)
    assert after.pop("words.json")
    assert after == before
    neuron = entangle.open_run(run).entangle.neuron(f"{up}:5")
    table = neuron.words
    assert table["value"][0] == pytest.approx(largest, rel=1e-4)
    assert {*table["side"]} == {"reads", "writes"}
    assert table[table["of"] == f"{up}:5"]["value"].is_monotonic_decreasing
    with pytest.raises(LookupError, match=f"entangle words .*{up}:6"):
        _ = entangle.open_run(run).entangle.neuron(f"{up}:6").words


def test_steering_is_printed_with_errors_and_continuations(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(run)
    line = ["steer", str(run), "model.layers.1.mlp.up_proj:5", "--windows", "3"]
    line += ["--set", "zero,quantile:0.9", "--prompt", "The quick", "--tokens", "5"]
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["setting"] for one in found["settings"]] == ["zero", "quantile:0.9"]
    assert (found["windows"], found["tokens"]) == (3, 3 * 31)
    assert all(one["kl"] > 0 < one["kl_error"] for one in found["settings"])
    assert main(line) == 0
    said = capsys.readouterr().out
    for one in found["settings"]:
        bound = f" ± {one['value_error']:.2g}" if one["setting"] != "zero" else ""
        held = f"{one['setting']} (held at {one['value']:.4g}{bound}): KL divergence"
        assert f"{held} {one['kl']:.3g} ± " in said
        assert f"{one['up'][0]['change']:+.3%} ± {one['up'][0]['error']:.3%}" in said
    assert f"  untouched     {json.dumps(found['continuation'], ensure_ascii=False)}" in said
    assert _contents(run) == before


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["UP:5", "--set", "zeros"], ["'zeros'", "quantile:0.99"]),
        (["UP:5", "--set", "zero", "--windows", "0"], ["--windows", "got 0"]),
        (["UP:5", "--set", "zero", "--prompt", "a", "--tokens", "0"], ["--tokens", "got 0"]),
        (["UP:5", "--set", "zero", "--tokens", "9"], ["--tokens 9", "only with --prompt"]),
        (["UP:37", "--set", "zero"], ["36"]),
        (["lm_head:3", "--set", "mean"], ["lm_head:3"]),
        (["UP:5", "--set", "zero", "--text", "missing.txt"], ["missing.txt"]),
    ],
)
def test_a_slip_in_steer_gets_one_message(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], messages: list[str]
) -> None:
    words = [word.replace("UP", "model.layers.1.mlp.up_proj") for word in words]
    assert main(["steer", str(run), *words]) == 2
    _one_message(capsys, messages)


def test_a_prompt_is_printed_with_values_and_places_and_in_colour_on_a_terminal(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, name = _contents(run), "model.layers.2.mlp.up_proj:36"
    words = ["contexts", str(run), name, "--prompt", "a fox\n"]
    assert main([*words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["neurons"]
    assert "".join(found["tokens"]) == "a fox\n"
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    lines = said.splitlines()
    assert lines[0].startswith(f"{name}: output")
    for line, token, value, quantile in zip(
        lines[1:], found["tokens"], found["values"], found["quantiles"], strict=True
    ):
        assert line.split()[:2] == [f"{value:.4g}", f"{quantile:.4f}"]
        assert line.endswith(token.replace("\n", "⏎"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(words) == 0
    assert "\x1b[30;48;2;" in capsys.readouterr().out
    assert main([*words[:3], "--prompt", ""]) == 2
    _one_message(capsys, ["no tokens"])
    assert _contents(run) == before


def test_contexts_of_each_layers_most_entangled_neurons(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["contexts", str(run), "--top", "2", "--layers", "*.up_proj", "*.q_proj"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["neurons"]
    frame = entangle.open_run(run).to_dataset().to_dataframe()
    expected = set()
    for layer, some in frame.groupby("layer"):
        if str(layer).endswith((".up_proj", ".q_proj")):
            expected |= {f"{layer}:{i}" for i in some.nlargest(2, "wasserstein")["index"]}
    assert len(found) == len(expected) == 12
    assert {one["neuron"] for one in found} == expected
    assert set(json.loads((run / "contexts.json").read_text())["neurons"]) == expected


def test_contexts_of_a_run_on_a_folder_of_two_texts(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "calibration.txt").write_text(WORDS * 20)
    (tmp_path / "texts" / "evaluation.txt").write_text(WORDS[::-1] * 20)
    words = ["measure", str(place / "model"), "--text", str(tmp_path / "texts"), "--length", "32"]
    words += ["--windows", "9", "--seed", "3", "--bos", "always", "--skip-first", "1"]
    run = tmp_path / "run"
    assert main([*words, "--layers", "*.1.mlp.up_proj", "--out", str(run)]) == 0
    text = json.loads((run / "run.json").read_text())["text"]
    assert text == str(tmp_path / "texts" / "calibration.txt")
    capsys.readouterr()
    assert main(["contexts", str(run), "model.layers.1.mlp.up_proj:5", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["neurons"]
    assert found["tokens"] == 9 * 31
    assert all(one["before"].startswith("<s>") or one["position"] > 24 for one in found["contexts"])


def test_neurons_may_stand_behind_options(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"model.layers.1.mlp.up_proj:{index}" for index in range(6)]
    assert main(["contexts", "--device", "cpu", str(run), "--debug", names[0]]) == 0
    assert "window:position" in capsys.readouterr().out
    assert main(["contexts", str(run), names[0], "--device", "cpu", *names[1:]]) == 0
    said = capsys.readouterr().out
    assert [name in said for name in names] == [True] * 6
    assert "more than 5 neurons" in said
    assert "[[" not in said
    assert {*json.loads((run / "contexts.json").read_text())["neurons"]} == {*names}
    assert main(["plot", str(run), "neuron", "--out", str(run / "a.png"), names[0]]) == 0
    plan = ["plan", str(run), "--text", "text.txt", "--seed", "what"]  # which plan would not use
    for words in (["rank", str(run), "what"], ["contexts", str(run), "--what", names[0]], plan):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"usage: entangle {words[0]} ")
        assert re.search(rf"unrecognized arguments: .*what.*entangle {words[0]} --help", printed)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ([], ["LAYER:INDEX", "--top"]),
        (["--top", "0"], ["--top", "at least 1", "got 0"]),
        (["UP:5", "--top", "2"], ["LAYER:INDEX", "--top"]),
        (["UP:5", "UP:37"], ["up_proj:37'", "37 neurons", " 36"]),
        (["model.layers.1.mlp.up_prj:5"], ["up_prj:5'", "model.layers.1.mlp.up_proj:0"]),
        (["--top", "2", "--layers", "*.nothing"], ["layer", "'*.nothing'"]),
        (["UP:5", "--device", "cuda:7"], ["cuda:7"]),
        (["--top", "-1"], ["--top", "at least 1", "got -1"]),
    ],
)
def test_a_slip_in_the_words_of_contexts_gets_one_message(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], messages: list[str]
) -> None:
    words = [word.replace("UP:", "model.layers.1.mlp.up_proj:") for word in words]
    assert main(["contexts", str(run), *words]) == 2
    _one_message(capsys, messages)
    assert not (run / "contexts.json").exists()


def _one_message(capsys: pytest.CaptureFixture[str], messages: list[str]) -> None:
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("entangle: ")
    assert "Traceback" not in said.err
    for message in messages:
        assert message in said.err


def test_contexts_need_the_text_and_the_weights_that_were_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(WORDS * 60)
    assert main(_measure(tmp_path, "run", "--layers", "*.1.mlp.up_proj")) == 0
    capsys.readouterr()
    run, text = tmp_path / "run", tmp_path / "text.txt"
    words = ["contexts", str(run), "--top", "1"]

    text.rename(tmp_path / "away.txt")
    assert main(words) == 2
    _one_message(capsys, ["no text", str(text)])
    text.write_text(WORDS.upper() * 60)
    assert main(words) == 2
    _one_message(capsys, ["other windows", str(text)])
    (tmp_path / "away.txt").rename(text)
    assert not (run / "contexts.json").exists()

    assert main(words) == 0
    capsys.readouterr()
    written = (run / "contexts.json").read_bytes()
    (run / "contexts.json").write_bytes(written[:50])
    assert main(words) == 2
    _one_message(capsys, ["contexts.json", "damaged"])
    (run / "contexts.json").unlink()
    assert main(words) == 0
    assert (run / "contexts.json").read_bytes() == written
    capsys.readouterr()

    save_tiny(tmp_path / "model", "llama", seed=1)
    assert main(words) == 2
    _one_message(capsys, ["other weights"])
    for name, message in (("model", "run.json"), ("nowhere", "nowhere ")):
        assert main(["contexts", str(tmp_path / name), "--top", "1"]) == 2
        _one_message(capsys, [message, "--out"])
    assert (run / "contexts.json").read_bytes() == written


@pytest.fixture(scope="module")
def own(place: Path) -> Path:
    """A run on a text and on what the model wrote."""
    words = [*_measure(place, "own"), "--seed", "3"]
    words.insert(words.index("--text") + 2, "self:")
    assert main(words) == 0
    return place / "own"


def test_a_run_says_which_texts_it_was_measured_on(
    place: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about, log = (json.loads((own / name).read_text()) for name in ("run.json", "log.json"))
    text = str(place / "text.txt")
    assert (about["text"], about["windows"]) == (f"{text} + self:", 20)
    assert {name: drawn["windows"] for name, drawn in about["texts"].items()} == {
        text: 10,
        "self:": 10,
    }
    assert f"--text {text} self:" in about["command"]
    assert log["own_text_seconds"] > 0
    assert main(["rank", str(own)]) == 0
    assert f"640 tokens of {text} + self: (20 windows of 32)" in capsys.readouterr().out
    subject = entangle.plots.layers(entangle.open_run(own)).get_suptitle()
    assert "place" in subject
    assert "/text + self: · 640 tokens" in subject
    assert main(["report", str(own)]) == 0
    assert f"{text} + self:" in (own / "report.html").read_text(encoding="utf-8")


def test_a_repeated_command_and_contexts_have_the_same_tokens(
    tmp_path: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    neuron = "model.layers.1.mlp.up_proj:5"
    assert main(["contexts", str(own), neuron]) == 0
    assert "10 windows of 32 tokens (self:)" in capsys.readouterr().err
    words = shlex.split(json.loads((own / "run.json").read_text())["command"])[1:]
    assert main([*words, "--out", str(tmp_path / "again")]) == 0
    assert re.search(r"model wrote 10 windows of 32 tokens \(self:\) in", capsys.readouterr().err)
    again = _contents(tmp_path / "again")
    known = {name: data for name, data in _contents(own).items() if name in again}
    assert {"self.npy", "self.txt", "text.npy"} <= {*again}
    assert again | {"log.json": b""} == known | {"log.json": b""}


@pytest.mark.parametrize(
    ("command", "evaluation", "message"),
    [
        *((name, ["self:"], "self:.*writes itself") for name in ("sweep", "ablate", "disentangle")),
        ("ablate", ["A", "B"], r"one text, got 2\b.*A, B"),
        ("sweep", ["TEXT", "self:"], "self:.*writes itself"),
        ("sweep", ["OTHER", "OTHER"], r"other\.txt.*twice"),
    ],
)
def test_an_evaluation_is_text_that_the_model_did_not_write(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    evaluation: list[str],
    message: str,
) -> None:
    on = str(place / ("model" if command == "sweep" else "run"))
    words = [command, on, "--text", str(place / "text.txt"), "--length", "32", "--out", "nowhere"]
    named = {"TEXT": str(place / "text.txt"), "OTHER": str(place / "other.txt")}
    words += ["--sparsity", "0.5", "--evaluation", *(named.get(one, one) for one in evaluation)]
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("nowhere").exists()
