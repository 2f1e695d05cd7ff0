"""The logits of a model on windows, made again from its hidden states behind the last block.

Logits are too large to keep: a token of SmolLM2 has 49,152 of them, but a hidden state of 576
numbers. What follows the last block (in most models a norm and the output embedding) is run by the
model itself, with its blocks left out, so that no architecture needs code of its own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from entangle.model import ranks
from entangle.model.calls import BlockCall, Forward, hidden_of, replaced_forwards
from entangle.model.layers import find_blocks
from entangle.model.placing import input_device
from entangle.model.progress import progress_bar
from entangle.model.text import TokenWindows


@dataclasses.dataclass(frozen=True, eq=False)
class KeptLogits:
    """The logits of a model, as `keep_logits` found it: its blocks may change afterwards."""

    model: PreTrainedModel
    blocks: list[nn.Module]
    extras: list[int | None]  # of each block: how many items its output has besides; None: no tuple
    batches: Sequence[torch.Tensor]  # of tokens
    hidden: dict[int, tuple[torch.Tensor, torch.device]]  # on the host, and the device they were on

    def of_batch(self, number: int) -> torch.Tensor:
        """Return the logits (windows, length, vocabulary) of a batch, with the bits of the model's."""

        def output_of(index: int, hidden: torch.Tensor, _: Callable[[], Any]) -> Any:
            if index == len(self.blocks) - 1:
                kept, device = self.hidden[number]
                # Copied, since what follows may change it in place.
                hidden = kept.to(device, copy=True)
            extra = self.extras[index]
            return hidden if extra is None else (hidden, *(None,) * extra)

        return _logits(self, number, output_of)

    def of_windows(self, windows: torch.Tensor, batch_size: int) -> "KeptLogits":
        """Return the logits of some of the windows, by their places (windows,), in other batches.

        Batches of another size are rounded otherwise. The process must have all batches.
        """
        ordered = [self.hidden[number] for number in range(len(self.batches))]
        tokens = torch.cat([*self.batches])[windows].split(batch_size)
        states = torch.cat([states for states, _ in ordered])[windows].split(batch_size)
        hidden = {number: (part, ordered[0][1]) for number, part in enumerate(states)}
        return dataclasses.replace(self, batches=tokens, hidden=hidden)


def keep_logits(
    model: PreTrainedModel, windows: TokenWindows, *, batch_size: int, progress: bool | None = None
) -> KeptLogits | None:
    """Run a model once, and keep its hidden states behind the last block, on the host.

    Under torchrun each process keeps those of its own batches. The logits of its first batch are made
    again on trial; return None if their bits differ from the model's own on any process.

    Raises:
        ValueError: the model has no list of blocks.
    """
    batches = windows.batches(batch_size)
    kept = KeptLogits(model, list(find_blocks(model)[1]), [], batches, {})
    same = True
    with (
        torch.inference_mode(),
        progress_bar(total=windows.tokens.numel(), unit="token", shown=progress) as bar,
    ):
        for number in ranks.shard().batches(len(batches)):
            if not kept.hidden:
                same = _remade(kept, number)
                if not same:
                    break
            else:
                _keep(kept, number)
            bar.update(batches[number].numel())
    return kept if all(ranks.all_gather(same)) else None


def _remade(kept: KeptLogits, number: int) -> bool:
    """Keep a batch; return whether its logits can be made again with the same bits.

    Raises:
        OutOfMemoryError: the device has too little memory.
    """
    try:
        logits = _keep(kept, number)
        return torch.equal(kept.of_batch(number), logits)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False  # what fails in any run of the model fails again when it is scored


def _keep(kept: KeptLogits, number: int) -> torch.Tensor:
    """Run the model on a batch and keep its hidden states; return its logits."""
    kept.extras.clear()

    def output_of(index: int, _: torch.Tensor, call: Callable[[], Any]) -> Any:
        output = call()
        kept.extras.append(None if isinstance(output, torch.Tensor) else len(output) - 1)
        if index == len(kept.blocks) - 1:
            states = hidden_of(output, index)
            kept.hidden[number] = states.to("cpu", copy=True), states.device
        return output

    return _logits(kept, number, output_of)


def _logits(
    kept: KeptLogits,
    number: int,
    output_of: Callable[[int, torch.Tensor, Callable[[], Any]], Any],
) -> torch.Tensor:
    """Run the model on a batch, with outputs of its blocks that ``output_of`` returns (see `calls`)."""

    def make(index: int, forward: Forward) -> Forward:
        def run(*args: Any, **kwargs: Any) -> Any:
            _, hidden = BlockCall.of(index, args, kwargs)
            return output_of(index, hidden, lambda: forward(*args, **kwargs))

        return run

    tokens = kept.batches[number].to(input_device(kept.model))
    with replaced_forwards(kept.blocks, make):
        logits: torch.Tensor = kept.model(input_ids=tokens, use_cache=False).logits
    return logits
