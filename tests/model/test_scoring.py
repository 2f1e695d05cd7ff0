"""Perplexity: against the definition written out in float64, and models whose score is known."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from transformers import PreTrainedModel

import entangle
from entangle.model.kept_logits import keep_logits
from entangle.model.text import TokenWindows
from tests.tiny_models import ARCHITECTURES, VOCABULARY, tiny_model

GENERATOR = torch.Generator().manual_seed(5)


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


def spoken(model: PreTrainedModel, windows: TokenWindows, rows: list[int]) -> None:
    """Replace some windows by what a model finds most likely after their first token."""
    with torch.inference_mode():
        for place in range(1, windows.length):
            logits = model(input_ids=windows.tokens[rows, :place]).logits
            windows.tokens[rows, place] = logits[:, -1].argmax(-1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("skip_first", [0, 5])
def test_divergence_is_that_of_both_models_logits(name: str, skip_first: int) -> None:
    """Of random models that are much alike, on texts of which some are their own first choices."""
    dense, model = tiny_model(name), tiny_model(name)
    with torch.no_grad():
        for (_, one), (_, other) in zip(
            model.named_parameters(), dense.named_parameters(), strict=True
        ):
            one.copy_(other + 0.04 * torch.randn(one.shape, generator=GENERATOR))
    windows = random_windows(7, 16)
    spoken(dense, windows, [0, 1, 2])
    spoken(model, windows, [3, 4, 5])
    alone = entangle.perplexity(model, windows, batch_size=3, skip_first=skip_first)
    kept = keep_logits(dense, windows, batch_size=3)
    first = max(skip_first, 1)
    expected: dict[str, list[Any]] = {name: [] for name in ("kl", "agreement", "lost", "gained")}
    for window in windows.tokens:
        with torch.inference_mode():
            logits = [one(input_ids=window[None]).logits[0].double() for one in (dense, model)]
        truth, log = (log_softmax(one[first - 1 : -1].numpy(), axis=-1) for one in logits)
        right, theirs, ours = window[first:].numpy(), truth.argmax(-1), log.argmax(-1)
        expected["kl"].append((np.exp(truth) * (truth - log)).sum(axis=-1))
        expected["agreement"].append(np.mean(theirs == ours))
        expected["lost"].append(np.mean((theirs == right) & (ours != right)))
        expected["gained"].append(np.mean((theirs != right) & (ours == right)))
    for against in (dense, kept):
        score = entangle.perplexity(
            model, windows, against=against, batch_size=3, skip_first=skip_first
        )
        assert np.array_equal(score.window_nats, alone.window_nats)
        assert score.divergence is not None
        assert score.divergence.kl == pytest.approx(np.array(expected["kl"]), rel=1e-3, abs=1e-6)
        for share in ("agreement", "lost", "gained"):
            values = np.array(expected[share])
            assert getattr(score.divergence, share) == pytest.approx(values)
            assert 0 < values.mean() < 1
    same = entangle.perplexity(dense, windows, against=kept, batch_size=3).divergence
    assert same is not None
    assert (same.kl.max(), same.agreement.min(), same.lost.max(), same.gained.max()) == (0, 1, 0, 0)


def test_a_token_that_both_models_exclude_adds_nothing() -> None:
    def excluding(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([259]), -torch.inf)

    windows, found = random_windows(3, 8), []
    for excluded in (False, True):
        models = [tiny_model(seed=seed) for seed in (0, 1)]
        for model in models if excluded else ():
            model.get_output_embeddings().register_forward_hook(excluding)
        score = entangle.perplexity(models[0], windows, against=models[1])
        assert score.divergence is not None
        found.append(score.divergence.kl)
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert not np.array_equal(found[0], found[1])


def test_models_that_cannot_be_compared_are_refused() -> None:
    other = tiny_model()
    other.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    with pytest.raises(ValueError, match=rf"\b{VOCABULARY} logits.*\b{VOCABULARY + 3}\b"):
        entangle.perplexity(tiny_model(), random_windows(2, 8), against=other)
    with pytest.raises(ValueError, match="training mode"):
        entangle.perplexity(tiny_model(), random_windows(2, 8), against=tiny_model().train())
    with torch.no_grad():
        other = tiny_model(seed=1)
        other.get_output_embeddings().weight[7] = float("nan")  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="compare with are not finite"):
        entangle.perplexity(tiny_model(), random_windows(2, 8), against=other)


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
