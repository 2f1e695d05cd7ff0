"""Windows of several texts: each text's own draw, by equal shares, in turns."""

import random
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entangle.model.mixing import equal_shares, mixed_windows, share_windows
from entangle.model.overlap import SeenText, run_hashes, shared_share
from entangle.model.text import TokenWindows, evenly_spaced, token_windows
from tests.tiny_models import tiny_tokenizer

LENGTH = 20
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three texts of 50, 60 and 70 windows, with no sequence of tokens in common."""
    folder = tmp_path_factory.mktemp("texts")
    for place in range(3):
        letters = random.Random(place).choices(string.ascii_letters, k=(50 + 10 * place) * LENGTH)
        (folder / f"{place}.txt").write_text("".join(letters))
    return [folder / f"{place}.txt" for place in range(3)]


def drawn(texts: list[Path], windows: int, seed: int = 0) -> list[TokenWindows]:
    parts = share_windows(texts, TOKENIZER, windows=windows, length=LENGTH, seed=seed)
    return [part for part in parts if part is not None]


def test_shares_are_equal_and_the_first_texts_have_what_is_left_over() -> None:
    for count in range(1, 6):
        names = [f"text {place}" for place in range(count)]
        for windows in range(count, 30):
            expected = [0] * count
            for window in range(windows):  # deal one at a time
                expected[window % count] += 1
            assert equal_shares(names, windows) == expected


@pytest.mark.parametrize("windows", [3, 31, 128])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_mix_has_the_windows_of_each_texts_own_draw_in_turns(
    texts: list[Path], windows: int, seed: int
) -> None:
    mixed = mixed_windows(drawn(texts, windows, seed))
    own = []
    for place, text in enumerate(texts):
        count = len(range(place, windows, 3))
        options: dict[str, Any] = {"windows": count, "length": LENGTH, "seed": seed}
        own.append(token_windows(text, TOKENIZER, **options).tokens.tolist())
    expected = [own[window % 3][window // 3] for window in range(windows)]
    assert mixed.tokens.tolist() == expected
    assert mixed.text == " + ".join(map(str, texts))
    assert (mixed.available, mixed.seed, mixed.length) == (180, seed, LENGTH)
    for part, text, rows in zip(mixed.by_text(), texts, own, strict=True):
        assert (part.text, part.tokens.tolist()) == (str(text), rows)


def test_one_text_is_as_it_always_was(texts: list[Path]) -> None:
    alone = token_windows(texts[0], TOKENIZER, windows=99, length=LENGTH, seed=2)
    (part,) = drawn(texts[:1], 99, 2)
    assert mixed_windows([part]) is part
    assert (part.fingerprint, len(part), part.by_text()) == (alone.fingerprint, 50, [part])


def test_windows_of_unlike_numbers_take_turns_while_they_last(texts: list[Path]) -> None:
    one, two, three = (
        token_windows(text, TOKENIZER, windows=None, length=LENGTH) for text in texts
    )
    mixed = mixed_windows([one[:2], two[:5]])
    assert mixed.origins is not None
    assert mixed.origins.tolist() == [0, 1, 0, 1, 1, 1, 1]
    assert [len(part) for part in mixed_windows([mixed, three[:3]]).by_text()] == [2, 5, 3]


def test_what_is_chosen_keeps_its_text_and_even_choices_have_each_texts_share(
    texts: list[Path],
) -> None:
    mixed = mixed_windows(drawn(texts[:2], 40))
    for part, whole in zip(mixed[3:9].by_text(), mixed.by_text(), strict=True):
        assert len(part) == 3
        assert {*part.hashes} <= {*whole.hashes}
    assert [len(part) for part in mixed[::2].by_text()] == [20]  # they take turns
    for count in (2, 10, 20, 39):
        shares = [len(part) for part in evenly_spaced(mixed, count).by_text()]
        assert sum(shares) == count
        assert abs(shares[0] - shares[1]) <= 1
    quarter = mixed.chosen(mixed.places[::4].sort().values)
    assert [len(part) for part in quarter.by_text()] == [5, 5]


def test_an_evaluation_is_compared_with_each_of_the_texts(texts: list[Path]) -> None:
    parts = [token_windows(text, TOKENIZER, windows=None, length=LENGTH) for text in texts[:2]]
    mixed = mixed_windows(parts)
    # Runs that begin in one window and end in the next of the same text are there, and no others.
    alone = np.unique(np.concatenate([run_hashes(part) for part in parts]))
    assert np.array_equal(run_hashes(mixed), alone)
    for text in texts[:2]:
        moved = token_windows([text.read_text()[7:]], TOKENIZER, windows=None, length=33)
        with pytest.raises(ValueError, match=re.escape(f"({mixed.text})")):
            shared_share(SeenText.of(mixed), moved)
    other = token_windows(texts[2], TOKENIZER, windows=None, length=33)
    assert shared_share(SeenText.of(mixed), other) == 0


def test_a_text_with_fewer_windows_than_its_share_is_refused(texts: list[Path]) -> None:
    expected = f"{texts[0]} has 50 windows of {LENGTH} tokens.*share of 61 of 121.*most 100"
    with pytest.raises(ValueError, match=expected):
        drawn(texts[:2], 121)
    assert [len(part) for part in drawn(texts[:2], 100)] == [50, 50]


def test_the_same_text_twice_is_refused(texts: list[Path], tmp_path: Path) -> None:
    one = texts[0]
    link = tmp_path / "link.txt"
    link.symlink_to(one)
    for other in (one, one.parent / "." / one.name, link):
        with pytest.raises(ValueError, match="twice"):
            drawn([one, other], 10)
    for name in ("calibration.txt", "evaluation.txt"):
        (tmp_path / name).write_text(one.read_text())
    with pytest.raises(ValueError, match="twice"):  # the folder is its calibration.txt
        mixed_windows(drawn([tmp_path, tmp_path / "calibration.txt"], 11))
    with pytest.raises(ValueError, match="twice"):  # a copy
        mixed_windows(drawn([one, tmp_path / "evaluation.txt"], 10))


def test_windows_that_are_not_alike_are_refused(texts: list[Path]) -> None:
    one = token_windows(texts[0], TOKENIZER, length=LENGTH)
    unlike: dict[str, dict[str, Any]] = {
        "length": {"length": LENGTH + 1},
        "seed": {"length": LENGTH, "seed": 1},
        "bos": {"length": LENGTH, "bos": "always"},
    }
    for name, options in unlike.items():
        other = token_windows(texts[1], TOKENIZER, **options)
        with pytest.raises(ValueError, match=f"got {name} "):
            mixed_windows([one, other])
    with pytest.raises(ValueError, match="at least one text"):
        mixed_windows([])
    with pytest.raises(ValueError, match="3 texts and 2 windows"):
        equal_shares(texts, 2)


def test_two_lists_of_documents_are_two_texts() -> None:
    parts = [token_windows([letter * 400], TOKENIZER, windows=3, length=LENGTH) for letter in "ab"]
    assert torch.equal(mixed_windows(parts).tokens[1::2], parts[1].tokens)


def test_each_text_keeps_a_window_and_a_text_without_one_is_gone() -> None:
    sizes = {"a": 200, "b": 1, "c": 100}
    parts = [
        TokenWindows(torch.full((size, 4), place), name, size, 0, "never")
        for place, (name, size) in enumerate(sizes.items())
    ]
    mixed = mixed_windows(parts)
    for count in (3, 4, 32, 300):
        few = evenly_spaced(mixed, count)
        shares = [len(part) for part in few.by_text()]
        assert sum(shares) == len(few) == count
        assert shares[1] == 1
        assert abs(shares[0] - 2 * shares[2]) <= 3
    first = mixed[:2]
    assert (first.text, first.names) == ("a + b", ["a", "b"])
    assert [part.tokens.unique().tolist() for part in first.by_text()] == [[0], [1]]
    alone = mixed[:1]
    assert (alone.text, alone.parts, alone.names) == ("a", (), ["a"])
