"""Collectives and shards for several processes that work on one text.

Under torchrun each process is a rank of `torch.distributed`. Without it there is one rank, and
nothing is sent. All ranks call the same functions in the same order. Rank 0 prints and writes.
"""

import dataclasses
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # set by torchrun
if TYPE_CHECKING or LAUNCHED:  # commands that only read runs must not import torch
    import torch
    from torch import distributed

Value = TypeVar("Value")

# The timeout of a collective: between two of them rank 0 may write for long while the others wait.
TIMEOUT = datetime.timedelta(hours=12)


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


def join() -> None:
    """Join the process group of torchrun: gloo on the CPU, NCCL on GPUs.

    Raises:
        ValueError: this machine has GPUs, but fewer than processes.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise ValueError(
                f"{processes} processes need as many GPUs, but this machine has {gpus}: start one "
                "process for each GPU"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=TIMEOUT)


def leave() -> None:
    """Wait for all ranks, then leave the process group.

    A rank that ends before the others may be killed.
    """
    if count() > 1:
        all_gather(None)
        _group().destroy_process_group()


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
    with _explaining():
        _group().all_reduce(tensor, getattr(_group().ReduceOp, how))


def all_gather(value: Value) -> list[Value]:
    """Gather one value from each rank on all ranks, in the order of the ranks.

    The values are pickled, so they should be small.
    """
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    with _explaining():
        _group().all_gather_object(found, value)
    return found


@contextmanager
def _explaining() -> Iterator[None]:
    """Explain a failed collective.

    Raises:
        RuntimeError: the collective failed.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"another of the {count()} processes has ended or cannot be reached, so this one ends "
            f"too ({str(error).splitlines()[0][:200]}): read the error of the other process"
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
        with _explaining():
            _group().broadcast(tensor, owner)


def from_rank(owner: int, value: Value | None) -> Value:
    """Return the value of the rank ``owner`` on all ranks. It is pickled, so it should be small."""
    found = [value]
    if count() > 1:
        with _explaining():
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
    with _explaining():
        _group().all_gather(parts, padded)
    cat = sys.modules["torch"].cat
    every: torch.Tensor = cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
    order = cat(all_gather(places)).argsort()
    return every[order.to(every.device)]
