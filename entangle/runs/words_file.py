"""words.json: the words that the weights of neurons read and write, as `words` found them, by name."""

from pathlib import Path
from typing import Any

from entangle.runs.forms import NUMBER, TEXT, read_added

FILE = "words.json"
_WORDS = [{"token": TEXT, "value": NUMBER, "deviation": NUMBER}]
_SIDE = {
    "side": TEXT,
    "neuron": TEXT,
    "what": TEXT,
    "through": [TEXT],
    "top": _WORDS,
    "bottom": _WORDS,
}


def read_words(folder: Path) -> dict[str, Any]:
    """Return what a run's words.json has; empty without the file.

    Raises:
        OSError: the file is damaged.
        ValueError: it has another form than `words` writes.
    """
    return read_added(folder / FILE, {...: {"words": [_SIDE]}}, "words")
