"""Named distributions of zero mean and unit variance, with their W1 to N(0, 1) and their modes.

A law's W1 to the Gaussian fitted to it is the same number at any mean and scale. Each is the
integral of |F⁻¹ - Φ⁻¹| to the digits given; `tests/numerics/test_gaussian.py` integrates them again.
"""

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.special import ndtr, ndtri

Array = npt.NDArray[np.float64]
FINE = np.linspace(-10, 10, 2**16)


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A law by its quantile function, its distance and its number of modes."""

    name: str
    quantile: Callable[[Array], Array]
    wasserstein: float
    modes: int = 1

    def __str__(self) -> str:
        return self.name

    def sample(self, tokens: int, *, seed: int = 0) -> Array:
        """Return independent draws."""
        return self.quantile(np.random.default_rng(seed).random(tokens))

    def quantiles(self, tokens: int) -> Array:
        """Return the middles of equal shares: the law itself, as well as so few tokens can be."""
        return self.quantile((np.arange(tokens) + 0.5) / tokens)


def two_points(u: Array) -> Array:
    return np.where(u < 0.5, -1.0, 1.0)


def mixture(*means: float, spread: float) -> Callable[[Array], Array]:
    """Return the quantile function of equal shares of N(mean, spread²), as one law of unit std."""
    scale = math.sqrt(np.var(means) + spread**2)
    grid = np.linspace(-8, 8, 40001)
    centers = (np.array(means) - np.mean(means)) / scale
    cumulative = np.mean([stats.norm.cdf(grid, c, spread / scale) for c in centers], axis=0)
    return lambda u: np.interp(u, cumulative, grid)


GAUSSIAN = Distribution("gaussian", ndtri, 0.0)
TWO_POINTS = Distribution("two points", two_points, 0.535377, modes=2)
UNIFORM = Distribution("uniform", stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)).ppf, 0.154280)
LAPLACE = Distribution("laplace", stats.laplace(scale=math.sqrt(0.5)).ppf, 0.145412)
EXPONENTIAL = Distribution("exponential", stats.expon(-1).ppf, 0.314420)
LOGISTIC = Distribution("logistic", stats.logistic(scale=math.sqrt(3) / math.pi).ppf, 0.059257)
STUDENT = Distribution("student t5", stats.t(5, scale=math.sqrt(0.6)).ppf, 0.102031)
BIMODAL = Distribution("bimodal", mixture(-2, 2, spread=1), 0.198047, modes=2)
TRIMODAL = Distribution("trimodal", mixture(-5, 0, 5, spread=1), 0.195268, modes=3)

DISTRIBUTIONS = [
    GAUSSIAN,
    TWO_POINTS,
    UNIFORM,
    LAPLACE,
    EXPONENTIAL,
    LOGISTIC,
    STUDENT,
    BIMODAL,
    TRIMODAL,
]


def bulk_of(column: Array, *, high_first: bool = False) -> Array:
    """Return the tokens without the 1% farthest from the median, sorted.

    Of those that are equally far, the highest are removed first or last.
    """
    x = np.sort(column.astype(np.float64))
    x = x[::-1] if high_first else x
    far = np.argsort(-np.abs(x - np.median(x)), kind="stable")
    return np.sort(np.delete(x, far[: round(0.01 * len(x))]))


def integrated(ends: Array, cumulative: Array) -> float:
    """Return ∫|F - Φ| on a grid fine enough for 1e-6, F linear between (ends, cumulative).

    F jumps where two ends are equal; it is 0 before the first and 1 after the last.
    """
    far = 12 + np.abs(ends).max()
    ends = np.concatenate([[-far, ends[0]], ends, [ends[-1], far]])
    cumulative = np.concatenate([[0, 0], cumulative, [1, 1]])
    total = 0.0
    for (a, f), (b, g) in pairwise(zip(ends, cumulative, strict=True)):
        x = np.concatenate([[a], FINE[np.searchsorted(FINE, a) : np.searchsorted(FINE, b)], [b]])
        d = f + (g - f) * (x - a) / max(b - a, 1e-300) - ndtr(x)
        total += float(np.trapezoid(np.abs(d), x))
    return total
