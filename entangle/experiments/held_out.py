"""Measures of one layer on held-out tokens: neurons within clusters, and with sparse experts."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from entangle.model.layers import LinearLayer
from entangle.numerics import gaussian, wasserstein
from entangle.numerics.difficulty import mapping_difficulty
from entangle.numerics.sparsity import Solve, Sparsity
from entangle.pruning.calibration import Calibration
from entangle.pruning.neurons import sparse_neurons
from entangle.pruning.options import SOLVE

Array = npt.NDArray[np.float64]
Tensors = dict[str, torch.Tensor]


def measure_layer(
    layer: LinearLayer,
    calibrations: Sequence[Calibration],
    sparsities: Sequence[Sparsity],
    inputs: torch.Tensor,
    halves: torch.Tensor,
    kept: Sequence[int],
    seed: int,
    solve: Solve = SOLVE,
) -> Tensors:
    """Return the measures of a layer's neurons on held-out inputs (tokens, inputs), by name.

    The first calibration has one expert; then come pairs of k-means and random experts. ``halves``
    (tokens,) is 0 or 1, the half of the windows that a token is in. ``kept`` are the neurons whose
    outputs are returned.
    """
    outputs = layer.module(inputs)
    found = _clustered(calibrations, inputs, outputs, seed)
    all_neurons, columns = torch.arange(layer.neurons), wasserstein.sorted_columns(outputs)
    shape = (layer.neurons, len(sparsities), len(calibrations))
    distance, lost = np.empty(shape), np.empty((*shape, 2))
    sparse = torch.empty(*shape[1:], len(inputs), len(kept))
    for place, sparsity in enumerate(sparsities):
        for arm, calibration in enumerate(calibrations):
            rows = sparse_neurons(layer, calibration, sparsity, all_neurons, solve=solve)
            pruned = rows.outputs(layer)(inputs)
            others = wasserstein.sorted_columns(pruned)
            distance[:, place, arm] = gaussian.between_sorted(columns, others)
            squares = (pruned.double() - outputs.double()).square_()
            for half in range(2):
                lost[:, place, arm, half] = squares[halves == half].sum(dim=0).cpu()
            sparse[place, arm] = pruned[:, kept].float().cpu()
    found |= {"distance_to_dense": torch.from_numpy(distance), "lost": torch.from_numpy(lost)}
    return found | {"outputs": outputs[:, kept].float().cpu(), "sparse": sparse}


def _clustered(
    calibrations: Sequence[Calibration], inputs: torch.Tensor, outputs: torch.Tensor, seed: int
) -> Tensors:
    """Return each token's cluster, and the distance and difficulty of neurons within clusters.

    The random clusters here are the k-means clusters with the tokens shuffled, so that the sizes
    are exactly the same.
    """

    def distance(rows: torch.Tensor) -> Array:
        return gaussian.from_samples(outputs[rows])

    def difficulty(rows: torch.Tensor) -> Array:
        found = mapping_difficulty(inputs[rows], outputs[rows], len(rows), seed=seed)
        return found.difficulty

    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs)))
    shuffled = shuffled.to(inputs.device)
    clusters: list[torch.Tensor] = []
    for calibration in calibrations:
        router = calibration.router
        zero = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        clusters.append(zero if router is None else router.assign(inputs))
    found: dict[str, list[Array]] = {}
    # One expert has no control; both arms of a pair are measured together.
    for arm in [0, *range(1, len(clusters), 2)]:
        assigned = [clusters[arm], clusters[arm][shuffled]] if arm else [clusters[arm]]
        for name, measure in (("wasserstein", distance), ("difficulty", difficulty)):
            values, share = _within(measure, assigned)
            found.setdefault(f"{name}_within", []).extend(values)
            found.setdefault(f"{name}_share", []).extend([share] * len(assigned))
    tensors = {name: torch.from_numpy(np.stack(values, axis=1)) for name, values in found.items()}
    return tensors | {"clusters": torch.stack(clusters).cpu()}


def _within(
    measure: Callable[[torch.Tensor], Array], assigned: Sequence[torch.Tensor]
) -> tuple[Array, Array]:
    """Return means of a measure over clusters, weighted by tokens, and the share of tokens in them.

    ``assigned`` are clusterings (tokens,) with the same sizes. If a neuron has no value in a
    cluster of one clustering, such as with constant outputs, the cluster is left out of all. The
    means are (clusterings, neurons), the share of the remaining tokens is (neurons,).
    """
    total, weight = np.zeros(()), np.zeros(())
    for cluster in assigned[0].unique():
        rows = [(one == cluster).nonzero().flatten() for one in assigned]
        values = np.stack([measure(part) for part in rows])  # (clusterings, neurons)
        known = np.isfinite(values).all(axis=0)
        total = total + np.where(known, values, 0.0) * len(rows[0])
        weight = weight + known * len(rows[0])
    return total / np.where(weight > 0, weight, np.nan), weight / len(assigned[0])
