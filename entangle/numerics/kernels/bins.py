"""The bins of a histogram: constants that kernels, error bounds and pictures share."""

STEPS = 64  # lattice steps in a bin
HALF_RANGE = 8  # the bins end at this many scales on either side of the center
MAX_BINS = 2048  # so that a step's index fits 17 bits, and its square summed over 2^31 tokens int64
MAX_EXCESS = 2**30  # in bins: what lies farther out is not summed, and its neuron is NaN
MAX_SQUARES = 2**62  # in squared bins: a tail's sum stops here, and its neuron is NaN
