"""How ranks join, how they send tensors, and what each is told when another is lost.

No GPU is at hand: a fake torch.distributed notes what it is asked, and tensors on the meta device
stand for those on a GPU.
"""

import datetime
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from entangle.__main__ import main
from entangle.model import ranks
from entangle.runs.store import open_run
from tests.forking import forked_ranks, start_ranks
from tests.tiny_models import save_tiny

GPU = "meta"


class Two:
    """torch.distributed of the first of two ranks; the other gives what this one gives."""

    ReduceOp = SimpleNamespace(SUM="sum", MIN="min", MAX="max")

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.error: Exception | None = None

    def get_world_size(self) -> int:
        return 2

    def get_rank(self) -> int:
        return 0

    def _note(self, what: Any) -> None:
        self.asked.append(what)
        if self.error is not None:
            raise self.error

    def all_gather_object(self, found: list[Any], value: Any) -> None:
        self._note("objects")
        found[:] = [value] * len(found)

    def broadcast_object_list(self, _: list[Any], owner: int) -> None:
        self._note(("objects", owner))

    def all_reduce(self, tensor: torch.Tensor, *, op: str, async_op: bool = False) -> "Two":
        self._note(("all_reduce", tensor.device.type, op, async_op))
        return self

    def broadcast(self, tensor: torch.Tensor, *, src: int, async_op: bool = False) -> "Two":
        self._note(("broadcast", tensor.device.type, src, async_op))
        return self

    def all_gather(
        self, tensor_list: list[torch.Tensor], tensor: torch.Tensor, *, async_op: bool = False
    ) -> "Two":
        self._note(("all_gather", tensor.device.type, len(tensor_list), async_op))
        return self

    def wait(self, timeout: datetime.timedelta) -> None:
        self._note(("wait", timeout))

    def destroy_process_group(self) -> None:
        self._note("destroyed")


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Two:
    fake = Two()
    monkeypatch.setattr(ranks, "_group", lambda: fake)
    return fake


# What is sent by what.

SENT: dict[str, tuple[Callable[[torch.Tensor], Any], Any]] = {
    "all_reduce": (ranks.all_reduce_max_, "max"),
    "broadcast": (lambda tensor: ranks.broadcast_(tensor, 1), 1),
    "all_gather": (lambda tensor: ranks.gather(tensor, torch.arange(3)), 2),
}


@pytest.mark.parametrize("name", SENT)
def test_nccl_begins_when_all_have_come_and_is_waited_for(name: str, two: Two) -> None:
    """NCCL does not notice that a process has ended, and gloo does."""
    send, option = SENT[name]
    send(torch.zeros(3, 2, device=GPU))
    place = two.asked.index((name, GPU, option, True))
    assert two.asked[place - 1] == "objects"
    assert two.asked[place + 1] == ("wait", ranks.SENDING)


@pytest.mark.parametrize("name", SENT)
def test_on_the_cpu_gloo_sends_and_nothing_is_sent_before(name: str, two: Two) -> None:
    send, option = SENT[name]
    send(torch.zeros(3, 2))
    assert (name, "cpu", option, False) in two.asked
    assert two.asked.count("objects") == (2 if name == "all_gather" else 0)  # lengths and places
    assert not any(asked[0] == "wait" for asked in two.asked)


@pytest.mark.parametrize(
    ("waited", "message"),
    [
        (3.0, r"another .*ended .*\(after 3 seconds in {}: lost\b.*read the error"),
        (7 * 3600.0, r"another .*ended .*\(after 25,200 seconds in {}: lost\b.*read the error"),
        (12 * 3600.0, r"another .*in time.*\(after 43,200 seconds in {}: lost\b.*which .*hangs"),
    ],
)
@pytest.mark.parametrize("name", [*SENT, "object of a rank"])
def test_a_collective_that_fails_says_which_it_was_and_how_long_it_took(
    name: str, waited: float, message: str, two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 100.0 + waited])
    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    two.error = RuntimeError("lost\nand a trace of C++")
    send = SENT[name][0] if name in SENT else lambda _: ranks.from_rank(0, 5)
    shown = name if name in SENT else "broadcast"
    with pytest.raises(RuntimeError, match=message.format(shown)) as error:
        send(torch.zeros(3, 2))
    assert len(str(error.value).splitlines()) == 1


