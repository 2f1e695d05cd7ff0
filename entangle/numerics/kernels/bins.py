"""Constants of a histogram's bins, shared by kernels, error bounds and pictures."""

STEPS = 64  # lattice steps in a bin
HALF_RANGE = 8  # the bins reach this many scales from the center on either side
MAX_BINS = 2048  # so that a step's index fits 17 bits, and the sum of 2^31 of its squares int64
MAX_EXCESS = 2**30  # in bins: a value farther out is not summed, and its neuron is NaN
MAX_SQUARES = 2**62  # in squared bins: a tail's sum is capped here, and its neuron is NaN
