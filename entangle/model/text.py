"""Windows of tokens that are cut from a text, and their fingerprint."""

import dataclasses
import hashlib
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]
Purpose = Literal["calibration", "evaluation"]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of one text, and where the text was read."""

    tokens: torch.Tensor  # (windows, length) int64, on the CPU
    text: str  # the source of the text
    available: int  # the number of windows in the whole text
    seed: int
    bos: Bos

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the tokens and their shape."""
        array = self.tokens.numpy().astype("<i8")
        return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()

    @property
    def hashes(self) -> list[str]:
        """The first 12 hex digits of the SHA-256 of each window's tokens."""
        rows = self.tokens.numpy().astype("<i8")
        return [hashlib.sha256(row.tobytes()).hexdigest()[:12] for row in rows]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, which: slice) -> "TokenWindows":
        """Return some of the windows: ``windows[::2]`` and ``windows[1::2]`` are disjoint halves.

        Raises:
            TypeError: ``which`` is not a slice.
            ValueError: the slice is empty, or its step is not positive.
        """
        if not isinstance(which, slice):
            raise TypeError(f"expected a slice of windows, such as windows[:8], got {which!r}")
        tokens = self.tokens[which]
        if not len(tokens):
            raise ValueError(f"{which} selects none of the {len(self)} windows")
        return dataclasses.replace(self, tokens=tokens)

    @property
    def length(self) -> int:
        """The number of tokens in a window."""
        return int(self.tokens.shape[1])

    def batches(self, size: int) -> Sequence[torch.Tensor]:
        """Return the windows in batches of ``size`` (the last may have fewer).

        Raises:
            ValueError: ``size`` is not positive.
        """
        if size < 1:
            raise ValueError(f"a batch needs at least one window, got batch size {size}")
        return torch.split(self.tokens, size)


