"""Collectives and shards for several processes that work on one text.

Under torchrun each process is a rank of `torch.distributed`. Without it there is one rank, and
nothing is sent. All ranks call the same functions in the same order. Rank 0 prints and writes.
"""

import dataclasses
import datetime
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # set by torchrun
if TYPE_CHECKING or LAUNCHED:  # commands that only read runs must not import torch
    import torch
    from torch import distributed

Value = TypeVar("Value")

# How long a process waits for the others. Rank 0 may work alone for hours, when it writes windows,
# hashes or saves a large model. A process that ends is noticed at once.
TIMEOUT = datetime.timedelta(hours=12)
# How long NCCL may take to send tensors when all processes have come: it may hang without an error.
SENDING = datetime.timedelta(minutes=30)


class StoppedError(RuntimeError):
    """An error of rank 0, raised on the other ranks: rank 0 reports it, the others end."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One process's share of the batches: every ``of``-th batch, beginning with batch ``number``.

    ``number`` counts from 0.
    """

    number: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the shard that a text names: ``3/8`` is the third of eight, with the number 2.

        Raises:
            ValueError: the text does not name a shard.
        """
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ValueError(f"expected a shard such as 3/8, the third of eight, got {text!r}")
        return cls(int(number) - 1, int(of))

    def __str__(self) -> str:
        return f"{self.number + 1}/{self.of}"

    def batches(self, count: int) -> range:
        """Return which of ``count`` batches belong to the shard."""
        return range(self.number, count, self.of)


def join(device: str = "auto") -> None:
    """Join the process group of torchrun: gloo for tensors on the CPU, NCCL for those on GPUs.

    ``device`` is as in `load_model`. Unless it is the CPU, each process of a machine takes its own
    GPU, if there are GPUs. NCCL connects the processes only when a tensor on a GPU is sent.

    Raises:
        RuntimeError: the processes cannot reach one another.
        ValueError: this machine has GPUs, but fewer than processes, or several processes are to
            share one GPU.
    """
    kind, _, index = device.partition(":")
    processes, backend = int(os.environ["LOCAL_WORLD_SIZE"]), "gloo"
    if kind == "cuda" and index and processes > 1:
        raise ValueError(
            f"--device {device} is one GPU, but torchrun started {processes} processes on this "
            "machine: leave out --device, and each process takes a GPU of its own"
        )
    if kind != "cpu" and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if processes > gpus:
            raise ValueError(
                f"{processes} processes need as many GPUs, but this machine has {gpus}: start one "
                "process for each GPU, or use --device cpu"
            )
        if not index:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # A failure of NCCL becomes an error here. Otherwise a thread of torch aborts the process.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        backend = "cpu:gloo,cuda:nccl"
    with _explaining("init_process_group"):
        distributed.init_process_group(backend, timeout=TIMEOUT)


def leave() -> None:
    """Wait for all ranks, then leave the process group.

    A rank that ends before the others may be killed.
    """
    group = _group()
    if group is not None:
        all_gather(None)
        group.destroy_process_group()


def count() -> int:
    """Return the number of ranks."""
    group = _group()
    return int(group.get_world_size()) if group is not None else 1


def rank() -> int:
    """Return the rank of this process, from 0."""
    group = _group()
    return int(group.get_rank()) if group is not None else 0


def _group() -> Any:
    """Return torch.distributed if this process is in a process group, and None if not."""
    module = sys.modules.get("torch.distributed")
    joined = module is not None and module.is_available() and module.is_initialized()
    return module if joined else None


def shard() -> Shard:
    """Return the shard of this process."""
    return Shard(rank(), count())


def all_reduce_sum_(tensor: "torch.Tensor") -> None:
    """Replace a tensor by its sum over all ranks, in place."""
    if count() > 1:
        _reduce_(tensor, "SUM")


def all_reduce_min_(tensor: "torch.Tensor") -> None:
    """Replace a tensor by its elementwise minimum over all ranks, in place."""
    if count() > 1:
        _reduce_(tensor, "MIN")


def all_reduce_max_(tensor: "torch.Tensor") -> None:
    """Replace a tensor by its elementwise maximum over all ranks, in place."""
    if count() > 1:
        _reduce_(tensor, "MAX")


def _reduce_(tensor: "torch.Tensor", how: str) -> None:
    _send("all_reduce", tensor, op=getattr(_group().ReduceOp, how))


def all_gather(value: Value) -> list[Value]:
    """Gather one value from each rank on all ranks, in the order of the ranks.

    The values are pickled, so they should be small.
    """
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    with _explaining("all_gather"):
        _group().all_gather_object(found, value)
    return found


def _send(collective: str, tensor: "torch.Tensor", **options: Any) -> None:
    """Run a collective on a tensor, and wait until this process has its result.

    For a tensor on a GPU all processes first wait for one another through gloo, which notices at
    once if one of them ends. NCCL would not, so it begins only when all have come.
    """
    send = getattr(_group(), collective)
    if tensor.device.type == "cpu":
        with _explaining(collective):
            send(tensor=tensor, **options)
    else:
        all_gather(None)
        with _explaining(collective, SENDING):
            send(tensor=tensor, **options, async_op=True).wait(SENDING)


@contextmanager
def _explaining(collective: str, limit: datetime.timedelta | None = None) -> Iterator[None]:
    """Explain a failed collective; one that took as long as ``limit`` has timed out.

    Raises:
        RuntimeError: the collective failed.
    """
    begin = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        waited = time.monotonic() - begin
        reason = textwrap.shorten(str(error).partition("\n")[0], 200, placeholder=" ...")
        where = f"after {waited:,.0f} seconds in {collective}: {reason}"
        if waited < 0.95 * (limit or TIMEOUT).total_seconds():
            raise RuntimeError(
                f"another of the processes has ended or cannot be reached, so this one ends too "
                f"({where}): read the error of the other process. If it printed none, torchrun prints "
                "its exit code: -9 means that it was killed, often for lack of memory"
            ) from error
        raise RuntimeError(
            f"another of the processes did not answer in time, so this one ends too ({where}): "
            "find out which process hangs, and run the same command again"
        ) from error


def on_rank_zero(write: Callable[..., object], *args: Any) -> None:
    """Call ``write(*args)`` on rank 0 only; all ranks wait until it has returned."""
    if rank() == 0:
        write(*args)
    all_gather(None)


@contextmanager
def rank_zero_runs(what: object) -> Iterator[None]:
    """Run the body on rank 0 while the others wait in `wait_for_rank_zero`.

    The others receive whether it failed.

    ``what`` describes the command and its inputs; it must be the same on all ranks.

    Raises:
        RuntimeError: ``what`` differs on another rank.
    """
    try:
        yield
    except BaseException:
        all_gather(None)
        raise
    _compare(all_gather(repr(what)))


def wait_for_rank_zero(what: object) -> None:
    """Wait until rank 0 has left the body of `rank_zero_runs`.

    Raises:
        RuntimeError: ``what`` differs between ranks.
        StoppedError: the body failed on rank 0.
    """
    found = all_gather(repr(what))
    if found[0] is None:
        raise StoppedError("rank 0 failed: read its error")
    _compare(found)


def _compare(found: list[Any]) -> None:
    other = [rank for rank, one in enumerate(found) if one != found[0]]
    if other:
        raise RuntimeError(
            f"rank {other[0]} has other arguments or another model, text or version than rank 0: "
            "start all processes with the same command and the same files"
        )


@contextmanager
def in_turn() -> Iterator[None]:
    """Run the body on one rank of each machine after the other; all ranks wait for the last."""
    own = int(os.environ.get("LOCAL_RANK", "0")) if count() > 1 else 0
    turns = max(all_gather(own)) + 1
    for _ in range(own):
        all_gather(None)
    try:
        yield
    finally:
        for _ in range(own, turns):
            all_gather(None)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Run the body on each rank; if it raises ValueError on one rank, raise it on all ranks.

    Raises:
        ValueError: the body raised it on a rank; the message is that of the first such rank.
    """
    message = None
    try:
        yield
    except ValueError as error:
        if count() == 1:
            raise
        message = str(error)
    for first in all_gather(message):
        if first is not None:
            raise ValueError(first)


