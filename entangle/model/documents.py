"""The documents of a text, from files, the hub or Python: any span is read without the rest."""

import functools
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from jinja2 import TemplateError

Purpose = Literal["calibration", "evaluation"]
Chat = Callable[[list[dict[str, Any]]], str]  # makes a text of the messages of a conversation

TABLES = {".json", ".jsonl", ".parquet", ".arrow"}  # suffixes of files that are no plain text
BLANK = "\n\n"  # joins documents
REACH = 2**14  # bytes: a good place to cut is searched at most so far after a given place
PART = 2**20  # bytes: about so much of a list or a table is read at once


class _Part(Protocol):
    """A part of a text: a file, or some documents joined by blank lines."""

    size: int  # bytes

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes between two places."""

    def decoded(self, data: bytes, start: int) -> str:
        """Return the text of bytes that were read at a place."""


class Documents:
    """Documents joined by blank lines. Only what is read is held in memory.

    Places are numbers of bytes of the joined documents in UTF-8.
    """

    def __init__(self, source: str, parts: Sequence[_Part], notes: Sequence[str] = ()) -> None:
        self.source = source  # where the documents were read
        self.notes = tuple(notes)  # sentences on what was left out
        self.parts = parts
        self.ends = np.cumsum([part.size + len(BLANK) for part in parts], dtype=np.int64)
        self.size = max(int(self.ends[-1]) - len(BLANK), 0) if len(parts) else 0  # bytes

    def read(self, start: int = 0, end: int | None = None) -> str:
        """Return the text between two places; the default is all of it.

        Raises:
            ValueError: a file is not UTF-8 text.
        """
        spans = self._spans(start, self.size if end is None else end)
        return "".join(part.decoded(data, at) + blank for part, at, data, blank in spans)

    def cut(self, place: int) -> int:
        """Return a good place to cut, at or soon after a place.

        A good place is after a blank line; if none is near, after a line; else before white space;
        else between two characters.
        """
        if not 0 < place < self.size:
            return min(max(place, 0), self.size)
        spans = self._spans(place - 1, min(place + REACH, self.size))
        near = b"".join(data + blank.encode() for _, _, data, blank in spans)
        for pattern in (rb"\n\n", rb"\n", rb".(?=\s)", rb".(?=[^\x80-\xbf])"):
            if found := re.search(pattern, near, re.DOTALL):
                return place - 1 + found.end()
        return place - 1 + len(near)

    def _spans(self, start: int, end: int) -> Iterator[tuple[_Part, int, bytes, str]]:
        """Give the parts between two places.

        For each: the part, the place in it where the bytes begin, the bytes, and what is needed of
        the blank line after it.
        """
        for which in range(int(np.searchsorted(self.ends, start, side="right")), len(self.parts)):
            part, stop = self.parts[which], int(self.ends[which]) - len(BLANK)
            first = stop - part.size
            if first >= end:
                return
            here, there = max(start - first, 0), min(end - first, part.size)
            data = part.read(here, there) if here < there else b""
            yield part, here, data, BLANK[max(start - stop, 0) : max(end - stop, 0)]


class _File:
    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size

    def read(self, start: int, end: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def decoded(self, data: bytes, start: int) -> str:
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} is not UTF-8 text: {error.reason} at byte {start + error.start:,}, "
                f"0x{data[error.start]:02x}"
            ) from error
        return text.replace("\r\n", "\n").replace("\r", "\n")


class _Rows:
    def __init__(self, documents: Callable[[], Sequence[str]], size: int | None = None) -> None:
        self.documents = documents
        self.size = len(_joined(documents)) if size is None else size

    def read(self, start: int, end: int) -> bytes:
        return _joined(self.documents)[start:end]

    def decoded(self, data: bytes, start: int) -> str:
        return data.decode()


@functools.lru_cache(maxsize=2)  # neighbouring spans are read one after the other
def _joined(documents: Callable[[], Sequence[str]]) -> bytes:
    return BLANK.join(documents()).encode()


def _rows_at_once(rows: int, size: int) -> int:
    """Return how many rows of a list or table have about the size of a part, and at most 1000."""
    return max(1, min(1000, PART * rows // max(size, 1)))


def read_documents(
    text: str | Path | Sequence[str], purpose: Purpose = "calibration", chat: Chat | None = None
) -> Documents:
    """Open a text: a file, a folder of ``*.txt``, ``hub:NAME[/CONFIG][:SPLIT][#COLUMN]`` or a list.

    If a folder has ``calibration.txt`` and ``evaluation.txt``, only the file that ``purpose`` names
    is read. ``chat`` makes texts of a column of conversations.

    Raises:
        FileNotFoundError: the file or folder does not exist, or the folder has no ``*.txt``.
        ValueError: the name is empty, the file is no plain text by its suffix, or a text of the hub
            cannot be read.
    """
    if not isinstance(text, str | Path):
        given = list(text)
        step = _rows_at_once(len(given), sum(map(len, given)))
        slices = (slice(start, start + step) for start in range(0, len(given), step))
        parts = [_Rows(functools.partial(given.__getitem__, one)) for one in slices]
        return Documents("documents given in Python", parts)
    if str(text).startswith("hub:"):
        return _read_hub(str(text), chat)
    if not str(text):  # Path would take it for the current folder
        raise ValueError("the name of the text is empty: give a file, a folder or hub:NAME")
    path = Path(text)
    named = all(len(part) < 256 for part in path.parts)  # a longer part cannot be a file name
    if named and path.is_dir():
        files = sorted(path.glob("*.txt"))
        names = {file.name for file in files}
        if {"calibration.txt", "evaluation.txt"} <= names:
            path = path / f"{purpose}.txt"
            files = [path]
        if not files:
            raise FileNotFoundError(f"the folder {path} holds no *.txt file")
    elif named and path.is_file():
        if path.suffix in TABLES:
            raise ValueError(
                f"{path} is a table or JSON and no plain text: its names of fields and marks would be "
                "read as text. Write its texts to a .txt file, or give them in Python as a list"
            )
        files = [path]
    else:
        raise FileNotFoundError(
            f"there is no text at {textwrap.shorten(str(text), 100)}: expected a file, a folder "
            "of *.txt, hub:NAME[/CONFIG][:SPLIT][#COLUMN], or self: (what the model itself writes). "
            "In Python, give the text itself as a list: [text]"
        )
    return Documents(str(path), [_File(file) for file in files])


def _read_hub(source: str, chat: Chat | None) -> Documents:
    """Open a column of a data set of the Hugging Face hub; the default is `text` of `train`.

    Raises:
        ValueError: the extra `hub` is not installed, the hub has no such data set or column, or the
            column holds neither texts nor conversations that ``chat`` can write.
    """
    table, column = _open_hub(source.removeprefix("hub:"))
    where, kind = f"column {column!r} of {source}", table.features[column]
    table = table.select_columns([column])
    strings = getattr(kind, "dtype", "") in {"string", "large_string"}
    if not strings:
        _check_chat(table, column, where, chat)

    def texts(start: int, end: int) -> list[str]:
        rows = [row for row in table[start:end][column] if row is not None]
        return rows if strings else [_written(row, chat, where) for row in rows]

    parts, nulls, start = [], 0, 0
    mapped = table.with_format("arrow")[:]  # not yet read
    for batch in mapped.to_batches(max_chunksize=_rows_at_once(len(mapped), mapped.nbytes)):
        rows, end = batch.column(0), start + len(batch)
        known = len(rows) - rows.null_count
        if known:
            documents = functools.partial(texts, start, end)
            size = _bytes(rows) + len(BLANK) * (known - 1) if strings else None
            parts.append(_Rows(documents, size))
        nulls, start = nulls + rows.null_count, end
    note = f"{nulls:,} of the {start:,} rows in {where} are null: they are left out"
    return Documents(source, parts, [note] if nulls else [])


def _bytes(strings: Any) -> int:
    """Return the total length of an Arrow array of strings, from its offsets only."""
    import pyarrow.compute  # installed, since datasets needs it

    return int(pyarrow.compute.sum(pyarrow.compute.binary_length(strings)).as_py())


def _check_chat(table: Any, column: str, where: str, chat: Chat | None) -> None:
    """Check that a column without texts holds conversations, and that there is a template.

    Raises:
        ValueError: it holds something else, or there is no template.
    """
    rows = (row[column] for row in table)
    first = next((row for row in rows if row), None)
    is_chat = isinstance(first, list) and all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in first
    )
    if not is_chat:
        raise ValueError(
            f"{where} holds neither texts nor conversations (lists of messages with role and "
            f"content), but {textwrap.shorten(str(table.features[column]), 100)}: choose another "
            "column with #COLUMN"
        )
    if chat is None:
        raise ValueError(
            f"{where} holds conversations, but the model's tokenizer has no chat template to write "
            "them as texts: choose another column with #COLUMN, or a model with a chat template"
        )


def _written(messages: list[dict[str, Any]], chat: Chat | None, where: str) -> str:
    assert chat is not None
    # Arrow gives each message all keys of the other messages, with None as value.
    known = [{name: value for name, value in m.items() if value is not None} for m in messages]
    try:
        return chat(known)
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"the tokenizer's chat template cannot write a conversation in {where} ({error}): "
            f"{textwrap.shorten(str(known), 200)}"
        ) from error


def _open_hub(name: str) -> tuple[Any, str]:
    """Return a data set of the hub, memory-mapped, and the name of the chosen column.

    Raises:
        ValueError: the extra `hub` is not installed, or the hub has no such data set or column.
    """
    try:
        import datasets  # an optional package, only for texts of the hub
    except ImportError as error:
        raise ValueError(
            "texts of the hub need the extra 'hub': pip install 'entangle[hub]'"
        ) from error
    name, _, column = name.partition("#")
    name, _, split = name.partition(":")
    if not name:
        raise ValueError("hub: names no data set: expected hub:NAME[/CONFIG][:SPLIT][#COLUMN]")
    parts = name.split("/")
    # "a/b" is data set b of owner a, or configuration b of data set a: try both. A folder is itself.
    folder = Path(name).is_dir()
    attempts: list[tuple[str, str | None]] = [(name, None)] if folder or len(parts) < 3 else []
    attempts += [("/".join(parts[:-1]), parts[-1])] if len(parts) > 1 and not folder else []
    problems = []
    for path, config in attempts:
        try:
            table = datasets.load_dataset(path, config, split=split or "train")
        except (
            *(OSError, ValueError, LookupError, RuntimeError),
            datasets.exceptions.DatasetsError,
        ) as error:
            problems.append(f"  {path}, configuration {config}: {error}".rstrip())
            continue
        if (column or "text") not in table.column_names:
            raise ValueError(
                f"hub:{name} has no column {column or 'text'!r}; its columns are "
                f"{', '.join(table.column_names)}: choose one with #COLUMN"
            )
        return table, column or "text"
    raise ValueError(f"could not read hub:{name}:\n" + "\n".join(problems))
