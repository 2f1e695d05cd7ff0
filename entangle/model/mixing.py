"""Windows of several texts, mixed by equal shares."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from entangle.model.text import OWN, TokenWindows, token_windows


def equal_shares(texts: Sequence[str | Path], windows: int) -> list[int]:
    """Return the number of windows of each text; what is left over goes to the first texts.

    Raises:
        ValueError: a text is given twice, there is none, or there are more texts than windows.
    """
    paths = [os.path.realpath(text) for text in texts]
    twice = [str(text) for text, path in zip(texts, paths, strict=True) if paths.count(path) > 1]
    if twice:
        raise ValueError(f"{twice[-1]} is given twice: give each text once")
    if not texts or (texts[1:] and windows < len(texts)):
        raise ValueError(
            f"expected at least one text, and a window for each, got {len(texts)} texts and "
            f"{windows} windows"
        )
    each, rest = divmod(windows, len(texts))
    return [each + (place < rest) for place in range(len(texts))]


def share_windows(
    texts: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    length: int,
    **options: Any,
) -> list[TokenWindows | None]:
    """Draw each text's share of ``windows``, as `token_windows` draws them from that text alone.

    ``self:`` becomes None: its share can be written only when the model is loaded. ``options`` are
    those of `token_windows`.

    Raises:
        ValueError: as `equal_shares` and `token_windows`; or one of several texts has fewer windows
            than its share.
    """
    parts: list[TokenWindows | None] = []
    for text, count in zip(texts, equal_shares(texts, windows), strict=True):
        if text == OWN:
            parts.append(None)
            continue
        part = token_windows(text, tokenizer, windows=count, length=length, **options)
        if texts[1:] and len(part) < count:  # one text gives what it has: no share is promised
            raise ValueError(
                f"{part.text} has {len(part)} windows of {length} tokens, fewer than its share of "
                f"{count} of {windows} windows: give at most {len(part) * len(texts)} windows, or "
                "leave this text out"
            )
        parts.append(part)
    return parts


def mixed_windows(parts: Sequence[TokenWindows]) -> TokenWindows:
    """Mix windows of several texts: they take turns, each text's windows in their own order.

    So each batch, shard and process has its share of each text, and so has the first batch, which
    places the bins of the histograms. When a text has no more windows, the others go on. The windows
    of one text are returned as they are.

    Raises:
        ValueError: there are none, or they slide; or they are of the same text, or differ in length, in seed or in
            the tokens that they begin with.
    """
    if not parts:
        raise ValueError("expected the windows of at least one text, got none")
    if not parts[1:]:
        return parts[0]
    parts = [part for mixture in parts for part in mixture.by_text()]
    first = parts[0]
    if any(part.stride for part in parts):
        raise ValueError("windows that slide cannot be mixed: score each text by itself")
    for part in parts[1:]:
        for name in ("length", "seed", "bos", "starts"):
            one, other = getattr(first, name), getattr(part, name)
            if one != other:
                raise ValueError(
                    f"only like windows can be mixed, got {name} {one!r} ({first.text}) and "
                    f"{other!r} ({part.text})"
                )
    for one, other in itertools.combinations(parts, 2):
        named = one.text == other.text and Path(one.text).exists()
        if named or one.fingerprint == other.fingerprint or OWN == one.text == other.text:
            raise ValueError(f"{other.text} is given twice: give each text once")
    counts = [len(part) for part in parts]
    turns = [(turn, place) for place, count in enumerate(counts) for turn in range(count)]
    order = torch.tensor(sorted(range(len(turns)), key=turns.__getitem__))
    available = [part.available for part in parts]
    known = [count for count in available if count is not None]
    return dataclasses.replace(
        first,
        tokens=torch.cat([part.tokens for part in parts])[order],
        text=" + ".join(part.text for part in parts),
        available=sum(known) if len(known) == len(parts) else None,
        notes=tuple(note for part in parts for note in part.notes),
        parts=tuple(parts),
        origins=torch.tensor([place for _, place in turns])[order],
        decode=None,
        seconds=sum(part.seconds for part in parts),
    )
