"""The share of an evaluation text that is also in a calibration text, however both are cut.

Of a text that a model or a measurement has seen, hashes of sequences of 16 tokens are kept: those
that begin at every sixteenth token of each window. Of the evaluation all sequences are hashed. So a
shared stretch of 31 tokens is always found, whatever the window lengths and beginnings are.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from entangle.model.text import TokenWindows

RUN = 16  # tokens in a run, and from one kept run to the next
LARGEST = 0.04  # finds a leak of 5%: some tokens at the ends of shared stretches are not found
Hashes = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, eq=False)
class SeenText:
    """The hashes of the windows of a text."""

    text: str  # the source of the text
    windows: Sequence[str]  # of whole windows, see `TokenWindows.hashes`
    runs: Hashes | None  # (runs,), sorted; None for a run that was measured before version 0.2.0

    @classmethod
    def of(cls, windows: TokenWindows) -> "SeenText":
        """Return the hashes of some windows."""
        return cls(windows.text, windows.hashes, run_hashes(windows))


def run_hashes(windows: TokenWindows) -> Hashes:
    """Return the sorted 64-bit hashes (runs,) of the runs at every sixteenth token of each window.

    A window's last run may end in the next window: windows may follow one another in the text.
    """
    tokens = _joined(windows)
    length = windows.length - windows.starts
    places = np.arange(len(windows))[:, None] * length + np.arange(0, length, RUN)
    places = places[places <= len(tokens) - RUN]
    return np.unique(_hashed(tokens, places))


def shared_share(seen: SeenText, evaluation: TokenWindows) -> float:
    """Return the share of the evaluation's tokens that are in 16 tokens of the seen text.

    Whole windows are compared if a window has fewer than 16 tokens of the text, or if the measured
    run has no hashes of its text.

    Raises:
        ValueError: the share is 4% or more; or the seen text has only hashes of windows, and some
            of them are windows of the evaluation.
    """
    tokens, length = _joined(evaluation), evaluation.length - evaluation.starts
    shared = np.zeros(len(tokens), dtype=bool)
    if seen.runs is not None and len(tokens) >= RUN:
        places = np.arange(len(tokens) - RUN + 1)
        found = np.flatnonzero(np.isin(_hashed(tokens, places), seen.runs))
        for place in range(RUN):
            shared[found + place] = True
    if seen.runs is None or length < RUN:
        known = {*seen.windows}
        shared |= np.repeat([one in known for one in evaluation.hashes], length)
    share = float(shared.mean())
    if share >= LARGEST or (seen.runs is None and share):
        window, token = divmod(int(shared.argmax()), length)
        raise ValueError(
            f"{share:.1%} of the tokens of the evaluation ({evaluation.text}) are also in the text "
            f"that was seen before ({seen.text}), first from token {token + evaluation.starts + 1} "
            f"of window {window + 1} on, so its score would be too good: use another text"
        )
    return share


def _joined(windows: TokenWindows) -> npt.NDArray[np.uint64]:
    """Return the tokens of the text in all windows, one window after the other."""
    return windows.tokens.numpy()[:, windows.starts :].astype(np.uint64).ravel()


def _hashed(tokens: npt.NDArray[np.uint64], places: npt.NDArray[np.int64]) -> Hashes:
    """Return the hashes of the runs of 16 tokens that begin at the places.

    Each token is mixed in by the finaliser of SplitMix64 (Steele, Lea and Flood 2014, figure 17).
    """
    found = np.zeros(len(places), dtype=np.uint64)
    for place in range(RUN):
        found = (found ^ tokens[places + place]) + np.uint64(0x9E3779B97F4A7C15)
        found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found ^= found >> np.uint64(31)
    return found
