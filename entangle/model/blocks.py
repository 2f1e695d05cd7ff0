"""A walk through a model block by block: each block's call is recorded, then replayed.

The arguments of a block differ between architectures and releases, so none are made up here. Each
batch runs through the model once without its blocks. This records each block's arguments beside
the hidden states (masks, positions), which must not depend on the blocks' outputs. To check that,
the first batch also runs through the whole model: if the arguments differ, an error is raised.

Memory holds the hidden states of all batches, and one batch in one block. If the model's weights
are in files (see `placing`), one block is on the device, and the hidden states are on the host.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from entangle.model.hooks import (
    CountedTokens,
    OnOutputs,
    OnRows,
    backbone_of,
    check_fired,
    check_hooks,
    counted_tokens,
)
from entangle.model.layers import LinearLayer, find_blocks
from entangle.model.placing import input_device, is_offloaded, load_block, release_block

Forward = Callable[..., Any]
_NOT_IN_SEQUENCE = (
    "this model cannot be run block by block, because its blocks do not run one after the other on "
    "hidden states alone: {}"
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """The arguments of a call of a block, without the hidden states."""

    block: int  # the index of the block
    leaves: list[Any]
    form: Any  # the tree structure of the leaves in (args, kwargs)
    named: bool  # whether the hidden states were a keyword argument

    @classmethod
    def of(
        cls, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple["_Call", torch.Tensor]:
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

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Call a block with these arguments and ``hidden``, and return its hidden states."""
        args, kwargs = _pytree.tree_unflatten(self.leaves, self.form)
        if self.named:
            return _hidden_of(block(*args, hidden_states=hidden, **kwargs), self.block)
        return _hidden_of(block(hidden, *args, **kwargs), self.block)

    def sharing(self, other: "_Call | None") -> "_Call":
        """Return an equal call that shares its equal arguments with ``other``, to save memory."""
        if other is None or self.form != other.form:
            return self
        pairs = zip(self.leaves, other.leaves, strict=True)
        leaves = [old if _same(new, old) else new for new, old in pairs]
        return dataclasses.replace(self, leaves=leaves)

    def equals(self, other: "_Call") -> bool:
        """Return whether two calls have equal arguments."""
        if self.named != other.named or self.form != other.form:
            return False
        return all(map(_same, self.leaves, other.leaves))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return a is b or (alike and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
    return type(a) is type(b) and (a is b or bool(a == b))


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _hidden_of(output: Any, block: int) -> torch.Tensor:
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, torch.Tensor):
        fact = f"block {block} returns a {type(output).__name__}"
        raise RuntimeError(_NOT_IN_SEQUENCE.format(fact))
    return hidden


