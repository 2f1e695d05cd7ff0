"""PCA and k-means by torch against scikit-learn, on the CPU: the code has no branch for a GPU."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from entangle.numerics import clustering, routing
from entangle.numerics.clustering import kmeans, krylov_size, principal_axes
from tests.numerics.test_routing import (
    agree,
    clustered,
    groups,
    same_clusters,
    scikit,
    with_outliers,
)


def falling(tokens: int, inputs: int, power: float, *, seed: int = 0) -> torch.Tensor:
    """Return Gaussian rows whose standard deviations fall along hidden axes as 1 / n^power."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    scales = torch.arange(1, inputs + 1) ** -power
    rows: torch.Tensor = (torch.randn(tokens, inputs, generator=generator) * scales) @ turned
    return rows


def massive(rows: torch.Tensor) -> torch.Tensor:
    """Make one token a thousand times as large."""
    rows = rows.clone()
    rows[7] *= 1e3
    return rows


def centred(rows: torch.Tensor) -> torch.Tensor:
    return rows.double() - rows.double().mean(dim=0)


def axes_of(rows: torch.Tensor, components: int, seed: int = 0) -> torch.Tensor:
    return principal_axes(centred(rows), components, seed=seed)


def exact_variances(rows: torch.Tensor, components: int) -> np.ndarray:
    with threadpool_limits(1):
        found: np.ndarray = PCA(svd_solver="full").fit(rows.double().numpy()).explained_variance_
    return found[:components]


