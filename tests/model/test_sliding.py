"""Sliding windows: against the published loop over a text, and each token's own context."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import entangle
from entangle.model.mixing import mixed_windows
from tests.model.test_scoring import random_windows
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps; so does the dog. " * 2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def nats_of(tokens: torch.Tensor) -> torch.Tensor:
    """Return the nats of all tokens but the first."""
    with torch.inference_mode():
        logits = tiny_model("llama")(input_ids=tokens[None]).logits[0]
    return cross_entropy(logits[:-1], tokens[1:], reduction="none")


def test_the_score_is_that_of_the_published_loop(file: Path) -> None:
    windows = entangle.sliding_windows(file, tiny_tokenizer(), stride=5, windows=None, length=16)
    score = entangle.perplexity(tiny_model("llama"), windows, batch_size=7)
    tokens = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    tokens = tokens[: 1 + (len(tokens) - 1) // 5 * 5]
    losses, done = [], 0
    for begin in range(0, len(tokens), 5):
        end = min(begin + 16, len(tokens))
        losses.append(nats_of(tokens[begin:end])[-(end - done) :])
        done = end
        if end == len(tokens):
            break
    expected = torch.cat(losses)
    assert score.tokens == len(expected) == len(tokens) - 1
    assert score.nats == pytest.approx(float(expected.mean()), rel=1e-5)
    pieces = expected.view(-1, 5).mean(dim=1)
    assert score.window_nats == pytest.approx(pieces.numpy(), rel=1e-4)
    error = float(pieces.std()) / len(pieces) ** 0.5
    assert score.nats_error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(("adds_bos", "stride"), [(True, 3), (True, 15), (False, 4), (False, 1)])
def test_each_token_is_scored_once_after_the_tokens_before_it(
    file: Path, adds_bos: bool, stride: int
) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    windows = entangle.sliding_windows(file, tokenizer, stride=stride, windows=None, length=16)
    found = entangle.perplexity(tiny_model("llama"), windows).window_nats
    tokens = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    tokens = tokens[: len(tokens) // 2 * 2]
    start = torch.ones(1, dtype=torch.int64) if adds_bos else torch.zeros(0, dtype=torch.int64)
    scored = 0 if adds_bos else 1
    assert len(found) == (len(tokens) - scored) // stride == windows.available
    for piece in (0, 1, 2, 7, len(found) - 1):
        first = scored + piece * stride
        begin = max(0, first + stride - 16 + len(start))
        nats = nats_of(torch.cat([start, tokens[begin : first + stride]]))[-stride:]
        assert found[piece] == pytest.approx(float(nats.mean()), rel=1e-4)


def test_some_windows_are_drawn_by_seed_and_compared_too(file: Path) -> None:
    every = entangle.sliding_windows(file, tiny_tokenizer(), stride=4, windows=None, length=16)
    some, again, other = (
        entangle.sliding_windows(file, tiny_tokenizer(), stride=4, windows=9, length=16, seed=seed)
        for seed in (1, 1, 2)
    )
    assert some.fingerprint == again.fingerprint != other.fingerprint
    rows = {tuple(row) for row in every.tokens.tolist()}
    assert len(some) == 9
    assert all(tuple(row) in rows for row in some.tokens.tolist())
    dense, model = tiny_model("llama", seed=1), tiny_model("llama")
    whole = entangle.perplexity(model, every, against=dense).divergence
    half = entangle.perplexity(model, every[1::2], against=dense, batch_size=3).divergence
    assert whole is not None
    assert half is not None
    assert half.kl.shape == (len(every) // 2, 4)
    assert half.kl == pytest.approx(whole.kl[1::2], rel=1e-3)


def test_what_cannot_slide_is_refused(file: Path) -> None:
    for stride in (0, 16):
        with pytest.raises(ValueError, match=rf"\b1 to 15\b.*16 tokens.* stride of {stride}"):
            entangle.sliding_windows(file, tiny_tokenizer(), stride=stride, length=16)
    with pytest.raises(ValueError, match=r"164 tokens, fewer than one window of 200"):
        entangle.sliding_windows(file, tiny_tokenizer(), stride=4, length=200)
    windows = entangle.sliding_windows(file, tiny_tokenizer(), stride=4, length=16)
    with pytest.raises(ValueError, match=r"skip_first.*sliding.* got 2"):
        entangle.perplexity(tiny_model("llama"), windows, skip_first=2)
    with pytest.raises(ValueError, match=r"slide by 4"):
        entangle.measure(tiny_model("llama"), windows)
    with pytest.raises(ValueError, match=r"slide"):
        mixed_windows([windows, random_windows(3, 16)])