def assign_ranks(costs: Sequence[float]) -> list[int]:
    """Return a rank for each piece of work, so that the ranks' total costs are about equal.

    The most expensive pieces come first, each to the rank with the least work so far.
    """
    owners, busy = [0] * len(costs), [0.0] * count()
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        owners[piece] = min(range(count()), key=busy.__getitem__)
        busy[owners[piece]] += costs[piece]
    return owners


def broadcast_(tensor: "torch.Tensor", owner: int) -> None:
    """Replace a tensor by that of the rank ``owner``, in place."""
    assert tensor.is_contiguous()  # otherwise the values would be permuted
    if count() > 1:
        _send("broadcast", tensor, src=owner)


def from_rank(owner: int, value: Value | None) -> Value:
    """Return the value of the rank ``owner`` on all ranks. It is pickled, so it should be small."""
    found = [value]
    if count() > 1:
        with _explaining("broadcast"):
            _group().broadcast_object_list(found, owner)
    return found[0]  # type: ignore[return-value]


def gather(rows: "torch.Tensor", places: "torch.Tensor") -> "torch.Tensor":
    """Return the rows (tokens, ...) of all ranks, sorted by their places (tokens,) in the text."""
    if count() == 1:
        return rows
    lengths = all_gather(len(rows))
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [padded.clone() for _ in lengths]
    _send("all_gather", padded, tensor_list=parts)
    cat = sys.modules["torch"].cat
    every: torch.Tensor = cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
    order = cat(all_gather(places)).argsort()
    return every[order.to(every.device)]
