"""contexts.json: what was found of neurons, and the windows of text that they share.

``neurons`` has what `contexts` found, by name, and ``windows`` the text of each token of the
windows that it shows, by the window's index. A neuron has its ``scale`` (see `numerics.levels`) and
up to eight ``windows``: ``why`` it was chosen, its index ``window``, the ``position`` of the token
that it was chosen for, and ``levels``, in base64 a signed byte for each counted token, the last of
the window; -128 is a token that the neuron's trained expert did not have. Files of versions before
0.2.0 have neurons alone, by name, without windows.
"""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from entangle.numerics.levels import Levels
from entangle.runs import store
from entangle.runs.forms import COUNT, KNOWN, NUMBER, TEXT, another_form, check_form, read_added

Array = npt.NDArray[np.float64]

FILE = "contexts.json"

_TOKEN = {"window": COUNT, "position": COUNT, "before": TEXT, "token": TEXT, "after": TEXT}
_LEFT_OUT = {"what": TEXT, "tokens": COUNT, "variance": NUMBER, "wasserstein": KNOWN}
_NEURON = {  # what readers need of a neuron, also in older files
    "tokens": COUNT,
    "wasserstein": NUMBER,
    "low": KNOWN,
    "high": KNOWN,
    "positions": [NUMBER],
    "frequent": [{"token": TEXT, "share": NUMBER}],
    "without": [_LEFT_OUT],
    "contexts": [{"why": TEXT, **_TOKEN, "output": NUMBER, "deviation": NUMBER}],
}
_SHOWN = {"why": TEXT, "window": COUNT, "position": COUNT, "levels": TEXT}
_WINDOWS = {"scale": dict.fromkeys(("median", "reach", "step"), NUMBER), "windows": [_SHOWN]}
_PARTS = ("gate", "up", "product")
_CASE = {"gate": TEXT, "up": TEXT, "tokens": COUNT, "share": NUMBER, "mean": KNOWN}
_UNIT = {
    **dict.fromkeys(_PARTS, TEXT),
    "wasserstein": dict.fromkeys(_PARTS, KNOWN),
    "cases": [{**_CASE, "examples": [{**_TOKEN, **dict.fromkeys(_PARTS, KNOWN)}]}],
}


@dataclasses.dataclass(frozen=True, eq=False)
class ColouredWindow:
    """A window of the text, with a neuron's value at each token."""

    why: str  # it was chosen: highest, lowest, mode at X, quantile Q
    window: int  # index
    position: int  # of the token that it was chosen for
    tokens: list[str]
    values: Array  # (tokens,) output units; NaN for tokens without one
    shades: Array  # (tokens,) from -1 to 1: see `Levels.shades`


@dataclasses.dataclass(frozen=True)
class Kept:
    """The content of contexts.json."""

    neurons: dict[str, dict[str, Any]]
    windows: dict[str, list[str]]  # the text of each token, by the window's index

    def windows_of(self, neuron: str) -> list[ColouredWindow]:
        """Return a neuron's windows, with its values; none if an older version wrote them."""
        found = self.neurons[neuron]
        if "scale" not in found:
            return []
        scale = Levels(**found["scale"])
        windows = []
        for one in found["windows"]:
            tokens = self.windows[str(one["window"])]
            counted = scale.values(unpacked(one["levels"]))
            values = np.concatenate([np.full(len(tokens) - len(counted), np.nan), counted])
            place = {name: one[name] for name in ("why", "window", "position")}
            windows.append(
                ColouredWindow(**place, tokens=tokens, values=values, shades=scale.shades(values))
            )
        return windows


def packed(levels: npt.NDArray[np.int8]) -> str:
    """Return levels as text."""
    return base64.b64encode(levels.tobytes()).decode()


def unpacked(text: str) -> npt.NDArray[np.int8]:
    """Return the levels of a text."""
    return np.frombuffer(base64.b64decode(text), np.int8)


def read_contexts(folder: Path) -> Kept:
    """Return what a run's contexts.json has; empty without the file.

    Raises:
        OSError: the file is damaged.
        ValueError: it has another form than `contexts` writes.
    """
    file = folder / FILE
    content = read_added(file, {}, "contexts")
    new = isinstance(content.get("neurons"), dict) and isinstance(content.get("windows"), dict)
    kept = (
        Kept(content["neurons"], content["windows"]) if new else Kept(content, {})
    )  # or an older one
    try:
        _check(kept)
    except ValueError as error:
        raise ValueError(another_form(file, "contexts", str(error))) from error
    return kept


def _check(kept: Kept) -> None:
    """Check that all that readers need is there.

    Raises:
        ValueError: something is not.
    """
    check_form(kept.windows, {...: [TEXT]}, "windows")
    for name, neuron in kept.neurons.items():
        check_form(neuron, _NEURON, name)
        if "scale" not in neuron:
            continue
        check_form(neuron, _WINDOWS, name)
        if neuron.get("unit") is not None:
            check_form(neuron["unit"], _UNIT, f"{name}, unit")
        for one in neuron["windows"]:
            tokens = kept.windows.get(str(one["window"]))
            if tokens is None or len(unpacked(one["levels"])) > len(tokens):
                raise ValueError(f"{name} shows window {one['window']}, whose text is missing")


def add_contexts(
    folder: Path, neurons: Mapping[str, Mapping[str, Any]], windows: Mapping[int, Sequence[str]]
) -> None:
    """Add neurons to a run's contexts.json, and the windows that they show.

    Windows that no neuron shows any more are left out.

    Raises:
        OSError: the file is damaged, or cannot be written.
        ValueError: it has another form than `contexts` writes.
    """
    kept = read_contexts(folder)
    found = {**kept.neurons, **neurons}
    texts = kept.windows | {str(window): list(tokens) for window, tokens in windows.items()}
    shown = {one["window"] for neuron in found.values() for one in neuron.get("windows", ())}
    texts = {str(window): texts[str(window)] for window in sorted(shown)}
    store.write_json(folder / FILE, {"neurons": found, "windows": texts})
