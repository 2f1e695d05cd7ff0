"""The share of an evaluation text that is also in a calibration text, however both are cut.

Of a text that a model or a measurement has seen, the hashes of all sequences of 16 tokens are kept.
So each shared stretch of 16 tokens is found, whatever the window lengths and beginnings are.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from entangle.model.text import TokenWindows

RUN = 16  # tokens in a run
LARGEST = 0.04  # finds a leak of 5%: shorter stretches, at the ends of a leak, are not found
Hashes = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, eq=False)
class SeenText:
    """The hashes of the windows of a text."""

    what: str  # the calibration windows, or the text of a measured run
    text: str  # the source of the text
    windows: Sequence[str]  # of whole windows, see `TokenWindows.hashes`
    runs: Hashes | None  # (runs,), sorted; None for a run that was measured before version 0.2.0

    @classmethod
    def of(cls, windows: TokenWindows) -> "SeenText":
        """Return the hashes of calibration windows."""
        return cls("the calibration windows", windows.text, windows.hashes, run_hashes(windows))


def run_hashes(windows: TokenWindows) -> Hashes:
    """Return the sorted 64-bit hashes (runs,) of all runs of 16 tokens, each once.

    A run may begin in one window and end in the next: windows may follow one another in the text.
    The windows of several texts take turns, so each text is hashed by itself.
    """
    return np.unique(np.concatenate([_hashed(_joined(one)) for one in windows.by_text()]))


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
        found = np.flatnonzero(np.isin(_hashed(tokens), seen.runs))
        for place in range(RUN):
            shared[found + place] = True
    if seen.runs is None or length < RUN:
        known = {*seen.windows}
        shared |= np.repeat([one in known for one in evaluation.hashes], length)
    share = float(shared.mean())
    if share >= LARGEST or (seen.runs is None and share):
        window, token = divmod(int(shared.argmax()), length)
        raise ValueError(
            f"{share:.1%} of the tokens of the evaluation ({evaluation.text}) are also in "
            f"{seen.what} ({seen.text}), first from token {token + evaluation.starts + 1} "
            f"of window {window + 1} on, so its score would be too good: use another text"
        )
    return share


def _joined(windows: TokenWindows) -> npt.NDArray[np.uint64]:
    """Return the tokens of the text in all windows, one window after the other."""
    return windows.tokens.numpy()[:, windows.starts :].astype(np.uint64).ravel()


def _hashed(tokens: npt.NDArray[np.uint64]) -> Hashes:
    """Return the hash of the run of 16 tokens that begins at each token (tokens - 15,).

    Each token is mixed in by the finaliser of SplitMix64 (Steele, Lea and Flood 2014, figure 17).
    """
    count = max(len(tokens) - RUN + 1, 0)
    found = np.zeros(count, dtype=np.uint64)
    for place in range(RUN):
        found = (found ^ tokens[place : place + count]) + np.uint64(0x9E3779B97F4A7C15)
        found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found ^= found >> np.uint64(31)
    return found
