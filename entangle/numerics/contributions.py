"""Each token's part of a neuron's distance to a Gaussian, and a bootstrap of that distance."""

import numpy as np
import numpy.typing as npt
import torch

from entangle.numerics import threads as _threads  # noqa: F401
from entangle.numerics.gaussian import from_samples, gaussian_bins
from entangle.numerics.kernels.distances_cpu import fill_distances, fill_parts

Array = npt.NDArray[np.float64]


def distance_parts(samples: npt.ArrayLike | torch.Tensor) -> Array:
    """Return each token's part of each neuron's distance (tokens, neurons), in std.

    A token's part is ∫|x₍ᵢ₎ - Φ⁻¹(u)| du over its own quantile bin, where x is standardised. Tokens
    with equal values share the mean of their parts. The parts add up to the exact distance. They
    are NaN for a constant neuron and for one with values that are not finite.
    """
    rows = _rows(samples)
    order = np.argsort(rows, axis=0, kind="stable")
    columns = np.ascontiguousarray(np.take_along_axis(rows, order, axis=0).T)
    parts = np.full(columns.shape, np.nan)
    fill_parts(columns, *gaussian_bins(len(rows)), parts)
    found = np.empty(rows.shape)
    np.put_along_axis(found, order, parts.T, axis=0)
    return found


def bootstrap(
    samples: npt.ArrayLike | torch.Tensor,
    window: int | npt.NDArray[np.int64],
    windows: int | None = None,
    *,
    draws: int = 200,
    seed: int = 0,
) -> Array:
    """Return the exact distances of resampled windows (draws, neurons), in std.

    ``samples`` (tokens, neurons) are consecutive windows of ``window`` tokens each, or ``window``
    (tokens,) is the index of each token's window among so many ``windows``, ascending. A draw takes as
    many windows with replacement. It takes whole windows, since tokens of one window depend on each
    other.

    Raises:
        ValueError: ``window`` is less than 1, or the number of tokens is not a multiple of it.
    """
    rows = _rows(samples)
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"expected windows of at least 1 token, got a window of {window}")
        if len(rows) % window:
            raise ValueError(
                f"expected whole windows of {window} tokens, got {len(rows)} tokens, which is not a "
                f"multiple of {window}"
            )
        windows = len(rows) // window
        window = np.repeat(np.arange(windows), window)
    sizes = np.bincount(window, minlength=windows or 0)
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(draws, len(sizes)))
    distances = np.full((draws, rows.shape[1]), np.nan)
    if sizes.min() < sizes.max():
        own = np.split(np.arange(len(rows)), np.cumsum(sizes)[:-1])
        for number, one in enumerate(drawn):
            chosen = np.concatenate([own[place] for place in one])
            if len(chosen):
                distances[number] = from_samples(rows[chosen])
        return distances
    weights = np.stack([np.bincount(one, minlength=len(sizes)) for one in drawn]).astype(np.int32)
    order = np.argsort(rows, axis=0, kind="stable")
    columns = np.ascontiguousarray(np.take_along_axis(rows, order, axis=0).T)
    owner = np.ascontiguousarray(window[order].T.astype(np.int32))
    fill_distances(columns, owner, weights, *gaussian_bins(len(rows)), distances)
    return distances


def _rows(samples: npt.ArrayLike | torch.Tensor) -> npt.NDArray[np.float32]:
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().float().cpu().numpy()
    rows = np.asarray(samples, dtype=np.float32)
    if rows.ndim != 2:
        raise ValueError(f"expected samples of shape (tokens, neurons), got {rows.shape}")
    return rows
