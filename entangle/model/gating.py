"""Gated MLPs of any architecture: which layers multiply their outputs, found by a trial.

Two layers of a block receive the same input. Their outputs, one of them after an activation, are
multiplied element by element, and the product is the input of a third layer. Names tell nothing.
"""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from entangle.model.hooks import backbone_of, on_trial
from entangle.model.layers import LinearLayer, find_layers
from entangle.model.placing import input_device
from entangle.model.sides import LayerInputs, by_block, inputs_among, listen

TOKENS = 16  # from all over the vocabulary
_ELEMENTS = 0.99  # of the elements must fit: the smallest of a short dtype are rounded to zero


@dataclasses.dataclass(frozen=True)
class GatedLayers:
    """The layers of a gated MLP: the inputs of ``down`` are act(gate) · up."""

    gate: LinearLayer
    up: LinearLayer
    down: LinearLayer

    @property
    def products(self) -> LayerInputs:
        """What `measure --input-layers` measures of ``down``."""
        return LayerInputs(self.down)


def find_gated(model: PreTrainedModel, blocks: Collection[int] | None = None) -> list[GatedLayers]:
    """Return the gated MLPs of a model, or of some of its blocks, at most one of each block.

    A first run tells which layers receive the same input. Then, for each choice of a gate, an up and
    a down layer, the gate's outputs are made the same for half of the tokens, and for the other half
    another vector: the inputs of ``down`` must be the outputs of ``up`` times a vector that is the
    same within either half. Without an activation both layers are alike, and the first is the gate.
    Experts that see only some of the tokens are left out, and so is a layer that makes both halves
    at once. No recording counts these runs.
    """
    if blocks is not None and not blocks:
        return []
    layers = [one for one in find_layers(model) if blocks is None or one.block in blocks]
    choices = _choices(model, layers)
    found: dict[int, GatedLayers] = {}
    while any(choices.values()):
        tried = {block: left.pop(0) for block, left in choices.items() if left}
        found |= {block: tried[block] for block in _that_multiply(model, tried)}
        choices = {block: left for block, left in choices.items() if block not in found}
    return [found[block] for block in sorted(found)]


def _choices(model: PreTrainedModel, layers: Sequence[LinearLayer]) -> dict[int, list[GatedLayers]]:
    """Return, for each block, those of its layers whose sizes and inputs allow a gated MLP."""
    heard: dict[str, list[Any]] = {}

    def hear(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        heard.setdefault(names[module], []).append((inputs_among(args, kwargs), outputs))

    names = {layer.module: layer.name for layer in layers}
    with on_trial(model), torch.inference_mode():
        for layer in layers:
            layer.module.register_forward_hook(hear, with_kwargs=True)
        _run(model)
    received = {}
    for layer in layers:
        if len(heard.get(layer.name, ())) == 1:
            inputs, outputs = heard[layer.name][0]
            if _has_rows(inputs, layer.inputs) and _has_rows(outputs, layer.neurons):
                received[layer.name] = inputs
    choices = {}
    for block, some in by_block(one for one in layers if one.name in received).items():
        choices[block] = [
            GatedLayers(gate, up, down)
            for gate, up in itertools.permutations(some, 2)
            if received[gate.name] is received[up.name] and gate.neurons == up.neurons
            for down in some
            if down.inputs == up.neurons and received[down.name] is not received[up.name]
        ]
    return choices


def _that_multiply(model: PreTrainedModel, tried: dict[int, GatedLayers]) -> list[int]:
    """Return the blocks whose layers are a gated MLP."""
    ups: dict[int, torch.Tensor] = {}
    products: dict[int, torch.Tensor] = {}
    with on_trial(model), torch.inference_mode():
        for block, one in tried.items():
            one.gate.module.register_forward_hook(_halved)
            listen(one.up, functools.partial(_keep, ups, block))
            listen(one.products, functools.partial(_keep, products, block))
        _run(model)
    return [block for block, up in ups.items() if _multiplied(up, products[block])]


def _keep(kept: dict[int, torch.Tensor], block: int, rows: torch.Tensor) -> None:
    kept[block] = rows.clone()


def _halved(_: nn.Module, __: Any, outputs: torch.Tensor) -> torch.Tensor:
    """Give either half of the tokens the outputs of its first token."""
    rows = outputs.reshape(TOKENS, -1)
    half = TOKENS // 2
    return rows[[0] * half + [half] * half].reshape(outputs.shape)


def _multiplied(up: torch.Tensor, products: torch.Tensor) -> bool:
    """Return whether products are outputs times a vector for either half, and another for each."""
    tolerance = 8 * torch.finfo(products.dtype).eps
    up, products = (rows.reshape(TOKENS, -1).double() for rows in (up, products))
    half = TOKENS // 2

    def fit(first: int, others: slice) -> float:
        """Return the share of elements with the first token's factor; of zeros it is unknown."""
        one, other = products[first] * up[others], products[others] * up[first]
        known = (one != 0) | (other != 0)
        alike = (one - other).abs() <= tolerance * (one.abs() + other.abs())
        return float(alike[known].double().mean()) if known.any() else 0.0

    within = min(fit(0, slice(1, half)), fit(half, slice(half + 1, None)))
    return within >= _ELEMENTS and fit(0, slice(half, None)) < _ELEMENTS


def _run(model: PreTrainedModel) -> None:
    vocabulary = len(model.get_input_embeddings().get_parameter("weight"))
    tokens = torch.arange(1, TOKENS + 1) * vocabulary // (TOKENS + 2)
    backbone_of(model)(input_ids=tokens[None].to(input_device(model)), use_cache=False)


def _has_rows(values: Any, width: int) -> bool:
    return isinstance(values, torch.Tensor) and values.numel() == TOKENS * width
