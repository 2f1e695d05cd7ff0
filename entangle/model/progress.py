"""Bars that show how far long work is, and the time that is left."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
    work: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    unit: str,
    desc: str | None = None,
    shown: bool | None,
) -> "tqdm[Any]":
    """Return a bar on standard error. If ``shown`` is None, it is seen in notebooks alone.

    A bar that may be seen is still hidden by the environment variable TQDM_DISABLE.
    """
    seen = _in_notebook() if shown is None else shown
    options: dict[str, Any] = {} if seen else {"disable": True}  # False would win over the variable
    bar: tqdm[Any] = tqdm(work, total=total, unit=unit, desc=desc, **options)
    return bar


def _in_notebook() -> bool:
    """Return whether the program runs in a kernel of Jupyter."""
    shell = sys.modules.get("IPython")
    return shell is not None and hasattr(shell.get_ipython(), "kernel")
