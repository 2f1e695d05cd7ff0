"""Kill commands at random moments; given again, they must make what unbroken commands make.

The commands run in forks of this process, which has imported all and runs nothing itself. Under
torchrun its agent is a fork too, and it forks the ranks.
"""

import faulthandler
import functools
import os
import random
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

from entangle.measurement import measuring
from entangle.model import folders, ranks
from tests.torture import place

SIZES = "--windows 40 --length 16 --batch-size 2"
TEXT = f"model --text text.txt {SIZES}"
HELD = "--evaluation evaluation.txt --evaluation-windows 6"
SOME = "--layers *.mlp.up_proj"
COMMANDS = {
    "measure": f"measure {TEXT}",
    "measure-difficulty": f"measure {TEXT} --difficulty 64 --skip-first 1",
    "measure-offload": f"measure {TEXT} --offload parts",
    "sparsify": f"sparsify {TEXT} --sparsity 0.5",
    "sparsify-experts": f"sparsify {TEXT} --layers *.mlp.* --sparsity 0.5 --experts 2",
    "sweep": f"sweep {TEXT} {HELD} {SOME} --sparsity 0.5,2:4 --method sparsegpt,wanda",
    "sweep-experts": f"sweep {TEXT} {HELD} {SOME} --sparsity 0.5 --method sparsegpt --experts 1,2",
    "ablate": f"ablate run --text text.txt {SIZES} {HELD} {SOME} --share 0.2 --seeds 1 "
    "--sets wasserstein,random,std --intervention sparsify,zero",
    "disentangle": f"disentangle run --text text.txt {SIZES} {HELD} {SOME} --experts 2",
}
RANKED = ("measure", "sparsify", "sparsify-experts", "sweep", "ablate")
PLOTS = {  # what is drawn after a run is finished, and what draws it again
    "measure-difficulty": ["difficulty"],
    "sweep": ["sweep"],
    "sweep-experts": ["sweep"],
    "ablate": ["ablation"],
    "disentangle": ["improvement", "clusters", "sparse"],
}
SIGNALS = [signal.SIGKILL] * 8 + [signal.SIGINT, signal.SIGTERM]
CODES = {signal.SIGKILL: {-9}, signal.SIGINT: {130}, signal.SIGTERM: {143, -15}}
SECONDS = 120  # that a command may take
INPUTS = ("model", "text.txt", "evaluation.txt", "run")


@dataclass(frozen=True)
class Unbroken:
    """What a command makes that nothing interrupts."""

    content: place.Content
    seconds: float


class Child:
    """A command that runs in a fork of this process."""

    def __init__(self, run: Callable[[], int], folder: Path, said: Path) -> None:
        """Start it in a folder; what it prints is in a file."""
        self.said = said
        self.begin = time.monotonic()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                for number in (1, 2):
                    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
                os.chdir(folder)
                os.setsid()  # with what it starts
                faulthandler.enable()  # if it hangs, SIGABRT shows where
                # tqdm's own lock is shared by all forks: a killed one would keep it for ever.
                tqdm.set_lock(threading.RLock())
                measuring.SECONDS = 0.0  # states are saved as often as may be
                code = run()
            except SystemExit as stopped:
                code = stopped.code if isinstance(stopped.code, int) else 1
            except KeyboardInterrupt:  # before the command itself heeds it
                code = 130
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait(self, seconds: float) -> int | None:
        """Wait for the end, at most so long; return the exit code, negative for a signal."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                break
            else:
                time.sleep(0.002)
        return self.code

    def kill(self, number: signal.Signals, *, group: bool = False) -> None:
        try:
            (os.killpg if group else os.kill)(self.pid, number)
        except ProcessLookupError:
            if self.code is None:  # it has not called setsid yet
                os.kill(self.pid, number)

    @property
    def text(self) -> str:
        said = self.said  # it is not there before the process has begun
        return said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""


def _rank(words: Sequence[str]) -> int:
    """Be one rank: torchrun's agent has forked this process."""
    vars(ranks).update(torch=torch, distributed=distributed)  # as where torchrun starts it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = place.run_main(words)
    if code:
        os._exit(code)
    return code


