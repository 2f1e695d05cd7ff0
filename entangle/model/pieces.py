"""The text of each token in its window, such that all of them together are the window's text."""

from collections.abc import Callable, Sequence
from typing import Any

_LONGEST = 4  # tokens of one character of UTF-8, each a byte


def pieces_of(tokens: Sequence[int], decode: Callable[[list[int]], Any]) -> list[str]:
    """Return the text of each token.

    A token is decoded after those of the piece before it, since one decoded alone may lose its
    space. If several tokens make one character, the last of them has it and the others have no
    text.
    """
    found: list[str] = []
    before, begin = 0, 0  # where the tokens of the piece before begin, and those of this one
    for end in range(1, len(tokens) + 1):
        known = decode(list(tokens[before:begin]))
        whole = decode(list(tokens[before:end]))
        follows = whole.startswith(known)
        piece = whole[len(known) :] if follows else decode(list(tokens[begin:end]))
        if piece.endswith("\ufffd") and end - begin < _LONGEST and end < len(tokens):
            found.append("")
            continue
        found.append(piece)
        before, begin = begin, end
    return found
