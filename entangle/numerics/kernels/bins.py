"""Constants and places of a histogram's bins, shared by kernels, error bounds and pictures."""

from typing import Any

import numpy as np
import numpy.typing as npt

STEPS = 64  # lattice steps in a bin
HALF_RANGE = 8  # the bins reach this many scales from the center on either side
MAX_BINS = 2048  # so that a step's index fits 17 bits, and the sum of 2^31 of its squares int64
MAX_EXCESS = 2**30  # in bins: a value farther out is not summed, and its neuron is NaN
MAX_SQUARES = 2**62  # in squared bins: a tail's sum is capped here, and its neuron is NaN
# A value is at most 1/128 of a step beyond the bin that counts it, since float32 finds its bin. This
# is 1/8192 of a bin; twice that is taken.
SLIP = 1 / 4096


def width_of(scale: Any, bins: int) -> Any:
    """Return the width of bins, in the unit of ``scale``."""
    return scale * (2 * HALF_RANGE / bins)


def edges_of(center: float, scale: float, bins: int) -> npt.NDArray[np.float64]:
    """Return the edges of bins (bins + 1,), in the unit of ``center`` and ``scale``."""
    return center + scale * np.linspace(-HALF_RANGE, HALF_RANGE, bins + 1)
