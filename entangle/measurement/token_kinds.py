"""The tokens that a neuron has outputs of, by kind and by position, and its distance without some."""

import dataclasses
import math
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from entangle.model.text import token_name
from entangle.numerics.gaussian import from_samples

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]

FARTHEST = 0.01  # share of the tokens that is left out, those farthest from the mean
FREQUENT = 200  # the most frequent token ids, whose shares are computed
SHOWN = 20  # of them, those with the largest share are shown


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """The distance of a neuron when some tokens are left out."""

    what: str  # which tokens are left out
    tokens: int  # how many are left out
    variance: float  # their share of the sum of squared deviations, from 0 to 1
    wasserstein: float  # exact, of the remaining tokens, in std; NaN if these are constant


@dataclasses.dataclass(frozen=True, eq=False)
class CountedTokens:
    """The counted tokens that a neuron has outputs of: their positions in the windows and their ids.

    They are the same for every neuron, but a trained expert has only those that were sent to it. A
    kind is a distinct token id.
    """

    length: int  # counted tokens of a window
    rows: npt.NDArray[np.int64]  # (tokens,) indices among all counted tokens
    position: npt.NDArray[np.int64]  # (tokens,) in the window, 0 at the first counted token
    kind: npt.NDArray[np.int64]  # (tokens,) index into kinds
    kinds: npt.NDArray[np.int64]  # (kinds,) token ids
    counts: npt.NDArray[np.int64]  # (kinds,) how often each occurs
    frequent: npt.NDArray[np.int64]  # indices of the most frequent kinds, in descending order

    @classmethod
    def of(cls, tokens: npt.NDArray[np.int64]) -> Self:
        """Group the counted token ids (windows, length)."""
        return cls._of(tokens.ravel(), np.arange(tokens.size), tokens.shape[1])

    @classmethod
    def _of(cls, ids: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], length: int) -> Self:
        kinds, kind, counts = np.unique(ids, return_inverse=True, return_counts=True)
        frequent = np.argsort(-counts, kind="stable")[:FREQUENT]
        return cls(length, rows, rows % length, kind, kinds, counts, frequent)

    def only(self, rows: npt.NDArray[np.int64]) -> Self:
        """Return some of these tokens, all of which must be counted ones."""
        return self._of(self.kinds[self.kind[rows]], rows, self.length)


def frequent_tokens(
    counted: CountedTokens,
    outputs: Floats,
    shares: Array,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """Return the frequent tokens with the largest shares of the distance, in descending order."""
    share = np.bincount(counted.kind, weights=shares)
    total = np.bincount(counted.kind, weights=outputs.astype(np.float64))
    frequent = counted.frequent
    largest = frequent[np.argsort(-share[frequent], kind="stable")[:SHOWN]]
    return [
        {
            "token": token_name(tokenizer, int(counted.kinds[kind])),
            "count": int(counted.counts[kind]),
            "share": float(share[kind]),
            "mean_output": float(total[kind] / counted.counts[kind]),
        }
        for kind in largest
    ]


def distances_without(
    counted: CountedTokens,
    outputs: Floats,
    skip_first: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[LeftOut]:
    """Return a neuron's distance without the 1% of tokens farthest from the mean, and without others.

    These are all tokens at one window position, and all tokens of one frequent kind. The position and
    the kind are those whose share of the squared deviations exceeds their share of the tokens by
    the most.
    """
    deviations = np.square(outputs - outputs.mean(dtype=np.float64))
    positions = np.arange(counted.length)
    far = np.zeros(len(outputs), dtype=bool)
    far[np.argsort(-deviations, kind="stable")[: round(FARTHEST * len(outputs))]] = True
    groups = {f"the {FARTHEST:.0%} farthest from the mean": far}
    for group, candidates in (
        (counted.position, positions),
        (counted.kind, counted.frequent),
    ):
        size = int(candidates.max()) + 1
        variance = np.bincount(group, weights=deviations, minlength=size) / deviations.sum()
        excess = variance - np.bincount(group, minlength=size) / len(group)
        worst = int(candidates[np.argmax(excess[candidates])])
        place = f"position {worst + skip_first}"
        token = token_name(tokenizer, int(counted.kinds[worst])) if group is counted.kind else None
        what = place if token is None else f"token {token!r}"
        groups[what] = group == worst
    return [
        LeftOut(
            what=what,
            tokens=int(left.sum()),
            variance=float(deviations[left].sum() / deviations.sum()),
            wasserstein=math.nan if left.all() else float(from_samples(outputs[~left, None])[0]),
        )
        for what, left in groups.items()
    ]
