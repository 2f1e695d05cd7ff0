"""A folder is written whole or not at all, by one process at a time, and only over our own."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from entangle.model import folders
from entangle.model.folders import check_sums, check_target, new_file, new_folder, sums

AGAIN = "Copy it again"


def contents(folder: Path) -> dict[str, str]:
    """Return every file below a folder, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run written before."""
    target = tmp_path / "run"
    fill(target, "first")
    return target


def fill(target: Path, what: str, *, overwrite: bool = False) -> None:
    with new_folder(target, overwrite=overwrite) as folder:
        (folder / "run.json").write_text(what)
        (folder / "neurons.zarr").mkdir()
        (folder / "neurons.zarr" / "0").write_text(what)


WHOLE = {"run/run.json": "first", "run/neurons.zarr/0": "first"}


def test_a_folder_appears_at_the_end_and_whole(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "new"
    with new_folder(target) as folder:
        assert not target.exists()
        assert folder == tmp_path / "runs" / "new.partial"
        assert contents(folder) == {".lock": ""}
        (folder / "a").write_text("text")
    assert contents(tmp_path) == {"runs/new/a": "text"}


def test_windows_renames_no_folder_with_an_open_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the lock is let go, and removed, before the rename; here the end of that is imitated."""
    replace = folders._replace

    def without_open_files(partial: Path, target: Path) -> None:
        with FileLock(partial / ".lock", timeout=0):
            pass
        (partial / ".lock").unlink()
        replace(partial, target)

    monkeypatch.setattr(folders, "_WINDOWS", True)
    monkeypatch.setattr(folders, "_replace", without_open_files)
    for what in ("zeroth", "first"):
        fill(tmp_path / "run", what, overwrite=True)
    assert contents(tmp_path) == WHOLE


def test_an_empty_folder_in_its_place_is_taken_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(FileExistsError, match=r"run exists.*--overwrite"):
        fill(tmp_path / "run", "first")
    fill(tmp_path / "run", "first", overwrite=True)
    assert contents(tmp_path) == WHOLE


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "disk full")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_after_an_error_all_is_as_before(
    tmp_path: Path, error: BaseException, overwrite: bool
) -> None:
    if overwrite:
        fill(tmp_path / "run", "first")
    before = contents(tmp_path)

    def fail() -> None:
        with new_folder(tmp_path / "run", overwrite=overwrite) as folder:
            (folder / "run.json").write_text("second")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["run"] if overwrite else [])


def test_an_existing_folder_is_refused_before_anything_is_made(run: Path) -> None:
    with pytest.raises(FileExistsError, match=r"run exists.*--overwrite"):
        fill(run, "second")
    assert contents(run.parent) == WHOLE


def test_overwriting_replaces_the_whole_of_a_run(run: Path) -> None:
    (run / "report.html").write_text("of the first")
    fill(run, "second", overwrite=True)
    assert contents(run.parent) == {"run/run.json": "second", "run/neurons.zarr/0": "second"}


def test_what_entangle_did_not_write_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("text")
    before = contents(tmp_path)
    for name in ("thesis", "file"):
        with pytest.raises(FileExistsError, match=rf"/{name} .*\bentangle\b"):
            fill(tmp_path / name, "second", overwrite=True)
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match=rf"/{name} exists.*\bentangle\b") as caught:
                check_target(tmp_path / name, overwrite)
            assert "--overwrite" not in str(caught.value)  # which would fail, too
    assert contents(tmp_path) == before


def test_a_folder_of_the_users_with_a_name_like_ours_is_left_alone(run: Path) -> None:
    for name in ("run.old", "other.partial"):
        run.with_name(name).mkdir()
        (run.with_name(name) / "precious").write_text("mine")
    fill(run, "second", overwrite=True)
    with pytest.raises(FileExistsError, match=r"other\.partial .*\bentangle\b"):
        fill(run.with_name("other"), "first")
    for name in ("run.old", "other.partial"):
        assert contents(run.with_name(name)) == {"precious": "mine"}


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def slowly() -> None:
        with new_folder(tmp_path / "run") as folder:
            (folder / "run.json").write_text("late")
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "run.json").write_text("first")

    with pytest.raises(FileExistsError, match=r"run exists.*--overwrite"):
        slowly()
    assert contents(tmp_path) == {"run/run.json": "first"}


