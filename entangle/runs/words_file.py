"""words.json: the words that the weights of neurons read and write, as `words` found them, by name."""

from pathlib import Path
from typing import Any

from entangle.runs import store

FILE = "words.json"


def read_words(folder: Path) -> dict[str, Any]:
    """Return what a run's words.json has; empty without the file.

    Raises:
        OSError: the file is damaged.
    """
    file = folder / FILE
    kept: dict[str, Any] = store.read_json(file) if file.is_file() else {}
    return kept
