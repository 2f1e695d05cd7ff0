"""Named distributions of zero mean and unit variance, their exact W1 to N(0, 1), their modes."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import integrate, optimize, stats

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A law, by its cumulative and its quantile function."""

    name: str
    cdf: Callable[[Array], Array]
    quantile: Callable[[Array], Array]
    modes: int
    wasserstein: float  # to N(0, 1); `quadrature` derives it again

    def __str__(self) -> str:
        return self.name

    def sample(self, tokens: int, *, seed: int = 0) -> Array:
        """Return independent draws."""
        return self.quantile(np.random.default_rng(seed).random(tokens))

    def quantiles(self, tokens: int) -> Array:
        """Return the middle quantiles of equal shares: the law itself, as well as can be."""
        return self.quantile((np.arange(tokens) + 0.5) / tokens)


def quadrature(cdf: Callable[[Array], Array], jumps: Array | None = None) -> float:
    """Return ∫|F - Φ| dx, adaptively between the jumps of F and its crossings with Φ."""

    def difference(x: float) -> float:
        return float(cdf(np.array(x)) - stats.norm.cdf(x))

    grid = np.linspace(-40, 40, 8001)
    if jumps is not None:
        grid = np.sort(np.concatenate([grid, jumps - 1e-9, jumps + 1e-9]))
    ...
