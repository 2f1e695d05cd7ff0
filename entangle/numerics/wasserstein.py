"""1-Wasserstein distances of torch histograms and rows, on any device (see `gaussian`).

The distance of a neuron's standardised outputs to N(0, 1) measures its entanglement.
"""

import numpy as np
import numpy.typing as npt
import torch

from entangle.numerics import threads as _threads  # noqa: F401
from entangle.numerics.gaussian import Array, Distances, between_sorted, from_counts
from entangle.numerics.histograms import Histograms, Moments


def from_histograms(histograms: Histograms, moments: Moments) -> Distances:
    """Return each neuron's distance, with a certified error bound (see `from_counts`)."""
    state = {name: tensor.cpu().numpy() for name, tensor in histograms.tensors().items()}
    return from_counts(state, moments.mean, moments.std)


def between_samples(rows: torch.Tensor, others: torch.Tensor) -> Array:
    """Return W1 between rows and others of each neuron, both (tokens, neurons), in std of ``rows``.

    For equal numbers of samples it is the mean of |x₍ᵢ₎ - y₍ᵢ₎|. It is NaN for constant ``rows``.

    Raises:
        ValueError: the shapes differ.
    """
    return between_sorted(sorted_columns(rows), sorted_columns(others))


def sorted_columns(rows: torch.Tensor) -> npt.NDArray[np.float32]:
    """Return each neuron's samples (tokens, neurons) in ascending order (neurons, tokens)."""
    return np.sort(rows.detach().float().cpu().numpy().T, axis=1)
