"""Which layers can be pruned: those that multiply their inputs by a plain weight of their own."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from entangle.model.experts import ExpertLinear
from entangle.model.fused import FusedMatrix
from entangle.model.layers import LinearLayer, is_plain, weight_of


def multiplies(module: nn.Module) -> bool:
    """Return whether a module multiplies its inputs by a weight of its own, and adds its bias.

    A subclass of `nn.Linear` may have another forward, and a weight may be computed from others
    (`torch.nn.utils.parametrize`).
    """
    if isinstance(module, ExpertLinear | FusedMatrix):
        return True
    own = vars(module).get("forward")  # of this module and not of its class, as accelerate sets it
    replaced = own is not None and not hasattr(module, "_hf_hook")
    if module._parameters.get("weight") is None or replaced:
        return False
    if type(module).forward in {nn.Linear.forward, Conv1D.forward}:
        return True
    return isinstance(module, nn.Linear) and _tried(module)


def _tried(module: nn.Linear) -> bool:
    """Return whether a class's forward multiplies by its weight; it is tried on a small weight."""
    weight = torch.arange(15.0).sin().view(5, 3)
    bias = None if module.bias is None else torch.arange(5.0).cos()
    inputs = torch.tensor([1e-3, 1.0, 1e3])[:, None, None] * torch.arange(6.0).cos().view(2, 3)
    trial = copy.copy(module)
    small = {"weight": _constant(weight), "bias": None if bias is None else _constant(bias)}
    vars(trial).update(_parameters=module._parameters | small, in_features=3, out_features=5)
    try:
        with torch.no_grad():
            outputs = type(module).forward(trial, inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError):
        return False
    expected = nn.functional.linear(inputs, weight, bias)
    alike = isinstance(outputs, torch.Tensor) and outputs.shape == expected.shape
    return alike and torch.allclose(outputs.float(), expected, rtol=1e-5, atol=1e-5)


def _constant(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def unprunable_layers(layers: Sequence[LinearLayer]) -> dict[str, str]:
    """Return, by name, why a layer is left as it is when others are pruned.

    Quantised layers are not among them: `check_prunable` refuses these.
    """
    return {
        layer.name: f"its module, {type(layer.module).__name__}, does more than multiply by a weight"
        for layer in layers
        if is_plain(layer.module) and not multiplies(layer.module)
    }


def check_prunable(layers: Sequence[LinearLayer], among: Sequence[LinearLayer] = ()) -> None:
    """Check that the layers have plain weights, and share none with each other or with ``among``.

    Raises:
        ValueError: a layer is quantised or expanded, or shares its weight with another.
    """
    owners: dict[int, list[str]] = {}
    for layer in {*layers, *among}:
        if is_plain(layer.module):
            owners.setdefault(_place(layer), []).append(layer.name)
    for layer in layers:
        if isinstance(layer.module, ExpertLinear):
            raise ValueError(
                f"{layer.name} is already expanded to {len(weight_of(layer))} experts: prune the "
                "dense model, or leave the layer out with exclude"
            )
        if not is_plain(layer.module):
            kind = getattr(getattr(layer.module, "weight", None), "dtype", "no plain weight")
            raise ValueError(
                f"{layer.name} is quantised ({type(layer.module).__name__}, {kind}): load the "
                "model without quantisation, or dequantise it and save it first, or leave the "
                "layer out with exclude"
            )
        others = sorted({*owners[_place(layer)]} - {layer.name})
        if others:
            raise ValueError(
                f"{layer.name} and {others[0]} share one weight, and a shared weight cannot be "
                "pruned: leave both layers out with exclude"
            )


def check_no_trained_experts(layers: Sequence[LinearLayer], action: str) -> None:
    """Check that no layer is of a trained expert, which cannot take an ``action``: "be ...".

    Raises:
        ValueError: one is.
    """
    trained = [layer for layer in layers if isinstance(layer.module, FusedMatrix)]
    if trained:
        raise ValueError(
            f"{trained[0].name} is of a trained expert, which cannot {action}: leave trained experts "
            f"out with exclude '*.{trained[0].role.rsplit('.', 2)[0]}.*'"
        )


def _place(layer: LinearLayer) -> int:
    weight = layer.module.weight
    assert isinstance(weight, torch.Tensor)
    if weight.is_meta:  # the weight of a trained expert is a new view each time
        return id(layer.module if isinstance(layer.module, FusedMatrix) else weight)
    return weight.data_ptr()
