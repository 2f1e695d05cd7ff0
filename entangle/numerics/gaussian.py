"""1-Wasserstein distances to a Gaussian: from counts, from samples, and the noise floor.

W1 = ∫|F - Φ| dx = ∫|F⁻¹ - Φ⁻¹| du, in closed form, with ∫Φ = xΦ + φ and ∫Φ⁻¹ = -φ(Φ⁻¹). The
distance from counts has a certified error bound. The distance from samples is exact, or it is POT's
or SciPy's distance to a drawn normal sample. Only these two methods draw a Gaussian.

W1 is 0.53538 for two equal points, 0.15428 for a uniform neuron, 0.14541 for a Laplacian one and
0.31442 for an exponential one. W1 does not distinguish heavy tails from several modes.

This module does not import torch, so that reading a run is quick.
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

    ``error`` bounds the difference of ``wasserstein`` from the exact distance of the counted rows.
    """

    wasserstein: Array  # (neurons,)
    error: Array  # (neurons,)


def from_counts(state: Mapping[str, npt.NDArray[Any]], mean: Array, std: Array) -> Distances:
    """Return the distance of each neuron's histogram, whose distribution F is linear inside a bin.

    ``state`` is the state of `Histograms` by name, as stored in a run; ``mean`` and ``std``
    (neurons,) are its moments.

    The error bound is certified, in units of the final std. It is a sum of these terms:

    * half a bin width times the share of tokens inside, since F is exact at the bin edges;
    * 1/32 of half a bin width for the lattice's error in mean and std, and half the squared bin
      width times the share of tokens in the tails, whose squares are rounded;
    * for each tail, twice the smaller of ∫(1 - F) and ∫(1 - Φ) beyond the edge. ∫(1 - F) is known
      exactly, from the tail's sum.
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
    return the libraries' distances to one normal sample of the same size, drawn with ``seed``. This
    is the paper's estimator. Its error is at most that sample's own distance to N(0, 1), about
    1.3/√n. A constant column, or one with values that are not finite, gives NaN.

    Raises:
        ValueError: the samples are not two-dimensional, or the method is unknown.
    """
    if hasattr(samples, "detach"):  # a tensor; torch is not imported here
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
    """Return W1 between sorted samples of each neuron (neurons, tokens), in std of ``columns``.

    For equal numbers of samples it is the mean of |x₍ᵢ₎ - y₍ᵢ₎|. NaN for constant ``columns``.

    Raises:
        ValueError: the shapes differ.
    """
    if columns.shape != others.shape:
        raise ValueError(
            f"expected samples of equal shapes (tokens, neurons), got {columns.shape[::-1]} and "
            f"{others.shape[::-1]}"
        )
    std = columns.std(axis=1, dtype=np.float64)
    distance: Array = np.abs(columns - others).mean(axis=1, dtype=np.float64)
    return distance / np.where(std > 0, std, np.nan)


def _library_distance(standard: Array, drawn: Array, method: Method) -> float:
    if method == "scipy":
        return float(scipy.stats.wasserstein_distance(standard, drawn))
    import ot  # it imports torch, which this module must not

    return float(ot.wasserstein_1d(standard, drawn, p=1))  # W_p to the p-th power: p must be 1


@functools.lru_cache(maxsize=4)
def gaussian_bins(n: int) -> tuple[Array, Array]:
    """Return the n-quantiles of N(0, 1) and the density at them, both (n + 1,), from u = 0 to 1."""
    quantiles: Array = scipy.special.ndtri(np.arange(n + 1) / max(n, 1))
    return quantiles, np.exp(-0.5 * quantiles**2) / ROOT_2PI


# The limit of E[√n W1] for a Gaussian sample standardised by its own mean and std:
# √(2/π) ∫ √(Φ(1-Φ) - φ²(1 + x²/2)) dx. The root is the standard deviation of the limiting process
# (Durbin, "Weak convergence of the sample distribution function when parameters are estimated",
# Annals of Statistics 1, 1973), and √(2/π) is E|N(0, 1)|. A test computes the integral again.
NOISE = 0.8331789520451822


def noise_floor(count: float) -> float:
    """Return the mean distance of a truly Gaussian neuron on ``count`` independent tokens, in std.

    It is 0.833/√n in the limit; the true mean is a little smaller for few tokens. Tokens of a text
    depend on each other, so it is a lower bound. It is a threshold and is never subtracted. NaN
    without tokens.
    """
    return NOISE / math.sqrt(count) if count > 0 else math.nan


def noise_floor_95(count: float) -> float:
    """Return a bound, 1.2/√n, of the 95% quantile of a truly Gaussian neuron's distance, in std.

    ``tests/numerics/test_gaussian.py`` checks it. See `noise_floor`. NaN without tokens.
    """
    return 1.2 / math.sqrt(count) if count > 0 else math.nan
