"""Commands in processes of their own that are forked, so that they start at once.

A new Python needs seconds to import torch and transformers. Here a server imports them once, and
each command is a fork of it. A command is given as to Python: ``-m entangle ...``, ``-c CODE ...``
or the path of a script, and then its arguments.
"""

import contextlib
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import entangle

ROOT = Path(__file__).resolve().parents[1]
# The server runs nothing on threads. Numba's workqueue is the layer that works in a fork.
_SERVER = {
    "NUMBA_THREADING_LAYER": "workqueue",
    "OMP_NUM_THREADS": "1",
    "TORCHELASTIC_RUN_ID": "forked",  # `ranks` imports torch.distributed where this is set
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
_NO_RANK = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_context = multiprocessing.get_context("forkserver")


for _name in entangle.__all__:  # the server imports this module, and with it all of entangle
    getattr(entangle, _name)


class Forked:
    """A command that runs; its output is in files."""

    def __init__(
        self, words: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start a command with these variables added to the environment of the tests."""
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._out, self._err = (Path(folder) / name for name in ("out", "err"))
        variables = {name: value for name, value in os.environ.items() if name not in _NO_RANK}
        variables |= {name: _SERVER[name] for name in ("TQDM_DISABLE", "HF_HUB_OFFLINE")}
        variables |= environment or {}
        arguments = [str(word) for word in words], variables, self._out, self._err
        _serve()
        self._process = _context.Process(target=_run, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stdout(self) -> str:
        """What the command has printed so far."""
        return _text(self._out)

    @property
    def stderr(self) -> str:
        return _text(self._err)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the command runs."""
        self._process.join(0)
        return self._process.exitcode

    def wait(self, timeout: float = 180) -> int:
        """Wait for the end and return the exit code.

        Raises:
            TimeoutExpired: the command did not end, and was killed.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired("a forked command", timeout, self.stdout, self.stderr)
        return self._process.exitcode

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def forked(*words: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    command = Forked(words, environment)
    code = command.wait()
    return subprocess.CompletedProcess(words, code, command.stdout, command.stderr)


def start_ranks(count: int, *words: str | Path, **environment: str) -> list[Forked]:
    """Start a command in several processes as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    every = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "forked"}
    every |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [
        Forked(words, environment | every | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def forked_ranks(
    count: int, *words: str | Path, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run a command in several processes as torchrun does; if one fails, the others are killed.

    The exit code is that of the first that failed, or 0.
    """
    ranks = start_ranks(count, *words, **environment)
    end, code = time.monotonic() + 180, 0
    while code == 0 and None in (codes := [rank.poll() for rank in ranks]):
        code = next((one for one in codes if one), 0)
        if time.monotonic() > end:
            code = -1
        time.sleep(0.01)
    code = code or next((one for one in codes if one), 0)
    for rank in ranks if code else []:
        rank.kill()
    out, err = ("".join(getattr(rank, name) for rank in ranks) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, code, out, err)


def _serve() -> None:
    """Start the server if it does not run, with its own environment."""
    before = dict(os.environ)
    os.environ.update(_SERVER)
    try:
        _context.set_forkserver_preload(["tests.forking"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(words: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """Be the command."""
    os.environ.clear()
    os.environ.update(environment)
    for file, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(ROOT)
    space: dict[str, Any] = {"__name__": "__main__"}
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], space)  # noqa: S102  # the tests' own code
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
