"""The shape of a neuron's bulk: its tokens without the 1% that are farthest from their median.

A few outliers raise a distance by squeezing all other outputs together. The bulk's distance does
not see them: what is left is brought to mean 0 and std 1 and compared with one fixed law, N(0, 1)
kept within ±2.576 (which is what is left of a Gaussian neuron), brought to mean 0 and std 1.

This module does not import torch, so that reading a run is quick.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from entangle.numerics import threads as _threads  # noqa: F401
from entangle.numerics.gaussian import Array
from entangle.numerics.kernels.bins import width_of
from entangle.numerics.kernels.bulk_cpu import bulk_ends, bulk_shapes, far_variance

REMOVED = 0.01  # the share of the tokens, rounded, that are no part of the bulk


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the bulk of each neuron looks like (neurons,); NaN for a neuron without a std."""

    wasserstein: Array  # W1 to the reference, in std of the bulk
    error: Array  # certified bound of the error of ``wasserstein``
    negentropy: Array  # nats by which the entropy of a Gaussian of the bulk's variance is larger
    bimodality: Array  # (skewness² + 1) / kurtosis, from 0 to 1; 5/9 for a uniform law
    far_variance: Array  # of all tokens: the share of the variance beyond 6 std


def shapes_of_counts(state: Mapping[str, npt.NDArray[Any]], mean: Array, std: Array) -> Shapes:
    """Return the shapes of histograms, whose distribution F is linear inside a bin.

    ``state`` is the state of `Histograms` by name, as stored in a run; ``mean`` and ``std``
    (neurons,) are its moments. Of tokens that are equally far from the median any may be removed;
    the bound holds for each choice.

    The bound is certified. With X the bulk's sorted outputs, of mean m and std s, and X', m' and s'
    what is taken for them, it is (mean |X - X'| + |m - m'| + |s - s'|) / s'. By Cauchy and Schwarz
    this bounds the difference of the standardised laws. The bounds of the three terms are:

    * |X - X'|: half a bin, since F is exact at the edges of bins, and the number of tokens that the
      bulk may have more on one side, times its extent. The median and the ends of the bulk are known
      up to a bin, so this number is that of the tokens in about one bin at the ends;
    * |m - m'|: half a bin times the share of tokens removed, as all tokens inside have an exact sum;
    * |s - s'|: the same for the sum of squares, or what half a bin of the bulk's own may change it;
    * a tail that is partly in the bulk is taken to be at its edge; its sum bounds the error.

    No such distance exceeds √2, which is the bound if the bulk may lie in one bin. Negentropy and
    bimodality have no bound; they say nothing where that of the distance is large.
    """
    known = np.isfinite(std)
    count, removed, ends, width = _placed(state)
    found, far = np.full((len(std), 4), np.nan), np.full(len(std), np.nan)
    counts, tails, excess = state["counts"], state["tail_count"], state["tail_excess"]
    bulk_shapes(counts, count, removed, state["steps"], tails, excess, ends, known, found)
    place, spread = (mean - state["center"]) / width + counts.shape[1] / 2, std / width
    far_variance(counts, count, tails, excess, state["tail_square"], place, spread, known, far)
    distance, error, negentropy, bimodality = (found[:, column] for column in range(4))
    return Shapes(distance, error, negentropy, bimodality, far)


@dataclasses.dataclass(frozen=True)
class Ends:
    """Where the bulk of each neuron is (neurons,), in units of its output; NaN if unknown."""

    least: Array  # no token of the bulk is below it
    most: Array  # nor above it
    low: Array  # where it begins, if the tokens of a bin are spread evenly
    high: Array
    bins: Array  # how many bins it may lie in


def ends_of_counts(state: Mapping[str, npt.NDArray[Any]]) -> Ends:
    """Return where the bulk of each histogram is; ``state`` is that of `Histograms`, by name."""
    count, removed, ends, width = _placed(state)
    found = np.full((len(count), 4), np.nan)
    known = np.isfinite(ends).all(axis=1) & (count > 0)
    tails = state["tail_count"], state["tail_excess"]
    bulk_ends(state["counts"], count, removed, *tails, ends, known, found)
    left = state["center"] - width * (state["counts"].shape[1] / 2)
    least, most, low, high = (left + width * found[:, column] for column in range(4))
    return Ends(least, most, low, high, found[:, 1] - found[:, 0])


def _placed(
    state: Mapping[str, npt.NDArray[Any]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Array, Array]:
    """Return the tokens, those removed, the positions of the smallest and largest, and the width."""
    count = np.asarray(state["count"], np.int64)
    bins = state["counts"].shape[1]
    width: Array = width_of(state["scale"], bins)
    ends = np.stack([state["minimum"], state["maximum"]], axis=1).astype(np.float64)
    ends = (ends - state["center"][:, None]) / width[:, None] + bins / 2
    return count, np.rint(REMOVED * count).astype(np.int64), ends, width
