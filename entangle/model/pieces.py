"""The text of each token in its window, such that all of them together are the window's text."""

from collections.abc import Callable, Sequence
from typing import Any

_LONGEST = 4  # tokens of one character of UTF-8, each a byte
_PART = "\ufffd"  # what a part of a character is decoded to


def pieces_of(tokens: Sequence[int], decode: Callable[[list[int]], Any]) -> list[str]:
    """Return the text of each token.

    A token is decoded after those of the piece before it, since one decoded alone may lose its
    space. If several tokens make one character, the last of them has it and the others have no
    text. Bytes that are no part of a character are replacement signs, at their own tokens.
    """
    found: list[str] = []
    before, begin = 0, 0  # where the tokens of the piece before begin, and those of this one
    for end in range(1, len(tokens) + 1):
        known = str(decode(list(tokens[before:begin]))) + "".join(found[begin:])
        whole = str(decode(list(tokens[before:end])))
        settled = whole
        if whole.endswith(_PART):  # what the next tokens change was only a part of a character
            ends = range(end + 1, min(end + _LONGEST, len(tokens) + 1))
            later = [str(decode(list(tokens[before:last]))) for last in ends]
            while not all(text.startswith(settled) for text in later):
                settled = settled[:-1]
        follows = settled.startswith(known)
        found.append(settled[len(known) :] if follows else str(decode([tokens[end - 1]])))
        if whole != known and not whole.endswith(_PART):
            before, begin = begin, end
    return found
