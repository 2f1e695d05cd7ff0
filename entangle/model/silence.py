"""A model whose layers are silent, but for what a trial lets them say.

Each state is a window of one token, so no token sees another. No recording counts such a run.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from entangle.model.calls import (
    BlockCall,
    Forward,
    hidden_of,
    replaced_forwards,
    run_short,
    run_whole,
)
from entangle.model.hooks import backbone_of, check_hooks, on_trial
from entangle.model.layers import LinearLayer, find_blocks
from entangle.model.placing import input_device
from entangle.model.sides import inputs_among


@dataclasses.dataclass(frozen=True, eq=False)
class Heard:
    """What was heard of a pass of the model with silenced layers."""

    inputs: dict[str, torch.Tensor]  # of each layer that ran once, (states, inputs)
    blocks: dict[int, torch.Tensor]  # the outputs of each block that ran, (states, width)
    embedded: torch.Tensor  # the states before the first block
    tokens: torch.Tensor  # (states,)


@dataclasses.dataclass(frozen=True, eq=False)
class SilencedModel:
    """A model whose layers can be silenced; only the blocks of some layers run."""

    model: PreTrainedModel
    layers: Sequence[LinearLayer]
    blocks: Sequence[nn.Module]  # all
    width: int  # numbers of the stream for a token
    extras: Sequence[int | None]  # of each block (see `calls.run_whole`)

    @classmethod
    def of(cls, model: PreTrainedModel, layers: Sequence[LinearLayer]) -> Self:
        """Run the model as it is on one token, to see the form of its blocks' outputs.

        Raises:
            RuntimeError: the blocks do not run one after the other on hidden states alone.
            ValueError: the model is compiled or not loaded, has no list of blocks, or has not one
                hidden state for each token.
        """
        check_hooks(model, 0)
        blocks = list(find_blocks(model)[1])
        arguments = {"input_ids": _tokens(model, 1)}
        with on_trial(model), torch.inference_mode():
            _, extras = run_whole(backbone_of(model), blocks, arguments)
            hidden = run_short(backbone_of(model), blocks, arguments, extras)[1]
        if hidden.numel() != hidden.shape[-1]:
            raise ValueError(
                "the blocks of this model have several hidden states for a token "
                f"({' x '.join(map(str, hidden.shape))} numbers), and what layers read and write is known "
                "of one alone: its neurons have no words"
            )
        return cls(model, layers, blocks, hidden.shape[-1], extras)

    def run(self, states: torch.Tensor, said: Mapping[str, torch.Tensor]) -> Heard:
        """Run the model with these states before each block, and behind the last one.

        All layers are silent but those in ``said``, which has their outputs (states, neurons).
        """
        heard: dict[str, list[Any]] = {}
        outputs: dict[int, torch.Tensor] = {}
        embedded: list[torch.Tensor] = []
        count, busy = len(states), {layer.block for layer in self.layers}

        def hearing(name: str) -> Callable[..., None]:
            def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                heard.setdefault(name, []).append(_rows(inputs_among(args, kwargs), count))

            return hear

        def make(index: int, forward: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                hidden, extra = BlockCall.of(index, args, kwargs)[1], self.extras[index]
                embedded.append(hidden)
                given = states.to(hidden).view_as(hidden)
                if index in busy:
                    first = (given.clone(), *args[1:]) if args else ()
                    named = {} if args else {"hidden_states": given.clone()}
                    output = forward(*first, **kwargs | named)
                    outputs[index] = _rows(hidden_of(output, index), count)
                return given if extra is None else (given, *(None,) * extra)

            return run

        tokens, head = _tokens(self.model, count), self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        others = _others([self.blocks[index] for index in busy], self.layers)
        saying = {layer.module: said.get(layer.name) for layer in self.layers}
        saying |= dict.fromkeys(others if head is None else [*others, head])
        with (
            on_trial(self.model),
            torch.inference_mode(),
            replaced_forwards(self.blocks, make),
        ):
            for module, values in saying.items():
                module.forward = _saying(module, values)  # removed by on_trial
            for layer in self.layers:
                layer.module.register_forward_pre_hook(hearing(layer.name), with_kwargs=True)
            if head is not None:
                head.register_forward_pre_hook(hearing(""), with_kwargs=True)
            self.model(input_ids=tokens, use_cache=False)
        once = {name: rows[0] for name, rows in heard.items() if len(rows) == 1}
        once = {name: rows for name, rows in once.items() if rows is not None}
        return Heard(once, outputs, _rows(embedded[0], count), tokens[:, 0].cpu())


def _saying(module: nn.Module, said: torch.Tensor | None) -> Callable[..., Any]:
    """Return a forward of a module that returns these outputs (states, neurons), or zeros."""
    own, plain = module.forward, type(module) in {nn.Linear, Conv1D}

    def say(*args: Any, **kwargs: Any) -> Any:
        if plain:  # without a product
            inputs, known = inputs_among(args, kwargs), vars(module)
            neurons = known["nf"] if isinstance(module, Conv1D) else known["out_features"]
            output: Any = inputs.new_zeros(*inputs.shape[:-1], neurons)
        else:
            output = own(*args, **kwargs)
        if isinstance(output, torch.Tensor) and said is not None:
            return said.to(output).view_as(output) if said.numel() == output.numel() else output
        return _pytree.tree_map_only(torch.Tensor, torch.zeros_like, output)

    return say


def _rows(values: Any, states: int) -> Any:
    """Return values as rows (states, width) on the CPU, or None if they are not."""
    if not isinstance(values, torch.Tensor) or values.numel() != states * values.shape[-1]:
        return None
    return values.detach().reshape(states, -1).cpu().clone()


def _others(blocks: Sequence[nn.Module], layers: Sequence[LinearLayer]) -> list[nn.Module]:
    """Return the modules that have weights of their own and are no layers, such as fused experts."""
    linear = {layer.module for layer in layers}
    return [
        module
        for block in blocks
        for module in block.modules()
        if any(p.ndim > 1 for p in module.parameters(recurse=False))
        and not linear.intersection(module.modules())
    ]


def _tokens(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Return windows (count, 1) of a token each, from all over the vocabulary."""
    vocabulary = len(model.get_input_embeddings().get_parameter("weight"))
    tokens = torch.arange(1, count + 1) * vocabulary // (count + 2)
    return tokens[:, None].to(input_device(model))
