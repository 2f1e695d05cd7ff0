"""Where a text comes from is read as it is written, any span of it without the rest."""

import itertools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle.model.documents import Documents, _open_hub, read_documents
from entangle.model.text import token_windows
from tests.tiny_models import tiny_tokenizer


def contents(documents: Documents) -> tuple[str, str]:
    return documents.source, documents.read()


# Reading.


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "b.parquet"])
def test_tables_are_no_plain_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"text": "words"}')
    with pytest.raises(ValueError, match=rf"{name} .*no plain text"):
        read_documents(tmp_path / name)


def test_an_empty_name_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    assert read_documents(".").read() == "words"
    with pytest.raises(ValueError, match="empty"):
        read_documents("")


def test_a_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "story.md"
    file.write_text("Größe 1\r\n", encoding="utf-8", newline="")
    assert contents(read_documents(file)) == (str(file), "Größe 1\n")
    assert token_windows(str(file), tiny_tokenizer(), length=4).text == str(file)


def test_of_a_folder_each_text_is_a_document_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "calibration.txt"):
        (tmp_path / name).write_text(name)
    expected = (str(tmp_path), "a.txt\n\nb.txt\n\ncalibration.txt")
    assert contents(read_documents(tmp_path)) == expected


def test_of_a_folder_made_for_it_the_purpose_chooses_the_file(tmp_path: Path) -> None:
    for name in ("calibration", "evaluation", "other"):
        (tmp_path / f"{name}.txt").write_text(f"for {name}")
    for purpose in ("calibration", "evaluation"):
        expected = (str(tmp_path / f"{purpose}.txt"), f"for {purpose}")
        assert contents(read_documents(tmp_path, purpose)) == expected
    tokenizer = tiny_tokenizer()
    windows = token_windows(tmp_path, tokenizer, length=4, purpose="evaluation")
    assert tokenizer.batch_decode(windows.tokens) == ["for ", "eval", "uati"]
    assert windows.text == str(tmp_path / "evaluation.txt")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt .*UTF-8.* 0xf6\b"):
        read_documents(tmp_path).read()
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
        self.exceptions = SimpleNamespace(DatasetsError=LookupError)
        self.asked: list[tuple[str, str | None, str]] = []

    def load_dataset(self, path: str, config: str | None, *, split: str) -> SimpleNamespace:
        self.asked.append((path, config, split))
        if (path, config) not in self.known:
            raise ValueError(f"the hub has no {path} {config or ''}".rstrip())
        return SimpleNamespace(column_names=("text", "page"))


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
    assert _open_hub(name)[1] == column
    assert hub.asked[-1] == (path, config, split)


def test_an_owners_data_set_is_preferred_to_a_configuration(hub: Hub) -> None:
    _open_hub("owner/name")
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


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set in a folder, as `datasets` itself reads it: texts, conversations and others."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = [
        {
            "text": None if i % 3 == 1 else f"{i}: é" * (i % 4),
            "messages": None if i == 5 else [{"role": "user", "content": f"Q{i}"}] * (1 + i % 2),
            "others": [{"role": "user", "content": "x"}, {"role": "tool", "content": "", "id": i}],
            "number": i,
            "words": ["a", "b"],
            "nothing": None,
            "parts": [{"from": "me", "value": "x"}],
        }
        for i in range(2500)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"hub:{folder}"


def test_nulls_are_left_out_and_counted(rows: str) -> None:
    found = read_documents(f"{rows}:train[:40%]")
    expected = [f"{i}: é" * (i % 4) for i in range(1000) if i % 3 != 1]
    assert found.read() == "\n\n".join(expected)
    assert found.size == len("\n\n".join(expected).encode())
    (note,) = found.notes
    assert note.startswith("333 of the 1,000 rows")
    assert "'text'" in note
    windows = token_windows(rows, tiny_tokenizer(), windows=3, length=8)
    assert windows.text == rows
    assert [note[:23] for note in windows.notes] == ["833 of the 2,500 rows i"]


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.id }}</s>{% endfor %}"


