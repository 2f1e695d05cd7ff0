"""Which layers multiply their outputs: against the names that transformers gives them."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from entangle.model import gating
from entangle.model.gating import find_gated
from entangle.model.layers import find_layers
from tests.tiny_models import tiny_llama4, tiny_mamba, tiny_model

GATED = (
    "gemma2",
    "llama",
    "mistral",
    "olmo2",
    "qwen3",
    "stablelm",
)  # all with names gate, up, down
PLAIN = ("bloom", "falcon", "gpt2", "gpt-neox", "opt", "phi", "mixtral")


def roles(model: PreTrainedModel) -> list[tuple[str, ...]]:
    return [tuple(one.role for one in (x.gate, x.up, x.down)) for x in find_gated(model)]


@pytest.mark.parametrize("name", GATED)
def test_gated_mlps_are_found_in_each_block(name: str) -> None:
    model = tiny_model(name)
    depth: int = model.config.num_hidden_layers
    assert roles(model) == [("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")] * depth
    assert [one.down.block for one in find_gated(model)] == list(range(depth))
    assert [one.down.block for one in find_gated(model, {depth - 1})] == [depth - 1]
    assert find_gated(model, set()) == []


@pytest.mark.parametrize("name", PLAIN)
def test_other_mlps_have_none(name: str) -> None:
    assert roles(tiny_model(name)) == []


def test_without_an_mlp_there_is_none_and_a_shared_expert_is_one() -> None:
    assert roles(tiny_mamba()) == []
    shared = [f"feed_forward.shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    assert roles(tiny_llama4()) == [tuple(shared)] * 2


@pytest.mark.parametrize("act", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_activation_and_sizes_that_tell_nothing(act: str, dtype: torch.dtype) -> None:
    """All layers of the block are square, so q, k, v and o could be gated too."""
    same: dict[str, Any] = {"intermediate_size": 24, "num_key_value_heads": 3, "hidden_act": act}
    found = roles(tiny_model("llama", dtype=dtype, **same))
    assert found == [("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_products_with_a_vector_of_each_half_are_products(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(16, 40, generator=generator).to(dtype)
    first, second = torch.randn(2, 40, generator=generator).to(dtype)
    vectors = torch.stack([first] * 8 + [second] * 8)
    cases = {
        "product": (vectors * up, True),
        "dead units": (torch.relu(vectors) * up, True),
        "one vector for all tokens": (first * up, False),  # whatever the gate's outputs are
        "sum": (vectors + up, False),
        "another token's output": (vectors * up.roll(1, 0), False),
        "another unit's output": (vectors * up.roll(1, 1), False),
        "the gate alone": (vectors, False),
        "activated": (vectors * torch.relu(up), False),
        "nothing": (torch.zeros_like(up), False),
    }
    found = {name: gating._multiplied(up, products) for name, (products, _) in cases.items()}
    assert found == {name: expected for name, (_, expected) in cases.items()}


def test_the_trial_leaves_the_model_and_its_recordings_as_they_were() -> None:
    model = tiny_model("llama")
    window = torch.arange(5, 25)[None]
    before = model(window).logits
    heard: list[int] = []
    handle = find_layers(model)[0].module.register_forward_hook(lambda *_: heard.append(1))
    find_gated(model)
    assert not heard
    assert torch.equal(model(window).logits, before)
    handle.remove()
    assert not any(module._forward_hooks for module in model.modules())
