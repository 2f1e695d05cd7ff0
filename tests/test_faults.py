"""Kills, damage, full disks and other processes: what is finished is right, and what is wrong is told."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from entangle.__main__ import main
from entangle.measurement import measuring
from entangle.measurement.measuring import measure
from entangle.measurement.merging import merge
from entangle.model import folders, packing
from entangle.runs.store import open_run
from tests.forking import Forked, forked_ranks
from tests.measurement.test_recording import tokens, windows_of
from tests.model.test_ranks import (
    ENVIRONMENT,
    ROOT,
    WORDS,
    HaltError,
    assert_same_run,
    kill_all,
    ran,
    save_after_each_batch,
    stopping,
    torchrun,
)
from tests.tiny_models import save_tiny, tiny_model


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with a text of more windows than are measured."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model", "gpt2")
    (folder / "text.txt").write_text(WORDS * 900)
    return folder


def words_of(place: Path, out: Path, *options: str, windows: int = 30) -> list[str]:
    """Return the words of a measurement of batches of two windows of 32 tokens."""
    words = ["measure", str(place / "model"), "--text", str(place / "text.txt"), "--length", "32"]
    words += ["--windows", str(windows), "--batch-size", "2", "--bins", "64", *options]
    return [*words, "--out", str(out)]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same_bytes(folder: Path, other: Path) -> None:
    """Assert that two runs are the same files, but for what they cost."""
    one, two = contents(folder), contents(other)
    assert set(one) == set(two)
    assert len(one) > 40
    assert [name for name in one if one[name] != two[name] and name != "log.json"] == []


# Kills.


# All is imported once, and each child is a fork: so a kill costs no more than what it kills. The
# parent runs nothing on threads; Numba's workqueue is a layer of it that outlives a fork.
KILLS = """
import json, multiprocessing, os, random, signal, sys, time
from pathlib import Path

import torch
torch.set_num_threads(1)
from safetensors import safe_open

import entangle
from entangle.__main__ import main
from entangle.measurement import measuring

entangle.measure, entangle.load_model, entangle.load_tokenizer, entangle.token_windows  # imported

whole, target = sys.argv[1], Path(sys.argv[2])
kills, batches, words = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]
partial = target.with_name(target.name + ".partial")
measuring.SECONDS = 0.0
fork, rng = multiprocessing.get_context("fork"), random.Random(0)

def child(out):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(main([*words, "--out", str(out)]))

def start(out):
    process = fork.Process(target=child, args=(out,))
    process.start()
    return process

def done():
    for file in partial.glob("state/*.safetensors"):
        if ".partial" not in file.name:
            try:
                with safe_open(file, framework="pt") as opened:
                    return int(opened.get_tensor("done"))
            except FileNotFoundError:
                pass
    return 0

begin = time.monotonic()
process = start(whole)
while process.is_alive() and not list(Path(whole + ".partial").glob("state/*.safetensors")):
    time.sleep(0.001)
first = time.monotonic() - begin  # until something is saved
process.join()
length = time.monotonic() - begin
assert process.exitcode == 0, process.exitcode

said = {"killed": 0, "done": [], "late": 0}

def kill(process):
    process.kill()
    process.join()
    if process.exitcode == 0:
        assert target.exists()
        return
    assert process.exitcode == -signal.SIGKILL, process.exitcode
    said["killed"] += 1
    said["done"].append(done())

# Not for long, nor for many batches, so that the run is not finished by then.
for number in range(kills):
    begin, before = time.monotonic(), done()
    delay = rng.uniform(0, first + 0.1 * (length - first))
    least = before + (number % 3 == 0)  # every third is let count more, on a busy machine too
    process = start(target)
    while process.is_alive() and done() <= before + batches // 60:
        if time.monotonic() > begin + delay and done() >= least:
            break
        process.join(0.01)
    kill(process)
assert not target.exists(), said
# And while it is written.
def written(since):
    files = (path for path in partial.glob("neurons.zarr/**/*") if path.is_file())
    try:
        return any(path.stat().st_mtime > since for path in files)
    except FileNotFoundError:
        return False

for number in range(4):
    begin = time.time()
    process = start(target)
    while process.is_alive() and not written(begin):
        time.sleep(0.001)
    process.join(number * 0.03)
    kill(process)
    said["late"] += process.exitcode != 0
    if target.exists():
        break
