"""1-Wasserstein distance of each neuron's standardised outputs to N(0, 1): its entanglement.

Four ways: from `Histograms`, with a certified bound of the error; and from samples exactly, or as
POT's or SciPy's distance to a drawn normal sample. Only these two draw a Gaussian. In closed form
throughout: W1 = ∫|F - Φ| dx = ∫|F⁻¹ - Φ⁻¹| du, with ∫Φ = xΦ + φ and ∫Φ⁻¹ = -φ(Φ⁻¹).

Two equal points have 0.53538, a uniform neuron 0.15428, a Laplacian one 0.14541 and an
exponential one 0.31442. W1 cannot tell heavy tails from several modes.
"""

import dataclasses
import functools
import math
from typing import Literal

import numba
import numpy as np
import numpy.typing as npt
import torch
from scipy import integrate, stats
from scipy.special import ndtri

from entangle.numerics.histograms import HALF_RANGE, STEPS, Histograms, Moments

Array = npt.NDArray[np.float64]
Method = Literal["exact", "pot", "scipy"]

_ROOT_2PI = math.sqrt(2 * math.pi)
_ROOT_HALF = math.sqrt(0.5)


@dataclasses.dataclass(frozen=True)
class Distances:
    """W1 to N(0, 1) in std; NaN for a neuron that is dead or has values that are not finite.

    ``error`` bounds how far ``wasserstein`` lies from the exact distance of the rows counted.
    """

    wasserstein: Array  # (neurons,)
    error: Array  # (neurons,)


def from_histograms(histograms: Histograms, moments: Moments) -> Distances:
    """Return each neuron's distance, its distribution F taken as linear inside a bin.

    The error is certified, in units of the final std: half a bin times the share of tokens
    inside (F is right at the edges), 1/32 of half a bin for the lattice's mean and std (and what
    a tail's rounded squares may add to it), and per tail twice the smaller of what F and Φ hold
    beyond the edge, ∫(1 - F) and ∫(1 - Φ): F's is known exactly, as the tail's mean.
    """
    state = {name: tensor.cpu().numpy() for name, tensor in histograms.tensors().items()}
    known = np.isfinite(moments.std)
    std = np.where(known, moments.std, 1.0)
    middle = (state["center"] - np.where(known, moments.mean, 0.0)) / std
    reach = HALF_RANGE * state["scale"] / std
    width = 2 * reach / histograms.bins
    left, right = middle - reach, middle + reach
    n = np.maximum(moments.count, 1)
    tails = state["tail_count"] / n[:, None]
    excess = (state["tail_excess"] / n[:, None] + tails / 2) / STEPS * width[:, None]
    distance = _linear_distance(left, width, state["counts"], moments.count, tails, excess, known)

    share = tails.sum(axis=1)
    gaussian = np.stack([_gaussian_below(left), _gaussian_below(-right)], axis=1)
    error = width / 2 * (1 - share + 1 / 32) + share * width**2 / 2
    error += 2 * np.minimum(excess, gaussian).sum(axis=1)
    return Distances(distance, np.where(known, error, np.nan))


def _gaussian_below(x: Array) -> Array:
    """Return ∫Φ from -∞ to x."""
    below: Array = x * stats.norm.cdf(x) + stats.norm.pdf(x)
    return np.maximum(below, 0.0)


@numba.njit(cache=True)
def _density(x):  # type: ignore[no-untyped-def]
    return math.exp(-0.5 * x * x) / _ROOT_2PI


@numba.njit(cache=True)
def _cumulative(x):  # type: ignore[no-untyped-def]
    return 0.5 * math.erfc(-x * _ROOT_HALF)


@numba.njit(parallel=True, nogil=True, cache=True)
def _linear_distance(left, width, counts, count, tails, excess, known):  # type: ignore[no-untyped-def]
    """Return ∫|F - Φ| per neuron: over the tails, each an atom at its mean, and bin by bin."""
    neurons, bins = counts.shape
    distance = np.full(neurons, np.nan)
    for i in numba.prange(neurons):
        if not known[i]:
            continue
        h = width[i]
        z = left[i]
        f = tails[i, 0]
        total = 0.0
        atom = z - excess[i, 0] / f if f > 0 else z
        cumulative, density = _cumulative(atom), _density(atom)
        total += max(atom * cumulative + density, 0.0)
        if f > 0:
            total += _crossing(atom, z, f - cumulative, f - _cumulative(z), 0.0)
        cumulative, density = _cumulative(z), _density(z)
        for k in range(bins):
            end = left[i] + (k + 1) * h
            next_cumulative, next_density = _cumulative(end), _density(end)
            slope = counts[i, k] / count[i] / h
            d0, d1 = f - cumulative, f + slope * h - next_cumulative
            # |Φ''| <= 0.242: within 0.0303 h² of its chord, d cannot cross zero.
            if d0 * d1 > 0 and min(abs(d0), abs(d1)) > 0.0303 * h * h:
                gaussian = end * next_cumulative + next_density - z * cumulative - density
                total += abs((f + 0.5 * slope * h) * h - gaussian)
            else:
                total += _crossing(z, end, d0, d1, slope)
            z, cumulative, density = end, next_cumulative, next_density
            f += counts[i, k] / count[i]
        f = tails[i, 1]
        atom = -z - excess[i, 1] / f if f > 0 else -z  # the right tail, mirrored
        total += max(atom * _cumulative(atom) + _density(atom), 0.0)
        if f > 0:
            total += _crossing(atom, -z, f - _cumulative(atom), f - _cumulative(-z), 0.0)
        distance[i] = total
    return distance


