"""Windows of tokens that are cut from a text, and their fingerprint."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.model.documents import Chat, Documents, Purpose, read_documents
from entangle.model.limits import context_of

Bos = Literal["auto", "always", "never"]
OWN = "self:"  # names the text that the model writes itself, see `runs.own_text`
NOT_SCORED = (
    f"{OWN} is what the model writes itself, so a score on it would not tell how well the model knows "
    "a text: give a text that the model did not write"
)
Ids = npt.NDArray[np.int32]

WHOLE = 2**24  # bytes; a text of at most this size is tokenised at once: 160 times its size
PIECE = 2**16  # bytes of a piece in which windows are drawn, or more for long windows
ROUNDS = 16  # of draws: each round replaces the windows that were drawn twice
UNKNOWN = 0.01, 0.5  # shares of unknown tokens: above the first a note, above the second an error


@dataclasses.dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of one text or of several, and where the text was read."""

    tokens: torch.Tensor  # (windows, length) int64, on the CPU
    text: str  # the source of the text
    available: int | None  # the number of windows in the whole text; None: it was not counted
    seed: int
    bos: Bos
    starts: int = 0  # the number of tokens of each window that stand before its text
    notes: tuple[str, ...] = ()  # sentences on rows that were left out and on unknown tokens
    parts: tuple["TokenWindows", ...] = ()  # of several texts: the windows that were mixed
    origins: torch.Tensor | None = None  # (windows,): the index in ``parts`` of each window
    decode: Callable[[list[int]], str] | None = None  # of the model's own text: makes text of it
    seconds: float = 0.0  # that the model took to write its own text
    stride: int = 0  # of sliding windows: the number of scored tokens of each window
    firsts: torch.Tensor | None = None  # (windows,): of sliding windows, the first scored token

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
        chosen = self.chosen(torch.arange(len(self))[which])
        if not len(chosen):
            raise ValueError(f"{which} selects none of the {len(self)} windows")
        return chosen

    def chosen(self, which: torch.Tensor) -> "TokenWindows":
        """Return the windows at these places, or where a mask (windows,) is true.

        Of several texts only those that have a window are left.
        """
        tokens = self.tokens[which]
        if self.origins is None or not len(tokens):
            firsts = None if self.firsts is None else self.firsts[which]
            return dataclasses.replace(self, tokens=tokens, firsts=firsts)
        kept, origins = torch.unique(self.origins[which], return_inverse=True)
        parts: tuple[TokenWindows, ...] = tuple(self.parts[place] for place in kept.tolist())
        if len(parts) == 1:
            return dataclasses.replace(parts[0], tokens=tokens)
        text = " + ".join(part.text for part in parts)
        return dataclasses.replace(self, tokens=tokens, text=text, parts=parts, origins=origins)

    def by_text(self) -> list["TokenWindows"]:
        """Return the windows of each text by themselves."""
        if self.origins is None:
            return [self]
        return [
            dataclasses.replace(part, tokens=self.tokens[self.origins == place])
            for place, part in enumerate(self.parts)
        ]

    @property
    def names(self) -> list[str]:
        """The name of each text; several lists, which have one name in Python, are numbered."""
        texts = [part.text for part in self.parts] or [self.text]
        before = [texts[:place].count(text) for place, text in enumerate(texts)]
        return [f"{text} ({n + 1})" if n else text for text, n in zip(texts, before, strict=True)]

    @property
    def places(self) -> torch.Tensor:
        """The places (windows,) of the windows, text after text.

        Every fourth of them has a fourth of each text. Every fourth window has not: the windows of
        several texts take turns.
        """
        if self.origins is None:
            return torch.arange(len(self))
        return torch.argsort(self.origins, stable=True)

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
            ``length`` less than 2, or not more than the tokens that a window begins with;
            ``bos`` is unknown, or ``always`` with a tokenizer that has no token to begin with; or
            the text is ``self:``, which needs a model (see `runs.own_text.own_windows`).
    """
    if text == OWN and purpose == "evaluation":
        raise ValueError(NOT_SCORED)
    if text == OWN:
        raise ValueError(
            f"{OWN} is what a model writes itself, and here is no model: call "
            "own_windows(model, tokenizer), or give another text"
        )
    if (windows is not None and windows < 1) or length < 2:
        raise ValueError(
            f"expected at least 1 window of at least 2 tokens, got {windows} windows of {length} "
            "tokens"
        )
    start = start_tokens(tokenizer, bos)
    body = length - len(start)
    if body < 1:
        raise ValueError(
            f"windows of {length} tokens leave no room for text after the {len(start)} tokens that "
            "this tokenizer begins a text with: use a larger length"
        )

    def encode(text: str) -> Ids:
        # verbose=False: no warning that the text is longer than the model's context.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    documents = read_documents(text, purpose, _chat(tokenizer))
    large, drawn, available = documents.size > WHOLE, None, None
    # A few windows of a large text are drawn without reading the rest. A few means at most a
    # quarter of all, if a token has 4 bytes.
    if large and windows is not None and 16 * windows * body <= documents.size:
        drawn = _draw(documents, encode, windows, body, seed)
    if drawn is None:
        step = 16 * PIECE if large else WHOLE
        cuts = (documents.cut(place) for place in range(0, documents.size + step, step))
        pieces = itertools.starmap(documents.read, itertools.pairwise(cuts))
        drawn, tokens = _cut(map(encode, pieces), body)
        available = len(drawn)
        if available == 0:
            raise ValueError(
                f"the text ({documents.source}) has {tokens:,} tokens, fewer than one window of "
                f"{length}: give a longer text or a smaller length"
            )
        if windows is not None and windows < available:
            chosen = np.random.default_rng(seed).choice(available, size=windows, replace=False)
            drawn = drawn[np.sort(chosen)]
    notes = [*documents.notes, *_unknown(drawn, tokenizer, documents.source)]
    starts = np.tile(np.asarray(start, dtype=np.int64), (len(drawn), 1))
    found = torch.from_numpy(np.concatenate([starts, drawn], axis=1))
    return TokenWindows(found, documents.source, available, seed, bos, len(start), tuple(notes))


def _cut(pieces: Iterable[Ids], body: int) -> tuple[Ids, int]:
    """Cut windows (windows, body) from pieces that follow each other; also count all tokens."""
    rows, rest, tokens = [], np.empty(0, np.int32), 0
    for piece in pieces:
        ids = np.concatenate([rest, piece])
        used = len(ids) // body * body
        rows.append(ids[:used].reshape(-1, body))
        rest, tokens = ids[used:].copy(), tokens + len(piece)
    return np.concatenate(rows or [np.empty((0, body), np.int32)]), tokens


def _draw(
    documents: Documents, encode: Callable[[str], Ids], windows: int, body: int, seed: int
) -> Ids | None:
    """Draw windows (windows, body) at places that are uniform over the bytes of a text.

    The text is divided into pieces. A place chooses a piece and one of its windows, and only pieces
    with a place are tokenised. Return None if this finds too few windows.
    """
    generator = np.random.default_rng(seed)
    step = max(PIECE, 32 * body)
    found: dict[tuple[int, int], Ids] = {}
    for _ in range(ROUNDS):
        places = generator.integers(documents.size, size=windows - len(found))
        for piece, group in itertools.groupby(np.sort(places).tolist(), lambda at: at // step):
            first, last = piece * step, min((piece + 1) * step, documents.size)
            text = documents.read(documents.cut(first), documents.cut(last))
            rows, _ = _cut([encode(text)], body)
            for place in group if len(rows) else ():
                index = (place - first) * len(rows) // (last - first)
                found[piece, index] = rows[index].copy()
        if len(found) == windows:
            return np.stack([found[key] for key in sorted(found)])
    return None


def _unknown(ids: Ids, tokenizer: PreTrainedTokenizerBase, source: str) -> list[str]:
    """Return a sentence on the share of unknown tokens in windows, if it is large.

    Raises:
        ValueError: most of the tokens are unknown.
    """
    token: Any = tokenizer.unk_token_id
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if token is None or token in others:  # as in GPT-2: this token has another use
        return []
    share = float((ids == token).mean())
    if share > UNKNOWN[1]:
        raise ValueError(
            f"{share:.1%} of the tokens of the text ({source}) are the unknown token "
            f"{tokenizer.unk_token}: give a text in a language that this tokenizer knows, or check "
            "that it is the model's own"
        )
    known = f"{share:.1%} of the tokens of {source} are the unknown token {tokenizer.unk_token}"
    return [known] if share > UNKNOWN[0] else []


def _chat(tokenizer: PreTrainedTokenizerBase) -> Chat | None:
    """Return a function that writes a conversation as text; None without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    return lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False))