ROWS = {
    "as of a model": falling(900, 400, 0.5),
    "slowly": falling(900, 400, 0.25, seed=1),
    "planted": clustered(900, 400, 8, seed=2, offset=3.0),
    "fewer tokens": falling(150, 400, 0.5, seed=3),
    "bfloat16": falling(900, 400, 0.5, seed=4).bfloat16().float(),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_the_axes_have_the_variance_of_the_exact_ones(name: str, large: bool) -> None:
    rows, components = ROWS[name], 12
    rows = massive(rows) if large else rows
    axes = axes_of(rows, components)
    assert 2 * krylov_size(components) < rows.shape[1]  # so that they are not exact
    assert (axes.shape, axes.dtype) == ((components, 400), torch.float64)
    np.testing.assert_allclose(axes @ axes.T, np.eye(components), atol=1e-10)
    coordinates = centred(rows) @ axes.T
    ours, exact = coordinates.var(dim=0).numpy(), exact_variances(rows, components)
    assert (ours <= exact * (1 + 1e-9)).all()
    # Beside a massive token all others have a millionth of the variance.
    for first in range(large, components):
        assert ours[first:].sum() == pytest.approx(exact[first:].sum(), rel=1e-3)


def test_many_axes_are_exact() -> None:
    rows = massive(clustered(300, 48, offset=2.0))
    with threadpool_limits(1):
        exact = PCA(20, svd_solver="full").fit(rows.double().numpy()).components_
    np.testing.assert_allclose(np.abs(exact @ axes_of(rows, 20).T.numpy()), np.eye(20), atol=1e-5)


def test_axes_of_rows_with_fewer_dimensions_are_orthonormal_and_miss_nothing() -> None:
    few = torch.eye(400)[:3].repeat_interleave(20, dim=0)
    some = falling(200, 3, 0.5) @ torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    for rows in (few, some, massive(some), torch.full((50, 400), 3.3), torch.zeros(50, 400)):
        axes = axes_of(rows, 12)
        np.testing.assert_allclose(axes @ axes.T, np.eye(12), atol=1e-10)
        exact = centred(rows)
        scale = float(exact.abs().max())  # float32 rounds the products of the rows to 1e-7 of it
        np.testing.assert_allclose(exact @ axes.T @ axes, exact, atol=1e-6 * scale)


def test_axes_hang_on_the_seed_and_on_nothing_else() -> None:
    rows = falling(900, 400, 0.25)
    first, again, other = (axes_of(rows, 12, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Without the last ones, which are near to the next axes, they are the same.
    reach = (first[:4] @ other[:4].T).abs()
    np.testing.assert_allclose(reach, np.eye(4), atol=1e-4)


# k-means.


def inertia(points: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(torch.cdist(points, centroids).square().min(dim=1).values.sum())


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_sum_of_distances_is_nearly_scikit_learns_best(seed: int, large: bool) -> None:
    rows = clustered(1500, 12, 6, seed=seed)
    points = (massive(rows) if large else rows).double()
    centroids, labels = kmeans(points, 6, seed=seed)
    with threadpool_limits(1):
        best = KMeans(6, n_init=10, random_state=0).fit(points.numpy())
    assert inertia(points, centroids) <= 1.04 * best.inertia_
    assert torch.equal(labels, torch.cdist(points, centroids).argmin(dim=1))
    assert (centroids.dtype, labels.dtype) == (torch.float64, torch.int64)


@pytest.mark.parametrize("seed", range(3))
def test_from_the_same_points_it_takes_scikit_learns_steps(seed: int) -> None:
    points = clustered(800, 10, 5, seed=seed).double()
    points -= points.mean(dim=0)
    start = points[clustering._far_apart(points, 7, seed)].numpy()
    with threadpool_limits(1):
        theirs = KMeans(7, init=start, n_init=1).fit(points.numpy())
    centroids, labels = kmeans(points, 7, seed=seed)
    np.testing.assert_allclose(centroids, theirs.cluster_centers_, atol=1e-9)
    assert np.array_equal(labels, theirs.labels_)


@pytest.mark.parametrize("seed", range(6))
def test_clusters_far_apart_are_found(seed: int) -> None:
    rows, owners = groups([100, 15, 60, 3, 40, 200, 16, 80], seed=seed)
    _, labels = kmeans(rows.double(), 8, seed=seed)
    pairs = {*zip(labels.tolist(), owners.tolist(), strict=True)}
    assert len(pairs) == len({*labels.tolist()}) == 8


def test_a_centroid_without_points_moves_to_the_farthest(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, owners = groups([30, 20, 10])
    points = rows.double()
    other = int((owners != owners[0]).nonzero()[0])
    monkeypatch.setattr(clustering, "_far_apart", lambda *_: [0, 0, other])
    _, labels = kmeans(points, 3)
    pairs = {*zip(labels.tolist(), owners.tolist(), strict=True)}
    assert len(pairs) == len({*labels.tolist()}) == 3


def test_the_first_points_are_drawn_by_their_squared_distance() -> None:
    # Two places with 900 and 100 points, and one point far away: the second is drawn from a
    # pair, so that it is at the far place unless both draws miss it.
    points = torch.zeros(1000, 1, dtype=torch.float64)
    points[900:] = 3.0  # in sum 900 times 1 of squared distance
    points[999] = 9.0  # 81
    seconds = []
    for seed in range(400):
        first, second = clustering._far_apart(points, 2, seed)
        if first < 900:
            assert points[second] != 0
            seconds.append(float(points[second]))
    # To begin the second cluster at 3 leaves less than at 9: it is kept unless both draws are 9.
    far = (81 / (99 * 9 + 81)) ** 2
    found = seconds.count(9.0) / len(seconds)
    assert abs(found - far) < 5 * (far * (1 - far) / len(seconds)) ** 0.5


@pytest.mark.parametrize("count", [1, 3, 8])
def test_few_distinct_points_are_the_centroids(count: int) -> None:
    points = torch.eye(5, dtype=torch.float64)[:3].repeat_interleave(20, dim=0)
    centroids, labels = kmeans(points, count)
    assert centroids.shape == (count, 5)
    assert torch.isfinite(centroids).all()
    assert len(labels.unique()) == min(count, 3)


# Both, as a router uses them.


@pytest.mark.parametrize("outliers", [0, 40])
def test_clusters_on_a_device_are_scikit_learns(outliers: int) -> None:
    rows, _ = groups([100, 40, 60, 200], inputs=160)
    rows = with_outliers(rows, outliers) if outliers else rows
    experts = 4 + (outliers > 0)
    clusters = routing._on_device(rows, experts, experts - 1, 0)
    same_clusters(clusters, scikit(rows, experts, experts - 1, 0), rows)
    agree(routing.fold(clusters), clusters, rows)


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("outliers", [0, 80])
def test_on_the_cpu_axes_of_many_inputs_are_not_exact_but_the_clusters_are(
    outliers: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = clustered(1200, 160)
    rows = with_outliers(rows, outliers) if outliers else rows
    exact = routing.find_clusters(rows, 4, seed=seed)
    monkeypatch.setattr(routing, "EXACT", 100)
    clusters = routing.find_clusters(rows, 4, seed=seed)
    same_clusters(clusters, scikit(rows, 4, 5, seed), rows)
    assert exact.axes is not None
    assert clusters.axes is not None
    assert not np.array_equal(exact.axes, clusters.axes)
