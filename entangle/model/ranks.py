"""Several processes on one text: which batches are whose, and how their sums become one.

Under torchrun each process is a rank of `torch.distributed`; alone there is one rank, and nothing is
sent. All ranks call the same functions in the same order. Rank 0 prints and writes.
"""

import dataclasses
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun
if TYPE_CHECKING or LAUNCHED:  # else it is imported by whoever needs it: to read a run it is not
    import torch
    from torch import distributed

Value = TypeVar("Value")

# Between two calls a rank may have much more to do than another: rank 0, for one, writes.
PATIENCE = datetime.timedelta(hours=12)


class StoppedError(RuntimeError):
    """Rank 0 has an error, which it tells: the other ranks only end."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A process's share of a text's batches: every ``of``-th, from the one of its number (from 0)."""

    number: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one as it is written: ``3/8`` is the third of eight.

        Raises:
            ValueError: it is no such thing.
        """
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ValueError(f"expected a shard such as 3/8, the third of eight, got {text!r}")
        return cls(int(number) - 1, int(of))

    def __str__(self) -> str:
        return f"{self.number + 1}/{self.of}"

    def batches(self, count: int) -> range:
        """Return the numbers of its batches, of so many."""
        return range(self.number, count, self.of)


def join() -> None:
    """Join the processes that torchrun started, this one among them.

    Raises:
        ValueError: more of them here than GPUs, where there are some.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"{here} processes cannot share {gpus} GPUs: start one for each")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=PATIENCE)


def leave() -> None:
    """Wait until all processes are done, and part: one that ends alone may be killed for it."""
    if count() > 1:
        everyone(None)
        _group().destroy_process_group()


def count() -> int:
    """Return how many processes there are."""
    group = _group()
    return int(group.get_world_size()) if group is not None else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    group = _group()
    return int(group.get_rank()) if group is not None else 0


def _group() -> Any:
    """Return torch.distributed if this process is one of a group, however it was started."""
    module = sys.modules.get("torch.distributed")
    joined = module is not None and module.is_available() and module.is_initialized()
    return module if joined else None


def shard() -> Shard:
    """Return this process's share."""
    return Shard(rank(), count())


def add_(tensor: "torch.Tensor") -> None:
    """Make of a tensor its sum over all ranks."""
    if count() > 1:
        _reduce_(tensor, "SUM")


def least_(tensor: "torch.Tensor") -> None:
    """Make of a tensor its least values over all ranks."""
    if count() > 1:
        _reduce_(tensor, "MIN")


def most_(tensor: "torch.Tensor") -> None:
    """Make of a tensor its largest values over all ranks."""
    if count() > 1:
        _reduce_(tensor, "MAX")


def _reduce_(tensor: "torch.Tensor", how: str) -> None:
    with _others():
        _group().all_reduce(tensor, getattr(_group().ReduceOp, how))


def everyone(value: Value) -> list[Value]:
    """Return what each rank gave, in their order: small things, which are pickled on the way."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    with _others():
        _group().all_gather_object(found, value)
    return found


@contextmanager
def _others() -> Iterator[None]:
    """Say what it means if others do not answer.

    Raises:
        RuntimeError: they do not.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"another process of the {count()} has ended or cannot be reached, so this one ends "
            f"too: see what it said ({str(error).splitlines()[0][:200]})"
        ) from error


def once(write: Callable[..., object], *args: Any) -> None:
    """Have rank 0 write what all ranks read, and wait until it is there."""
    if rank() == 0:
        write(*args)
    everyone(None)


@contextmanager
def leading(what: object) -> Iterator[None]:
    """Do something on rank 0 that the others wait for in `agree`, and tell them whether it went well.

    Raises:
        RuntimeError: another rank is about something else.
    """
    try:
        yield
    except BaseException:
        everyone(None)
        raise
    _compare(everyone(repr(what)))


def agree(what: object) -> None:
    """Wait for what rank 0 does in `leading`.

    Raises:
        RuntimeError: it, or another rank, is about something else.
        StoppedError: it has an error.
    """
    found = everyone(repr(what))
    if found[0] is None:
        raise StoppedError("rank 0 has an error")
    _compare(found)


def _compare(found: list[Any]) -> None:
    other = [rank for rank, one in enumerate(found) if one != found[0]]
    if other:
        raise RuntimeError(
            f"rank {other[0]} was started with other arguments, or has another model, text or "
            "version, than rank 0: start all with the same command on the same files"
        )


@contextmanager
def together() -> Iterator[None]:
    """Do something of one's own, of which the others hear if it cannot be done.

    Raises:
        ValueError: on all ranks, what it was on one.
    """
    problem = None
    try:
        yield
    except ValueError as error:
        if count() == 1:
            raise
        problem = str(error)
    for said in everyone(problem):
        if said is not None:
            raise ValueError(said)


def spread(costs: Sequence[float]) -> list[int]:
    """Return a rank for each piece of work, so that all have as much to do: the largest first."""
    owners, busy = [0] * len(costs), [0.0] * count()
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        owners[piece] = min(range(count()), key=busy.__getitem__)
        busy[owners[piece]] += costs[piece]
    return owners


def broadcast_(tensor: "torch.Tensor", owner: int) -> None:
    """Make of a tensor that of one rank."""
    assert tensor.is_contiguous()  # else its values would be mixed up
    if count() > 1:
        with _others():
            _group().broadcast(tensor, owner)


def from_rank(owner: int, value: Value | None) -> Value:
    """Return what one rank gave: what is not large, which is pickled on the way."""
    found = [value]
    if count() > 1:
        with _others():
            _group().broadcast_object_list(found, owner)
    return found[0]  # type: ignore[return-value]


def gather(rows: "torch.Tensor", places: "torch.Tensor") -> "torch.Tensor":
    """Return all ranks' rows (tokens, ...), in the order of their places (tokens,)."""
    if count() == 1:
        return rows
    lengths = everyone(len(rows))
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [padded.clone() for _ in lengths]
    with _others():
        _group().all_gather(parts, padded)
    cat = sys.modules["torch"].cat
    every: torch.Tensor = cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
    order = cat(everyone(places)).argsort()
    return every[order.to(every.device)]