class BlockWalk:
    """The hidden states of all batches, carried through a model's blocks one block at a time.

    ``block`` is the index of the block that runs next. `record_inputs` records the inputs of its layers
    and `record_outputs` their outputs; `advance` carries the hidden states through it. The weights of the
    block may change between `record_inputs` and `advance`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Mapping[str, torch.Tensor]],
        *,
        skip_first: int = 0,
        places: Sequence[int] | None = None,
    ) -> None:
        """Compute the hidden states before the first block, and record the arguments of all blocks.

        A batch maps names of the model's arguments (input_ids, attention_mask) to tensors.
        ``places`` are the positions in the text, in tokens, at which the batches begin; without
        them each batch begins where the one before it ends.

        Raises:
            RuntimeError: the blocks do not run one after the other on hidden states alone.
            ValueError: the model is compiled or not loaded, there are no batches, or
                ``skip_first`` is negative.
        """
        check_hooks(model, skip_first)
        self.model = model
        self._offloaded = is_offloaded(model)
        self._fetched: nn.Module | None = None
        self.blocks = list(find_blocks(model)[1])
        if self._offloaded:  # an earlier walk may have left its last block on the device
            for block in self.blocks:
                release_block(block)
        self.block = 0
        self._device = input_device(model)
        self.counted: list[CountedTokens] = []
        self._batch = 0  # the number of the running batch
        self._hidden: list[torch.Tensor] = []
        self._calls: list[list[_Call]] = []  # per batch, per block
        self._extras: list[int | None] = []
        with torch.inference_mode():
            for batch in batches:
                self._add_batch(batch, skip_first)
        if not self._hidden:
            raise ValueError("there is no batch to run: give at least one window")

        starts = itertools.accumulate((batch.size for batch in self.counted), initial=0)
        begun = zip(self.counted, starts if places is None else places, strict=False)
        # Per batch, the places in the text of its counted tokens.
        self.places = [start + batch.places for batch, start in begun]

    @property
    def tokens(self) -> int:
        """The number of counted tokens in all batches."""
        return sum(batch.counted for batch in self.counted)

    @property
    def done(self) -> bool:
        """Whether all blocks have run."""
        return self.block == len(self.blocks)

    def record_inputs(
        self, layers: Sequence[LinearLayer], on_inputs: OnRows, *, advance: bool = False
    ) -> dict[str, str]:
        """Run the block once, and call ``on_inputs`` with the counted input rows of its layers.

        If several layers receive the same tensor, ``on_inputs`` is called for the first of them
        only. Return, for each layer's name, the name of the layer that it was called for. With
        ``advance`` the outputs of the block become the hidden states. An error may leave some
        batches advanced and others not: begin a new walk then.

        Raises:
            RuntimeError: a layer did not run once in each batch, does not have one row for each
                token, or shares its input in some batches only.
        """
        assert all(layer.block == self.block for layer in layers)
        owners: dict[str, str] = {}
        seen: dict[int, tuple[torch.Tensor, str]] = {}  # holds the tensors, so that no id is reused

        def hook_on(layer: LinearLayer) -> RemovableHandle:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                inputs = args[0] if args else next(iter(kwargs.values()))
                first = seen.setdefault(id(inputs), (inputs, layer.name))[1]
                before = owners.setdefault(layer.name, first)
                if before != first:
                    other = before if before != layer.name else first
                    raise RuntimeError(
                        f"{layer.name} shares its input with {other} in some batches only: leave "
                        f"{layer.name} out with exclude"
                    )
                fired[layer.name] += 1
                if first == layer.name:
                    on_inputs(layer, self.counted[self._batch].rows(layer, inputs))

            return layer.module.register_forward_pre_hook(hook, with_kwargs=True)

        fired = dict.fromkeys((layer.name for layer in layers), 0)
        self._run_batches(map(hook_on, layers), fired, advance=advance, after=seen.clear)
        return owners

    def record_outputs(self, layers: Sequence[LinearLayer], on_outputs: OnOutputs) -> None:
        """Advance through the block, and call ``on_outputs`` with the outputs of its layers.

        It receives the layer, all rows (tokens, neurons) of one batch, and the places of those that
        count (None if all do).

        Raises:
            RuntimeError: a layer did not run once in each batch, or does not have one row for
                each token.
        """
        assert all(layer.block == self.block for layer in layers)
        fired = dict.fromkeys((layer.name for layer in layers), 0)

        def hook_on(layer: LinearLayer) -> RemovableHandle:
            def hook(_: nn.Module, __: Any, outputs: torch.Tensor) -> None:
                fired[layer.name] += 1
                on_outputs(layer, *self.counted[self._batch].rows_and_places(layer, outputs))

            return layer.module.register_forward_hook(hook)

        self._run_batches(map(hook_on, layers), fired, advance=True)

    def advance(self) -> None:
        """Carry the hidden states through the block with its present weights."""
        self._run_batches([], {}, advance=True)

    def _run_batches(
        self,
        hooks: Iterable[RemovableHandle],
        fired: Mapping[str, int],
        *,
        advance: bool,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Run the block on each batch with these hooks, and check ``fired`` at the end.

        ``after`` is called after each batch.
        """
        handles: list[RemovableHandle] = []
        try:
            handles.extend(hooks)
            for number in range(len(self._hidden)):
                self._batch = number
                hidden = self._run(number)
                after()
                if advance:
                    self._keep(number, hidden)
                del hidden  # otherwise the next batch runs while this one's output is in memory
        finally:
            for handle in handles:
                handle.remove()
        check_fired(fired, len(self.counted))
        self.block += advance

    def _run(self, number: int) -> torch.Tensor:
        block = self.blocks[self.block]
        if self._offloaded and self._fetched is not block:
            if self._fetched is not None:
                release_block(self._fetched)
            load_block(block)
            self._fetched = block
        with torch.inference_mode():
            call = self._calls[number][self.block]
            hidden = self._hidden[number]  # copied, since a block may change it in place
            hidden = hidden.to(self._device, copy=True) if self._offloaded else hidden.clone()
            return call(block, hidden)

    def _keep(self, number: int, hidden: torch.Tensor) -> None:
        """Store a batch's new hidden states, in place if possible: new tensors fragment the memory."""
        before, where = self._hidden[number], self._where(hidden)
        with torch.inference_mode():
            if before.device == where and _form(before) == _form(hidden):
                before.copy_(hidden)
            else:
                self._hidden[number] = hidden.to(where, copy=True)

    def _where(self, hidden: torch.Tensor) -> torch.device:
        return torch.device("cpu") if self._offloaded else hidden.device

    def _add_batch(self, batch: Mapping[str, torch.Tensor], skip_first: int) -> None:
        backbone = backbone_of(self.model)
        arguments = {name: value.to(self._device) for name, value in batch.items()}
        self.counted.append(counted_tokens(backbone, (), arguments, skip_first))
        if self._calls:
            before: Sequence[_Call | None] = self._calls[-1]
            calls, hidden = _run_short(backbone, self.blocks, arguments, self._extras)
        else:
            before, self._extras = _run_whole(backbone, self.blocks, arguments)
            calls, hidden = _run_short(backbone, self.blocks, arguments, self._extras)
            changed = [c.block for c, b in zip(calls, before, strict=True) if not c.equals(b)]
            if changed:
                fact = f"the other arguments of block {changed[0]} depend on earlier blocks"
                raise RuntimeError(_NOT_IN_SEQUENCE.format(fact))
        self._calls.append(list(map(_Call.sharing, calls, before)))
        # Copied, since the model may keep a reference to its tensor.
        self._hidden.append(hidden.to(self._where(hidden), copy=True))


