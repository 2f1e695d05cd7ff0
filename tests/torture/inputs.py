"""Cases of bad inputs: make a command line and its files, run it, and judge what it did."""

import fcntl
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from entangle.experiments import planning
from entangle.model import folders
from tests.torture import damage, lines, place

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # that a case may take
OWN_TEXT = re.compile(r"(?m)^entangle: .* wrote \d+ windows of \d+ tokens \(self:\) in .*\n")
MESSAGE = 1500  # characters of a message at most, beyond those of what it repeats
# fmt: off
# What a person who gave a bad input should never read.
INTERNAL = (
    *("Traceback", "bug in entangle", "object has no attribute", "NoneType", "unexpected keyword"),
    *("index out of range", "invalid literal for", "could not convert string", "unhashable"),
    *("unsupported operand", "null byte", "can't encode", "size mismatch for", "<class '", " at 0x"),
    *("not subscriptable", "not iterable", "object is not", "positional argument", "Warning:"),
    *("out of bounds", "must be str", "must be real number", "panicked at", "RuntimeError", "KeyError"),
    *("[Errno", "not in list", "broadcast together", "must match the size"),
)
# fmt: on
RESUMED = {"measure", "sparsify", "sweep", "ablate", "disentangle"}


@dataclass(frozen=True)
class Case:
    """A command line and the folder that it runs in."""

    seed: int
    words: list[str]
    done: list[str]  # what was done to the files, in words
    locked: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What a command did; the code is None if it took too long."""

    code: int | None
    out: str
    err: str
    seconds: float


def seeds_of(command: str) -> Iterator[int]:
    """Give the seeds of the cases of a command whose words are wrong, or may be."""
    for seed in itertools.count():
        rng = _rng(seed)
        if lines.command_of(rng) == command and lines.draw(command, rng)[1]:
            yield seed


def _rng(seed: int) -> random.Random:
    return random.Random(f"inputs {seed}")


def make_case(seed: int, good: Path, folder: Path) -> Case:
    """Draw a case and make its folder from the good inputs."""
    rng = _rng(seed)
    words, _ = lines.draw(lines.command_of(rng), rng)
    text = " ".join(words)
    names = {name for name in place.NAMES if any(_begins(word, name) for word in words)}
    if {"run", "run-2"} & names or rng.random() < 0.1:
        names |= {"model", "text.txt", "evaluation.txt"}
    if "run-gpt2" in names:
        names |= {"gpt2", "text.txt"}
    place.copy(good, folder, sorted(names))
    _odd_names(folder, text)
    done: list[str] = []
    locked: list[Path] = []
    if names and rng.random() < 0.4:
        for _ in range(rng.choice([1, 1, 1, 2])):
            target = folder / rng.choice(sorted(names))
            if target.exists() and not target.is_symlink():
                done.append(damage.damage(target, rng))
    if rng.random() < 0.25:
        done.append(_target(good, folder, rng, locked, names))
    return Case(seed, words, done, locked)


def _begins(word: str, name: str) -> bool:
    return re.search(rf"(?:^|[=,]){re.escape(name)}(?:$|[/:,])", word) is not None


def _odd_names(folder: Path, text: str) -> None:
    """Make what else a line may name."""
    makers: dict[str, Callable[[Path], object]] = {
        "empty": lambda path: path.mkdir(),
        "loop": lambda path: path.symlink_to("loop"),
        "dangling": lambda path: path.symlink_to("nowhere-else"),
        "fifo": os.mkfifo,
        "model.gguf": lambda path: path.write_bytes(b"GGUF" + bytes(60)),
        "unwritable": lambda path: path.mkdir(mode=0o555),
    }
    for name, make in makers.items():
        if name in text:
            make(folder / name)


def _target(
    good: Path, folder: Path, rng: random.Random, locked: list[Path], names: set[str]
) -> str:
    """Put something where the result would be written."""
    new, kind = folder / "new", rng.choice(["run", "unfinished", "other", "locked", "file", "mine"])
    partial = folder / "new.partial"
    if new.exists() or partial.exists():
        return "nothing"
    if kind == "run":
        source = rng.choice([*place.MADE])
        shutil.copytree(good / source, new, copy_function=os.link)
        return f"new is {source}"
    if kind in {"unfinished", "other", "locked"}:
        source = rng.choice([*place.MADE])
        shutil.copytree(good / source, partial, copy_function=os.link)
        (partial / ".lock").touch()
        if kind != "other":
            (partial / folders.RESUMABLE).touch()
        if kind == "locked":
            locked.append(partial / ".lock")
        said = f"new.partial is {kind}, of {source}"
        if rng.random() < 0.5:
            said += ", " + damage.damage(partial, rng)
        return said
    if kind == "file":
        rng.choice([new, partial]).write_bytes(b"a file")
    else:
        mine = rng.choice([new, partial])
        mine.mkdir()
        (mine / "thesis.tex").write_text("years of work")
    return f"new or new.partial is {kind}"


@contextmanager
def holding(locks: Sequence[Path]) -> Iterator[None]:
    """Hold locks as another process would: a lock belongs to the opened file, not to a process."""
    with ExitStack() as stack:
        for lock in locks:
            if lock.is_file():
                opened = stack.enter_context(lock.open("a"))
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


class TooLongError(BaseException):
    """A case took too long; no error that a command would catch."""


def run_here(case: Case, folder: Path) -> Outcome:
    """Run a case in this process, with all that is printed caught, from C and Rust too."""

    def stop(*_: object) -> None:
        raise TooLongError

    begin, code = time.monotonic(), None
    old, directory = signal.signal(signal.SIGALRM, stop), folder.parent
    ends = signal.getsignal(signal.SIGTERM)
    extra = ""
    with (
        holding(case.locked),
        _caught(directory) as said,
        chdir(folder),
        _warnings(),
        _planned_here(),
    ):
        signal.alarm(SECONDS)
        try:
            code = place.run_main(case.words)
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
        except TooLongError:
            extra = traceback.format_exc()
        except BaseException:  # noqa: BLE001  # as Python itself would end
            code, extra = 1, traceback.format_exc()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)
            signal.signal(signal.SIGTERM, ends)
    if code in {130, 143}:  # it is the torture that is to stop
        sys.exit(code)
    out, err = (file.read_text(encoding="utf-8", errors="replace") for file in said)
    return Outcome(code, out, err + extra, time.monotonic() - begin)


@contextmanager
def _caught(folder: Path) -> Iterator[list[Path]]:
    """Send what is printed into two files."""
    files = [folder / "stdout", folder / "stderr"]
    streams = sys.stdout, sys.stderr
    for stream in streams:
        stream.flush()
    saved = [os.dup(number) for number in (1, 2)]
    try:
        for file, number in zip(files, (1, 2), strict=True):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
            os.close(opened)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(  # noqa: SIM115
            2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
        )
        yield files
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams
        for one, number in zip(saved, (1, 2), strict=True):
            os.dup2(one, number)
            os.close(one)


@contextmanager
def _planned_here() -> Iterator[None]:
    """Let `plan` run each command once and in this process, not five times in processes of its own."""
    costs: dict[str, Any] = {}

    def run(words: Sequence[str], out: Path, blocks: int, batches: int) -> Any:
        if words[0] not in costs:
            with _caught(out.parent) as said:
                code = place.run_main([*words, "--out", str(out), "--overwrite"])
            if code:
                kind = ValueError if code == 2 else RuntimeError  # as it does itself
                raise kind(f"{words[0]} failed: {said[1].read_text(encoding='utf-8')}")
            costs[words[0]] = 1.0, 1e9, 0.0, 1e6
        return planning._Cost(blocks, batches, *costs[words[0]])

    with patch.object(planning, "_run", run):
        yield


@contextmanager
def _warnings() -> Iterator[None]:
    """Print each warning that Python itself would print, and only errors of the libraries' logs.

    A real command sets the second by environment variables before it imports the libraries.
    """
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("always")
        for kind in (
            DeprecationWarning,
            PendingDeprecationWarning,
            ImportWarning,
            ResourceWarning,
        ):
            warnings.simplefilter("ignore", kind)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def run_command(case: Case, folder: Path) -> Outcome:
    """Run a case as a real command."""
    begin = time.monotonic()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    environment.pop("TQDM_DISABLE", None)
    try:
        with holding(case.locked):
            done = subprocess.run(
                [os.fsencode(word) for word in (sys.executable, "-m", "entangle", *case.words)],
                cwd=folder,
                env=environment,
                capture_output=True,
                timeout=5 * SECONDS,  # `plan` runs ten commands
                check=False,
            )
    except subprocess.TimeoutExpired as late:
        out, err = (_decoded(said) for said in (late.stdout, late.stderr))
        return Outcome(None, out, err, time.monotonic() - begin)
    seconds = time.monotonic() - begin
    return Outcome(done.returncode, _decoded(done.stdout), _decoded(done.stderr), seconds)


def _decoded(said: bytes | None) -> str:
    return (said or b"").decode("utf-8", "replace")


def problems(case: Case, done: Outcome, before: place.Content, after: place.Content) -> list[str]:
    """Say what is wrong with what a command did."""
    wrong: list[str] = []
    done = replace(done, err=OWN_TEXT.sub("", done.err))
    if done.code is None:
        wrong.append(f"it did not end in {SECONDS} s")
    elif done.code not in {0, 2}:
        wrong.append(f"exit code {done.code}")
    if done.code == 0 and done.err:
        wrong.append(f"exit 0, but it says: {done.err[:300]}")
    if done.code == 2:
        wrong += _of_message(case, done)
    if done.code == 0 and "--json" in case.words and not {"-h", "--help"} & {*case.words}:
        try:
            json.loads(done.out, parse_constant=_no_number)
        except ValueError as error:
            wrong.append(f"its JSON is none: {error}")
    return wrong + _of_files(case, done, before, after)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _of_message(case: Case, done: Outcome) -> list[str]:
    """Say what is wrong with the message of a command that refused its input."""
    message = done.err.rstrip("\n")
    debug = any("--debug".startswith(word) for word in case.words if len(word) > 3)
    begin = ("Traceback", "usage: ") if debug else "usage: "
    found = re.search(r"^entangle( \w+: error|: error)?: ", message, re.MULTILINE)
    if found is None or not (found.start() == 0 or message.startswith(begin)):
        return [f"exit 2, but the message is {done.err[:300]!r}"]
    message = message[found.start() :]
    own = message.split("transformers failed: ")[0]  # behind it stands what transformers said
    wrong = [f"{term!r} in the message" for term in INTERNAL if term in own]
    longest = MESSAGE + sum(map(len, case.words)) if "9" * 5000 not in message else 10**6
    if len(message) > longest:
        wrong.append(f"the message has {len(message)} characters")
    plain = message
    for word in sorted(case.words, key=len, reverse=True):
        plain = plain.replace(word, "word") if word else plain
    if len(plain.split("\n")) > 6:
        wrong.append(f"the message has {len(plain.splitlines())} lines")
    if len(re.findall(r"^entangle: ", plain, re.MULTILINE)) > 1:
        wrong.append("there are several messages")
    if len(message.split()) < 5:
        wrong.append("the message is too short to be clear")
    return wrong


def _of_files(case: Case, done: Outcome, before: place.Content, after: place.Content) -> list[str]:
    """Say which results are lost, and what is left behind."""
    wrong: list[str] = []
    for name, content in before.items():
        changed = name not in after or after[name] != content
        if changed and not _may_change(name, case, done):
            wrong.append(f"{name} was {'changed' if name in after else 'removed'}")
    named = {Path(part) for word in case.words[1:] for part in word.split("=", 1)}
    # The folder of --offload is the user's scratch; parents of a result that was not made stay too.
    parts = [part for word in case.words for part in word.split("=", 1)]
    scratch = {
        str(Path(value))
        for flag, value in itertools.pairwise(parts)
        if len(flag) > 3 and any(one.startswith(flag) for one in ("--offload", "--csv"))
    }
    above = {str(parent) for path in named for parent in path.parents}
    for name in {*after} - {*before}:
        if name in above and after[name] is None:
            continue
        if case.words[0] == "diff" and name in scratch:  # its table is whole, its figure failed
            continue
        if any(f"{name}/".startswith(f"{word}/") for word in scratch):
            continue
        top = name.split("/")[0]
        asked = top.endswith(".partial") and top in case.words
        if done.code == 0 and (".partial" not in name or asked):
            continue
        if done.code == 2 and not re.search(r"(^|/)[^/]*\.partial(/|$)", name):
            wrong.append(f"{name} was left behind")
        elif done.code == 2 and name.endswith(".partial"):
            wrong.append(f"{name} was left behind, unfinished")
        elif done.code == 0:
            wrong.append(f"{name} is there at the end")
    return wrong


def _may_change(name: str, case: Case, done: Outcome) -> bool:
    """Return whether a command may change a file that was there."""
    top = name.split("/")[0]
    if top.endswith(".partial") and case.words[0] in {*RESUMED, "merge"}:
        return not case.locked and (done.code == 0 or "--overwrite" in case.words)
    if done.code != 0:  # a table is written before a figure that then fails
        return case.words[0] == "diff" and name in case.words and "--csv" in case.words
    words = [part for word in case.words for part in word.split("=", 1)]
    if case.words[0] in {"rank", "diff", "plot", "report"}:
        inside = re.search(r"/figures/|/report\.html$", name) is not None
        return inside or name in {str(Path(word)) for word in words}
    added = {"contexts": "contexts", "words": "words", "describe": "descriptions"}
    if case.words[0] in added:
        return name.endswith(f"/{added[case.words[0]]}.json")
    targets = {str(Path(to)) for flag, to in itertools.pairwise(words) if flag in {"--ou", "--out"}}
    overwrites = any("--overwrite".startswith(word) for word in words if len(word) > 4)
    return overwrites and any(f"{name}/".startswith(f"{target}/") for target in targets)


class Judge:
    """Runs cases in a folder of its own, with good inputs that it makes once."""

    def __init__(self) -> None:
        self.folder = place.workplace()
        self.good = self.folder / "good"
        place.make(self.good)
        self.before = place.contents(self.good)

    def judge(self, seed: int, *, real: bool = False) -> tuple[Case, Outcome, list[str]]:
        """Run one case, in this process or as a real command."""
        folder = self.folder / f"case-{seed}"
        case = make_case(seed, self.good, folder)
        if real:
            words = [word.replace("\0", "0") for word in case.words]  # no command line has it
            case = replace(case, words=words)
        before = place.contents(folder)
        done = run_command(case, folder) if real else run_here(case, folder)
        wrong = problems(case, done, before, place.contents(folder))
        shutil.rmtree(folder, ignore_errors=True)
        return case, done, wrong

    def untouched(self) -> bool:
        """Return whether the good inputs are as they were."""
        return place.contents(self.good) == self.before

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
