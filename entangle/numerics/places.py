"""The place of a value in a neuron's distribution, from its stored histogram."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from entangle.numerics.kernels.bins import SLIP, edges_of
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
        edges = edges_of(center, scale, len(counts) - 2)
        ends = (
            min(float(state["minimum"]), edges[0]),
            max(float(state["maximum"]), edges[-1]),
        )
        knots = np.concatenate([ends[:1], edges, ends[1:]])
        return cls(knots, np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum())

    def places(self, values: npt.NDArray[np.floating]) -> tuple[Array, Array]:
        """Return the share of the tokens below each value, and the bound of its error.

        The tokens of the value's bin, or tail, may lie anywhere in it: the bound is the distance to
        the farther end of the bin's share. Beside an edge it may be in either bin, since float32
        has found the bin.
        """
        last = len(self.knots) - 1
        found = np.interp(values, self.knots, self.below)
        before = np.searchsorted(self.knots, values - self._slip, side="right").clip(1, last) - 1
        after = np.searchsorted(self.knots, values + self._slip, side="left").clip(1, last)
        inside = (values >= self.knots[0]) & (values <= self.knots[-1])
        bound = np.maximum(found - self.below[before], self.below[after] - found)
        return found, np.where(inside | np.isnan(values), bound, 0.0)

    def quantile(self, share: float) -> tuple[float, float]:
        """Return the value that this share of the tokens is below, and the bound of its error.

        Both are in output units. The true value may lie anywhere in its bin, or tail: the bound is
        the distance to the farther end.
        """
        left, right = (int(np.searchsorted(self.below, share, side)) for side in ("left", "right"))
        # Where the share falls on an edge, the value is in the bin before it or in that behind it.
        begin, end = max(left - 1, 0), min(right, len(self.knots) - 1)
        value = float(np.interp(share, self.below, self.knots))
        far = max(value - self.knots[begin], self.knots[end] - value)
        return value, float(far + self._slip)

    @property
    def _slip(self) -> float:
        """How far beyond its bin a value may be, in output units."""
        return float(SLIP * (self.knots[2] - self.knots[1]))

    @property
    def scale(self) -> Levels:
        """The median and the reach of the distribution, for colours; it has no levels."""
        median = float(np.interp(0.5, self.below, self.knots))
        far = np.sort(np.abs(self.knots - median))
        above, under = (np.interp(median + sign * far, self.knots, self.below) for sign in (1, -1))
        return Levels(median, float(np.interp(1 - OUTSIDE, above - under, far)), 0.0)
