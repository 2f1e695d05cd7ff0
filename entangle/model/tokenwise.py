"""Which layers of a block work on each token alone: those of the MLP, and not those of attention.

Names differ between architectures, so a trial finds the parts of a block that mix tokens: a part
mixes them if its output at other tokens changes with its input at the first token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from transformers import PreTrainedModel

from entangle.model.fused import FusedMatrix
from entangle.model.hooks import backbone_of, on_trial
from entangle.model.layers import LinearLayer
from entangle.model.placing import input_device

TOKENS = 8  # in a longer window one token changes the other outputs less
# Of the change at the first token. Others do not change in a part that does not mix tokens, except
# by rounding where it sorts tokens by expert. Attention changed them by 0.02 and more.
MIXED = 2e-3

_Call = tuple[tuple[Any, ...], Mapping[str, Any], torch.Tensor]  # arguments and output of a part


def layers_of_tokens(model: PreTrainedModel, layers: Sequence[LinearLayer]) -> list[LinearLayer]:
    """Return the layers that are in no part of their block that mixes tokens.

    A part is the largest module below the block that has the layer in it and runs as a whole. The
    model runs on a few tokens from all over its vocabulary, since equal tokens would tell little of
    attention, and its parts run once more. Layers that do not run are left out, and
    so are the matrices of trained experts. No recording counts these runs.
    """
    layers = [layer for layer in layers if not isinstance(layer.module, FusedMatrix)]
    prefixes = {layer.name: _below_block(layer) for layer in layers}
    calls: dict[str, _Call] = {}
    with on_trial(model), torch.inference_mode():
        for name in {name for names in prefixes.values() for name in names}:
            _record(model.get_submodule(name), name, calls)  # on_trial removes the hooks
        vocabulary = len(model.get_input_embeddings().get_parameter("weight"))
        tokens = torch.arange(1, TOKENS + 1) * vocabulary // (TOKENS + 2)
        backbone_of(model)(input_ids=tokens[None].to(input_device(model)), use_cache=False)
        found = {
            name: [part for part in names if part in calls] for name, names in prefixes.items()
        }
        parts = {name: ran[0] for name, ran in found.items() if ran}
        mixing = {
            part: _mixes(model.get_submodule(part), *calls[part]) for part in {*parts.values()}
        }
    return [one for one in layers if one.name in parts and not mixing[parts[one.name]]]


def _below_block(layer: LinearLayer) -> list[str]:
    """Return the names of the modules below the block that have the layer in them, largest first."""
    steps = layer.role.split(".")
    block = layer.name.removesuffix(layer.role)
    return [block + ".".join(steps[: count + 1]) for count in range(len(steps))]


def _record(part: nn.Module, name: str, calls: dict[str, _Call]) -> None:
    """Record a part's first call, with copies of all tensors, since a model may change them."""
    arguments: list[Any] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments[:] = _pytree.tree_map(_copy, (args, kwargs))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        if name not in calls:
            calls[name] = (*arguments, _rows(output).clone())

    part.register_forward_pre_hook(before, with_kwargs=True)
    part.register_forward_hook(after)


def _mixes(
    part: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: torch.Tensor
) -> bool:
    """Return whether a part's output (tokens, width) at other tokens depends on its first token."""
    leaves, form = _pytree.tree_flatten((args, kwargs))
    rows = next(one for one in leaves if _is_rows(one))
    first = rows.view(-1, rows.shape[-1])[0]
    first.copy_(1 - first)
    args, kwargs = _pytree.tree_unflatten(leaves, form)
    change = (_rows(part(*args, **kwargs)).float() - output.float()).norm(dim=1)
    return bool(change[1:].max() > MIXED * change[0])


def _rows(output: Any) -> torch.Tensor:
    rows: torch.Tensor = next(one for one in _pytree.tree_leaves(output) if _is_rows(one))
    return rows.reshape(-1, rows.shape[-1])


def _is_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone(memory_format=torch.contiguous_format)
    return value
