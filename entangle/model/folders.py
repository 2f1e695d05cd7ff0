"""Folders and files that are written whole or not at all, and SHA-256 sums to check them."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

RESUMABLE = ".kept"  # the marker of a resumable folder: its unfinished work stays for the next try

_WINDOWS = sys.platform == "win32"

FAILS_AGAIN = (ValueError, TypeError, LookupError)
"""Errors about input: the same command fails again, and another command cannot use its work."""


@contextmanager
def new_folder(
    target: str | Path,
    *,
    overwrite: bool = False,
    can_resume: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Yield an empty folder ``TARGET.partial`` to fill, and rename it to ``target`` at the end.

    The folder is locked: no other process can fill it. After an error it is removed, and ``target``
    is as before.

    With ``can_resume`` the folder is resumable. If it holds unfinished work of a killed process,
    ``can_resume(folder)`` decides whether that is kept or removed. After an error, unfinished
    work stays for another attempt. After one of `FAILS_AGAIN` it is removed.

    Raises:
        FileExistsError: ``target`` exists, and ``overwrite`` is false or entangle did not write it;
            or ``TARGET.partial`` was not written by entangle, or holds unfinished work of another
            command and ``overwrite`` is false.
        BlockingIOError: another process is writing to ``target``.
        OSError: the target cannot be written; the message names it.
    """
    target = Path(target)
    if target.is_symlink():  # replace its target, not the link
        target = Path(os.path.realpath(target))
    check_target(target, overwrite)
    partial = partial_of(target)
    lock = _claim(partial, target)
    if (
        can_resume is None
        and (partial / RESUMABLE).exists()
        and has_work(partial)
        and not overwrite
    ):
        lock.release()
        raise FileExistsError(
            f"{partial} is unfinished: run the command in its run.json again to resume it, or use "
            "--overwrite to delete it"
        )
    filling = False
    try:
        if can_resume is None or not has_work(partial) or not can_resume(partial):
            _empty(partial)
        if can_resume is not None:
            (partial / RESUMABLE).touch()
        filling = True
        yield partial
        filling = False
        check_target(target, overwrite)
        if _WINDOWS:  # an open file, such as the lock, keeps its folder from being renamed
            lock.release()
        _replace(partial, target)
        (target / ".lock").unlink(missing_ok=True)
        (target / RESUMABLE).unlink(missing_ok=True)
    except BaseException as error:
        # Not in `finally`: after the rename a folder of this name belongs to another process.
        fails_again = filling and isinstance(error, FAILS_AGAIN)
        if can_resume is None or not has_work(partial) or fails_again:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.release()


def partial_of(target: Path) -> Path:
    """Return the folder that is filled and then renamed to ``target``; links are resolved."""
    target = Path(os.path.realpath(target)) if target.is_symlink() else target
    return target.with_name(target.name + ".partial")


def shared_partial(target: Path) -> Path:
    """Return the folder that another process fills and renames to ``target``; make it if missing."""
    folder = partial_of(target)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_folder(folder: Path) -> None:
    """Remove a folder if it exists."""
    shutil.rmtree(folder, ignore_errors=True)


def has_work(partial: Path) -> bool:
    """Return whether a partial folder holds work: files other than its lock, marker and run.json.

    Files that are half written (``.partial``) do not count.
    """
    files = (path for path in partial.rglob("*") if path.is_file())
    own = {".lock", RESUMABLE, "run.json"}
    return any(file.name not in own and ".partial" not in file.name for file in files)


def check_target(target: Path, overwrite: bool) -> None:
    """Check that a folder may be written at ``target``.

    Raises:
        FileExistsError: it exists and ``overwrite`` is false, or entangle did not write it.
    """
    if not target.exists():
        return
    if not target.is_dir() or not (_is_run(target) or not any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists and was not written by entangle: choose another name"
        )
    if not overwrite:
        raise FileExistsError(f"{target} exists: choose another name, or use --overwrite")


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def _claim(partial: Path, target: Path) -> FileLock:
    """Make the partial folder and lock it; files in it stay.

    Raises:
        FileExistsError: the folder exists, and entangle did not make it.
        BlockingIOError: another process has locked the folder.
        OSError: the folder cannot be made.
    """
    lock = FileLock(partial / ".lock", timeout=0)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        usable = (partial / ".lock").exists() or not any(partial.iterdir())
        if usable:
            lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            f"another process is writing to {target}: wait until it ends, or choose another name"
        ) from error
    except OSError as error:
        raise OSError(f"cannot write to {partial}: {error.strerror or error}") from error
    if not usable:
        raise FileExistsError(
            f"{partial} exists and was not written by entangle: move it, or choose another name"
        )
    return lock


def _empty(folder: Path) -> None:
    """Remove everything in a folder except its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _replace(partial: Path, target: Path) -> None:
    old = target.with_name(target.name + ".partial.old")
    try:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        partial.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; rename it to ``target``, or remove it on errors.

    A link stays, and what it leads to is written. A target that is no file, such as a pipe or
    /dev/stdout, is written to itself.

    Raises:
        OSError: the target cannot be written; the message names it.
    """
    target = Path(target)
    if target.is_dir():
        raise OSError(f"cannot write {target}: it is a folder. Give the name of a file")
    file = Path(os.path.realpath(target))
    special = file.exists() and not file.is_file()
    # The suffix stays, since savefig and others choose the format by it. No user's file has the name.
    partial = file if special else file.with_name(f".{file.stem}.entangle.partial{file.suffix}")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OSError(f"cannot write {target}: {target.parent} is not a folder") from error
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror}") from error
    try:
        yield partial
        partial.replace(file)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(f"cannot write {target}: {error.strerror}") from error
    finally:
        if not special:
            partial.unlink(missing_ok=True)


def sums(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder, by its name.

    Raises:
        OSError: a file cannot be read.
    """
    found = {}
    for name in files:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check_sums(folder: Path, expected: Mapping[str, str], advice: str) -> None:
    """Check that the files in a folder have the SHA-256 sums that `sums` returned.

    ``advice`` ends the message: what to do about a damaged folder.

    Raises:
        ValueError: a file is missing or has another sum; the message names it.
    """
    for name, digest in expected.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing. {advice}")
        if sums(folder, [name])[name] != digest:
            raise ValueError(
                f"{folder} is damaged: {name} does not match the SHA-256 sum of the file that was "
                f"written. {advice}"
            )
