"""Holding one neuron at a value, or scaling it, while a model runs."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from entangle.model.eager import heard
from entangle.model.fused import FusedMatrix
from entangle.model.hooks import check_hooks, unheard_layers
from entangle.model.layers import linear_layers, trained_experts
from entangle.model.patterns import INPUT
from entangle.model.sides import LayerInputs, Recordable, find_channel, inputs_among, layer_of

KINDS = ("zero", "mean", "quantile:Q", "scale:X")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a neuron is set to."""

    kind: str  # zero, mean, quantile or scale
    number: float = 0.0  # of quantile and scale

    @classmethod
    def of(cls, text: str) -> Self:
        """Read zero, mean, quantile:Q with Q from 0 to 1, or scale:X with a finite X other than 1.

        Raises:
            ValueError: the text is none of these.
        """
        kind, _, number = text.partition(":")
        if text in {"zero", "mean"}:
            return cls(kind)
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if kind == "quantile" and 0 <= value <= 1:
            return cls(kind, value)
        if kind == "scale" and math.isfinite(value) and value != 1:
            return cls(kind, value)
        why = "; a scale of 1 changes nothing" if kind == "scale" and value == 1 else ""
        raise ValueError(
            f"expected a setting such as zero, mean, quantile:0.99 or scale:2, got {text!r}: Q of "
            f"quantile:Q is from 0 to 1, and X of scale:X any number but 1{why}"
        )

    def __str__(self) -> str:
        """Return the text that `of` reads."""
        return f"{self.kind}:{self.number:g}" if self.kind in {"quantile", "scale"} else self.kind


def find_steerable(model: PreTrainedModel, neuron: str) -> tuple[Recordable, int]:
    """Return the layer, or its inputs, and the index of a neuron that can be steered.

    The model may be packed or expanded, and the neuron that of a trained expert. The model runs once
    on a few tokens, and no recording counts this.

    Raises:
        LookupError: the model has no such neuron.
        ValueError: the model is compiled or not loaded; or the layer does not run once in a forward
            pass, or not on each token, so that a hook would change nothing or only a part.
    """
    check_hooks(model, 0)
    layers = linear_layers(model)
    if neuron.rpartition(":")[0].removesuffix(INPUT) not in {layer.name for layer in layers}:
        layers += trained_experts(model)
    one, index = find_channel(layers, neuron)
    vocabulary = len(model.get_input_embeddings().get_parameter("weight"))
    tokens = torch.arange(1, 9)[None] * vocabulary // 10
    reasons = unheard_layers(model, [one], tokens)
    if reasons:
        raise ValueError(f"{neuron} cannot be steered: {reasons[one.name]}")
    return one, index


@contextmanager
def changed(one: Recordable, index: int, *, scale: float, value: float) -> Iterator[None]:
    """Replace a neuron's output, or an input channel, by ``scale`` times it plus ``value``.

    An input channel is changed for this layer alone, also where others receive the same inputs, and
    after a rule for sparse inputs. A trained expert's neuron is changed at the expert's own tokens; a
    recording of this expert that begins inside hears its outputs unchanged.
    """

    def change(values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[..., index] = values[..., index] * scale + value if scale else value
        return values

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        new = change(inputs_among(args, kwargs))
        if isinstance(module, FusedMatrix):  # without the outputs, so that it computes them
            return (new,), kwargs
        if args:
            return (new, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): new}

    def after(_: nn.Module, __: Any, outputs: torch.Tensor) -> torch.Tensor:
        return change(outputs)

    module = layer_of(one).module
    inputs = isinstance(one, LayerInputs)
    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if inputs
        else module.register_forward_hook(after)
    )
    try:
        with heard([module]):
            yield
    finally:
        handle.remove()
