"""Sliding windows: each token of a text is scored once, with as much context as a window has."""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from entangle.model.text import Bos, TokenWindows, start_tokens, token_windows


def sliding_windows(
    text: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stride: int,
    windows: int | None = 128,
    length: int = 512,
    seed: int = 0,
    bos: Bos = "auto",
) -> TokenWindows:
    """Draw ``windows`` random windows of those that slide over a text by ``stride`` tokens.

    The text is cut into pieces of ``stride`` tokens. The window of a piece has the piece and the
    tokens before it, ``length`` in all. Only the piece is scored, so each token of the text is scored
    once, given at least ``length - stride`` tokens where the text has as many before it. The pieces at
    the beginning of the text, which have fewer, are scored in the text's first window. If the windows
    begin with no token of the tokenizer (see `token_windows`), the text's first token is given and
    not scored. A rest that is shorter than a piece is left out.

    If the text has fewer windows, or if ``windows`` is None, all of them are returned. They are for
    `perplexity` only. The whole text is tokenised.

    Raises:
        ValueError: as `token_windows`; or the stride leaves no token before the piece.
    """
    start = start_tokens(tokenizer, bos)
    given, body = max(len(start), 1), length - len(start)
    if (windows is not None and windows < 1) or not 1 <= stride <= length - given:
        raise ValueError(
            f"expected at least 1 window and a stride from 1 to {length - given} for windows of "
            f"{length} tokens, got {windows} windows and a stride of {stride}"
        )
    pairs = token_windows(
        text, tokenizer, windows=None, length=2, bos="never", purpose="evaluation"
    )
    tokens = pairs.tokens.flatten()
    scored = given - len(start)  # the place of the first scored token in the text
    available = max(len(tokens) - scored, 0) // stride if len(tokens) >= body else 0
    if not available:
        raise ValueError(
            f"the text ({pairs.text}) has {len(tokens):,} tokens, fewer than one window of {length}: "
            "give a longer text or a smaller length"
        )
    pieces = np.arange(available)
    if windows is not None and windows < available:
        pieces = np.random.default_rng(seed).choice(available, size=windows, replace=False)
        pieces.sort()
    firsts = torch.from_numpy(scored + stride * pieces)  # in the text
    begins = (firsts + stride - body).clamp(min=0)
    found = torch.stack([tokens[begin : begin + body] for begin in begins.tolist()])
    starts = torch.tensor(start, dtype=torch.int64).expand(len(found), -1)
    return TokenWindows(
        torch.cat([starts, found], dim=1),
        pairs.text,
        available,
        seed,
        bos,
        len(start),
        pairs.notes,
        stride=stride,
        firsts=len(start) + firsts - begins,
    )
