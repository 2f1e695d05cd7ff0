"""Which tokens make a neuron's distance to a Gaussian, and how sure that distance is."""

import numba
import numpy as np
import numpy.typing as npt
import torch

from entangle.numerics.wasserstein import gaussian_bins, integrate_bin

Array = npt.NDArray[np.float64]


def distance_parts(samples: npt.ArrayLike | torch.Tensor) -> Array:
    """Return each token's part of each neuron's distance (tokens, neurons), in std.

    A token's part is ∫|x₍ᵢ₎ - Φ⁻¹(u)| du over its own quantile bin, x standardised, averaged over
    tokens with equal values; the parts add up to the exact distance. NaN for a constant neuron, or
    one with values that are not finite.
    """
    rows = _rows(samples)
    order = np.argsort(rows, axis=0, kind="stable")
    columns = np.ascontiguousarray(np.take_along_axis(rows, order, axis=0).T)
    parts = np.full(columns.shape, np.nan)
    _fill_parts(columns, *gaussian_bins(len(rows)), parts)
    found = np.empty(rows.shape)
    np.put_along_axis(found, order, parts.T, axis=0)
    return found


def bootstrap(
    samples: npt.ArrayLike | torch.Tensor, window: int, *, draws: int = 200, seed: int = 0
) -> Array:
    """Return the exact distances of resampled windows (draws, neurons), in std.

    ``samples`` (tokens, neurons) are consecutive windows of ``window`` tokens each. As many are
    drawn with replacement, whole, since tokens of a window depend on each other.

    Raises:
        ValueError: the tokens are no whole number of windows.
    """
    rows = _rows(samples)
    if window < 1 or len(rows) % window:
        raise ValueError(f"expected whole windows of {window} tokens, got {len(rows)} tokens")
    windows = len(rows) // window
    drawn = np.random.default_rng(seed).integers(windows, size=(draws, windows))
    weights = np.stack([np.bincount(one, minlength=windows) for one in drawn]).astype(np.int32)
    order = np.argsort(rows, axis=0, kind="stable")
    columns = np.ascontiguousarray(np.take_along_axis(rows, order, axis=0).T)
    distances = np.full((draws, rows.shape[1]), np.nan)
    owner = np.ascontiguousarray((order // window).T.astype(np.int32))
    _fill_distances(columns, owner, weights, *gaussian_bins(len(rows)), distances)
    return distances


def _rows(samples: npt.ArrayLike | torch.Tensor) -> npt.NDArray[np.float32]:
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().float().cpu().numpy()
    rows = np.asarray(samples, dtype=np.float32)
    if rows.ndim != 2:
        raise ValueError(f"expected samples of shape (tokens, neurons), got {rows.shape}")
    return rows


@numba.njit(parallel=True, nogil=True, cache=True)
def _fill_parts(columns, quantiles, densities, parts):  # type: ignore[no-untyped-def]
    """Fill the parts of sorted columns (neurons, tokens), equal values sharing theirs."""
    neurons, n = columns.shape
    for i in numba.prange(neurons):
        column = columns[i]
        if n < 2 or not column[0] < column[-1]:
            continue
        mean = column.astype(np.float64).mean()
        inverse = 1 / np.sqrt(((column - mean) ** 2).mean())
        first = 0
        while first < n:
            last, total = first, 0.0
            while last < n and column[last] == column[first]:
                x = (column[last] - mean) * inverse
                total += integrate_bin(x, last, n, quantiles, densities)
                last += 1
            parts[i, first:last] = total / (last - first)
            first = last


@numba.njit(parallel=True, nogil=True, cache=True)
def _fill_distances(columns, owner, weights, quantiles, densities, distances):  # type: ignore[no-untyped-def]
    """Fill distances of sorted columns (neurons, tokens), each token as often as its window is."""
    neurons, n = columns.shape
    for i in numba.prange(neurons):
        column = columns[i].astype(np.float64)
        if n < 2 or not column[0] < column[-1]:
            continue
        for draw in range(len(weights)):
            mean, square = 0.0, 0.0
            for k in range(n):
                mean += weights[draw, owner[i, k]] * column[k]
            mean /= n
            for k in range(n):
                square += weights[draw, owner[i, k]] * (column[k] - mean) ** 2
            if not square > 0:
                continue
            inverse = 1 / np.sqrt(square / n)
            place, total = 0, 0.0
            for k in range(n):
                x = (column[k] - mean) * inverse
                for _ in range(weights[draw, owner[i, k]]):
                    total += integrate_bin(x, place, n, quantiles, densities)
                    place += 1
            distances[draw, i] = total
