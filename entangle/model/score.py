"""The score of a model on a text."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from entangle.model.divergence import Divergence, mean_over_windows


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """The negative log-likelihood of a text under a model, with its standard error over windows.

    Each window is scored separately, as in the pruning papers: its first token is given and not
    scored, and a scored token has on average half a window of context. With a stride (see
    `sliding_windows`) only the last tokens of a window are scored.
    """

    window_nats: npt.NDArray[np.float64]  # (windows,): mean nats per scored token
    tokens: int  # the number of scored tokens
    divergence: Divergence | None = None  # from the dense model, if the score is beside one

    def stored(self, texts: Iterable[Sequence[int]]) -> dict[str, Any]:
        """Return what tables need of the score, as JSON has it; ``texts`` are each text's windows."""
        found = {"window_nats": self.window_nats.tolist(), "tokens": self.tokens}
        if self.divergence is None:
            return found
        return found | {"divergence": self.divergence.stored(texts)}

    @property
    def nats(self) -> float:
        """The mean negative log-likelihood, in nats per token."""
        return float(self.window_nats.mean())

    @property
    def nats_error(self) -> float:
        """The standard error of ``nats`` over windows; NaN for one window."""
        return mean_over_windows(self.window_nats)[1]

    @property
    def perplexity(self) -> float:
        """The exponential of ``nats``; infinite if a float cannot hold it."""
        return math.exp(self.nats) if not self.nats > 709 else math.inf

    @property
    def perplexity_error(self) -> float:
        """The standard error of the perplexity, to first order."""
        return self.perplexity * self.nats_error