def token_windows(
    text: str | Path | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int | None = 128,
    length: int = 512,
    seed: int = 0,
    bos: Bos = "auto",
    purpose: Purpose = "calibration",
) -> TokenWindows:
    """Draw ``windows`` random windows of ``length`` tokens from a text, by ``seed``.

    If the text has fewer windows, or if ``windows`` is None, all of them are returned. Windows keep
    the order of the text.

    ``text`` is a source, as TEXT on the command line (see `read_documents`), or a list of documents.
    ``bos`` sets which tokens each window begins with: ``auto``, those that the tokenizer itself
    puts before a text; ``always``, the same, or its beginning-of-sequence token if there are none;
    ``never``, none. They count towards ``length``. Tokens that it puts after a text are left out.

    Raises:
        ValueError: the text has fewer tokens than one window; ``windows`` is less than 1 or
            ``length`` less than 2, or not more than the tokens that a window begins with; or
            ``bos`` is unknown, or ``always`` with a tokenizer that has no token to begin with.
    """
    if (windows is not None and windows < 1) or length < 2:
        raise ValueError(
            f"expected at least 1 window of at least 2 tokens, got {windows} windows of {length} "
            "tokens"
        )
    if isinstance(text, str | Path):
        source, documents = read_documents(text, purpose)
    else:
        source, documents = "documents given in Python", list(text)
    start = start_tokens(tokenizer, bos)
    if length <= len(start):
        raise ValueError(
            f"windows of {length} tokens leave no room for text after the {len(start)} tokens that "
            "this tokenizer begins a text with: use a larger length"
        )
    # verbose=False: no warning that the text is longer than the model's context.
    ids = tokenizer("\n\n".join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    body = length - len(start)
    available = len(ids) // body
    if available == 0:
        raise ValueError(
            f"the text ({source}) has {len(ids):,} tokens, fewer than one window of {length}: "
            "give a longer text or a smaller length"
        )
    stream = np.asarray(ids, dtype=np.int64)[: available * body].reshape(available, body)
    if windows is not None and windows < available:
        drawn = np.random.default_rng(seed).choice(available, size=windows, replace=False)
        stream = stream[np.sort(drawn)]
    starts = np.tile(np.asarray(start, dtype=np.int64), (len(stream), 1))
    tokens = torch.from_numpy(np.concatenate([starts, stream], axis=1))
    return TokenWindows(tokens, source, available, seed, bos)


def evenly_spaced(windows: TokenWindows, count: int) -> TokenWindows:
    """Return at most ``count`` of the windows, evenly spaced."""
    if len(windows) <= count:
        return windows
    places = np.linspace(0, len(windows) - 1, count).round().astype(int)
    return dataclasses.replace(windows, tokens=windows.tokens[torch.from_numpy(places)])


def check_windows(model: PreTrainedModel, windows: TokenWindows, skip_first: int = 0) -> None:
    """Check that a model can run on windows, before a long computation begins.

    Raises:
        ValueError: the model is in training mode, the windows are longer than its context or have
            tokens outside its vocabulary, or ``skip_first`` is negative or skips all tokens.
    """
    if not 0 <= skip_first < windows.length:
        raise ValueError(
            f"expected skip_first from 0 to {windows.length - 1} for windows of {windows.length} "
            f"tokens, got {skip_first}"
        )
    if model.training:
        raise ValueError("the model is in training mode, which enables dropout: call model.eval()")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and windows.length > context:
        raise ValueError(
            f"windows of {windows.length} tokens are longer than the model's context of {context}: "
            "use a smaller length"
        )
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    largest = int(windows.tokens.max())
    if largest >= len(embedding):
        raise ValueError(
            f"the text has token {largest}, but the model's vocabulary has {len(embedding)} "
            "tokens: use the tokenizer of this model"
        )


def check_disjoint(calibration: TokenWindows, evaluation: TokenWindows) -> None:
    """Check that no evaluation window is also a calibration window.

    Raises:
        ValueError: some evaluation windows have the tokens of a calibration window.
    """
    known = {row.tobytes() for row in calibration.tokens.numpy()}
    shared = sum(row.tobytes() in known for row in evaluation.tokens.numpy())
    if shared:
        raise ValueError(
            f"{shared} of {len(evaluation)} evaluation windows ({evaluation.text}) are also "
            f"calibration windows ({calibration.text}), so their score would be too good: use "
            "another text"
        )


def start_tokens(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> list[int]:
    """Return the tokens that each window begins with.

    They are what the tokenizer's post-processor puts before a text (``auto``); the same, or else
    the beginning-of-sequence token (``always``); or none (``never``). What it puts after a text,
    such as an end of sequence, is never among them.

    Raises:
        ValueError: ``bos`` is unknown, or ``always`` and there is no token to begin with.
    """
    if bos not in {"auto", "always", "never"}:
        raise ValueError(f"bos must be 'auto', 'always' or 'never', got {bos!r}")
    if bos == "never":
        return []
    start: list[int] = []
    for text in ("a", "1", "の"):  # the first that has tokens at all
        plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(text)["input_ids"])
        if plain:
            places = range(len(whole) - len(plain) + 1)
            first = next((i for i in places if whole[i : i + len(plain)] == plain), 0)
            start = whole[:first]
            break
    token: Any = tokenizer.bos_token_id
    if bos == "always" and not start and token is None:
        raise ValueError(
            "this tokenizer puts no token before a text, and has no beginning-of-sequence token: "
            "use bos='never'"
        )
    return [token] if bos == "always" and not start else start


def read_documents(source: str | Path, purpose: Purpose = "calibration") -> tuple[str, list[str]]:
    """Read a text: a file, a folder of ``*.txt``, or ``hub:NAME[/CONFIG][:SPLIT][#COLUMN]``.

    If a folder has ``calibration.txt`` and ``evaluation.txt``, only the file that ``purpose`` names
    is read. Return the exact source and the documents.

    Raises:
        FileNotFoundError: the file or folder does not exist, or the folder has no ``*.txt``.
        ValueError: a file is not UTF-8 text, or a text of the hub cannot be read.
    """
    if str(source).startswith("hub:"):
        return str(source), _read_hub(str(source).removeprefix("hub:"))
    path = Path(source)
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
        files = [path]
    else:
        raise FileNotFoundError(
            f"there is no text at {textwrap.shorten(str(source), 100)}: expected a file, a folder "
            "of *.txt, or hub:NAME[/CONFIG][:SPLIT][#COLUMN]. In Python, give the text itself as a "
            "list: [text]"
        )
    return str(path), [_read_file(file) for file in files]


def _read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _read_hub(name: str) -> list[str]:
    """Read a column of a data set of the Hugging Face hub; the default is `text` of `train`.

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
    parts = name.split("/")
    # "a/b" is data set b of owner a, or configuration b of data set a: try both.
    attempts: list[tuple[str, str | None]] = [(name, None)] if len(parts) < 3 else []
    attempts += [("/".join(parts[:-1]), parts[-1])] if len(parts) > 1 else []
    problems = []
    for path, config in attempts:
        try:
            table = datasets.load_dataset(path, config, split=split or "train")
        except (OSError, ValueError, LookupError, RuntimeError) as error:
            problems.append(f"  {path}, configuration {config}: {error}".rstrip())
            continue
        if (column or "text") not in table.column_names:
            raise ValueError(
                f"hub:{name} has no column {column or 'text'!r}; its columns are "
                f"{', '.join(table.column_names)}: choose one with #COLUMN"
            )
        return [str(document) for document in table[column or "text"]]
    raise ValueError(f"could not read hub:{name}:\n" + "\n".join(problems))
