"""Windows are slices of the tokenised text."""

import dataclasses
import itertools
import random
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
import torch
import transformers
from tokenizers import Tokenizer, models

from entangle.model import text as module
from entangle.model.text import Bos, TokenWindows, token_windows
from tests.tiny_models import tiny_tokenizer

LENGTH = 16
TEXT = "".join(random.Random(0).choices(string.ascii_letters, k=1000))  # 62 windows and 8 letters


def windows_of(text: str = TEXT, **options: Any) -> TokenWindows:
    tokenizer = options.pop("tokenizer", tiny_tokenizer())
    return token_windows([text], tokenizer, **{"length": LENGTH} | options)


def letters(windows: TokenWindows) -> list[str]:
    return [str(tiny_tokenizer().decode(row)) for row in windows.tokens.tolist()]


# Cutting.


def test_all_windows_of_a_short_text_are_its_slices_in_order() -> None:
    windows = windows_of(windows=62)
    assert letters(windows) == [TEXT[i : i + LENGTH] for i in range(0, 992, LENGTH)]
    assert (len(windows), windows.length, windows.available) == (62, LENGTH, 62)
    assert windows.tokens.dtype == torch.int64
    assert torch.equal(windows.tokens, windows_of(windows=1000).tokens)
    assert torch.equal(windows.tokens, windows_of(windows=None).tokens)


def test_a_draw_takes_whole_slices_in_the_texts_order_and_none_twice() -> None:
    drawn = letters(windows_of(windows=20, seed=3))
    places = [TEXT.index(window) for window in drawn]
    assert len(drawn) == 20
    assert places == sorted(set(places))
    assert all(place % LENGTH == 0 for place in places)


def test_the_seed_decides_the_draw() -> None:
    draws = {seed: windows_of(windows=20, seed=seed) for seed in range(4)}
    for first, second in itertools.combinations(draws.values(), 2):
        assert not torch.equal(first.tokens, second.tokens)
        assert first.fingerprint != second.fingerprint
    assert torch.equal(draws[2].tokens, windows_of(windows=20, seed=2).tokens)
    often = [letter for seed in range(200) for letter in letters(windows_of(windows=5, seed=seed))]
    # Each of 62 slices is drawn 1000/62 = 16 times on average; all at least twice, by far.
    assert min(often.count(TEXT[i : i + LENGTH]) for i in range(0, 992, LENGTH)) >= 2


