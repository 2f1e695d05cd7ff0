"""The score of a model on a text."""

import dataclasses
import math

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """The negative log-likelihood of a text under a model, with its standard error over windows.

    Each window is scored separately, as in the pruning papers: its first token is given and not
    scored, and a scored token has on average half a window of context.
    """

    window_nats: npt.NDArray[np.float64]  # (windows,): mean nats per scored token
    tokens: int  # the number of scored tokens

    @property
    def nats(self) -> float:
        """The mean negative log-likelihood, in nats per token."""
        return float(self.window_nats.mean())

    @property
    def nats_error(self) -> float:
        """The standard error of ``nats`` over windows; NaN for one window."""
        n = len(self.window_nats)
        return float(self.window_nats.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan

    @property
    def perplexity(self) -> float:
        """The exponential of ``nats``; infinite if a float cannot hold it."""
        return math.exp(self.nats) if not self.nats > 709 else math.inf

    @property
    def perplexity_error(self) -> float:
        """The standard error of the perplexity, to first order."""
        return self.perplexity * self.nats_error
