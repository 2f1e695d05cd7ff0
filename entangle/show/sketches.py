"""Small histograms of many neurons at once."""

import dataclasses

import numpy as np
import numpy.typing as npt
import xarray as xr

from entangle.numerics.kernels.bins import HALF_RANGE

Floats = npt.NDArray[np.float64]

_REACH = 3.5  # std on both sides of the mean that a sketch shows at least
_CENTRAL = (0.001, 0.999)  # quantiles that a sketch shows at least, within the histogram


@dataclasses.dataclass(frozen=True)
class Sketches:
    """Bars of equal width between two outputs, a row per neuron; NaN for constant neurons."""

    low: Floats  # (neurons,), output units
    high: Floats
    shares: Floats  # of the tokens in each bar (neurons, bars)


def sketch(held: xr.Dataset, mean: Floats, std: Floats, *, bars: int) -> Sketches:
    """Return sketches of neurons: ``held`` is their histogram state, as in a run's ``histogram``.

    A sketch covers the central 99.8% of the tokens, within the histogram, and 3.5 std on both sides
    of the mean. A fine bin that several bars share is split as if its tokens were spread evenly.
    Tokens beyond the histogram are in no bar.
    """
    counts = held["counts"].to_numpy().astype(np.float64)  # (neurons, fine bins)
    tails = held["tail_count"].to_numpy().astype(np.float64)
    below = np.cumsum(np.concatenate([tails[:, :1], counts], axis=1), axis=1)  # at the fine edges
    tokens = below[:, -1] + tails[:, 1]
    fine = 2 * HALF_RANGE * held["scale"].to_numpy() / counts.shape[1]
    left = held["center"].to_numpy() - HALF_RANGE * held["scale"].to_numpy()
    ends = [left + fine * _quantile(below, counts, share * tokens) for share in _CENTRAL]
    spread = np.isfinite(std) & (std > 0) & np.isfinite(mean)
    low = np.where(spread, np.minimum(ends[0], mean - _REACH * std), np.nan)
    high = np.where(spread, np.maximum(ends[1], mean + _REACH * std), np.nan)
    rims = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, bars + 1)
    places = np.nan_to_num((rims - left[:, None]) / fine[:, None]).clip(0, counts.shape[1])
    whole = np.minimum(places.astype(np.int64), counts.shape[1] - 1)
    reached = np.take_along_axis(below, whole, axis=1) + (places - whole) * np.take_along_axis(
        counts, whole, axis=1
    )
    shares = np.where(
        spread[:, None], np.diff(reached, axis=1) / np.maximum(tokens, 1)[:, None], np.nan
    )
    return Sketches(low, high, shares)


def _quantile(below: Floats, counts: Floats, wanted: Floats) -> Floats:
    """Return the position below which so many tokens lie, in fine bins from the left edge."""
    after = np.sum(below < wanted[:, None], axis=1).clip(1, counts.shape[1])[:, None]
    before, inside = (
        np.take_along_axis(array, after - 1, axis=1)[:, 0] for array in (below, counts)
    )
    part = (wanted - before) / np.maximum(inside, 1)
    filled = counts > 0  # positions beyond the histogram are clipped to it
    first, last = filled.argmax(axis=1), counts.shape[1] - filled[:, ::-1].argmax(axis=1)
    place: Floats = (after[:, 0] - 1 + part.clip(0, 1)).clip(first, last)
    return place