def test_nccl_has_a_shorter_limit_since_nobody_is_waited_for(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranks.SENDING < ranks.TIMEOUT
    clock = iter([0.0, 1.0, 2.0, 2.0 + ranks.SENDING.total_seconds()])

    def all_gather(_: object) -> None:
        next(clock)

    def wait(_: datetime.timedelta) -> None:
        raise RuntimeError("timed out")

    monkeypatch.setattr(ranks, "all_gather", all_gather)
    monkeypatch.setattr(two, "wait", wait)
    next(clock)
    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(RuntimeError, match=r"in time.* 1,800 seconds in all_reduce"):
        ranks.all_reduce_sum_(torch.zeros(3, device=GPU))


def test_the_group_is_destroyed_when_all_have_come_also_if_one_rank_is_all(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.leave()
    assert two.asked == ["objects", "destroyed"]
    monkeypatch.setattr(two, "get_world_size", lambda: 1)
    ranks.leave()
    assert two.asked[2:] == ["destroyed"]


# Joining.


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Make this process the third of some that torchrun started beside some GPUs."""

    def made(processes: int, gpus: int) -> list[Any]:
        done: list[Any] = []
        cuda = SimpleNamespace(
            is_available=lambda: gpus > 0,
            device_count=lambda: gpus,
            set_device=lambda index: done.append(("set_device", index)),
        )
        joined = SimpleNamespace(
            init_process_group=lambda backend, timeout: done.append((backend, timeout))
        )
        monkeypatch.setattr(ranks, "torch", SimpleNamespace(cuda=cuda), raising=False)
        monkeypatch.setattr(ranks, "distributed", joined, raising=False)
        for name, value in {"LOCAL_WORLD_SIZE": processes, "LOCAL_RANK": processes - 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "")  # so that it is restored
        monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT")
        return done

    return made


@pytest.mark.parametrize(
    ("processes", "gpus", "device", "expected"),
    [
        (3, 4, "auto", [("set_device", 2), ("cpu:gloo,cuda:nccl", ranks.TIMEOUT)]),
        (4, 4, "cuda", [("set_device", 3), ("cpu:gloo,cuda:nccl", ranks.TIMEOUT)]),
        (1, 4, "cuda:3", [("cpu:gloo,cuda:nccl", ranks.TIMEOUT)]),  # one process a machine
        (3, 4, "cpu", [("gloo", ranks.TIMEOUT)]),
        (3, 1, "cpu", [("gloo", ranks.TIMEOUT)]),
        (3, 0, "auto", [("gloo", ranks.TIMEOUT)]),
    ],
)
def test_the_device_decides_what_sends(
    processes: int,
    gpus: int,
    device: str,
    expected: Sequence[Any],
    machine: Callable[..., list[Any]],
) -> None:
    done = machine(processes, gpus)
    ranks.join(device)
    assert done == expected


@pytest.mark.parametrize(
    ("processes", "gpus", "device", "message"),
    [
        (3, 2, "auto", r"\b3 processes.*\b2\b.*--device cpu"),
        (3, 1, "cuda", r"\b3 processes.*\b1\b.*--device cpu"),
        (2, 2, "cuda:0", r"--device cuda:0 .*\b2 processes.*leave out --device"),
        (2, 0, "cuda:1", r"--device cuda:1 .*\b2 processes.*leave out --device"),
    ],
)
def test_processes_that_would_share_a_gpu_are_refused_before_anything_is_read(
    processes: int,
    gpus: int,
    device: str,
    message: str,
    machine: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    done = machine(processes, gpus)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    words = ["measure", str(tmp_path / "no model"), "--text", str(tmp_path / "no text")]
    assert main([*words, "--device", device, "--out", str(tmp_path / "run")]) == 2
    assert re.fullmatch(rf"entangle: .*{message}.*\n", capsys.readouterr().err)
    assert done == []
    assert list(tmp_path.iterdir()) == []


# With gloo.

ONE_GPU = """
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
from entangle.__main__ import run
run()
"""


def test_on_the_cpu_there_may_be_more_processes_than_gpus(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    words = ["measure", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt")]
    words += ["--windows", "5", "--length", "32", "--batch-size", "2", "--device", "cpu"]
    done = forked_ranks(2, "-c", ONE_GPU, *words, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    one, two = (open_run(tmp_path / name) for name in ("one", "two"))
    assert two.attrs == one.attrs
    assert (two["wasserstein"] == one["wasserstein"]).all()


LATE = """
import datetime, time
from torch.distributed import distributed_c10d
from entangle import __main__
from entangle.model import ranks

def command(args):
    ranks.all_gather(None)
    ranks.TIMEOUT = datetime.timedelta(seconds=1)  # only now, since a busy machine joins slowly
    distributed_c10d._set_pg_timeout(ranks.TIMEOUT, None)
    if ranks.rank() == 2:
        time.sleep(4)
    ranks.all_gather(None)

__main__.COMMANDS["perplexity"] = command
__main__.run()
"""


def test_when_a_rank_comes_too_late_each_is_told_and_ends() -> None:
    started = start_ranks(3, "-c", LATE, "perplexity", "MODEL", "--text", "TEXT")
    codes = [one.wait(60) for one in started]
    assert codes == [1, 1, 1], [one.stderr for one in started]
    for rank, one in enumerate(started):
        assert "Traceback" not in one.stderr
        (said,) = (line for line in one.stderr.splitlines() if line.startswith("entangle"))
        where = rf" \(rank {rank}\)" if rank else ""
        what = "has ended or cannot" if rank == 2 else "did not answer in time"
        assert re.match(rf"entangle{where}: another .*{what}.* \d seconds in all_gather: ", said)


TURNS = """
import os, sys, time
from pathlib import Path
from entangle.model import ranks

ranks.join()
place, failing = Path(sys.argv[1]), sys.argv[2] == "failing"
try:
    with ranks.in_turn():
        (place / "busy").mkdir()  # fails if another has it
        time.sleep(0.1)
        (place / "busy").rmdir()
        if failing and ranks.rank() == 0:
            raise ValueError("of rank 0")
except ValueError as error:
    (place / "error").write_text(f"{ranks.rank()} {error}")
(place / f"{ranks.rank()} {ranks.all_gather(ranks.rank())}").touch()  # still in step
ranks.leave()
os._exit(0)
"""


@pytest.mark.parametrize("how", ["well", "failing"])
def test_ranks_of_a_machine_take_turns(how: str, tmp_path: Path) -> None:
    done = forked_ranks(3, "-c", TURNS, tmp_path, how)
    assert done.returncode == 0, done.stderr
    names = {f"{rank} [0, 1, 2]" for rank in range(3)}
    assert {path.name for path in tmp_path.iterdir()} == names | (
        {"error"} if how == "failing" else set()
    )
