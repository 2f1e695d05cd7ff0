"""Many values of one neuron in 8 bits each: fine around the median, coarse far from it."""

import dataclasses
from typing import Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

MOST = 127  # levels on either side of the median
OUTSIDE = 0.01  # share of the values that are farther from the median than the reach


@dataclasses.dataclass(frozen=True)
class Levels:
    """A scale of 255 levels: level n stands for ``median + reach * sinh(step * n)``.

    The reach is the distance to the median that 99% of the values do not exceed, so a few massive
    values leave levels enough for all others. A value is at most half a level off, which is less
    than ``0.53 * step * hypot(reach, value - median)`` if none is a million reaches from the median.
    """

    median: float
    reach: float
    step: float

    @classmethod
    def of(cls, values: npt.NDArray[np.floating]) -> Self:
        """Return the scale of values (tokens,), whose ends are levels.

        If 99% of them equal the median, the reach is the largest distance to it.
        """
        median = float(np.median(values))
        far = np.abs(values.astype(np.float64) - median)
        most = float(far.max())
        reach = float(np.quantile(far, 1 - OUTSIDE)) or most or 1.0
        return cls(median, reach, float(np.arcsinh(most / reach)) / MOST)

    def levels(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.int8]:
        """Return the level nearest to each value."""
        if self.step == 0:
            return np.zeros(values.shape, np.int8)
        far = (values.astype(np.float64) - self.median) / self.reach
        return np.rint(np.arcsinh(far) / self.step).clip(-MOST, MOST).astype(np.int8)

    def values(self, levels: npt.NDArray[np.int8]) -> Array:
        """Return the values that levels stand for."""
        found: Array = self.median + self.reach * np.sinh(self.step * levels.astype(np.float64))
        return found

    def shades(self, values: npt.NDArray[np.floating]) -> Array:
        """Return how strongly values are coloured, from -1 to 1.

        It is their distance to the median in reaches; at the farthest 1% of them it is full.
        """
        found: Array = ((values - self.median) / self.reach).clip(-1, 1)
        return found
