"""Text that was seen before is found however it is cut; honest texts pass."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer

from entangle.model.overlap import LARGEST, SeenText, run_hashes, shared_share
from entangle.model.text import TokenWindows

RUN = 16
DATA = Path(__file__).parents[2] / "data"
Tokens = npt.NDArray[np.int64]


def cut(
    tokens: Tokens, length: int, windows: int | None = None, start: int | None = None
) -> TokenWindows:
    """Windows of ``length`` tokens of the text, some of them or all; each begins with ``start``."""
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    if windows is not None and windows < len(rows):
        rows = rows[np.sort(np.random.default_rng(0).choice(len(rows), windows, replace=False))]
    starts = 0 if start is None else 1
    rows = np.concatenate([np.full((len(rows), starts), start or 0), rows], axis=1)
    return TokenWindows(torch.from_numpy(rows), "some text", len(rows), 0, "auto", starts)


def random_text(size: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, 50_000, size)


def test_the_share_is_that_of_brute_force() -> None:
    """Few words, so that runs repeat by chance; tuples of tokens instead of hashes."""
    rng = np.random.default_rng(1)
    phrases = [rng.integers(0, 99, size) for size in (5, 16, 23, 40, 61)]

    def text(seed: int, share: float) -> Tokens:
        mix = np.random.default_rng(seed)
        parts = [
            phrases[mix.integers(5)] if mix.random() < share else mix.integers(0, 99, 30)
            for _ in range(400)
        ]
        return np.concatenate(parts)

    for length in (16, 37, 64):
        seen, scored = cut(text(2, 0.2), length, start=1), cut(text(3, 0.02), 50, start=1)
        flat = np.concatenate([row[1:] for row in seen.tokens.tolist()]).tolist()
        kept = {tuple(flat[p : p + RUN]) for p in range(len(flat) - RUN + 1)}
        tokens = np.concatenate([row[1:] for row in scored.tokens.tolist()]).tolist()
        shared = [False] * len(tokens)
        for place in range(len(tokens) - RUN + 1):
            if tuple(tokens[place : place + RUN]) in kept:
                shared[place : place + RUN] = [True] * RUN
        expected = sum(shared) / len(shared)
        assert 0.005 < expected < LARGEST
        assert shared_share(SeenText.of(seen), scored) == expected
        assert len(run_hashes(seen)) == len(kept)


@pytest.mark.parametrize("size", [15, 16, 17, 30])
def test_short_pieces_in_any_order_are_found_if_they_have_sixteen_tokens(size: int) -> None:
    """As single lines of the seen text, shuffled, among lines of another text."""
    text, other = random_text(20_000), random_text(60_000, seed=1)
    rng = np.random.default_rng(2)
    lines = [text[p : p + size] for p in rng.permutation(np.arange(0, 20_000 - size, 100))]
    between = np.split(other, np.sort(rng.choice(len(other), len(lines) - 1, replace=False)))
    mixed = np.concatenate([part for pair in zip(lines, between, strict=True) for part in pair])
    seen, scored = SeenText.of(cut(text, 200)), cut(mixed, 1)
    whole = dataclasses.replace(scored, tokens=scored.tokens.reshape(1, -1))
    if size < RUN:
        assert shared_share(seen, whole) == 0
        return
    share = size * len(lines) / len(mixed)
    with pytest.raises(ValueError, match=rf"\b{share:.1%} of the tokens"):
        shared_share(seen, whole)


@pytest.mark.parametrize("length", [16, 31, 40, 128, 500])
@pytest.mark.parametrize("start", [None, 7])
def test_the_same_text_is_found_in_windows_of_any_length(length: int, start: int | None) -> None:
    text = random_text(9_000)
    seen = SeenText.of(cut(text, 128, start=3))
    with pytest.raises(ValueError, match=r"\b(100|9\d)\.\d% of the tokens .*window 1 on"):
        shared_share(seen, cut(text, length, start=start))
    shifted = np.concatenate([random_text(5, seed=9), text])
    with pytest.raises(ValueError, match=r"\b(100|9\d)\.\d% of the tokens "):
        shared_share(seen, cut(shifted, length, start=start))


def test_the_first_shared_place_is_named() -> None:
    text, other = random_text(4_000), random_text(4_000, seed=1)
    mixed = np.concatenate([other[:1_234], text[160:1_160], other[1_234:]])
    with pytest.raises(ValueError, match=r"\b20.0% .*token 36 of window 13 on"):
        shared_share(SeenText.of(cut(text, 400)), cut(mixed, 100, start=5))  # the start is token 1


def test_windows_shorter_than_a_run_are_compared_whole() -> None:
    text = random_text(800)
    seen = SeenText.of(cut(text, 8, windows=40))
    assert shared_share(seen, cut(random_text(800, seed=1), 8)) == 0
    with pytest.raises(ValueError, match=r"\b40\.0% "):
        shared_share(seen, cut(text, 8))


def test_a_run_with_hashes_of_windows_only_has_no_window_of_the_evaluation() -> None:
    text = random_text(6_400)
    old = dataclasses.replace(SeenText.of(cut(text, 64)), runs=None)
    assert shared_share(old, cut(text[1:], 64)) == 0  # that is what such a run can tell
    one = np.concatenate([random_text(64 * 99, seed=1), text[64:128]])
    with pytest.raises(ValueError, match=r"\b1\.0% .*token 1 of window 100 on"):
        shared_share(old, cut(one, 64))
    assert shared_share(SeenText.of(cut(text, 64)), cut(one, 64)) == 0.01


def tokens_of(name: str) -> Tokens:
    tokenizer = Tokenizer.from_file(str(DATA / "smollm2-135m" / "tokenizer.json"))
    text = (DATA / "python-docs" / f"{name}.txt").read_text(encoding="utf-8")
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids)


def test_real_texts_pass_and_leaks_do_not() -> None:
    """200 random cuts of the examples' two texts, and 200 with a part of one put into the other."""
    seen_text, honest = tokens_of("calibration"), tokens_of("evaluation")
    rng = np.random.default_rng(0)
    shares, leaks = [], 0
    for _ in range(200):
        first = int(rng.integers(1_000))
        count, length = int(rng.integers(30, 120)), int(rng.integers(64, 500))
        seen = cut(seen_text[first:], length, windows=count, start=0)
        known = SeenText.of(seen)
        scored_length = int(rng.integers(32, 700))
        begin = int(rng.integers(len(honest) // 2))
        clean = honest[begin : begin + int(rng.integers(6_000, 20_000))]
        shares.append(shared_share(known, cut(clean, scored_length, start=0)))
        leaked = seen.tokens[:, 1:].numpy().ravel()
        size = int(len(clean) * rng.uniform(0.05, 1))
        place = int(rng.integers(max(len(leaked) - size, 1)))
        stretch = leaked[place : place + size]
        if len(stretch) < 0.05 * len(clean):
            continue
        where = int(rng.integers(len(clean)))
        mixed = np.concatenate([clean[:where], stretch, clean[where:]])
        mixed = mixed if len(stretch) >= 0.05 * len(mixed) else stretch
        if len(mixed) < scored_length:
            continue
        with pytest.raises(ValueError, match=r"\d% of the tokens of the evaluation"):
            shared_share(known, cut(mixed, scored_length, start=0))
        leaks += 1
    assert leaks > 100
    assert max(shares) < LARGEST / 4
    assert any(a != b for a, b in pairwise(shares))
