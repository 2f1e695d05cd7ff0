"""Tables in Markdown, and numbers with their errors."""

import math
from collections.abc import Sequence


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first row of cells is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = rows
    padded = [map(str.ljust, cells, widths) for cells in (head, ["-" * w for w in widths], *body)]
    return [f"| {' | '.join(cells)} |" for cells in padded]


def with_error(value: float, error: float) -> str:
    """Return ``value ± error``, rounded to the error's second digit.

    Without a finite, positive error, return the value with four digits.
    """
    if not (math.isfinite(error) and error > 0):
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
