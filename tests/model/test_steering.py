"""A neuron is changed as if its output or input were edited by hand, also in packed layers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from entangle.model.experts import ExpertLinear
from entangle.model.fused import FusedMatrix
from entangle.model.layers import find_layers, replace_layer
from entangle.model.packing import pack_layers
from entangle.model.steering import Setting, changed, find_steerable
from entangle.numerics.routing import CentroidRouter
from tests.tiny_mixtures import tiny_mixture
from tests.tiny_models import tiny_mamba, tiny_model

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
TOKENS = torch.arange(3, 27).view(2, 12) * 7


@contextmanager
def edited(module: nn.Module, index: int, edit: Any, *, inputs: bool) -> Iterator[None]:
    """Run a module between edits by hand, in place of its forward."""
    own = module.forward

    def forward(values: torch.Tensor) -> torch.Tensor:
        values = values.clone() if inputs else own(values).clone()
        values[..., index] = edit(values[..., index])
        return own(values) if inputs else values

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def kinds() -> dict[str, PreTrainedModel]:
    """Return a plain model, a packed one of the same sparse weights, and an expanded one."""
    model = tiny_model("llama")
    layers = {layer.name: layer for layer in find_layers(model)}
    for name in (UP, DOWN):
        weight = layers[name].module.get_parameter("weight").data
        weight[torch.rand(weight.shape, generator=torch.manual_seed(0)) < 0.7] = 0
    packed, expanded = copy.deepcopy(model), copy.deepcopy(model)
    pack_layers(packed, find_layers(packed), torch.device("cpu"))
    for layer in find_layers(expanded):
        if layer.name in {UP, DOWN}:
            weight = layer.module.get_parameter("weight").data
            matrix = torch.randn(weight.shape[1], 2, generator=torch.manual_seed(0))
            router = CentroidRouter(matrix, torch.zeros(2))
            own: Any = layer.module
            mixture = ExpertLinear(torch.stack([weight, -weight]), own.bias, router, [1, 1])
            replace_layer(expanded, layer, mixture)
    return {"plain": model, "packed": packed, "expanded": expanded}


@pytest.mark.parametrize("kind", ["plain", "packed", "expanded"])
def test_a_neuron_is_set_or_scaled_as_by_hand(kind: str) -> None:
    model = kinds()[kind]
    assert (type(model.get_submodule(UP)).__name__ == "PackedLinear") == (kind == "packed")
    with torch.inference_mode():
        plain = model(TOKENS).logits
        for neuron, index in ((UP, 9), (f"{DOWN}:input", 30), (DOWN, 4)):
            one, place = find_steerable(model, f"{neuron}:{index}")
            assert place == index
            module = model.get_submodule(neuron.removesuffix(":input"))
            edits = {
                (0.0, 1.5): lambda old: torch.full_like(old, 1.5),
                (-3.0, 0.0): lambda old: -3 * old,
            }
            for (scale, value), edit in edits.items():
                with changed(one, index, scale=scale, value=value):
                    found = model(TOKENS).logits
                with edited(module, index, edit, inputs=neuron.endswith("input")):
                    expected = model(TOKENS).logits
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
                assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3)
        assert torch.equal(model(TOKENS).logits, plain)  # the hooks are removed


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_a_trained_experts_neuron_is_set_or_scaled_as_its_weights_say(name: str) -> None:
    """A row of a matrix, with its bias, makes the neuron's output; a column takes the input."""
    model = tiny_mixture(name)
    with torch.inference_mode():
        plain = model(TOKENS).logits
    layers = [one for one in find_layers(model) if isinstance(one.module, FusedMatrix)]
    for layer in layers[:2]:  # both matrices of the first expert
        for place, scale, value in (("", -3.0, 0.0), ("", 0.0, 1.5), (":input", -3.0, 0.0)):
            one, index = find_steerable(model, f"{layer.name}{place}:5")
            with torch.inference_mode(), changed(one, index, scale=scale, value=value):
                found = model(TOKENS).logits
            matrix: Any = layer.module
            bias = torch.zeros(1) if matrix.bias is None else matrix.bias[5:6]
            edited = matrix.weight[:, 5] if place else matrix.weight[5]
            kept = edited.clone(), bias.clone()
            edited.mul_(scale)
            if not place:
                bias.mul_(scale).add_(value)
            by_hand = not value or matrix.bias is not None  # a value needs a bias to stand in
            with torch.inference_mode():
                expected = model(TOKENS).logits
            edited.copy_(kept[0])
            bias.copy_(kept[1])
            if by_hand:
                assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        assert torch.allclose(model(TOKENS).logits, plain, atol=1e-6)  # the hooks are removed
    with pytest.raises(LookupError, match="0 to"):
        find_steerable(model, f"{layers[0].name}:999")


def test_only_the_named_layer_gets_another_input() -> None:
    model = tiny_model("llama")
    seen: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "k_proj"):
        layer = model.get_submodule(f"model.layers.1.self_attn.{name}")
        layer.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0]}))
    one, index = find_steerable(model, "model.layers.1.self_attn.q_proj:input:3")
    with torch.inference_mode(), changed(one, index, scale=0, value=7):
        model(TOKENS)
    assert (seen["q_proj"][..., 3] == 7).all()
    assert (seen["k_proj"][..., 3] != 7).all()
    others = torch.arange(24) != 3
    assert torch.equal(seen["q_proj"][..., others], seen["k_proj"][..., others])


def test_the_hooks_are_removed_after_an_error() -> None:
    model = tiny_model("llama")
    one, index = find_steerable(model, f"{UP}:1")
    with pytest.raises(KeyError), changed(one, index, scale=0, value=0):
        raise KeyError
    assert not model.get_submodule(UP)._forward_hooks


def test_what_cannot_be_steered_is_refused() -> None:
    with pytest.raises(ValueError, match="did not run"):
        find_steerable(tiny_mamba(), "backbone.layers.1.mixer.dt_proj:2")
    with pytest.raises(LookupError, match="0 to 36"):
        find_steerable(tiny_model("llama"), f"{UP}:37")
    with pytest.raises(LookupError, match="LAYER:INDEX"):
        find_steerable(tiny_model("llama"), "lm_head:3")


@pytest.mark.parametrize(
    "text", ["zero", "mean", "quantile:0.25", "quantile:1", "scale:-2", "scale:0"]
)
def test_settings_are_read_as_they_are_written(text: str) -> None:
    assert str(Setting.of(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "none", "scale", "scale:1", "scale:inf", "quantile", "quantile:1.5", "zero:1", "mean:"],
)
def test_settings_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a setting"):
        Setting.of(text)
