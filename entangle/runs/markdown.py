"""Tables in Markdown, and numbers with their errors."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

DIVERGENCE_HEADS = ["KL (nats)", "KL 99.9%", "agreement", "lost", "gained"]
DIVERGENCE = (
    "KL is the divergence of next-token probabilities from the dense model's, mean over tokens, and "
    "beside it the 99.9% quantile over tokens (its error is from a bootstrap of windows). Agreement is "
    "the share of tokens at which the most likely next token is the dense model's. Lost is the share at "
    "which only the dense model's is the text's, and gained the reverse. "
)


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


def is_compared(table: "pd.DataFrame") -> bool:
    """Return whether arms are compared with the dense model token by token (see `divergence`)."""
    return "kl" in table and bool(table["kl"].notna().any())


def divergence_cells(row: Mapping[Any, Any]) -> list[str]:
    """Return the cells below `DIVERGENCE_HEADS`, with errors, in nats and in percent."""
    if math.isnan(row["kl"]):  # of an arm that an older version has scored
        return ["-"] * len(DIVERGENCE_HEADS)
    nats = [with_error(row[name], row[f"{name}_error"]) for name in ("kl", "kl_tail")]
    shares = ("agreement", "lost", "gained")
    return nats + [f"{with_error(100 * row[n], 100 * row[f'{n}_error'])}%" for n in shares]
