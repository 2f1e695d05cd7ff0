"""Repetition: n-grams against a plain count, and continuations against an argmax loop."""

import math

import numpy as np
import pytest
import torch

import entangle
from entangle.model.repeating import repeated
from tests.model.test_scoring import random_windows
from tests.tiny_models import tiny_model


def counted(row: list[int], prompt: int) -> list[float]:
    """Count by comparing each n-gram, and each token, with all before it."""
    new, shares = row[prompt:], []
    for n in (1, 2, 3, 4):
        places = range(len(new) - n + 1)
        first = [all(new[j : j + n] != new[i : i + n] for j in range(i)) for i in places]
        shares.append(sum(first) / len(first))
    near = [
        any(i - back >= 0 and row[i - back] == row[i] for back in range(1, 33))
        for i in range(prompt, len(row))
    ]
    return [*shares, sum(near) / len(near)]


@pytest.mark.parametrize("words", [2, 9, 60])
def test_shares_are_those_of_a_plain_count(words: int) -> None:
    rng = np.random.default_rng(words)
    for prompt in (1, 10, 50):
        row = rng.integers(words, size=prompt + 70).tolist()
        assert repeated(row, prompt) == pytest.approx(counted(row, prompt), rel=1e-12)
    assert repeated([7] * 20, 4) == [1 / 16, 1 / 15, 1 / 14, 1 / 13, 1.0]
    assert repeated([*range(50)], 4) == [1, 1, 1, 1, 0]


def test_continuations_are_of_the_most_likely_tokens() -> None:
    model, windows = tiny_model("llama"), random_windows(9, 12)
    found = entangle.repetition(model, windows, prompts=3, prompt_tokens=6, tokens=20, batch_size=2)
    expected = []
    for place in (0, 4, 8):  # evenly spaced
        row = windows.tokens[place, :6]
        with torch.inference_mode():
            for _ in range(20):
                row = torch.cat([row, model(input_ids=row[None]).logits[0, -1:].argmax(-1)])
        expected.append(counted(row.tolist(), 6))
    names = ["distinct_1", "distinct_2", "distinct_3", "distinct_4", "repetition"]
    columns = found.columns()
    for name, values in zip(names, np.array(expected).T, strict=True):
        assert found.shares[name] == pytest.approx(values)
        assert columns[name] == pytest.approx(values.mean())
        assert columns[f"{name}_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(3))
    assert len(columns) == 10


def test_what_cannot_be_generated_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"prompts of 64 .*windows of 12\b"):
        entangle.repetition(model, random_windows(3, 12))
    with pytest.raises(ValueError, match=r"prompts of 64 .*128 .*context.*\b64\b"):
        entangle.repetition(model, random_windows(3, 64))
    with pytest.raises(ValueError, match=r"at least 4 tokens.* 3 tokens"):
        entangle.repetition(model, random_windows(3, 12), prompt_tokens=4, tokens=3)
