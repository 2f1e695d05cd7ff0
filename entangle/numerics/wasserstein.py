"""1-Wasserstein distances of each neuron's standardised outputs to N(0, 1): its entanglement.

The distances of `gaussian`, for what is on a device: histograms and rows of torch.
"""

import numpy as np
import numpy.typing as npt
import torch

from entangle.numerics import threads as _threads  # noqa: F401
from entangle.numerics.gaussian import Array, Distances, between_sorted, from_counts
from entangle.numerics.histograms import Histograms, Moments


def from_histograms(histograms: Histograms, moments: Moments) -> Distances:
    """Return each neuron's distance, with a certified bound of its error (see `from_counts`)."""
    state = {name: tensor.cpu().numpy() for name, tensor in histograms.tensors().items()}
    return from_counts(state, moments.mean, moments.std)


def between_samples(rows: torch.Tensor, others: torch.Tensor) -> Array:
    """Return W1 between each neuron's rows and others, both (tokens, neurons), in std of ``rows``.

    Of as many samples it is the mean of |x₍ᵢ₎ - y₍ᵢ₎|. NaN where the rows are constant.

    Raises:
        ValueError: not as many of both.
    """
    return between_sorted(sorted_columns(rows), sorted_columns(others))


def sorted_columns(rows: torch.Tensor) -> npt.NDArray[np.float32]:
    """Return each neuron's samples (tokens, neurons) in ascending order (neurons, tokens)."""
    return np.sort(rows.detach().float().cpu().numpy().T, axis=1)
