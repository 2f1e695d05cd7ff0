"""The linear layers of any causal language model, found by structure and not by name.

Here a weight is always ``(neurons, inputs)``, however the module stores it, and that of an expanded
layer is ``(experts, neurons, inputs)``. Outputs are ``(tokens, neurons)``.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from entangle.model.experts import ExpertLinear, PackedLinear

if TYPE_CHECKING:  # the import takes seconds, and some commands need no model
    from transformers import PreTrainedModel

_LINEAR = (nn.Linear, Conv1D, ExpertLinear)


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """One linear layer inside a transformer block."""

    name: str  # dotted name in the model: model.layers.5.mlp.up_proj
    block: int
    role: str  # dotted name in the block: mlp.up_proj
    module: nn.Module = dataclasses.field(repr=False, compare=False)

    @property
    def neurons(self) -> int:
        """The number of outputs."""
        return weight_of(self).shape[-2]

    @property
    def inputs(self) -> int:
        """The number of inputs."""
        return weight_of(self).shape[-1]


def weight_of(layer: LinearLayer) -> torch.Tensor:
    """Return a view of the layer's weight as ``(neurons, inputs)``; GPT-2's Conv1D is transposed.

    The weight of an expanded layer is ``(experts, neurons, inputs)``.
    """
    weight = layer.module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().T if isinstance(layer.module, Conv1D) else weight.detach()


def write_weight(layer: LinearLayer, weight: torch.Tensor) -> None:
    """Write a weight ``(neurons, inputs)`` into the layer, in place."""
    weight_of(layer).copy_(weight)


def replace_layer(model: "PreTrainedModel", layer: LinearLayer, module: nn.Module) -> LinearLayer:
    """Replace the layer's module in the model, and return the new layer."""
    parent, _, leaf = layer.name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
    return dataclasses.replace(layer, module=module)


def check_prunable(layers: Sequence[LinearLayer], among: Sequence[LinearLayer] = ()) -> None:
    """Check that the layers have plain weights, and share none with each other or with ``among``.

    Raises:
        ValueError: a layer is quantised or expanded, or shares its weight with another.
    """
    owners: dict[int, list[str]] = {}
    for layer in {*layers, *among}:
        weight = layer.module.weight
        assert isinstance(weight, torch.Tensor)
        owners.setdefault(_place(weight), []).append(layer.name)
    for layer in layers:
        weight = layer.module.weight
        assert isinstance(weight, torch.Tensor)
        if isinstance(layer.module, ExpertLinear):
            raise ValueError(
                f"{layer.name} is already expanded to {len(weight)} experts: prune the dense "
                "model, or leave the layer out with a narrower pattern"
            )
        plain = type(weight) in {nn.Parameter, torch.Tensor} and weight.is_floating_point()
        if not plain or weight.element_size() < 2:
            raise ValueError(
                f"{layer.name} is quantised ({type(layer.module).__name__}, {weight.dtype}): load "
                "the model without quantisation, or leave the layer out with a narrower pattern"
            )
        others = sorted({*owners[_place(weight)]} - {layer.name})
        if others:
            raise ValueError(
                f"{layer.name} and {others[0]} share one weight, and a shared weight cannot be "
                "pruned: leave both layers out with a narrower pattern"
            )


def _place(weight: torch.Tensor) -> int:
    return id(weight) if weight.is_meta else weight.data_ptr()


def find_blocks(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """Return the dotted name and the list of the model's transformer blocks.

    Raises:
        ValueError: the model is packed, has no configuration (a wrapper such as DataParallel), or
            has no list of as many modules with linear layers as ``num_hidden_layers``.
    """
    if not hasattr(model, "config"):
        raise ValueError(
            f"expected a model of transformers, got {type(model).__name__}: pass the transformers "
            "model that it wraps"
        )
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError(
            "the model's layers are packed, and a packed model can only run: load it with "
            "packed=False to measure, prune or save it"
        )
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    # Only the text decoder is searched: a vision encoder may have as many blocks.
    inside = {id(module) for module in decoder_of(model).modules()}
    for name, module in model.named_modules():
        blocks = isinstance(module, nn.ModuleList) and id(module) in inside
        if blocks and len(module) == count and _has_linears(module):
            return name, module
    raise ValueError(
        f"found no list of {count} transformer blocks (num_hidden_layers) in "
        f"{type(model).__name__}: give a causal language model of transformers"
    )


def decoder_of(model: "PreTrainedModel") -> nn.Module:
    """Return the text decoder of the model, which contains its blocks."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    return decoder


def _has_linears(blocks: nn.ModuleList) -> bool:
    return all(any(isinstance(m, _LINEAR) for m in b.modules()) for b in blocks)


def find_layers(model: "PreTrainedModel", patterns: Sequence[str] = ("*",)) -> list[LinearLayer]:
    """Return the linear layers in the model's blocks that match any pattern, in model order.

    A pattern is a layer's exact name or a shell pattern such as ``*.mlp.up_proj``. The output
    embedding is outside the blocks, so it is not a layer.

    Raises:
        LookupError: a pattern matches no layer; the message names near matches.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    layers = list(_walk(model))
    names = [layer.name for layer in layers]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise LookupError(_no_match(pattern, layers))
    return [layer for layer in layers if any(fnmatch.fnmatchcase(layer.name, p) for p in patterns)]


def _walk(model: "PreTrainedModel") -> Iterator[LinearLayer]:
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        for role, module in block.named_modules():
            if isinstance(module, _LINEAR):
                yield LinearLayer(f"{prefix}.{index}.{role}", index, role, module)


def _no_match(pattern: str, layers: Sequence[LinearLayer]) -> str:
    roles = sorted({layer.role for layer in layers})
    candidates = [layer.name for layer in layers] + [f"*.{role}" for role in roles]
    near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.5)
    hint = f"near matches: {', '.join(near)}; " if near else ""
    return (
        f"no layer matches {pattern!r}; {hint}layers are named like {layers[0].name}, "
        f"with the roles {', '.join(roles)}"
    )


def skipped_parameters(model: "PreTrainedModel") -> list[str]:
    """Return the names of parameters in the blocks that belong to no layer, such as fused experts.

    Only parameters of two or more dimensions are listed. Commands that measure or prune print them,
    so that nothing is skipped silently.
    """
    prefix, blocks = find_blocks(model)
    linear = {id(p) for layer in _walk(model) for p in layer.module.parameters()}
    return [
        f"{prefix}.{name}"
        for name, parameter in blocks.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in linear
    ]


@contextmanager
def naming(layer: LinearLayer) -> Iterator[None]:
    """Prefix the message of a ValueError with the layer's name.

    Raises:
        ValueError: the body raised one.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from error
