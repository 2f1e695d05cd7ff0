"""Models that are not causal, or that mix the windows of a batch, get no score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import entangle
from entangle.model.causality import check_causal, dependences
from entangle.runs.dataset import summary
from tests.model.test_scoring import random_windows
from tests.tiny_models import ARCHITECTURES, VOCABULARY, tiny_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
ENCODERS = ("Bert", "Roberta", "Electra", "RoFormer")
LATER, OTHERS = "on later tokens of the window", "on the other windows of the batch"


def encoder(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model that transformers loads as a causal one, with its usual small random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model.to(dtype).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_causal_models_pass(name: str, dtype: torch.dtype) -> None:
    assert dependences(tiny_model(name, dtype=dtype), random_windows(3, 16)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_told(name: str, dtype: torch.dtype) -> None:
    model, windows = encoder(name, dtype), random_windows(3, 16)
    assert dependences(model, windows) == [LATER]
    with pytest.raises(ValueError, match=rf"{name}.*later tokens.*causal"):
        entangle.perplexity(model, windows)


def mixing(model: PreTrainedModel, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the outputs of the model's first block."""
    block = model.model.layers[0]
    forward = block.forward

    def changed(*args: Any, **kwargs: Any) -> torch.Tensor:
        return change(forward(*args, **kwargs))

    block.forward = changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_windows_is_told(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    mixing(model, lambda hidden: hidden - 0.5 * hidden.mean(dim=0, keepdim=True))
    assert dependences(model, random_windows(3, 16)) == [OTHERS]
    with pytest.raises(ValueError, match="other windows"):
        check_causal(model, random_windows(3, 16))


@pytest.mark.parametrize("length", [2, 5, 64])
def test_a_window_of_any_length_tells(length: int) -> None:
    model, windows = tiny_model(), random_windows(1, length)
    assert dependences(model, windows) == []
    mixing(model, lambda hidden: hidden + hidden.mean(dim=1, keepdim=True))
    assert dependences(model, windows) == [LATER]


def test_equal_tokens_tell() -> None:
    windows = random_windows(2, 8)
    windows.tokens.fill_(0)
    assert dependences(encoder("Bert"), windows) == [LATER]


def test_the_model_is_as_before_and_no_recording_counts() -> None:
    model: Any = tiny_model("gpt2")
    windows = random_windows(3, 16)
    model.register_buffer("calls", torch.zeros(1))

    forward = model.forward

    def counting(input_ids: torch.Tensor, **words: Any) -> Any:
        model.calls = model.calls + torch.rand(1)
        return forward(input_ids=input_ids, **words)

    model.forward = counting
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with entangle.record(model) as recorder:
        check_causal(model, windows)
        model(windows.tokens)
    assert recorder.counter is not None
    assert (recorder.counter.batches, recorder.counter.tokens) == (1, windows.tokens.numel())
    assert recorder.dataset()["count"].max() == windows.tokens.numel()
    assert float(model.calls) > 0  # of the call that is no check
    model.calls.zero_()
    check_causal(model, windows)
    torch.manual_seed(3)
    check_causal(model, windows)
    assert torch.equal(torch.rand(2), expected)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_numbers_without_meaning_are_refused_and_others_say_so(tmp_path: Path) -> None:
    model, windows, held_out = encoder("Bert"), random_windows(6, 16), random_windows(3, 16)
    held_out.tokens.copy_(held_out.tokens.flip(1))
    run = entangle.measure(model, windows)
    assert run.attrs["dependent_on"] == [LATER]
    assert any("later tokens" in warning for warning in summary(run)["warnings"])
    assert not any(
        "causal" in w for w in summary(entangle.measure(tiny_model(), windows))["warnings"]
    )
    with pytest.raises(ValueError, match="later tokens"):
        entangle.sweep(model, windows, held_out, sparsity=0.5, out=tmp_path / "run")
    with pytest.raises(ValueError, match="later tokens"):
        entangle.ablate(model, windows, held_out, run=run, out=tmp_path / "run")
    assert not [*tmp_path.iterdir()]
