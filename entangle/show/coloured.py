"""Tokens coloured by a neuron's value, in a notebook and in a terminal."""

import html
import json
import math
from collections.abc import Sequence

import pandas as pd

from entangle.runs.contexts_file import ColouredWindow

_HIGH, _LOW = "230,120,0", "40,130,230"  # red, green, blue
_OPAQUE = 0.65  # of the strongest colour: text is readable on it in light and dark notebooks
_FAINT = 0.1  # a terminal leaves tokens with less of the colour as they are
# Of a terminal's background, from the faintest to the strongest; text on it is black.
_TINTS = {False: ((255, 228, 190), (255, 140, 20)), True: ((205, 228, 255), (80, 160, 255))}


# What a terminal obeys or does not show: control characters, marks of direction, other line ends.
_UNSEEN = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F)}
_UNSEEN |= {code: f"\\u{code:04x}" for code in (*range(0x2028, 0x202F), *range(0x2066, 0x206A))}
_SIGNS = _UNSEEN | {code: chr(0x2400 + code) for code in range(0x20)}
_SIGNS |= {ord("\n"): "⏎", ord("\t"): "⇥"}


def visible(text: str) -> str:
    """Return a token's text on one line, with signs for control characters such as line breaks."""
    return text.translate(_SIGNS)


def plain(text: str) -> str:
    """Return a text of several lines, with signs for other control characters."""
    return text.translate({code: sign for code, sign in _SIGNS.items() if chr(code) not in "\n\t"})


def quoted(text: str) -> str:
    """Return a text in quotes on one line, with escapes for control characters."""
    return json.dumps(text, ensure_ascii=False).translate(_UNSEEN)


def in_html(tokens: Sequence[str], titles: Sequence[str], shades: Sequence[float]) -> str:
    """Return tokens as HTML; ``titles`` are shown when pointed at, and a shade of NaN has no colour."""
    spans = []
    for token, title, shade in zip(tokens, titles, shades, strict=True):
        alpha = 0.0 if math.isnan(shade) else _OPAQUE * abs(shade)
        tint = f"background:rgba({_LOW if shade < 0 else _HIGH},{alpha:.2f})"
        text = html.escape(visible(token)) or "&#8203;&nbsp;"
        spans.append(f"<span style='{tint}' title='{html.escape(title)}'>{text}</span>")
    style = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6"
    return f"<code style='{style}'>{''.join(spans)}</code>"


def in_terminal(tokens: Sequence[str], shades: Sequence[float]) -> str:
    """Return tokens on coloured backgrounds, by escape sequences of 24 bits."""
    return "".join(
        on_colour(visible(token), shade) for token, shade in zip(tokens, shades, strict=True)
    )


def on_colour(text: str, shade: float) -> str:
    """Return a text on the background of a shade."""
    if not abs(shade) >= _FAINT:
        return text
    faint, strong = _TINTS[shade < 0]
    red, green, blue = (round(a + (b - a) * abs(shade)) for a, b in zip(faint, strong, strict=True))
    return f"\x1b[30;48;2;{red};{green};{blue}m{text}\x1b[0m"


class ColouredWindows(list[ColouredWindow]):
    """The windows of a neuron, which a notebook shows in colour."""

    def _repr_html_(self) -> str:
        parts = []
        for one in self:
            titles = ["" if math.isnan(value) else f"{value:.4g}" for value in one.values]
            head = html.escape(f"{one.why}, window {one.window}, position {one.position}")
            text = in_html(one.tokens, titles, one.shades.tolist())
            parts.append(f"<p><small>{head}</small><br>{text}</p>")
        return f"<div style='max-height:40em;overflow:auto'>{''.join(parts)}</div>"


class ColouredText:
    """A text of one's own, coloured by a neuron's value at each token."""

    def __init__(self, neuron: str, table: pd.DataFrame, shades: Sequence[float]) -> None:
        """Take the neuron's name, a table of the tokens and their shades."""
        self.neuron = neuron
        self.table = table  # a row per token: token, output (or input), quantile, quantile_error
        self._shades = list(shades)

    def __repr__(self) -> str:
        """Return the table."""
        return f"{self.neuron}\n{self.table.to_string()}"

    def _repr_html_(self) -> str:
        side = self.table.columns[1]
        titles = [
            f"{value:.4g}, quantile {place:.4f}"
            for value, place in zip(self.table[side], self.table["quantile"], strict=True)
        ]
        text = in_html(self.table["token"].tolist(), titles, self._shades)
        return f"<p><b>{html.escape(self.neuron)}</b><br>{text}</p>"