def _run_whole(
    backbone: nn.Module, blocks: Sequence[nn.Module], arguments: Mapping[str, torch.Tensor]
) -> tuple[list[_Call], list[int | None]]:
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


def _run_short(
    backbone: nn.Module,
    blocks: Sequence[nn.Module],
    arguments: Mapping[str, torch.Tensor],
    extras: Sequence[int | None],
) -> tuple[list[_Call], torch.Tensor]:
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
) -> tuple[list[_Call], torch.Tensor]:
    """Run a model; return each block's call, and the hidden states before the first block.

    ``output_of`` returns a block's output. Its arguments are the block's index, the block's hidden
    states, and a function that runs the block.

    Raises:
        RuntimeError: the blocks do not run one after the other on hidden states alone.
    """
    calls: list[_Call] = []
    first: torch.Tensor | None = None
    last: torch.Tensor | None = None

    def make(index: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal first, last
            call, hidden = _Call.of(index, args, kwargs)
            if index != len(calls):
                fact = f"block {index} runs where block {len(calls)} is expected"
                raise RuntimeError(_NOT_IN_SEQUENCE.format(fact))
            if first is None:
                first = hidden
            elif not _same(hidden, last):
                fact = f"the model changes the hidden states before block {index}"
                raise RuntimeError(_NOT_IN_SEQUENCE.format(fact))
            output = output_of(index, hidden, lambda: forward(*args, **kwargs))
            # Copied, since code between the blocks may change it in place.
            last = _hidden_of(output, index).clone()
            calls.append(call)
            return output

        return run

    with _replaced(blocks, make):
        backbone(**arguments, use_cache=False)
    if first is None or len(calls) != len(blocks):
        fact = f"only {len(calls)} of {len(blocks)} blocks ran"
        raise RuntimeError(_NOT_IN_SEQUENCE.format(fact))
    return calls, first


@contextmanager
def _replaced(
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