if not target.exists():
    process = start(target)
    process.join()
    assert process.exitcode == 0, process.exitcode
print(json.dumps(said))
"""


def test_killed_at_any_time_and_often_the_run_is_the_unbroken_one(
    place: Path, tmp_path: Path
) -> None:
    words = words_of(place, tmp_path, windows=1201)[:-2]
    targets = [str(tmp_path / "whole"), str(tmp_path / "run")]
    command = [sys.executable, "-c", KILLS, *targets, "21", "601", *words]
    process = ran(command, timeout=600, NUMBA_THREADING_LAYER="workqueue")
    assert process.returncode == 0, process.stdout + process.stderr
    said = json.loads(process.stdout.splitlines()[-1])
    assert said["killed"] >= 20
    done = said["done"][:21]
    assert done == sorted(done), said  # none of it was lost
    assert len({*done} - {0}) >= 3, said  # and it was gone on with
    assert max(done) < 601
    assert_same_bytes(tmp_path / "run", tmp_path / "whole")
    assert open_run(tmp_path / "run").attrs["tokens"] == 1201 * 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_an_error_while_a_run_is_written_does_not_lose_what_was_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, windows = tiny_model("gpt2"), windows_of(tokens(13))
    save_after_each_batch(model, monkeypatch)
    whole = measure(model, windows, batch_size=2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("entangle.runs.store.write_run", full)
        with pytest.raises(OSError, match="No space left"):
            measure(model, windows, batch_size=2, out=tmp_path / "run")
    passes: list[int] = []
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    run = measure(model, windows, batch_size=2, out=tmp_path / "run")
    assert len(passes) <= 1  # of seven
    assert run.identical(whole)
    assert open_run(tmp_path / "run").load().identical(whole)


def test_what_a_kill_before_any_work_leaves_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement that has counted nothing is no unfinished work, to itself and to others."""
    model, windows = tiny_model("gpt2"), windows_of(tokens(5))
    partial = folders.partial_of(tmp_path / "run")
    assert partial == tmp_path / "run.partial"
    assert not folders.has_work(partial)
    for number in (1, 2):
        measure(model, windows, batch_size=2, shard=f"{number}/2", out=tmp_path / str(number))
    whole = measure(model, windows, batch_size=2)
    for command in ("again", "with other options", "merge"):
        _leave(partial)
        assert not folders.has_work(partial)
        if command == "merge":
            run = merge([tmp_path / "1", tmp_path / "2"], out=tmp_path / "run")
            assert_same_run(run, whole)
        else:
            bins = 1024 if command == "again" else 64
            run = measure(model, windows, batch_size=2, bins=bins, out=tmp_path / "run")
            assert run.attrs["bins"] == bins
        assert open_run(tmp_path / "run").load().identical(run.load())
        assert not partial.exists()
        assert {path.name for path in (tmp_path / "run").iterdir()} == {
            *("log.json", "neurons.zarr", "run.json", "text.npy"),
        }
        shutil.rmtree(tmp_path / "run")
    _leave(partial)
    (partial / "state").mkdir()
    (partial / "state" / "some").touch()
    assert folders.has_work(partial)
    with pytest.raises(FileExistsError, match=r"run\.partial.*unfinished.*--overwrite"):
        merge([tmp_path / "1", tmp_path / "2"], out=tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"run\.partial.*\bbins: 2, now 1024\b.*--overwrite"):
        measure(model, windows, batch_size=2, out=tmp_path / "run")
    assert (partial / "state" / "some").is_file()


