"""Small histograms of many neurons at once."""

import dataclasses

import numpy as np
import numpy.typing as npt
import xarray as xr

from entangle.numerics.bulk import ends_of_counts
from entangle.numerics.kernels.bins import width_of

Floats = npt.NDArray[np.float64]

_STATE = ("counts", "count", "center", "scale", "tail_count", "tail_excess", "minimum", "maximum")
_ROOM = 0.3  # of the bulk's extent, free on both sides of it


@dataclasses.dataclass(frozen=True)
class Sketches:
    """Bars of equal width between two outputs, a row per neuron; NaN for constant neurons."""

    low: Floats  # (neurons,), output units
    high: Floats
    shares: Floats  # of the tokens in each bar (neurons, bars)


def axis_of(held: xr.Dataset) -> tuple[Floats, Floats]:
    """Return the ends (neurons,) of the axis of each neuron, in output units.

    They follow its bulk, all tokens but the 1% farthest from the median, and leave 30% of its
    extent free on both sides. NaN for a neuron without a bulk.
    """
    ends = ends_of_counts({name: held[name].to_numpy() for name in _STATE})
    fine = width_of(held["scale"].to_numpy(), held["counts"].shape[1])
    room = np.maximum(_ROOM * (ends.high - ends.low), fine)
    return ends.low - room, ends.high + room


def sketch(held: xr.Dataset, mean: Floats, std: Floats, *, bars: int) -> Sketches:
    """Return sketches of neurons: ``held`` is their histogram state, as in a run's ``histogram``.

    A sketch covers what `axis_of` returns. A fine bin that several bars share is split as if its
    tokens were spread evenly. Tokens beyond the histogram are in no bar.
    """
    counts = held["counts"].to_numpy().astype(np.float64)  # (neurons, fine bins)
    tails = held["tail_count"].to_numpy().astype(np.float64)
    below = np.cumsum(np.concatenate([tails[:, :1], counts], axis=1), axis=1)  # at the fine edges
    tokens = below[:, -1] + tails[:, 1]
    fine = width_of(held["scale"].to_numpy(), counts.shape[1])
    left = held["center"].to_numpy() - fine * (counts.shape[1] / 2)
    spread = np.isfinite(std) & (std > 0) & np.isfinite(mean)
    low, high = (np.where(spread, end, np.nan) for end in axis_of(held))
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