@pytest.mark.parametrize(
    ("bos", "adds_bos", "starts"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("always", True, True),
        ("always", False, True),
        ("never", True, False),
        ("never", False, False),
    ],
)
def test_bos_stands_before_each_window_and_takes_its_place_in_the_length(
    bos: Bos, adds_bos: bool, starts: bool
) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    windows = windows_of(bos=bos, tokenizer=tokenizer)
    body = LENGTH - 1 if starts else LENGTH
    prefix = "<s>" if starts else ""
    assert letters(windows) == [
        prefix + TEXT[i : i + body] for i in range(0, 1000 // body * body, body)
    ]
    assert windows.length == LENGTH
    assert int((windows.tokens == tokenizer.bos_token_id).sum()) == (len(windows) if starts else 0)


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("<pad> <s> $A", [0, 1]),
        ("<pad> <s> $A </s>", [0, 1]),
        ("</s> $A", [2]),
        ("</s> $A </s>", [2]),
        ("<pad> <pad> <pad> $A", [0, 0, 0]),
        ("$A </s>", []),
        ("$A <s> </s>", []),
    ],
)
def test_windows_begin_as_texts_begin_and_do_not_end_as_they_end(
    template: str, start: list[int], has_bos: bool
) -> None:
    tokenizer = tiny_tokenizer(template=template, has_bos=has_bos)
    assert tokenizer("xyz")["input_ids"][: len(start)] == start  # as the tokenizers library does
    always = start or [1]
    for bos, expected in (("auto", start), ("always", always), ("never", list[int]())):
        if bos == "always" and not start and not has_bos:
            continue
        windows = windows_of(bos=bos, tokenizer=tokenizer)
        body = LENGTH - len(expected)
        assert windows.tokens[:, : len(expected)].tolist() == [expected] * len(windows)
        text = letters(dataclasses.replace(windows, tokens=windows.tokens[:, len(expected) :]))
        assert text == [TEXT[i : i + body] for i in range(0, 1000 // body * body, body)]


def test_a_window_has_room_for_text_after_what_it_begins_with() -> None:
    tokenizer = tiny_tokenizer(template="<pad> <s> $A")
    with pytest.raises(ValueError, match=r"\b2 tokens leave no room.*\b2 tokens.*larger length"):
        windows_of(length=2, tokenizer=tokenizer)
    assert letters(windows_of(length=3, tokenizer=tokenizer, windows=None))[0][-1] == TEXT[0]


def test_without_a_bos_token_auto_and_never_do_without_and_always_is_an_error() -> None:
    tokenizer = tiny_tokenizer(has_bos=False)
    for bos in ("auto", "never"):
        assert letters(windows_of(bos=bos, tokenizer=tokenizer))[0] == TEXT[:LENGTH]
    with pytest.raises(ValueError, match=r"no beginning-of-sequence token.*bos='never'"):
        windows_of(bos="always", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"bos .*'auto', 'always'.*'never'.*'sometimes'"):
        windows_of(bos="sometimes")


def test_documents_are_joined_by_an_empty_line() -> None:
    windows = token_windows(["one", "two"], tiny_tokenizer(), length=4)
    assert letters(windows) == ["one\n", "\ntwo"]


@pytest.mark.parametrize(("text", "tokens"), [("", "0"), ("a" * (LENGTH - 1), "15")])
def test_a_text_shorter_than_a_window_is_an_error(text: str, tokens: str) -> None:
    message = rf"Python.*\b{tokens} tokens.*window of 16\b"
    with pytest.raises(ValueError, match=message):
        windows_of(text)
    assert len(windows_of("a" * LENGTH)) == 1


@pytest.mark.parametrize(("windows", "length"), [(0, 16), (-1, 16), (5, 1), (5, 0)])
def test_less_than_one_window_of_two_tokens_is_an_error(windows: int, length: int) -> None:
    message = rf"\b1 window .*\b2 tokens.* {windows} windows of {length} tokens$"
    with pytest.raises(ValueError, match=message):
        windows_of(windows=windows, length=length)


def test_a_text_longer_than_the_models_context_raises_no_warning() -> None:
    assert tiny_tokenizer().model_max_length < 1000
    assert windows_of().available == 62  # and warnings are errors here


def test_the_fingerprint_is_of_the_tokens_and_their_cut() -> None:
    windows = windows_of("a" * 64, windows=4)
    assert re.fullmatch("[0-9a-f]{64}", windows.fingerprint)
    assert windows.fingerprint == windows_of("a" * 64, windows=9, seed=5).fingerprint
    others = [windows_of("a" * 63 + "b"), windows_of("a" * 64, length=32), windows_of("a" * 48)]
    assert len({windows.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_slices_are_windows_of_the_same_text() -> None:
    whole = windows_of(windows=None)
    halves = whole[::2], whole[1::2]
    assert len(halves[0]) + len(halves[1]) == len(whole) > 4
    for first, half in enumerate(halves):
        assert half.tokens.tolist() == whole.tokens.tolist()[first::2]
        assert half.hashes == whole.hashes[first::2]
        assert (half.text, half.available) == (whole.text, whole.available)
    assert not {*halves[0].hashes} & {*halves[1].hashes}
    assert len({whole.fingerprint, *(half.fingerprint for half in halves)}) == 3
    with pytest.raises(ValueError, match=rf"none of .*\b{len(whole)} windows"):
        whole[len(whole) :]
    with pytest.raises(TypeError, match=r"slice.* 0$"):
        whole[0]  # type: ignore[index]


def test_batches_are_the_windows_in_order_the_last_one_shorter() -> None:
    windows = windows_of()
    batches = windows.batches(5)
    assert [len(batch) for batch in batches] == [5] * 12 + [2]
    assert torch.equal(torch.cat(list(batches)), windows.tokens)
    with pytest.raises(ValueError, match=r"batch size 0$"):
        windows.batches(0)


# Large texts: the limits are made small.

WORDS = "".join(f"{i:07d}" + " \n"[i % 50 == 49] for i in range(20_000))  # 160,000 bytes


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE", 10_000)
    monkeypatch.setattr(module, "PIECE", 1_000)


def places(windows: TokenWindows) -> list[int]:
    return [WORDS.index(window) for window in letters(windows)]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("length", [16, 300])  # short and long, compared with a piece
def test_windows_of_a_large_text_are_parts_of_it_in_order_that_do_not_overlap(length: int) -> None:
    windows = windows_of(WORDS, windows=30, length=length)
    found = places(windows)
    assert (len(found), windows.available) == (30, None)
    assert all(there - here >= length for here, there in itertools.pairwise(found))
    again = windows_of(WORDS, windows=30, length=length)
    assert again.fingerprint == windows.fingerprint
    assert windows_of(WORDS, windows=30, length=length, seed=1).fingerprint != windows.fingerprint


@pytest.mark.usefixtures("large")
def test_the_windows_do_not_depend_on_how_a_large_text_is_stored(tmp_path: Path) -> None:
    lines = WORDS.splitlines()
    (tmp_path / "whole.txt").write_text("\n\n".join(lines))
    for i in range(8):
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / f"{i}.txt").write_text("\n\n".join(lines[i * 50 : (i + 1) * 50]))
    for count in (20, None):
        found = [
            token_windows(text, tiny_tokenizer(), windows=count, length=32).fingerprint
            for text in (lines, tmp_path / "whole.txt", tmp_path / "parts")
        ]
        assert len({*found}) == 1


@pytest.mark.usefixtures("large")
def test_places_in_a_large_text_are_uniform() -> None:
    drawn = [
        place for seed in range(40) for place in places(windows_of(WORDS, windows=50, seed=seed))
    ]
    tenths = np.bincount(np.array(drawn) * 10 // len(WORDS), minlength=10)
    assert tenths.sum() == 2000
    assert scipy.stats.chisquare(tenths).pvalue > 0.01


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("text", [WORDS, TEXT * 30, "語" * 20_000], ids=["lines", "line", "語"])
def test_all_windows_of_a_large_text_are_its_slices(text: str) -> None:
    ids = tiny_tokenizer()(text, verbose=False)["input_ids"]
    expected = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    windows = windows_of(text, windows=None)
    assert torch.equal(windows.tokens, expected)
    assert windows.available == len(expected)
    assert torch.equal(windows_of(text, windows=len(expected) + 1).tokens, expected)
    most = windows_of(text, windows=len(expected) - 1)  # more than are drawn in pieces
    assert (len(most), most.available) == (len(expected) - 1, len(expected))
    assert len(windows_of(text, windows=9)) == 9


@pytest.mark.usefixtures("large")
def test_of_a_large_text_only_pieces_are_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seen = tiny_tokenizer(), list[int]()

    class Counting(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **options: Any) -> Any:
            seen.append(len(text))
            return super().__call__(text, **options)

    monkeypatch.setattr(tokenizer, "__class__", Counting)
    windows_of(WORDS, windows=8, tokenizer=tokenizer)
    assert max(seen) < 2_000
    assert sum(seen) < 10 * 2_000
    seen.clear()
    windows_of(WORDS, windows=None, tokenizer=tokenizer)
    assert max(seen) < 20_000
    assert sum(seen) == pytest.approx(len(WORDS), abs=10)


@pytest.mark.usefixtures("large")
def test_a_large_text_without_enough_tokens_is_an_error() -> None:
    """Its words are not known: each of 1,000 characters or so is one token."""
    tokenizer = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1}, unk_token="<unk>"))
    )
    with pytest.raises(ValueError, match=r"\b\d+ tokens, fewer than one window of 100\b"):
        windows_of(WORDS, tokenizer=tokenizer, windows=1, length=100)


# Unknown tokens.


@pytest.mark.parametrize(("known", "told"), [(1.0, None), (0.995, None), (0.9, "9.3% ")])
def test_the_share_of_unknown_tokens_is_told(known: float, told: str | None) -> None:
    windows = windows_of(
        "a" * round(1000 * known) + "é" * round(1000 * (1 - known)), tokenizer=few()
    )
    assert [note[:5] for note in windows.notes] == ([] if told is None else [told])


def test_a_text_that_is_mostly_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\b59\.7% .*unknown token <unk>"):
        windows_of("a" * 400 + "é" * 600, tokenizer=few())
    ended = few(eos_token="<unk>")  # as in GPT-2: also another token
    assert windows_of("a" * 400 + "é" * 600, tokenizer=ended).notes == ()


def few(**special: str) -> Any:
    """Return a tokenizer that knows two letters."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, unk_token="<unk>", **special
    )
