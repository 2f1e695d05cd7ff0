"""Which layers work on each token alone: against the names that transformers gives them."""

import pytest
import torch
from transformers import PreTrainedModel

from entangle.model.layers import find_layers
from entangle.model.tokenwise import layers_of_tokens
from tests.tiny_models import ARCHITECTURES, tiny_llama4, tiny_mamba, tiny_model

WINDOW = torch.arange(5, 25)


def roles_of_tokens(model: PreTrainedModel) -> set[str]:
    return {layer.role for layer in layers_of_tokens(model, find_layers(model))}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_outside_attention_are_found_on_each_architecture(name: str) -> None:
    model = tiny_model(name)
    roles = {layer.role for layer in find_layers(model)}
    attention = {role for role in roles if role.startswith(("self_att", "attn.", "attention."))}
    assert attention  # of this architecture
    assert roles_of_tokens(model) == roles - attention


def test_a_block_that_is_all_mixer_has_none() -> None:
    assert roles_of_tokens(tiny_mamba()) == set()


def test_a_shared_expert_works_on_each_token() -> None:
    found = roles_of_tokens(tiny_llama4())
    assert {f"feed_forward.shared_expert.{name}_proj" for name in ("up", "gate", "down")} <= found
    assert not any(role.startswith("self_attn") for role in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_short_floats_is_no_mixing(dtype: torch.dtype) -> None:
    for name in ("llama", "gpt-j", "opt"):
        assert roles_of_tokens(tiny_model(name, dtype=dtype)) == roles_of_tokens(tiny_model(name))


def test_the_trial_leaves_the_model_and_its_recordings_as_they_were() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heard: list[int] = []
    layers = find_layers(model)
    handle = layers[0].module.register_forward_hook(lambda *_: heard.append(1))
    layers_of_tokens(model, layers)
    assert not heard
    model(WINDOW[None])
    assert heard == [1]
    handle.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