def test_if_the_last_step_fails_the_old_run_is_back(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "run.partial":
            raise OSError(5, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="input/output error"):
        fill(run, "second", overwrite=True)
    assert contents(run.parent) == WHOLE


# Several processes.


HOLD = """
import sys, time
from pathlib import Path
from entangle.model.folders import new_folder

with new_folder(sys.argv[1]) as folder:
    (folder / "run.json").write_text("half")
    (folder / "tables").mkdir()
    (folder / "tables" / "a.csv").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_write_to_one_target_and_a_killed_ones_rest_is_cleaned(
    tmp_path: Path,
) -> None:
    target, partial = tmp_path / "run", tmp_path / "run.partial"
    half = {".lock": "", "run.json": "half", "tables/a.csv": "half"}
    command = [sys.executable, "-c", HOLD, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            with pytest.raises(BlockingIOError, match=r"another process .*/run\b"):
                fill(target, "first")
            assert contents(partial) == half  # and it was not disturbed
        finally:
            process.kill()
    assert contents(partial) == half
    with new_folder(target) as folder:
        assert contents(folder) == {".lock": ""}
        (folder / "run.json").write_text("whole")
    assert contents(tmp_path) == {"run/run.json": "whole"}


def test_one_that_comes_when_the_other_has_just_finished_is_not_cleaned_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename
    next_one = tmp_path / "run.partial"

    def renaming(self: Path, target: Path) -> Path:
        done = rename(self, target)
        next_one.mkdir()  # as another process does that will overwrite the run
        (next_one / ".lock").touch()
        return done

    monkeypatch.setattr(Path, "rename", renaming)
    fill(tmp_path / "run", "first")
    assert contents(tmp_path) == WHOLE | {"run.partial/.lock": ""}


def test_what_is_to_be_gone_on_with_stays_after_an_error(tmp_path: Path) -> None:
    target, partial = tmp_path / "run", tmp_path / "run.partial"

    def break_off(number: int) -> None:
        with new_folder(target, can_resume=lambda folder: (folder / "0").exists()) as folder:
            assert folder == partial
            (folder / str(number)).touch()
            raise RuntimeError("stop")

    for number in range(3):
        with pytest.raises(RuntimeError, match="stop"):
            break_off(number)
        assert {path.name for path in partial.iterdir()} == {
            *(".lock", ".kept"),
            *map(str, range(number + 1)),
        }
    with new_folder(target, can_resume=lambda _: True) as folder:
        (folder / "last").touch()
    assert {path.name for path in target.iterdir()} == {"0", "1", "2", "last"}
    assert not partial.exists()


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (OSError(28, "No space left on device"), True),
        (MemoryError(), True),
        (KeyboardInterrupt(), True),
        (SystemExit(143), True),
        (RuntimeError("CUDA out of memory"), True),
        (ValueError("the Gram of a layer cannot be factored"), False),
        (KeyError("no such layer"), False),
        (TypeError("not a number"), False),
    ],
)
def test_work_stays_only_after_an_error_that_another_attempt_can_get_past(
    error: BaseException, stays: bool, tmp_path: Path
) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "run", can_resume=lambda _: True) as folder:
            (folder / "done").touch()
            raise error

    with pytest.raises(type(error)):
        fail()
    assert (tmp_path / "run.partial" / "done").exists() == stays
    assert stays or not [*tmp_path.iterdir()]


def test_an_error_before_a_folder_is_filled_loses_none_of_its_work(tmp_path: Path) -> None:
    def damaged(folder: Path) -> bool:
        raise ValueError("run.json is damaged")

    def fail(error: Exception, can_resume: Callable[[Path], bool]) -> None:
        with new_folder(tmp_path / "run", can_resume=can_resume) as folder:
            (folder / "done").touch()
            raise error

    with pytest.raises(RuntimeError):
        fail(RuntimeError("stop"), lambda _: True)
    with pytest.raises(ValueError, match="damaged"):
        fail(ValueError("not reached"), damaged)
    assert (tmp_path / "run.partial" / "done").exists()


def test_another_command_does_not_lose_what_is_to_be_gone_on_with(tmp_path: Path) -> None:
    def break_off() -> None:
        with new_folder(tmp_path / "run", can_resume=lambda _: True) as folder:
            (folder / "done").touch()
            raise RuntimeError("stop")

    def take(overwrite: bool) -> None:
        with new_folder(tmp_path / "run", overwrite=overwrite):
            raise RuntimeError("other")

    with pytest.raises(RuntimeError, match="stop"):
        break_off()
    with pytest.raises(FileExistsError, match=r"run\.partial .*unfinished.*--overwrite"):
        take(overwrite=False)
    assert (tmp_path / "run.partial" / "done").exists()
    with pytest.raises(RuntimeError, match="other"):  # it was lent, so what was there is gone
        take(overwrite=True)
    assert not (tmp_path / "run.partial").exists()


def test_what_is_not_to_be_gone_on_with_is_cleaned_away(tmp_path: Path) -> None:
    def leave(can_resume: bool) -> None:
        with new_folder(tmp_path / "run", can_resume=lambda _: can_resume) as folder:
            left.append({path.name for path in folder.iterdir()})
            (folder / "old").touch()
            raise RuntimeError("stop")

    left: list[set[str]] = []
    for can_resume in (False, False, True):
        with pytest.raises(RuntimeError, match="stop"):
            leave(can_resume)
    assert left == [{".lock", ".kept"}, {".lock", ".kept"}, {".lock", ".kept", "old"}]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(OSError, match=r"write .*/file/run\.partial: Not a directory"):
        fill(tmp_path / "file" / "run", "first")
    (tmp_path / "other.partial").write_text("text")
    with pytest.raises(OSError, match=r"write .*/other\.partial: File exists"):
        fill(tmp_path / "other", "first")
    assert contents(tmp_path) == {"file": "text", "other.partial": "text"}


# One file.


def test_a_file_appears_at_the_end_and_keeps_its_ending(tmp_path: Path) -> None:
    target = tmp_path / "figures" / "heatmap.png"
    with new_file(target) as partial:
        partial.write_text("half")
        assert partial.suffix == ".png"
        assert not target.exists()
        partial.write_text("whole")
    assert contents(tmp_path) == {"figures/heatmap.png": "whole"}


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    target.write_text("first")

    def fail() -> None:
        with new_file(target) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert contents(tmp_path) == {"table.csv": "first"}
    with new_file(target) as partial:
        partial.write_text("second")
    assert contents(tmp_path) == {"table.csv": "second"}


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for parts, reason in [
        (("file", "table.csv"), f"{tmp_path}/file is not a folder"),
        (("file", "deep", "table.csv"), "Not a directory"),
    ]:
        target = tmp_path.joinpath(*parts)
        with pytest.raises(OSError, match=f"write {target}: {reason}$"):
            new_file(target).__enter__()
    assert contents(tmp_path) == {"file": "text"}


def test_a_file_beside_it_is_no_users_file(tmp_path: Path) -> None:
    for name in ("table.partial.csv", "table.csv.partial", ".table.partial.csv"):
        (tmp_path / name).write_text("precious")
    before = contents(tmp_path)
    with new_file(tmp_path / "table.csv") as partial:
        partial.write_text("new")
    assert contents(tmp_path) == before | {"table.csv": "new"}


def test_a_file_behind_a_link_is_written(tmp_path: Path) -> None:
    (tmp_path / "real.csv").write_text("first")
    for name, target in [("link.csv", "real.csv"), ("new.csv", "deep/made.csv")]:
        (tmp_path / name).symlink_to(target)
        with new_file(tmp_path / name) as partial:
            partial.write_text("second")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target).read_text() == "second"
    assert contents(tmp_path).keys() == {"real.csv", "link.csv", "deep/made.csv", "new.csv"}


def test_a_pipe_and_a_device_are_written_to_and_stay(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with new_file(pipe) as partial:
        partial.write_text("through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
    own, other = os.openpty()
    with new_file(os.ttyname(other)) as partial:
        partial.write_text("shown")
    assert os.read(own, 100) == b"shown"
    assert Path(os.ttyname(other)).is_char_device()
    os.close(own)
    os.close(other)


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    for number in ("1", "2"):
        with new_folder(link, overwrite=True) as folder:
            (folder / "run.json").write_text(number)
        assert link.is_symlink()
        assert (real / "run.json").read_text() == number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


# Whether files are still what they were.


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """What is in files of a folder, of which one is large and one is empty."""
    written = {"a.json": b"{}\n", "more/b": bytes(range(256)) * 5000, "more/empty": b""}
    for name, data in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return written


def test_sums_are_those_of_the_bytes(tmp_path: Path, files: dict[str, bytes]) -> None:
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert sums(tmp_path, files) == expected
    assert list(sums(tmp_path, reversed(list(files)))) == list(reversed(list(files)))
    assert sums(tmp_path, ["a.json"]) == {"a.json": expected["a.json"]}
    assert sums(tmp_path, []) == {}
    check_sums(tmp_path, expected, AGAIN)
    check_sums(tmp_path, {}, AGAIN)
    with pytest.raises(FileNotFoundError, match="nothing"):
        sums(tmp_path, ["nothing"])


@pytest.mark.parametrize("name", ["a.json", "more/b", "more/empty"])
def test_a_file_that_is_missing_or_changed_is_named(
    name: str, tmp_path: Path, files: dict[str, bytes]
) -> None:
    before = sums(tmp_path, files)
    data = files[name]
    flipped = data[:-1] + bytes([data[-1] ^ 1]) if data else b"x"
    for changed in (flipped, data + b"\0"):
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{tmp_path} .*damaged.* {name} .*\bwritten\b"):
            check_sums(tmp_path, before, AGAIN)
        others = {other: before[other] for other in files if other != name}
        check_sums(tmp_path, others, AGAIN)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path} .*damaged.* {name} .*missing"):
        check_sums(tmp_path, before, AGAIN)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"{tmp_path} .*damaged.* {name} .*missing"):
        check_sums(tmp_path, before, AGAIN)