@numba.njit(cache=True)
def _crossing(begin, end, d_begin, d_end, slope):  # type: ignore[no-untyped-def]
    """Return ∫|d| from begin to end, where d = F - Φ may change its sign and F is linear.

    Between the points where φ equals the slope of F, d is monotone and has at most one root.
    """
    stationary = math.inf
    if 0 < slope * _ROOT_2PI < 1:
        stationary = math.sqrt(-2 * math.log(slope * _ROOT_2PI))
    total, z, d = 0.0, begin, d_begin
    for stop in (-stationary, stationary, math.inf):
        if stop <= z:
            continue
        stop = min(stop, end)
        d_stop = d_begin + slope * (stop - begin) + _cumulative(begin) - _cumulative(stop)
        if stop == end:
            d_stop = d_end
        root, d_root = stop, d_stop
        if d * d_stop < 0:
            root, d_root = _root(z, stop, d, d_stop, slope), 0.0
            total += abs(_integral(root, stop, d_root, d_stop, slope))
        total += abs(_integral(z, root, d, d_root, slope))
        z, d = stop, d_stop
        if stop == end:
            break
    return total


@numba.njit(cache=True)
def _integral(a, b, d_a, d_b, slope):  # type: ignore[no-untyped-def]
    """Return ∫(F - Φ) from a to b, F through Φ(a) + d_a with the slope given."""
    f = d_a + _cumulative(a)
    gaussian = b * _cumulative(b) + _density(b) - a * _cumulative(a) - _density(a)
    return (f + 0.5 * slope * (b - a)) * (b - a) - gaussian


@numba.njit(cache=True)
def _root(a, b, d_a, d_b, slope):  # type: ignore[no-untyped-def]
    """Return where d = F - Φ, monotone from a to b, is zero (regula falsi, Illinois' variant)."""
    start, at_start, side = a, d_a + _cumulative(a), 0
    for _ in range(100):
        x = (a * d_b - b * d_a) / (d_b - d_a)
        d = at_start + slope * (x - start) - _cumulative(x)
        if abs(d) < 1e-13 or not a < x < b:
            break
        if d * d_b > 0:
            b, d_b = x, d
            d_a *= 0.5 if side < 0 else 1.0
            side = -1
        else:
            a, d_a = x, d
            d_b *= 0.5 if side > 0 else 1.0
            side = 1
    return min(max(x, a), b)


def from_samples(
    samples: npt.ArrayLike | torch.Tensor, *, method: Method = "exact", seed: int = 0
) -> Array:
    """Return the distance of each neuron's samples (tokens, neurons) to N(0, 1), in std.

    ``exact`` integrates |x₍ᵢ₎ - Φ⁻¹(u)| over each quantile bin of width 1/n. ``pot`` and ``scipy``
    give the libraries' numbers against one normal sample of the same size, drawn with ``seed``:
    the paper's estimator, off by at most that sample's own distance to N(0, 1), about 1.3/√n.
    A constant column, or one with values that are not finite, gives NaN.

    Raises:
        ValueError: the samples are not two-dimensional, or there is no such method.
    """
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().to("cpu", torch.promote_types(samples.dtype, torch.float32))
    rows = np.asarray(samples)
    rows = rows.astype(np.promote_types(rows.dtype, np.float32), copy=False)
    if rows.ndim != 2:
        raise ValueError(f"expected samples of shape (tokens, neurons), got {rows.shape}")
    if method not in {"exact", "pot", "scipy"}:
        raise ValueError(f"method must be 'exact', 'pot' or 'scipy', got {method!r}")
    columns = np.sort(rows.T, axis=1)  # (neurons, tokens)
    if method == "exact":
        return np.asarray(_exact_distance(columns, *gaussian_bins(columns.shape[1])))
    drawn = np.asarray(np.random.default_rng(seed).standard_normal(columns.shape[1]))
    distance: Array = np.full(len(columns), np.nan)
    for i, column in enumerate(columns.astype(np.float64)):
        if np.isfinite(column).all() and (column[:1] < column[-1:]).any():
            standard = (column - column.mean()) / column.std()
            distance[i] = _library_distance(standard, drawn, method)
    return distance