def _torchrun(words: Sequence[str]) -> int:
    """Be torchrun with two ranks."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="fork",
    )
    elastic_launch(config, _rank)(list(words))
    return 0


class Kills:
    """Runs cases in a folder of its own, against unbroken runs that it makes once."""

    def __init__(self) -> None:
        self.folder = place.workplace()
        self.good = self.folder / "good"
        place.make_sources(self.good)
        (self.good / "text.txt").write_text(place.prose(seed=1, words=1500))
        (self.good / "evaluation.txt").write_text(place.prose(seed=2, words=200))
        words = f"measure model --text text.txt {SIZES} --seed 1 --out run".split(" ")
        self._finish(Child(self._run(words), self.good, self.good / "said"), {0})
        self.inputs = {name: _content(self.good / name) for name in INPUTS}

    @staticmethod
    def _run(words: Sequence[str], *, ranked: bool = False) -> Callable[[], int]:
        return functools.partial(_torchrun if ranked else place.run_main, list(words))

    @staticmethod
    def _finish(child: Child, codes: set[int]) -> None:
        code = child.wait(SECONDS)
        if code is None:
            child.kill(signal.SIGABRT)
            child.wait(10)
            child.kill(signal.SIGKILL, group=True)
            child.wait(SECONDS)
        assert code in codes, f"exit code {code}: {child.text[-2000:]}"

    @functools.cache  # noqa: B019  # lives as long as the process
    def unbroken(self, name: str, ranked: bool) -> Unbroken:
        """Return what a command makes; its files are the same with ranks, but not its time."""
        seconds = 0.0
        for _ in range(2):  # the first may compile kernels
            folder = self.folder / f"unbroken-{name}"
            place.copy(self.good, folder, INPUTS)
            child = Child(self._run(self._words(name), ranked=ranked), folder, folder / "said")
            self._finish(child, {0})
            seconds = time.monotonic() - child.begin
            content = _compared(folder / "new")
            shutil.rmtree(folder)
        return Unbroken(content, seconds)

    @staticmethod
    def _words(name: str) -> list[str]:
        return [*COMMANDS[name].split(), "--out", "new"]

    def judge(self, seed: int, *, ranked: bool = False) -> tuple[str, list[str]]:
        """Kill a command, resume it, and compare; return what was done and what is wrong."""
        rng = random.Random(f"kills {seed} {ranked}")
        name = rng.choice(RANKED if ranked else list(COMMANDS))
        unbroken = self.unbroken(name, ranked)
        folder = self.folder / f"case-{seed}-{ranked}"
        place.copy(self.good, folder, INPUTS)
        said, done = folder / "said", [name + (" in two ranks" if ranked else "")]
        try:
            words = self._words(name)
            if not ranked and rng.random() < 0.1:  # over a result of other settings
                done.append("over another run")
                words.append("--overwrite")
                place.copy(self.good, folder / "old", ["run"])
                (folder / "old" / "run").rename(folder / "new")
            for _ in range(rng.choice([1, 1, 1, 1, 2, 2, 3, 5])):
                done.append(self._killed(name, words, unbroken.seconds, rng, folder, ranked))
                if _is_finished(folder) and "--overwrite" not in words:
                    break
            finished = (folder / "new").exists() and "--overwrite" not in words
            if finished:  # killed when all but the figures was done
                for kind in PLOTS.get(name, []):
                    plot = self._run(["plot", "new", kind])
                    self._finish(Child(plot, folder, said), {0})
            else:
                self._finish(Child(self._run(words, ranked=ranked), folder, said), {0})
            return ", ".join(done), self._wrong(folder, unbroken)
        except AssertionError as error:
            return ", ".join(done), [str(error)]
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _killed(
        self,
        name: str,
        words: Sequence[str],
        seconds: float,
        rng: random.Random,
        folder: Path,
        ranked: bool,
    ) -> str:
        """Start a command and kill it at a random moment; say how."""
        number, delay = rng.choice(SIGNALS), rng.uniform(0, seconds)
        said = folder / f"said-{rng.random()}"
        before = place.contents(folder / "new") if (folder / "new").exists() else None
        child = Child(self._run(words, ranked=ranked), folder, said)
        in_time = child.wait(delay) is None
        if in_time and ranked:
            number = signal.SIGKILL
            victim = _one_rank(child, rng)
            if victim is None:
                child.kill(number, group=True)
            else:
                os.kill(victim, number)
        elif in_time:
            child.kill(number)
        code = child.wait(SECONDS)
        if code is None:
            child.kill(signal.SIGKILL, group=True)
            child.wait(SECONDS)
        assert code is not None, f"{number.name} after {delay:.3f} s did not end it: {child.text}"
        if ranked:
            _kill_group(child)
        else:
            assert code in CODES[number] | {0}, f"{number.name}: exit code {code}: {child.text}"
            assert "Traceback" not in child.text, child.text
        if before is not None:  # the old result or the new one is there, whole
            kept = [folder / "new", folder / "new.partial.old"]
            whole = [path for path in kept if (path / "run.json").is_file()]
            assert whole, "the old result is lost"
        how = number.name if in_time else "it ended before a kill"
        return f"{how} after {delay:.3f} s (exit code {code})"

    def _wrong(self, folder: Path, unbroken: Unbroken) -> list[str]:
        """Say where the result differs, and what else is left."""
        found = _compared(folder / "new")
        names = sorted({*found} | {*unbroken.content})
        wrong = [f"{n} differs" for n in names if found.get(n) != unbroken.content.get(n)]
        for name, content in self.inputs.items():
            if _content(folder / name) != content:
                wrong.append(f"{name} was changed")
        left = [path.name for path in folder.iterdir()]
        return wrong + [f"{name} is left" for name in left if "partial" in name or "lock" in name]

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _content(path: Path) -> place.Content | bytes:
    return place.contents(path) if path.is_dir() else path.read_bytes()


def _compared(folder: Path) -> place.Content:
    """Return the content of a result, but for log.json, which says what it cost."""
    found = place.contents(folder)
    assert found.pop("log.json", None) is not None, f"{folder} has no log.json"
    return found


def _is_finished(folder: Path) -> bool:
    return (folder / "new").exists() and not folders.partial_of(folder / "new").exists()


def _one_rank(child: Child, rng: random.Random) -> int | None:
    """Return the process of one of the ranks; None to kill all, or if there is none yet."""
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    found = children.read_text().split() if children.exists() else []
    return None if not found or rng.random() < 0.3 else int(rng.choice(found))


def _kill_group(child: Child) -> None:
    """Kill what outlives torchrun."""
    child.kill(signal.SIGKILL, group=True)
    time.sleep(0.05)
