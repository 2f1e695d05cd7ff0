"""A walk through a model block by block.

Each batch runs through the model once without its blocks, which records the blocks' calls (see
`calls`). The first batch also runs through the whole model: if the arguments of a block differ
there, they depend on earlier blocks, and an error is raised.

Memory holds the hidden states of all batches, and one batch in one block. If the model's weights
are in files (see `placing`), one block is on the device, and the hidden states are on the host.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from entangle.model.calls import NOT_IN_SEQUENCE, BlockCall, run_short, run_whole
from entangle.model.eager import heard
from entangle.model.fused import FusedMatrix
from entangle.model.hooks import (
    CountedTokens,
    OnRecorded,
    OnRows,
    backbone_of,
    check_fired,
    check_hooks,
    counted_tokens,
    first_tokens,
)
from entangle.model.layers import LinearLayer, find_blocks
from entangle.model.placing import input_device, is_offloaded, load_block, release_block
from entangle.model.sides import Recordable, inputs_among, layer_of, listen
from entangle.model.sparse_inputs import first_tokens_are


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


class BlockWalk:
    """The hidden states of all batches, carried through a model's blocks one block at a time.

    ``block`` is the index of the block that runs next. `record_rows` records outputs and inputs of its layers
    and advances; `record_inputs` records inputs, once where layers share them. `advance` carries the
    hidden states through it. The weights of the block may change between `record_inputs` and `advance`.
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
        self.first: list[torch.Tensor] = []  # per batch, which begin a window (`first_tokens`)
        self._batch = 0  # the number of the running batch
        self._hidden: list[torch.Tensor] = []
        self._calls: list[list[BlockCall]] = []  # per batch, per block
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
    def running(self) -> CountedTokens:
        """The tokens of the batch that runs."""
        return self.counted[self._batch]

    @property
    def tokens(self) -> int:
        """The number of counted tokens in all batches."""
        return sum(batch.counted for batch in self.counted)

    @property
    def done(self) -> bool:
        """Whether all blocks have run."""
        return self.block == len(self.blocks)

    @property
    def hidden(self) -> list[torch.Tensor]:
        """The hidden states of each batch (windows, length, width) before the block."""
        return self._hidden

    def go_on(self, block: int, hidden: Sequence[torch.Tensor]) -> None:
        """Go on before this block, with hidden states that another walk of the batches had there."""
        for number, states in enumerate(hidden):
            self._keep(number, states.to(self._hidden[number].device))
        self.block = block

    def run_with(self, number: int, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the block on one batch, with these tensors in place of its parameters of these names.

        Outside inference mode autograd follows the weights to the outputs (windows, length, width),
        and nothing else.
        """
        block = self.fetch()
        stored = itertools.chain(block.named_parameters(), block.named_buffers())
        tensors = {name: tensor.detach() for name, tensor in stored} | dict(weights)

        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(block, tensors, args, kwargs)

        # Copies, since autograd cannot use tensors of inference mode.
        with first_tokens_are(block, self.first[number].clone()):
            return self._calls[number][self.block].copied()(run, self._copied(number))

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
        seen: dict[
            int | str, tuple[torch.Tensor, str]
        ] = {}  # holds the tensors, so that no id is reused

        def hook_on(layer: LinearLayer) -> RemovableHandle:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                inputs = inputs_among(args, kwargs)
                fired[layer.name] += 1
                # A trained expert may have no rows in a batch, so it is said to share none.
                own = isinstance(layer.module, FusedMatrix)
                key = layer.name if own else id(inputs)
                first = seen.setdefault(key, (inputs, layer.name))[1]
                before = owners.setdefault(layer.name, first)
                if before != first:
                    other = before if before != layer.name else first
                    raise RuntimeError(
                        f"{layer.name} shares its input with {other} in some batches only: leave "
                        f"{layer.name} out with exclude"
                    )
                if first == layer.name:
                    on_inputs(layer, self.running.rows(layer, inputs))

            return layer.module.register_forward_pre_hook(hook, with_kwargs=True)

        fired = dict.fromkeys((layer.name for layer in layers), 0)
        self._run_batches(layers, map(hook_on, layers), fired, advance=advance, after=seen.clear)
        return owners

    def record_rows(self, layers: Sequence[Recordable], on_rows: OnRecorded) -> None:
        """Advance through the block, and call ``on_rows`` with outputs or inputs of its layers.

        It receives the layer, all rows (tokens, neurons) of one batch, and the places of those that
        count (None if all do).

        Raises:
            RuntimeError: a layer did not run once in each batch, or does not have one row for
                each token.
        """
        assert all(layer.block == self.block for layer in layers)
        fired = dict.fromkeys((layer.name for layer in layers), 0)

        def hook_on(layer: Recordable) -> RemovableHandle:
            def hear(values: torch.Tensor) -> None:
                fired[layer.name] += 1
                on_rows(layer, *self.running.rows_and_places(layer, values))

            return listen(layer, hear)

        self._run_batches(layers, map(hook_on, layers), fired, advance=True)

    def advance(self) -> None:
        """Carry the hidden states through the block with its present weights."""
        self._run_batches([], [], {}, advance=True)

    def _run_batches(
        self,
        layers: Sequence[Recordable],
        hooks: Iterable[RemovableHandle],
        fired: Mapping[str, int],
        *,
        advance: bool,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Run the block on each batch with these hooks on layers, and check ``fired`` at the end.

        ``after`` is called after each batch.
        """
        handles: list[RemovableHandle] = []
        try:
            handles.extend(hooks)
            with heard(layer_of(layer).module for layer in layers):
                for number in range(len(self._hidden)):
                    self._batch = number
                    hidden = self.run(number)
                    after()
                    if advance:
                        self._keep(number, hidden)
                    del hidden  # otherwise the next batch runs while this one's output is in memory
        finally:
            for handle in handles:
                handle.remove()
        check_fired(fired, len(self.counted))
        self.block += advance

    def run(self, number: int) -> torch.Tensor:
        """Return the block's outputs (windows, length, width) on one batch."""
        block = self.fetch()  # outside inference mode, since its weights are changed there
        with torch.inference_mode(), first_tokens_are(block, self.first[number]):
            return self._calls[number][self.block](block, self._copied(number))

    def fetch(self) -> nn.Module:
        """Return the block; if the model is offloaded, read its weights in place of the last one's."""
        block = self.blocks[self.block]
        if self._offloaded and self._fetched is not block:
            if self._fetched is not None:
                release_block(self._fetched)
            load_block(block)
            self._fetched = block
        return block

    def _copied(self, number: int) -> torch.Tensor:
        """Return a batch's hidden states, copied, since a block may change them in place."""
        hidden = self._hidden[number]
        return hidden.to(self._device, copy=True) if self._offloaded else hidden.clone()

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
        self.first.append(first_tokens(backbone, (), arguments))
        if self._calls:
            before: Sequence[BlockCall | None] = self._calls[-1]
            calls, hidden = run_short(backbone, self.blocks, arguments, self._extras)
        else:
            before, self._extras = run_whole(backbone, self.blocks, arguments)
            calls, hidden = run_short(backbone, self.blocks, arguments, self._extras)
            changed = [c.block for c, b in zip(calls, before, strict=True) if not c.equals(b)]
            if changed:
                fact = f"the other arguments of block {changed[0]} depend on earlier blocks"
                raise RuntimeError(NOT_IN_SEQUENCE.format(fact))
        self._calls.append(list(map(BlockCall.sharing, calls, before)))
        # Copied, since the model may keep a reference to its tensor.
        self._hidden.append(hidden.to(self._where(hidden), copy=True))
