"""One layer on held-out tokens: each neuron within clusters, and pruned for them."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from entangle.model.layers import LinearLayer
from entangle.numerics import wasserstein
from entangle.numerics.difficulty import mapping_difficulty
from entangle.numerics.pruning import Sparsity
from entangle.study.calibration import Calibration
from entangle.study.swapping import sparse_rows

Array = npt.NDArray[np.float64]


def measure_layer(
    layer: LinearLayer,
    calibrations: Sequence[Calibration],
    sparsities: Sequence[Sparsity],
    inputs: torch.Tensor,
    kept: Sequence[int],
    seed: int,
) -> dict[str, torch.Tensor]:
    """Return what is found of a layer's neurons on held-out inputs (tokens, inputs), by name."""
    outputs = layer.module(inputs)
    everyone = torch.arange(layer.neurons)
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs)))
    clusters, within, difficulty = [], [], []
    for arm, calibration in enumerate(calibrations):
        router = calibration.router
        zero = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        clusters.append(zero if router is None else router.assign(inputs))
        # Arms come as one expert, and then in pairs: k-means, at random.
        same_sizes = clusters[arm - 1][shuffled] if arm and arm % 2 == 0 else clusters[arm]
        within.append(_within(lambda rows: wasserstein.from_samples(outputs[rows]), same_sizes))
        difficulty.append(
            _within(
                lambda rows: (
                    mapping_difficulty(inputs[rows], outputs[rows], len(rows), seed=seed).difficulty
                ),
                same_sizes,
            )
        )
    shape = (layer.neurons, len(sparsities), len(calibrations))
    distance, lost = np.empty(shape), np.empty((*shape, 2))
    sparse = torch.empty(*shape[1:], len(inputs), len(kept))
    for place, sparsity in enumerate(sparsities):
        for arm, calibration in enumerate(calibrations):
            pruned = sparse_rows(layer, calibration, sparsity, everyone).outputs(layer)(inputs)
            distance[:, place, arm] = wasserstein.between_samples(outputs, pruned)
            squares = (pruned.double() - outputs.double()).square_()
            for half in range(2):
                lost[:, place, arm, half] = squares[half::2].sum(dim=0).cpu()
            sparse[place, arm] = pruned[:, kept].float().cpu()
    found = {
        "wasserstein_within": np.stack(within, axis=1),
        "difficulty_within": np.stack(difficulty, axis=1),
        "distance_to_dense": distance,
        "lost": lost,
    }
    tensors = {name: torch.from_numpy(value) for name, value in found.items()}
    tensors |= {"outputs": outputs[:, kept].float().cpu(), "sparse": sparse}
    return tensors | {"clusters": torch.stack(clusters).cpu()}


def _within(measure: Callable[[torch.Tensor], Array], clusters: torch.Tensor) -> Array:
    """Return the mean of what is measured in each cluster, weighted by its tokens (neurons,).

    A cluster in which a neuron has no value has no weight in its mean.
    """
    total = weight = np.zeros(())
    for cluster in clusters.unique():
        rows = (clusters == cluster).nonzero().flatten()
        values = measure(rows)
        known = np.isfinite(values)
        total = total + np.where(known, values, 0.0) * len(rows)
        weight = weight + known * len(rows)
    mean: Array = total / np.where(weight > 0, weight, np.nan)
    return mean