def test_a_kill_while_run_json_is_written_leaves_no_work(tmp_path: Path) -> None:
    partial = folders.partial_of(tmp_path / "run")
    partial.mkdir()
    for name in (".lock", folders.RESUMABLE, "run.partial.json"):
        (partial / name).touch()
    assert not folders.has_work(partial)
    with folders.new_folder(tmp_path / "run") as folder:
        assert [path.name for path in folder.iterdir()] == [".lock"]
        (folder / "run.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def _leave(partial: Path) -> None:
    """Leave what a process that was killed at once does."""
    partial.mkdir()
    (partial / ".lock").touch()
    (partial / folders.RESUMABLE).touch()
    (partial / "run.json").write_text(json.dumps({"bins": 2, "command": "another"}))


def test_an_error_before_any_work_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    undo = stopping(model, 0)
    for out in ("run", "deep/er/run"):
        with pytest.raises(HaltError):
            measure(model, windows_of(tokens(5)), out=tmp_path / out)
        assert list((tmp_path / out).parent.iterdir()) == []
    undo()


# A rank that dies.


RANK = """
import sys
from entangle.__main__ import main
from entangle.measurement import measuring
measuring.SECONDS = 0.0
sys.exit(main(sys.argv[1:]))
"""


def rank_of(process: psutil.Process) -> str | None:
    try:
        words = process.cmdline()
        return process.environ().get("RANK") if any("rank.py" in word for word in words) else None
    except psutil.Error:
        return None


@pytest.mark.parametrize("victim", ["1"])
def test_when_a_rank_dies_all_end_and_the_next_ones_go_on(
    victim: str, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    target = tmp_path / "runs" / "run"
    partial = folders.partial_of(target)
    command = torchrun(2, tmp_path / "rank.py", *words_of(place, target, windows=2001))
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            command,
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
            stdout=said,
            stderr=said,
        )
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and len(list(partial.glob("state/*-of-2.safetensors"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (child,) = (one for one in psutil.Process(process.pid).children() if rank_of(one) == victim)
        begin = time.monotonic()
        child.send_signal(signal.SIGKILL)
        code = process.wait(timeout=240)
        assert code != 0
        assert time.monotonic() - begin < 120
    finally:
        if process.poll() is None:
            kill_all(process)
    assert not target.exists()
    state = {file.name: packing.load_tensors(file) for file in partial.glob("state/*-of-2.*")}
    assert len(state) == 2  # what both had done is kept
    assert all(0 < int(tensors["done"]) < 501 for tensors in state.values())
    done = forked_ranks(2, "-c", RANK, *words_of(place, target, windows=2001))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in target.parent.iterdir()] == ["run"]
    assert main(words_of(place, tmp_path / "whole", windows=2001)) == 0
    assert_same_run(open_run(target), open_run(tmp_path / "whole"))
    one, two = ((folder / "run.json").read_bytes() for folder in (target, tmp_path / "whole"))
    assert one == two


# Damage.


def flip(file: Path, place: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; it is not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    measure(tiny_model("gpt2"), windows_of(tokens(9)), batch_size=2, out=folder)
    return folder


FILES = (
    *("run.json", "text.npy", "neurons.zarr/.zmetadata", "neurons.zarr/.zgroup"),
    "neurons.zarr/.zattrs",
    *("neurons.zarr/wasserstein/0", "neurons.zarr/wasserstein/.zarray", "neurons.zarr/layer/0"),
    *("neurons.zarr/histogram/counts/0.0", "neurons.zarr/histogram/.zgroup"),
)


@pytest.mark.parametrize("how", ["flipped", "cut off", "empty", "longer", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_run_is_refused(name: str, how: str, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    open_run(run).load()
    file = run / name
    size, rng = file.stat().st_size, random.Random(f"{name} {how}")
    changes: dict[str, Callable[[], object]] = {
        "flipped": lambda: flip(file, rng.randrange(size), rng.randrange(8)),
        "cut off": lambda: os.truncate(file, size - 1),
        "empty": lambda: os.truncate(file, 0),
        "longer": lambda: file.write_bytes(file.read_bytes() + b"\n"),
        "gone": file.unlink,
    }
    changes[how]()
    kind = FileNotFoundError if (name, how) == ("run.json", "gone") else ValueError
    for _ in range(2):  # to read it mends nothing
        with pytest.raises(kind, match=str(run)) as caught:
            open_run(run)
        if (name, how) != ("run.json", "gone"):
            assert re.search(rf"{run} .*damaged.*{re.escape(name)}", str(caught.value))


def test_files_of_file_managers_are_not_the_runs(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    whole = open_run(run).load()
    for name in (".DS_Store", "wasserstein/._0", ".ipynb_checkpoints/a", "histogram/.directory"):
        file = run / "neurons.zarr" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"of a file manager")
    assert open_run(run).load().identical(whole)
    (run / "neurons.zarr" / "wasserstein" / "7").write_bytes(b"a chunk")
    with pytest.raises(ValueError, match=r"damaged.*wasserstein/7"):
        open_run(run)


def test_a_run_of_0_1_0_has_one_sum_over_all_files(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    log = json.loads((run / "log.json").read_text())
    del log["files"]
    (run / "log.json").write_text(json.dumps(log))
    open_run(run).load()
    flip(run / "neurons.zarr" / "wasserstein" / "0", 5)
    with pytest.raises(ValueError, match=r"damaged.*SHA-256"):
        open_run(run)


@pytest.mark.parametrize("how", ["cut off", "empty", "gone", "no JSON", "no UTF-8", "no object"])
def test_a_run_with_a_damaged_log_is_refused(how: str, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "log.json"
    if how == "gone":
        file.unlink()
    else:
        damaged = {"cut off": file.read_bytes()[:-3], "empty": b"", "no JSON": b"{sha"}
        file.write_bytes(damaged.get(how, b"\xff{}" if how == "no UTF-8" else b"[]\n"))
    with pytest.raises(ValueError, match=f"{run} .*damaged"):
        open_run(run)


def unfinished(model: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stop a measurement of five batches of few neurons after the third; return its state's file."""
    with monkeypatch.context() as patch:
        save_after_each_batch(model, patch)
        undo = stopping(model, 3)
        with pytest.raises(HaltError):
            measure(model, windows_of(tokens(9)), **FEW, out=out)
        undo()
    (file,) = (folders.partial_of(out) / "state").iterdir()
    assert int(packing.load_tensors(file)["done"]) == 3
    return file


FEW: dict[str, Any] = {"batch_size": 2, "bins": 16, "layers": "*.0.attn.c_proj"}


@pytest.mark.parametrize("how", ["length", "header", "payload", "last", "cut off", "half", "empty"])
def test_a_damaged_state_is_told_and_deleted_it_is_begun_anew(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt2")
    whole = measure(model, windows_of(tokens(9)), **FEW)
    file = unfinished(model, tmp_path / "run", monkeypatch)
    size = file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    if how in {"cut off", "half", "empty"}:
        os.truncate(file, {"cut off": size - 1, "half": size // 2, "empty": 0}[how])
    else:
        places = {"length": 1, "header": header // 2, "payload": header + 100, "last": size - 1}
        flip(file, places[how], 3)
    for _ in range(2):
        with pytest.raises(OSError, match=f"{re.escape(str(file))} .*damaged"):
            measure(model, windows_of(tokens(9)), **FEW, out=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    file.unlink()
    run = measure(model, windows_of(tokens(9)), **FEW, out=tmp_path / "run")
    assert run.identical(whole)
    assert open_run(tmp_path / "run").load().identical(whole)


def test_any_flipped_bit_of_a_state_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit of each byte of the header, and of many bytes behind it."""
    file = unfinished(tiny_model("gpt2"), tmp_path / "run", monkeypatch)
    good, rng = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    places = [*range(header), *rng.sample(range(header, len(good)), 300), len(good) - 1]
    unseen = []
    for place in places:
        flip(file, place, rng.randrange(8))
        try:
            packing.load_tensors(file)
        except OSError as error:
            assert re.search(f"{re.escape(str(file))} .*damaged", str(error))  # noqa: PT017
        else:
            unseen.append(place)
        file.write_bytes(good)
    assert unseen == []
    packing.load_tensors(file)


def test_a_damaged_run_json_of_an_unfinished_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt2")
    file = unfinished(model, tmp_path / "run", monkeypatch).parents[1] / "run.json"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"run\.json.*damaged"):
        measure(model, windows_of(tokens(9)), **FEW, out=tmp_path / "run")
    assert list(folders.partial_of(tmp_path / "run").glob("state/*.safetensors"))


# Places.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that can be made as small as is wanted."""
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, check=False).returncode != 0:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, kibibytes: int) -> None:
    words = ["mount", "-o", f"remount,size={kibibytes}k", str(disk)]
    subprocess.run(words, check=True)


@pytest.mark.parametrize("kibibytes", [4, 16, 64, 128, 200, 260, 320])
def test_a_full_disk_is_told_and_with_room_the_run_is_finished(
    kibibytes: int,
    place: Path,
    small_disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full when a folder is made, a state is saved or the run is written."""
    monkeypatch.setattr(measuring, "SECONDS", 0.0)
    assert main(words_of(place, tmp_path / "whole")) == 0
    needed = sum(-(-len(data) // 4096) * 4 for data in contents(tmp_path / "whole").values())
    assert needed > 320  # or none of these disks is too small
    resize(small_disk, kibibytes)
    capsys.readouterr()
    target = small_disk / "run"
    assert main(words_of(place, target)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    assert len(said.err.splitlines()) == 1
    assert "No space left on device" in said.err
    assert str(small_disk) in said.err
    assert not target.exists()
    resize(small_disk, 64 * 1024)
    assert main(words_of(place, target)) == 0
    assert_same_bytes(target, tmp_path / "whole")
    assert [path.name for path in small_disk.iterdir()] == ["run"]


HOLD = """
import sys, time
from entangle.__main__ import main
from entangle.measurement import recording, measuring

def hold(*args, **words):
    print("ready", flush=True)
    time.sleep(600)

measuring.recording_rows = hold
main(sys.argv[1:])
"""


def test_two_runs_to_one_target_at_once_are_one_too_many(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "run"
    process = Forked(["-c", HOLD, *words_of(place, target)])
    try:
        while process.stdout != "ready\n":
            assert process.poll() is None, process.stderr
            time.sleep(0.01)
        before = contents(tmp_path)
        for options in ([], ["--overwrite"], ["--bins", "16"]):
            assert main(words_of(place, target, *options)) == 2
            said = capsys.readouterr().err
            assert re.fullmatch(rf"entangle: .*another process.*{target}\b.*\n", said)
        assert contents(tmp_path) == before
    finally:
        process.kill()
    assert main(words_of(place, target)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    open_run(target)


def test_names_may_have_any_letters_and_spaces(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "Größe und 神经元 'so' \"to\" $HOME; * [1]"
    odd.mkdir()
    shutil.copytree(place / "model", odd / "model")
    shutil.copy(place / "text.txt", odd / "text.txt")
    target = odd / "λäuft ½ — 1 %"
    assert main(words_of(odd, target)) == 0
    assert str(target) in capsys.readouterr().out
    assert_same_run(open_run(target), _renamed(place, odd, tmp_path))
    command = json.loads((target / "run.json").read_text(encoding="utf-8"))["command"]
    again = shlex.split(command)[1:]
    assert main([*again, "--out", str(odd / "again")]) == 0
    assert_same_bytes(odd / "again", target)
    parts = [odd / f"Teil {number} ½" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        assert main(words_of(odd, part, "--shard", f"{number}/2")) == 0
    assert main(["merge", *map(str, parts), "--out", str(odd / "zusammen ∑")]) == 0
    assert_same_run(open_run(odd / "zusammen ∑"), open_run(target))
    assert "Traceback" not in capsys.readouterr().err


def _renamed(place: Path, odd: Path, tmp_path: Path) -> Any:
    """Return the run of the same model and text in a place of plain names."""
    assert main(words_of(place, tmp_path / "plain")) == 0
    return open_run(tmp_path / "plain")


def test_a_place_that_cannot_be_written_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("text")
    targets = [tmp_path / "file" / "run"]
    if Path("/proc/self/fd").is_dir():
        targets.append(Path("/proc/entangle/run"))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if not os.access(locked, os.W_OK):  # it is for root
        targets.append(locked / "run")
    for target in targets:
        assert main(words_of(place, target)) == 2
        said = capsys.readouterr().err
        assert re.match(f"entangle: .*write.*{target}", said)
        assert len(said.splitlines()) == 1
    assert contents(tmp_path) == {"file": b"text"}
    assert list(locked.iterdir()) == []


def test_in_a_place_that_is_there_and_of_the_users_nothing_is_touched(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "precious").write_text("mine")
    before = contents(tmp_path)
    for name in ("run", "other"):
        for options in ([], ["--overwrite"]):
            assert main(words_of(place, tmp_path / name, *options)) == 2
            assert "Traceback" not in capsys.readouterr().err
    assert contents(tmp_path) == before
