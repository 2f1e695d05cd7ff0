"""The calls of a model's blocks: each block's arguments are recorded, and the call is replayed.

The arguments of a block differ between architectures and releases, so none are made up here. They
are recorded beside the hidden states (masks, positions) and must not depend on the blocks' outputs.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

Forward = Callable[..., Any]
NOT_IN_SEQUENCE = (
    "this model cannot be run block by block, because its blocks do not run one after the other on "
    "hidden states alone: {}"
)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockCall:
    """The arguments of a call of a block, without the hidden states."""

    block: int  # the index of the block
    leaves: list[Any]
    form: Any  # the tree structure of the leaves in (args, kwargs)
    named: bool  # whether the hidden states were a keyword argument

    @classmethod
    def of(
        cls, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple["BlockCall", torch.Tensor]:
        """Return the call of a block with these arguments, and its hidden states.

        Raises:
            ValueError: the arguments have no hidden states.
        """
        named = not args
        hidden = kwargs.get("hidden_states") if named else args[0]
        if not isinstance(hidden, torch.Tensor):
            raise ValueError(
                f"this model cannot be run block by block: block {block} is called without hidden "
                "states"
            )
        rest = {key: kwargs[key] for key in kwargs if not named or key != "hidden_states"}
        leaves, form = _pytree.tree_flatten((args[1:], rest))
        return cls(block, leaves, form, named), hidden

    def __call__(self, block: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        """Call a block with these arguments and ``hidden``, and return its hidden states."""
        args, kwargs = _pytree.tree_unflatten(self.leaves, self.form)
        if self.named:
            return hidden_of(block(*args, hidden_states=hidden, **kwargs), self.block)
        return hidden_of(block(hidden, *args, **kwargs), self.block)

    def copied(self) -> "BlockCall":
        """Return an equal call with copies of the tensors."""
        leaves = [one.clone() if isinstance(one, torch.Tensor) else one for one in self.leaves]
        return dataclasses.replace(self, leaves=leaves)

    def sharing(self, other: "BlockCall | None") -> "BlockCall":
        """Return an equal call that shares its equal arguments with ``other``, to save memory."""
        if other is None or self.form != other.form:
            return self
        pairs = zip(self.leaves, other.leaves, strict=True)
        leaves = [old if _same(new, old) else new for new, old in pairs]
        return dataclasses.replace(self, leaves=leaves)

    def equals(self, other: "BlockCall") -> bool:
        """Return whether two calls have equal arguments."""
        if self.named != other.named or self.form != other.form:
            return False
        return all(map(_same, self.leaves, other.leaves))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return a is b or (alike and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
    return type(a) is type(b) and (a is b or bool(a == b))


def hidden_of(output: Any, block: int) -> torch.Tensor:
    """Return the hidden states in the output of the block with this index.

    Raises:
        RuntimeError: the output has none.
    """
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, torch.Tensor):
        fact = f"block {block} returns a {type(output).__name__}"
        raise RuntimeError(NOT_IN_SEQUENCE.format(fact))
    return hidden


def run_whole(
    backbone: nn.Module, blocks: Sequence[nn.Module], arguments: Mapping[str, torch.Tensor]
) -> tuple[list[BlockCall], list[int | None]]:
    """Run the whole model; return each block's call, and the extra items of its output.

    The number of extra items is the length of the output tuple less one, or None if the block
    returns a tensor.

    Raises:
        RuntimeError: the blocks do not run one after the other on hidden states alone.
    """
    extras: list[int | None] = []

    def run(_: int, __: torch.Tensor, call: Callable[[], Any]) -> Any:
        output = call()
        extras.append(None if isinstance(output, torch.Tensor) else len(output) - 1)
        return output

    return _catch(backbone, blocks, arguments, run)[0], extras


def run_short(
    backbone: nn.Module,
    blocks: Sequence[nn.Module],
    arguments: Mapping[str, torch.Tensor],
    extras: Sequence[int | None],
) -> tuple[list[BlockCall], torch.Tensor]:
    """Run a model without its blocks; return the same as `_catch`.

    Raises:
        RuntimeError: the blocks do not run one after the other on hidden states alone.
    """

    def skip(index: int, hidden: torch.Tensor, _: Callable[[], Any]) -> Any:
        extra = extras[index]
        return hidden if extra is None else (hidden, *(None,) * extra)

    return _catch(backbone, blocks, arguments, skip)


def _catch(
    backbone: nn.Module,
    blocks: Sequence[nn.Module],
    arguments: Mapping[str, torch.Tensor],
    output_of: Callable[[int, torch.Tensor, Callable[[], Any]], Any],
) -> tuple[list[BlockCall], torch.Tensor]:
    """Run a model; return each block's call, and the hidden states before the first block.

    ``output_of`` returns a block's output. Its arguments are the block's index, the block's hidden
    states, and a function that runs the block.

    Raises:
        RuntimeError: the blocks do not run one after the other on hidden states alone.
    """
    calls: list[BlockCall] = []
    first: torch.Tensor | None = None
    last: torch.Tensor | None = None

    def make(index: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal first, last
            call, hidden = BlockCall.of(index, args, kwargs)
            if index != len(calls):
                fact = f"block {index} runs where block {len(calls)} is expected"
                raise RuntimeError(NOT_IN_SEQUENCE.format(fact))
            if first is None:
                first = hidden
            elif not _same(hidden, last):
                fact = f"the model changes the hidden states before block {index}"
                raise RuntimeError(NOT_IN_SEQUENCE.format(fact))
            output = output_of(index, hidden, lambda: forward(*args, **kwargs))
            # Copied, since code between the blocks may change it in place.
            last = hidden_of(output, index).clone()
            calls.append(call)
            return output

        return run

    with replaced_forwards(blocks, make):
        backbone(**arguments, use_cache=False)
    if first is None or len(calls) != len(blocks):
        fact = f"only {len(calls)} of {len(blocks)} blocks ran"
        raise RuntimeError(NOT_IN_SEQUENCE.format(fact))
    return calls, first


@contextmanager
def replaced_forwards(
    blocks: Sequence[nn.Module], make: Callable[[int, Forward], Forward]
) -> Iterator[None]:
    """Replace each block's forward by one made from it, and restore it on exit."""
    own = [vars(block).get("forward") for block in blocks]  # accelerate may have set one
    try:
        for index, block in enumerate(blocks):
            block.forward = make(index, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward
