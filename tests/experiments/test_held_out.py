"""A layer on held-out tokens: against plain loops over clusters, tokens and experts."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from scipy.special import ndtri
from torch import nn
from transformers.pytorch_utils import Conv1D

from entangle.experiments.held_out import measure_layer
from entangle.model.layers import LinearLayer, weight_of
from entangle.numerics.masks import prune
from entangle.numerics.moments import InputMoments
from entangle.numerics.routing import CentroidRouter, Router, random_router
from entangle.numerics.sparsity import Sparsity
from entangle.pruning.calibration import Calibration
from tests.numerics.test_difficulty import brute, drawn

Array = npt.NDArray[np.float64]

INPUTS, NEURONS, TOKENS = 8, 6, 61
DEAD, HALF_DEAD = 4, 3  # neurons: one without weights, one that is constant in the first clusters
RARE = 5  # one that is constant but for two tokens, which are in one cluster
SPARSITIES = [Sparsity.parse("0.5"), Sparsity.parse("1:4")]
KEPT, SEED = [3, 0], 8
HALVES = torch.arange(TOKENS) // 7 % 2  # of windows of seven tokens


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(count: int, seed: int) -> torch.Tensor:
    """Return inputs in three groups far apart; the last inputs are zero in most."""
    rows, group = noise(count, INPUTS, seed=seed), torch.arange(count) % 7 % 3
    rows[:, :3] += 8 * torch.eye(3)[group]
    rows[:, -1] *= group == 2
    rows[:, -2] *= (torch.arange(count) % 60 == 8) | (torch.arange(count) % 60 == 15)
    return rows


def routers() -> list[Router]:
    """Return two routers by centroids, each before one at random: of three experts, and of two."""
    matrix = torch.zeros(INPUTS, 3)
    matrix[:3] = torch.eye(3)
    one = torch.zeros(INPUTS, 2)
    one[2, 1] = 1.0
    return [
        CentroidRouter(matrix, torch.zeros(3)),
        random_router(INPUTS, torch.tensor([3.0, 2.0, 2.0]), seed=2),
        CentroidRouter(one, torch.tensor([4.0, 0.0])),
        random_router(INPUTS, torch.tensor([5.0, 2.0]), seed=5),
    ]


def calibrations() -> list[Calibration]:
    text = tokens_of(200, seed=1)
    whole = InputMoments.zeros(INPUTS)
    whole.add(text)
    found = [Calibration(whole, None, 1.0, "layer")]
    for router in routers():
        parts, chosen = [], router.assign(text)
        for expert in range(router.experts):
            moments = InputMoments.zeros(INPUTS)
            moments.add(text[chosen == expert])
            parts.append(moments)
        found.append(Calibration(InputMoments.stack(parts), router, 1.0, "layer"))
    return found


def layer_of(kind: str) -> LinearLayer:
    """Return a layer of which HALF_DEAD and RARE see one of the last inputs alone, and DEAD none."""
    module: nn.Module = nn.Linear(INPUTS, NEURONS)
    if kind == "conv":
        module = Conv1D(NEURONS, INPUTS)  # type: ignore[no-untyped-call]
    weight = noise(NEURONS, INPUTS, seed=3)
    weight[HALF_DEAD, :-1] = weight[RARE, :-2] = weight[RARE, -1] = 0
    weight[DEAD] = 0
    layer = LinearLayer("h.0.up", 0, "up", module)
    with torch.no_grad():
        weight_of(layer).copy_(weight)
        bias = module.bias
        assert isinstance(bias, nn.Parameter)
        bias.copy_(noise(NEURONS, seed=4))
    return layer


class Measured:
    """What is found of a layer, and the same inputs and outputs for loops of the tests' own."""

    def __init__(self, kind: str) -> None:
        self.layer = layer_of(kind)
        self.inputs = tokens_of(TOKENS, seed=2)
        with torch.inference_mode():
            self.found = measure_layer(
                self.layer, calibrations(), SPARSITIES, self.inputs, HALVES, KEPT, SEED
            )
        bias = self.layer.module.bias
        assert isinstance(bias, nn.Parameter)
        self.bias = bias.detach()
        self.outputs = self.inputs @ weight_of(self.layer).T + self.bias

    def clusters(self, arm: int) -> list[list[int]]:
        """Return the tokens of each cluster, for random arms those of k-means with tokens shuffled."""
        if arm == 0:
            return [list(range(TOKENS))]
        chosen = routers()[(arm - 1) // 2 * 2].assign(self.inputs).tolist()
        if arm % 2 == 0:
            order = np.random.default_rng(SEED).permutation(TOKENS).tolist()
            chosen = [chosen[place] for place in order]
        return [[i for i, c in enumerate(chosen) if c == one] for one in sorted(set(chosen))]

    def means(self, arm: int, value: Callable[[list[int]], Array]) -> tuple[Array, Array]:
        """Return means of clusters' values, each as often as it has tokens, and their share.

        A cluster counts where a neuron has a value in it and in its counterpart of equal size.
        """
        other = arm if arm == 0 else arm + 1 if arm % 2 else arm - 1
        pairs = list(zip(self.clusters(arm), self.clusters(other), strict=True))
        assert all(len(cluster) == len(partner) for cluster, partner in pairs)
        every = []
        for cluster, partner in pairs:
            known = np.isfinite(value(cluster)) & np.isfinite(value(partner))
            every += [np.where(known, value(cluster), np.nan)] * len(cluster)
        counted = np.isfinite(every).sum(axis=0)
        return np.nansum(every, axis=0) / np.where(counted, counted, np.nan), counted / TOKENS

    def pruned(self, place: int, arm: int) -> torch.Tensor:
        """Return the outputs of pruned weights, token by token, each with those of its expert."""
        calibration, sparsity = calibrations()[arm], SPARSITIES[place]
        router, weight = calibration.router, weight_of(self.layer)
        if router is None:
            return (
                self.inputs @ prune(weight, calibration.moments, sparsity, solve="exact").weight.T
                + self.bias
            )
        moments = calibration.moments.shrunk(0.5)
        experts = [
            prune(weight, moments.expert(expert), sparsity, solve="exact").weight
            for expert in range(router.experts)
        ]
        rows = [experts[int(router.assign(row[None]))] @ row + self.bias for row in self.inputs]
        return torch.stack(rows)


@pytest.fixture(scope="module", params=["linear", "conv"])
def measured(request: pytest.FixtureRequest) -> Measured:
    return Measured(request.param)


def distance(values: Sequence[float]) -> float:
    """Return W1 of standardised values to N(0, 1), summed over a fine grid of quantiles."""
    x = np.sort(np.asarray(values, np.float64))
    if np.ptp(x) == 0:
        return float("nan")
    x = (x - x.mean()) / x.std()
    each = 4000
    u = (np.arange(each * len(x)) + 0.5) / (each * len(x))
    return float(np.abs(np.repeat(x, each) - ndtri(u)).mean())


def test_distances_within_clusters_are_means_weighted_by_tokens(measured: Measured) -> None:
    found = measured.found["wasserstein_within"].numpy()
    share = measured.found["wasserstein_share"].numpy()
    assert found.shape == share.shape == (NEURONS, 5)
    columns, cached = measured.outputs.double().T.tolist(), {}

    def of(cluster: list[int]) -> Array:
        key = tuple(cluster)
        if key not in cached:
            cached[key] = np.array([distance([x[token] for token in cluster]) for x in columns])
        return cached[key]

    for arm in range(5):
        expected, counted = measured.means(arm, of)
        np.testing.assert_allclose(found[:, arm], expected, atol=2e-4)
        np.testing.assert_allclose(share[:, arm], counted, rtol=1e-12)
    assert np.isnan(found[DEAD]).all()
    assert (share[DEAD] == 0).all()
    assert (share[:3] == 1).all()
    # One that is constant in two clusters of three has the third's distance alone.
    *constant, last = measured.clusters(1)
    assert [len({columns[HALF_DEAD][i] for i in some}) for some in constant] == [1, 1]
    assert share[HALF_DEAD, 1] == share[HALF_DEAD, 2] == len(last) / TOKENS
    assert found[HALF_DEAD, 1] == pytest.approx(of(last)[HALF_DEAD], abs=2e-4)
    # One that is constant in the counterpart of the one cluster in which it is not has no value.
    assert [len({columns[RARE][i] for i in some}) for some in measured.clusters(1)] == [1, 3, 1]
    assert len({columns[RARE][i] for i in measured.clusters(2)[1]}) == 1
    assert (share[RARE] == [1, 0, 0, 0, 0]).all()
    assert (np.abs(found[:3, 1] - found[:3, 2]) > 0.01).any()  # or it shows nothing


def test_difficulties_within_clusters_are_means_weighted_by_tokens(measured: Measured) -> None:
    found = measured.found["difficulty_within"].numpy()

    def of(cluster: list[int]) -> Array:
        pairs = drawn(len(cluster), len(cluster), SEED)
        return np.array(brute(measured.inputs[cluster], measured.outputs[cluster][:, :3], pairs))

    for arm in range(5):
        np.testing.assert_allclose(found[:3, arm], measured.means(arm, of)[0], rtol=1e-4)
    assert np.isnan(found[DEAD]).all()
    share = measured.found["difficulty_share"].numpy()
    assert (share[:3] == 1).all()
    assert (share[DEAD] == 0).all()
    assert share[HALF_DEAD, 1] <= len(measured.clusters(1)[2]) / TOKENS


def test_clusters_are_the_routers_and_random_ones_within_have_the_same_sizes(
    measured: Measured,
) -> None:
    found = measured.found["clusters"]
    assert found.shape == (5, TOKENS)
    assert not found[0].any()
    for arm, router in enumerate(routers(), start=1):
        assert torch.equal(found[arm], router.assign(measured.inputs))
    for arm in (1, 3):
        by_kmeans, at_random = (sorted(map(len, measured.clusters(a))) for a in (arm, arm + 1))
        assert by_kmeans == at_random
        assert measured.clusters(arm) != measured.clusters(arm + 1)


def test_pruned_outputs_are_those_of_each_tokens_own_expert(measured: Measured) -> None:
    lost = measured.found["lost"].numpy()
    distances = measured.found["distance_to_dense"].numpy()
    assert lost.shape == (NEURONS, 2, 5, 2)
    dense = measured.outputs
    for place in range(2):
        for arm in range(5):
            pruned = measured.pruned(place, arm)
            squares = (pruned - dense).double().square()
            for half in range(2):
                expected = np.zeros(NEURONS)
                for token in range(TOKENS):
                    if token // 7 % 2 == half:
                        expected += squares[token].numpy()
                found = lost[:, place, arm, half]
                np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-8)
            torch.testing.assert_close(
                measured.found["sparse"][place, arm], pruned[:, KEPT], rtol=1e-4, atol=1e-4
            )
            for neuron in set(range(NEURONS)) - {DEAD}:
                a, b = (x[:, neuron].double().numpy() for x in (dense, pruned))
                truth = stats.wasserstein_distance(a, b) / a.std()
                assert distances[neuron, place, arm] == pytest.approx(truth, rel=1e-3, abs=1e-5)
    assert np.isnan(distances[DEAD]).all()
    assert (lost[DEAD] == 0).all()
    live = lost[:3].sum(axis=-1)
    assert (live > 0).all()
    assert (np.ptp(live, axis=2) > 0.01 * live.max()).any()  # arms differ, or it shows nothing
    assert not np.allclose(live[:, 0], live[:, 1])  # and so do sparsities
    np.testing.assert_allclose(measured.found["outputs"], dense[:, KEPT], rtol=1e-5, atol=1e-5)
