"""1-Wasserstein distances to a Gaussian: from counts, from samples, and the noise floor.

W1 = ∫|F - Φ| dx = ∫|F⁻¹ - Φ⁻¹| du, in closed form, with ∫Φ = xΦ + φ and ∫Φ⁻¹ = -φ(Φ⁻¹). From
counts it comes with a certified bound of its error; from samples it is exact, or POT's or SciPy's
distance to a drawn normal sample. Only these two draw a Gaussian.

Two equal points have 0.53538, a uniform neuron 0.15428, a Laplacian one 0.14541 and an
exponential one 0.31442. W1 cannot tell heavy tails from several modes.

Nothing here needs torch, so that a run is read quickly.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import scipy

from entangle.numerics import threads as _threads  # noqa: F401
from entangle.numerics.kernels.bins import HALF_RANGE, STEPS
from entangle.numerics.kernels.distances_cpu import ROOT_2PI, exact_distance, histogram_distance

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]
Method = Literal["exact", "pot", "scipy"]


@dataclasses.dataclass(frozen=True)
class Distances:
    """W1 to N(0, 1) in std; NaN for a neuron that is dead or has values that are not finite.

    ``error`` bounds how far ``wasserstein`` lies from the exact distance of the rows counted.
    """

    wasserstein: Array  # (neurons,)
    error: Array  # (neurons,)


def from_counts(state: Mapping[str, npt.NDArray[Any]], mean: Array, std: Array) -> Distances:
    """Return the distance of each neuron's histogram, its distribution F linear inside a bin.

    ``state`` is the state of `Histograms` by name, as a run holds it; ``mean`` and ``std``
    (neurons,) are its moments.

    The error is certified, in units of the final std: half a bin times the share of tokens
    inside (F is right at the edges), 1/32 of half a bin for the lattice's mean and std (and what
    a tail's rounded squares may add to it), and per tail twice the smaller of what F and Φ hold
    beyond the edge, ∫(1 - F) and ∫(1 - Φ): F's is known exactly, as the tail's mean.
    """
    known = np.isfinite(std)
    std = np.where(known, std, 1.0)
    middle = (state["center"] - np.where(known, mean, 0.0)) / std
    reach = HALF_RANGE * state["scale"] / std
    width = 2 * reach / state["counts"].shape[1]
    left, right = middle - reach, middle + reach
    n = np.maximum(state["count"], 1)
    tails = state["tail_count"] / n[:, None]
    excess = (state["tail_excess"] / n[:, None] + tails / 2) / STEPS * width[:, None]
    distance = histogram_distance(
        left, width, state["counts"], state["count"], tails, excess, known
    )

    share = tails.sum(axis=1)
    gaussian = np.stack([_gaussian_below(left), _gaussian_below(-right)], axis=1)
    error = width / 2 * (1 - share + 1 / 32) + share * width**2 / 2
    error += 2 * np.minimum(excess, gaussian).sum(axis=1)
    return Distances(distance, np.where(known, error, np.nan))


def _gaussian_below(x: Array) -> Array:
    """Return ∫Φ from -∞ to x."""
    below: Array = x * scipy.special.ndtr(x) + np.exp(-(x**2) / 2.0) / ROOT_2PI
    return np.maximum(below, 0.0)


def from_samples(
    samples: "npt.ArrayLike | torch.Tensor", *, method: Method = "exact", seed: int = 0
) -> Array:
    """Return the distance of each neuron's samples (tokens, neurons) to N(0, 1), in std.

    ``exact`` integrates |x₍ᵢ₎ - Φ⁻¹(u)| over each quantile bin of width 1/n. ``pot`` and ``scipy``
    give the libraries' numbers against one normal sample of the same size, drawn with ``seed``:
    the paper's estimator, off by at most that sample's own distance to N(0, 1), about 1.3/√n.
    A constant column, or one with values that are not finite, gives NaN.

    Raises:
        ValueError: the samples are not two-dimensional, or there is no such method.
    """
    if hasattr(samples, "detach"):  # a tensor, and so torch is there
        samples = samples.detach().cpu()
        samples = samples.float() if samples.element_size() < 4 else samples
    rows = np.asarray(samples)
    rows = rows.astype(np.promote_types(rows.dtype, np.float32), copy=False)
    if rows.ndim != 2:
        raise ValueError(f"expected samples of shape (tokens, neurons), got {rows.shape}")
    if method not in {"exact", "pot", "scipy"}:
        raise ValueError(f"method must be 'exact', 'pot' or 'scipy', got {method!r}")
    columns = np.sort(rows.T, axis=1)  # (neurons, tokens)
    if method == "exact":
        return np.asarray(exact_distance(columns, *gaussian_bins(columns.shape[1])))
    drawn = np.asarray(np.random.default_rng(seed).standard_normal(columns.shape[1]))
    distance: Array = np.full(len(columns), np.nan)
    for i, column in enumerate(columns.astype(np.float64)):
        if np.isfinite(column).all() and (column[:1] < column[-1:]).any():
            standard = (column - column.mean()) / column.std()
            distance[i] = _library_distance(standard, drawn, method)
    return distance


def between_sorted(columns: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> Array:
    """Return W1 between each neuron's sorted samples and others (neurons, tokens), in std of the first.

    Of as many samples it is the mean of |x₍ᵢ₎ - y₍ᵢ₎|. NaN where the first are constant.

    Raises:
        ValueError: not as many of both.
    """
    if columns.shape != others.shape:
        raise ValueError(
            f"expected as many samples, got {columns.shape[::-1]} and {others.shape[::-1]}"
        )
    std = columns.std(axis=1, dtype=np.float64)
    distance: Array = np.abs(columns - others).mean(axis=1, dtype=np.float64)
    return distance / np.where(std > 0, std, np.nan)


def _library_distance(standard: Array, drawn: Array, method: Method) -> float:
    if method == "scipy":
        return float(scipy.stats.wasserstein_distance(standard, drawn))
    import ot  # an extra: only users who ask for POT's number need it

    return float(ot.wasserstein_1d(standard, drawn, p=1))  # W_p to the p-th power: p must be 1


@functools.lru_cache(maxsize=4)
def gaussian_bins(n: int) -> tuple[Array, Array]:
    """Return the n-quantiles of N(0, 1) and the density there, from u = 0 to 1 (n + 1,)."""
    quantiles: Array = scipy.special.ndtri(np.arange(n + 1) / max(n, 1))
    return quantiles, np.exp(-0.5 * quantiles**2) / ROOT_2PI


# E[√n W1] of a Gaussian sample with its own mean and std, in the limit:
# √(2/π) ∫ √(Φ(1-Φ) - φ²(1 + x²/2)) dx, the standard deviation of the limiting process (Durbin, "Weak
# convergence of the sample distribution function when parameters are estimated", Annals of Statistics
# 1, 1973), times the mean of a standard normal's absolute value. A test integrates it again.
NOISE = 0.8331789520451822


def noise_floor(count: float) -> float:
    """Return the mean distance that a truly Gaussian neuron shows on ``count`` independent tokens.

    0.833/√n in the limit, a little less for few. Tokens of a text depend on each other, so it is
    a lower bound; a threshold, never subtracted. NaN without tokens.
    """
    return NOISE / math.sqrt(count) if count > 0 else math.nan


def noise_floor_95(count: float) -> float:
    """Return a bound of the 95% quantile of that distance: 1.2/√n (tests/numerics/test_gaussian.py)."""
    return 1.2 / math.sqrt(count) if count > 0 else math.nan
