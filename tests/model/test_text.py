"""Windows are slices of the tokenised text; where they come from is read as it is written."""

import dataclasses
import itertools
import random
import re
import string
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from entangle.model.text import Bos, TokenWindows, check_disjoint, read_documents, token_windows
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


def test_windows_of_two_texts_are_compared_by_their_tokens() -> None:
    calibration, other = windows_of(windows=None), windows_of(TEXT[1:], windows=None)
    check_disjoint(calibration, other)  # shifted by a letter: no window is the same
    mixed = windows_of(TEXT[: 3 * LENGTH] + "x" * 40, windows=None)
    with pytest.raises(ValueError, match=r"\b3 of 5 evaluation windows.*calibration"):
        check_disjoint(calibration, mixed)
    with pytest.raises(ValueError, match=r"\b1 of 1 evaluation windows.*calibration"):
        check_disjoint(mixed, windows_of("x" * LENGTH))


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


# Reading.


def test_a_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "story.md"
    file.write_text("Größe 1\r\n", encoding="utf-8", newline="")
    assert read_documents(file) == (str(file), ["Größe 1\n"])
    assert token_windows(str(file), tiny_tokenizer(), length=4).text == str(file)


def test_of_a_folder_each_text_is_a_document_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "calibration.txt"):
        (tmp_path / name).write_text(name)
    assert read_documents(tmp_path) == (str(tmp_path), ["a.txt", "b.txt", "calibration.txt"])


def test_of_a_folder_made_for_it_the_purpose_chooses_the_file(tmp_path: Path) -> None:
    for name in ("calibration", "evaluation", "other"):
        (tmp_path / f"{name}.txt").write_text(f"for {name}")
    for purpose in ("calibration", "evaluation"):
        expected = (str(tmp_path / f"{purpose}.txt"), [f"for {purpose}"])
        assert read_documents(tmp_path, purpose) == expected
    windows = token_windows(tmp_path, tiny_tokenizer(), length=4, purpose="evaluation")
    assert letters(windows) == ["for ", "eval", "uati"]
    assert windows.text == str(tmp_path / "evaluation.txt")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt .*UTF-8.* 0xf6\b"):
        read_documents(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"/empty .*no \*\.txt"):
        read_documents(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no text .*/nowhere\b"):
        read_documents(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["It was a dark night.", "word " * 200, "a" * 5000, "a\n" * 99])
def test_text_itself_in_place_of_a_path_is_recognised(text: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text .*\[text\]") as caught:
        token_windows(text, tiny_tokenizer())
    assert len(str(caught.value)) < 300


# The hub.


class Hub(ModuleType):
    """A `datasets` that knows some data sets and notes what it is asked."""

    known = frozenset({("wikitext", "raw-v1"), ("owner/name", None), ("owner/name", "config")})

    def __init__(self) -> None:
        super().__init__("datasets")
        self.asked: list[tuple[str, str | None, str]] = []

    def load_dataset(self, path: str, config: str | None, *, split: str) -> "Table":
        self.asked.append((path, config, split))
        if (path, config) not in self.known:
            raise ValueError(f"the hub has no {path} {config or ''}".rstrip())
        return Table()


class Table(dict[str, list[str]]):
    column_names = ("text", "page")

    def __getitem__(self, column: str) -> list[str]:
        return [f"{column} 1", f"{column} 2"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    module = Hub()
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize(
    ("name", "path", "config", "split", "column"),
    [
        ("owner/name", "owner/name", None, "train", "text"),
        ("wikitext/raw-v1", "wikitext", "raw-v1", "train", "text"),
        ("owner/name/config", "owner/name", "config", "train", "text"),
        ("owner/name:test[:5%]", "owner/name", None, "test[:5%]", "text"),
        ("wikitext/raw-v1#page", "wikitext", "raw-v1", "train", "page"),
        ("owner/name/config:validation#page", "owner/name", "config", "validation", "page"),
    ],
)
def test_the_hub_is_asked_for_what_is_written(
    hub: Hub, name: str, path: str, config: str | None, split: str, column: str
) -> None:
    assert read_documents(f"hub:{name}") == (f"hub:{name}", [f"{column} 1", f"{column} 2"])
    assert hub.asked[-1] == (path, config, split)
    assert (path, config) in hub.known


def test_an_owners_data_set_is_preferred_to_a_configuration(hub: Hub) -> None:
    read_documents("hub:owner/name")
    assert hub.asked == [("owner/name", None, "train")]


def test_what_the_hub_does_not_have_is_said(hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"read hub:no/such\b") as caught:
        read_documents("hub:no/such:test")
    assert "the hub has no no/such" in str(caught.value)
    assert "the hub has no no such" in str(caught.value)
    with pytest.raises(ValueError, match=r"hub:owner/name .*no column 'body'.* text, page\b.*#"):
        read_documents("hub:owner/name#body")


def test_without_the_extra_the_command_to_install_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'entangle\[hub\]'"):
        read_documents("hub:wikitext")