def test_conversations_are_written_by_the_chat_template(rows: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    texts = [f"<user>Q{i}</s>" * (1 + i % 2) for i in range(2500) if i != 5]
    plain = token_windows(texts, tiny_tokenizer(), windows=None, length=50)
    found = token_windows(f"{rows}#messages", tokenizer, windows=None, length=50)
    assert found.fingerprint == plain.fingerprint
    assert found.notes[0].startswith("1 of the 2,500 rows")
    others = [f"<user>x</s><tool>{i}</s>" for i in range(2500)]
    plain = token_windows(others, tiny_tokenizer(), windows=9, length=50)
    found = token_windows(f"{rows}#others", tokenizer, windows=9, length=50)
    assert (found.fingerprint, found.notes) == (plain.fingerprint, ())
    tokenizer.chat_template = "{{ raise_exception('no tool') }}"
    with pytest.raises(ValueError, match=r"template.*'messages'.*no tool.*Q0"):
        token_windows(f"{rows}#messages", tokenizer)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("messages", r"'messages' of hub.*conversations.*no chat template.*#COLUMN"),
        ("number", r"'number' of hub.*neither texts.*int64.*#COLUMN"),
        ("words", r"'words' of hub.*neither texts.*string.*#COLUMN"),
        ("parts", r"'parts' of hub.*neither texts.*from.*#COLUMN"),
        ("nothing", r"'nothing' of hub.*neither texts.*null.*#COLUMN"),
        ("missing", r"no column 'missing'.*text, messages.*#COLUMN"),
    ],
)
def test_other_columns_are_refused_by_name_and_type(rows: str, column: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_windows(f"{rows}#{column}", tiny_tokenizer())


# Spans.

PIECES = st.lists(st.text(alphabet="aé語😀 \n\r", max_size=40), max_size=6)


@settings(max_examples=60, deadline=None)
@given(PIECES, st.integers(1, 50), st.booleans())
def test_spans_between_cuts_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], step: int, on_disk: bool
) -> None:
    if on_disk:
        folder = tmp_path_factory.mktemp("texts")
        for i, text in enumerate([*texts, "end"]):
            (folder / f"{i}.txt").write_bytes(text.encode())
        documents, texts = read_documents(folder), [*texts, "end"]
        texts = [(folder / f"{i}.txt").read_text(encoding="utf-8") for i in range(len(texts))]
    else:
        documents = read_documents(texts)
    whole = "\n\n".join(texts)
    assert documents.read() == whole
    cuts = [documents.cut(place) for place in range(0, documents.size + step, step)]
    assert cuts == sorted(cuts)
    assert all(cut >= min(i * step, documents.size) for i, cut in enumerate(cuts))
    spans = [documents.read(first, last) for first, last in itertools.pairwise(cuts)]
    assert "".join(spans) == whole


@pytest.mark.parametrize(
    ("text", "place", "cut"),
    [
        ("a line\nanother\n\nthird", 3, 16),  # after a blank line
        ("a line\nanother", 3, 7),  # after a line
        ("one two three", 5, 7),  # before white space
        ("語語語", 4, 6),  # between characters
        ("語語語", 7, 9),
        ("語語語", 6, 6),
        ("one", 0, 0),
        ("one", 7, 3),
    ],
)
def test_a_text_is_cut_where_it_hurts_least(text: str, place: int, cut: int) -> None:
    assert read_documents([text]).cut(place) == cut


def test_what_is_not_text_is_found_where_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 100)
    (tmp_path / "b.txt").write_bytes(b"b" * 50 + b"\xff" + b"b" * 50)
    documents = read_documents(tmp_path)
    assert documents.read(0, 150) == "a" * 100 + "\n\n" + "b" * 48
    with pytest.raises(ValueError, match=r"/b\.txt is not UTF-8.*\b50\b.*0xff"):
        documents.read(120, 160)


def test_a_data_set_that_is_damaged_or_has_no_name_is_told(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"could not read hub:.*"):
        read_documents(f"hub:{tmp_path}")
    with pytest.raises(ValueError, match="no data set"):
        read_documents("hub:")