def evenly_spaced(windows: TokenWindows, count: int) -> TokenWindows:
    """Return at most ``count`` of the windows, evenly spaced in each text, but one of each text."""
    if len(windows) <= count:
        return windows
    sizes = [len(part) for part in windows.by_text()]
    # One window of each text, and of the others each text's share, rounded down at its end.
    ends = np.cumsum(sizes) - np.arange(1, len(sizes) + 1)
    ends = ends * max(count - len(sizes), 0) // max(len(windows) - len(sizes), 1)
    shares = np.diff(ends, prepend=0) + 1
    which = [
        first + np.linspace(0, size - 1, share).round().astype(int)
        for first, size, share in zip(np.cumsum([0, *sizes]), sizes, shares, strict=False)
    ]
    places = torch.from_numpy(np.concatenate(which))
    return windows.chosen(windows.places[places].sort().values)


def check_windows(model: PreTrainedModel, windows: TokenWindows, skip_first: int = 0) -> None:
    """Check that a model can run on windows, before a long computation begins.

    Raises:
        ValueError: the model is in training mode, the windows are longer than its context or have
            tokens outside its vocabulary, ``skip_first`` is negative or skips all tokens, or it is
            given with sliding windows.
    """
    if not 0 <= skip_first < windows.length:
        raise ValueError(
            f"expected skip_first from 0 to {windows.length - 1} for windows of {windows.length} "
            f"tokens, got {skip_first}"
        )
    if model.training:
        raise ValueError("the model is in training mode, which enables dropout: call model.eval()")
    context = context_of(model)
    if context is not None and windows.length > context:
        raise ValueError(
            f"windows of {windows.length} tokens are longer than the model's context of {context}: "
            "use a smaller length"
        )
    if windows.stride and skip_first:
        raise ValueError(
            f"expected no skip_first for sliding windows, whose first tokens are not scored anyway, got "
            f"{skip_first}: leave it out"
        )
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    largest = int(windows.tokens.max())
    if largest >= len(embedding):
        raise ValueError(
            f"the text has token {largest}, but the model's vocabulary has {len(embedding)} "
            "tokens: use the tokenizer of this model"
        )


def check_evaluation(windows: TokenWindows) -> None:
    """Check that no model wrote the windows itself.

    Raises:
        ValueError: a model wrote some of them.
    """
    if OWN in windows.names:
        raise ValueError(NOT_SCORED)


def check_one_text(windows: TokenWindows) -> None:
    """Check that a score of these windows is a score of one text, which no model wrote itself.

    Raises:
        ValueError: they are of several texts, or a model wrote some of them.
    """
    check_evaluation(windows)
    if windows.parts:
        raise ValueError(
            f"a score is of one text, but these windows are of {windows.text}: score each text by "
            "itself"
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


def token_name(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """Return a token's text; its id follows if it is a part of a character, since those look alike."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return f"{text}<{token}>" if "\ufffd" in text or not text else text
