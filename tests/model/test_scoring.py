"""Perplexity: against the definition written out in float64, and models whose score is known."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

import entangle
from entangle.model.text import TokenWindows
from tests.tiny_models import ARCHITECTURES, VOCABULARY, tiny_model


def random_windows(windows: int, length: int) -> TokenWindows:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCABULARY - 1, (windows, length), generator=generator)
    return TokenWindows(tokens, "random", windows, 0, "never")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("skip_first", [0, 5])
def test_score_is_the_mean_log_likelihood(name: str, skip_first: int) -> None:
    model, windows = tiny_model(name), random_windows(5, 16)
    score = entangle.perplexity(model, windows, batch_size=2, skip_first=skip_first)
    nats = []
    for window in windows.tokens:
        with torch.inference_mode():
            logits = model(input_ids=window[None]).logits[0].double().numpy()
        likelihood = log_softmax(logits, axis=-1)
        first = max(skip_first, 1)
        nats.append([-likelihood[i - 1, int(window[i])] for i in range(first, 16)])
    assert score.tokens == np.size(nats)
    assert score.nats == pytest.approx(np.mean(nats), rel=1e-5)
    error = np.std(np.mean(nats, axis=1), ddof=1) / math.sqrt(5)
    assert score.nats_error == pytest.approx(error, rel=1e-3)
    assert score.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert score.perplexity_error == pytest.approx(math.exp(np.mean(nats)) * error, rel=1e-3)


def test_uniform_logits_score_the_vocabulary() -> None:
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.get_output_embeddings().weight)  # type: ignore[no-untyped-call]
    score = entangle.perplexity(model, random_windows(4, 10))
    assert score.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert score.perplexity_error == pytest.approx(0, abs=1e-6)
    assert score.tokens == 36


def test_one_window_has_no_standard_error() -> None:
    assert math.isnan(entangle.perplexity(tiny_model(), random_windows(1, 8)).perplexity_error)


def test_what_cannot_be_scored_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"\b65 tokens.*context of 64\b"):
        entangle.perplexity(model, random_windows(2, 65))
    with pytest.raises(ValueError, match=r"skip_first.*\b0 to 7\b.* got 8\b"):
        entangle.perplexity(model, random_windows(2, 8), skip_first=8)
    with pytest.raises(ValueError, match="training mode"):
        entangle.perplexity(tiny_model().train(), random_windows(2, 8))
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("nan")  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"not finite.*\b2 of 2 windows"):
        entangle.perplexity(model, random_windows(2, 8))
