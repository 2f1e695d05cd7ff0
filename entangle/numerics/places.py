"""The place of a value in a neuron's distribution, from its stored histogram."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from entangle.numerics.kernels.bins import HALF_RANGE
from entangle.numerics.levels import OUTSIDE, Levels

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Distribution:
    """The distribution function of a neuron's outputs: linear between its knots."""

    knots: Array  # output units, ascending: the edges of the bins, and the ends of both tails
    below: Array  # share of the tokens below each knot, from 0 to 1

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Return the distribution of one neuron's state (see `Histograms`).

        A tail is taken as linear from the outermost bin to the smallest or largest output.
        """
        tails = np.asarray(state["tail_count"], dtype=np.float64)
        counts = np.concatenate(
            [tails[:1], np.asarray(state["counts"], dtype=np.float64), tails[1:]]
        )
        center, scale = float(state["center"]), float(state["scale"])
        edges = center + scale * np.linspace(-HALF_RANGE, HALF_RANGE, len(counts) - 1)
        ends = (
            min(float(state["minimum"]), edges[0]),
            max(float(state["maximum"]), edges[-1]),
        )
        knots = np.concatenate([ends[:1], edges, ends[1:]])
        return cls(knots, np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum())

    def places(self, values: npt.NDArray[np.floating]) -> tuple[Array, Array]:
        """Return the share of the tokens below each value, and the bound of its error.

        The tokens of the value's bin, or tail, may lie anywhere in it: the bound is the distance to
        the farther end of the bin's share.
        """
        found = np.interp(values, self.knots, self.below)
        after = np.searchsorted(self.knots, values, side="right").clip(1, len(self.knots) - 1)
        inside = (values >= self.knots[0]) & (values <= self.knots[-1])
        bound = np.maximum(found - self.below[after - 1], self.below[after] - found)
        return found, np.where(inside | np.isnan(values), bound, 0.0)

    @property
    def scale(self) -> Levels:
        """The median and the reach of the distribution, for colours; it has no levels."""
        median = float(np.interp(0.5, self.below, self.knots))
        far = np.sort(np.abs(self.knots - median))
        above, under = (np.interp(median + sign * far, self.knots, self.below) for sign in (1, -1))
        return Levels(median, float(np.interp(1 - OUTSIDE, above - under, far)), 0.0)