def between_samples(rows: torch.Tensor, others: torch.Tensor) -> Array:
    """Return W1 between each neuron's rows and others, both (tokens, neurons), in std of ``rows``.

    Of as many samples it is the mean of |x₍ᵢ₎ - y₍ᵢ₎|. NaN where the rows are constant.

    Raises:
        ValueError: not as many of both.
    """
    return between_sorted(sorted_columns(rows), sorted_columns(others))


def sorted_columns(rows: torch.Tensor) -> npt.NDArray[np.float32]:
    """Return each neuron's samples (tokens, neurons) in ascending order (neurons, tokens)."""
    return np.sort(rows.detach().float().cpu().numpy().T, axis=1)


def between_sorted(columns: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> Array:
    """Do as `between_samples`, for samples that are sorted (neurons, tokens).

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
        return float(stats.wasserstein_distance(standard, drawn))
    import ot  # an extra: only users who ask for POT's number need it

    return float(ot.wasserstein_1d(standard, drawn, p=1))  # W_p to the p-th power: p must be 1


@functools.lru_cache(maxsize=4)
def gaussian_bins(n: int) -> tuple[Array, Array]:
    """Return the n-quantiles of N(0, 1) and the density there, from u = 0 to 1 (n + 1,)."""
    quantiles: Array = ndtri(np.arange(n + 1) / max(n, 1))
    return quantiles, np.exp(-0.5 * quantiles**2) / _ROOT_2PI


@numba.njit(cache=True)
def integrate_bin(x, k, n, quantiles, densities):  # type: ignore[no-untyped-def]
    """Return ∫|x - Φ⁻¹(u)| du over the quantile bin from k/n to (k + 1)/n (see `gaussian_bins`)."""
    if quantiles[k] < x < quantiles[k + 1]:
        both = densities[k] + densities[k + 1]
        return x * (2 * _cumulative(x) - (2 * k + 1) / n) + 2 * _density(x) - both
    return abs(x / n - (densities[k] - densities[k + 1]))


@numba.njit(parallel=True, nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _exact_distance(columns, quantiles, densities):  # type: ignore[no-untyped-def]
    """Return ∫|F⁻¹ - Φ⁻¹| du of each sorted column (neurons, tokens), standardised."""
    neurons, n = columns.shape
    distance = np.full(neurons, np.nan)
    for i in numba.prange(neurons):
        column = columns[i]
        if n < 2 or not column[0] < column[-1]:
            continue
        mean, variance = 0.0, 0.0
        for k in range(n):
            mean += np.float64(column[k])
        mean /= n
        for k in range(n):
            variance += (column[k] - mean) ** 2
        if not 0 < variance < math.inf:
            continue
        inverse = 1 / math.sqrt(variance / n)
        total, split = 0.0, 0.0
        for k in range(n):  # as if no bin held its own x; most do not
            x = (column[k] - mean) * inverse
            total += abs(x / n - (densities[k] - densities[k + 1]))
        for k in range(n):
            x = (column[k] - mean) * inverse
            if quantiles[k] < x < quantiles[k + 1]:
                split += x * (2 * _cumulative(x) - (2 * k + 1) / n) + 2 * _density(x)
                split -= densities[k] + densities[k + 1]
                split -= abs(x / n - (densities[k] - densities[k + 1]))
        distance[i] = total + split
    return distance


@functools.cache
def _noise_constant() -> float:
    """E[√n W1] of a Gaussian sample with its own mean and std, in the limit: 0.833.

    √(2/π) ∫ √(Φ(1-Φ) - φ²(1 + x²/2)) dx: the standard deviation of the limiting process (Durbin,
    "Weak convergence of the sample distribution function when parameters are estimated", Annals
    of Statistics 1, 1973), times the mean of a standard normal's absolute value.
    """

    def deviation(x: float) -> float:
        variance = stats.norm.cdf(x) * stats.norm.sf(x) - stats.norm.pdf(x) ** 2 * (1 + x * x / 2)
        return math.sqrt(max(float(variance), 0.0))

    return math.sqrt(2 / math.pi) * 2 * float(integrate.quad(deviation, 0, 12)[0])


def noise_floor(count: float) -> float:
    """Return the mean distance that a truly Gaussian neuron shows on ``count`` independent tokens.

    0.833/√n in the limit, a little less for few. Tokens of a text depend on each other, so it is
    a lower bound; a threshold, never subtracted. NaN without tokens.
    """
    return _noise_constant() / math.sqrt(count) if count > 0 else math.nan


def noise_floor_95(count: float) -> float:
    """Return a bound of the 95% quantile of that distance: 1.2/√n (tests/test_wasserstein.py)."""
    return 1.2 / math.sqrt(count) if count > 0 else math.nan
