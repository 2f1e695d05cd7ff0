"""Logits that are made again have the bits of the model's own, whatever becomes of its blocks."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from entangle.model.kept_logits import keep_logits
from entangle.model.layers import find_blocks
from tests.model.test_scoring import random_windows
from tests.tiny_models import tiny_mamba, tiny_model, tiny_vision_model

# Tied embeddings, logits that are scaled or capped, a projection and a norm behind the blocks.
NAMES = ("llama", "gpt2", "gemma2", "cohere", "granite", "opt", "bloom", "mixtral")


def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens).logits.clone()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [*NAMES, "vision", "mamba"])
def test_logits_have_the_bits_of_the_models_own(name: str) -> None:
    others = {"vision": tiny_vision_model, "mamba": tiny_mamba}
    model = others[name]() if name in others else tiny_model(name)
    windows = random_windows(5, 16)
    batches = windows.batches(2)
    expected = [logits_of(model, batch) for batch in batches]
    kept = keep_logits(model, windows, batch_size=2)
    assert kept is not None
    with torch.no_grad():
        for parameter in find_blocks(model)[1].parameters():
            parameter.zero_()
    assert not torch.equal(logits_of(model, batches[0]), expected[0])
    with torch.inference_mode():
        for number in (2, 0, 1, 0):
            assert torch.equal(kept.of_batch(number), expected[number])
    assert all("forward" not in vars(block) for block in find_blocks(model)[1])
    width = model.config.get_text_config().hidden_size
    assert [states.shape for states, _ in kept.hidden.values()] == [(2, 16, width)] * 2 + [
        (1, 16, width)
    ]


def test_logits_of_some_windows_are_those_of_the_model_on_them() -> None:
    model, windows, some = tiny_model("gemma2"), random_windows(5, 16), torch.tensor([4, 0, 3])
    kept = keep_logits(model, windows, batch_size=2)
    assert kept is not None
    part = kept.of_windows(some, 2)
    assert [len(batch) for batch in part.batches] == [2, 1]
    with torch.inference_mode():
        for number, batch in enumerate(windows.tokens[some].split(2)):
            assert torch.equal(part.batches[number], batch)
            torch.testing.assert_close(part.of_batch(number), logits_of(model, batch))


class _Remembering(nn.Module):
    """A norm that also adds what a block has left beside its output."""

    def __init__(self, norm: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.left: list[torch.Tensor] = []
        block.register_forward_hook(self.keep)

    def keep(self, _: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.left.append(output)

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.norm(hidden) + self.left.pop()


class _Counting(nn.Module):
    """A norm that adds how often it has run."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.runs = norm, 0

    def forward(self, hidden: torch.Tensor) -> Any:
        self.runs += 1
        return self.norm(hidden) + self.runs


def test_a_model_whose_logits_cannot_be_made_again_keeps_none() -> None:
    model = tiny_model("llama")
    norm = model.model.norm
    for other in (_Remembering(norm, model.model.layers[0].mlp), _Counting(norm)):
        model.model.norm = other
        assert keep_logits(model, random_windows(3, 8), batch_size=2) is None
