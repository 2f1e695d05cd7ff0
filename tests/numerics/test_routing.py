"""Clusters against scikit-learn in float64, routers against their parts and the binomial law."""

import copy
import dataclasses
import pickle
import re
import warnings
import weakref

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits
from torch import nn

from entangle.numerics.routing import (
    CentroidRouter,
    Clusters,
    RandomRouter,
    Router,
    Routes,
    find_clusters,
    fit_router,
    random_router,
    router_of,
)
from entangle.numerics.sparse import slice_rows

Floats = npt.NDArray[np.float64]


def clustered(
    tokens: int, inputs: int, clusters: int = 5, *, seed: int = 0, offset: float = 0.0
) -> torch.Tensor:
    """Return rows around centres that overlap, so that many lie near a border."""
    generator = torch.Generator().manual_seed(seed)
    centres = 0.7 * torch.randn(clusters, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    away = offset * torch.randn(inputs, generator=generator)
    chosen = torch.randint(clusters, (tokens,), generator=generator)
    rows = centres[chosen] + torch.randn(tokens, inputs, generator=generator) @ mixing
    found: torch.Tensor = rows + away
    return found


def with_outliers(rows: torch.Tensor, count: int, seed: int = 9) -> torch.Tensor:
    """Make the first rows one tight cluster, a thousand times as far away as the others."""
    noise = torch.randn(count, rows.shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.cat([1e3 * rows[0] + 0.3 * noise, rows[count:]])


def scikit(rows: torch.Tensor, experts: int, components: int, seed: int) -> Pipeline:
    """Fit PCA and k-means of scikit-learn in float64: what clusters should be equal to."""
    kmeans = ("kmeans", KMeans(experts, n_init=1, random_state=seed))
    pca = ("pca", PCA(components, svd_solver="full"))
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return Pipeline([pca, kmeans] if components else [kmeans]).fit(rows.double().numpy())


def squared_distances(clusters: Clusters, rows: torch.Tensor) -> Floats:
    """Return those to the centroids (tokens, experts), in float64."""
    reduced = rows.double().numpy() - clusters.mean
    reduced = reduced if clusters.axes is None else reduced @ clusters.axes.T
    found: Floats = np.square(reduced[:, None] - clusters.centroids).sum(axis=2)
    return found


def is_nearest(chosen: torch.Tensor, distances: Floats) -> npt.NDArray[np.bool_]:
    """Tell of which rows the chosen centroid is the nearest, or as near but for rounding."""
    own = np.take_along_axis(distances, chosen.numpy()[:, None], axis=1)[:, 0]
    nearest: npt.NDArray[np.bool_] = own <= distances.min(axis=1) * (1 + 1e-5)
    return nearest


def agree(router: Router, clusters: Clusters, rows: torch.Tensor) -> None:
    """See that a router sends rows to the nearest of the centroids that it was folded from."""
    chosen, distances = router.assign(rows), squared_distances(clusters, rows)
    assert router.experts == distances.shape[1]
    assert is_nearest(chosen, distances).all()
    assert len(chosen.unique()) == router.experts  # so that something was chosen at all


def same_clusters(clusters: Clusters, pipeline: Pipeline, sample: torch.Tensor) -> None:
    """See that clusters are scikit-learn's: mean, axes, centroids and the rows of each."""
    exact = sample.double().numpy()
    labels = pipeline["kmeans"].labels_
    assert sorted(clusters.sizes) == sorted(np.bincount(labels))
    centroids = pipeline["kmeans"].cluster_centers_
    if "pca" in pipeline.named_steps:
        pca, axes = pipeline["pca"], clusters.axes
        assert axes is not None
        np.testing.assert_allclose(axes @ axes.T, np.eye(len(axes)), atol=1e-10)
        # The same space, whatever the signs of the axes.
        reach = np.abs(pca.components_ @ axes.T)
        np.testing.assert_allclose(reach, np.eye(len(axes)), atol=1e-5)
        centroids = centroids @ pca.components_
        ours = clusters.centroids @ axes
    else:
        centroids, ours = centroids - exact.mean(axis=0), clusters.centroids
    np.testing.assert_allclose(clusters.mean, exact.mean(axis=0), atol=1e-9, rtol=1e-12)
    scale = np.abs(centroids).max()
    np.testing.assert_allclose(by_first(ours), by_first(centroids), atol=1e-6 * scale)


def by_first(centroids: Floats) -> Floats:
    """Return centroids in the order of their first coordinate."""
    found: Floats = centroids[np.argsort(centroids[:, 0])]
    return found


# PCA and k-means.

CASES = [
    (64, None, 2),
    (160, None, 5),
    (31, None, 0),
    (48, 7, 7),
    (24, 0, 0),
    (24, 24, 0),
    (5, 9, 0),
]


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize(("inputs", "components", "expected"), CASES)
def test_clusters_are_scikit_learns_and_a_router_goes_to_the_nearest(
    inputs: int, components: int | None, expected: int, offset: float, seed: int
) -> None:
    rows = clustered(1600, inputs, offset=offset)
    sample, held_out = rows[:1200], rows[1200:]
    clusters = find_clusters(sample, 4, components=components, seed=seed)
    same_clusters(clusters, scikit(sample, 4, expected, seed), sample)
    router = fit_router(sample, 4, components=components, seed=seed)
    agree(router, clusters, sample)
    agree(router, clusters, held_out)
    assert (router.matrix.shape, router.bias.shape) == ((inputs, 4), (4,))
    assert router.matrix.dtype == router.bias.dtype == torch.float32
    assert router.multiply_adds == 4 * inputs


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("inputs", "components", "expected"), CASES)
def test_beside_massive_outliers_rows_go_to_the_nearest_centroid_too(
    inputs: int, components: int | None, expected: int, offset: float, seed: int
) -> None:
    rows = with_outliers(clustered(1600, inputs, offset=offset), 80)
    rows -= rows[40:1200].double().mean(dim=0).float()
    sample, held_out = rows[40:1200], torch.cat([rows[:40], rows[1200:]])
    clusters = find_clusters(sample, 4, components=components, seed=seed)
    same_clusters(clusters, scikit(sample, 4, expected, seed), sample)
    assert min(clusters.sizes) == 40  # the outliers are one of the four
    router = fit_router(sample, 4, components=components, seed=seed)
    agree(router, clusters, sample)
    agree(router, clusters, held_out)


@pytest.mark.parametrize(("inputs", "components"), [(64, 2), (160, 5), (48, 7)])
def test_rows_far_from_zero_go_to_the_nearest_centroid_too(inputs: int, components: int) -> None:
    rows = clustered(2000, inputs, offset=1000.0)
    clusters = find_clusters(rows, 5, components=components, seed=1)
    same_clusters(clusters, scikit(rows, 5, components, 1), rows)
    distances = squared_distances(clusters, rows)
    chosen = fit_router(rows, 5, components=components, seed=1).assign(rows)
    own = np.take_along_axis(distances, chosen.numpy()[:, None], axis=1)[:, 0]
    assert (own <= distances.min(axis=1) * (1 + 1e-2)).all()
    assert (own == distances.min(axis=1)).mean() > 0.998


def test_clusters_do_not_hang_on_the_last_bits_of_a_kernel() -> None:
    rows = with_outliers(clustered(1200, 64), 40)
    first = find_clusters(rows, 4, components=2)
    with threadpool_limits(1, user_api="blas"):
        again = find_clusters(rows, 4, components=2)
    # Another order of the inputs sums in another order, as another kernel would.
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    other = find_clusters(rows[:, order], 4, components=2)
    assert first.axes is not None
    assert other.axes is not None
    assert again.sizes.tolist() == first.sizes.tolist() == other.sizes.tolist()
    assert again.axes is not None
    np.testing.assert_allclose(again.axes, first.axes, atol=1e-9)
    np.testing.assert_allclose(again.centroids, first.centroids, rtol=1e-9)
    spread = np.abs(first.axes[:, order.numpy()] @ other.axes.T)
    np.testing.assert_allclose(spread, np.eye(2), atol=1e-9)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    rows = clustered(600, 64)
    first, again, other = (fit_router(rows, 6, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.matrix, again.matrix)
    assert torch.equal(first.bias, again.bias)
    assert not torch.equal(first.matrix, other.matrix)


def test_bfloat16_rows_are_those_numbers() -> None:
    rows = clustered(600, 64).bfloat16()
    router, exact = fit_router(rows, 5), fit_router(rows.float(), 5)
    assert torch.equal(router.matrix, exact.matrix)
    assert torch.equal(router.assign(rows), exact.assign(rows.float()))
    assert torch.equal(router.assign(rows.double()), exact.assign(rows.float()))
    agree(router, find_clusters(rows, 5), rows.float())


def test_a_rows_expert_does_not_depend_on_the_rows_beside_it() -> None:
    rows = clustered(300, 64)
    for router in (fit_router(rows, 5), random_router(64, torch.ones(5))):
        together = router.assign(rows)
        alone = torch.cat([router.assign(row[None]) for row in rows])
        assert torch.equal(together, alone)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
        assert torch.equal(router.assign(rows[order]), together[order])
        assert torch.equal(router.assign(rows[7:11]), together[7:11])


def test_automatic_casting_changes_no_choice() -> None:
    rows = clustered(4000, 64, offset=1.0)
    router = fit_router(rows, 6)
    expected = router.assign(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router.assign(rows), expected)


# Small clusters are merged.


def groups(sizes: list[int], inputs: int = 8, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tight clusters of these sizes far from each other, and which row is of which."""
    generator = torch.Generator().manual_seed(seed)
    centres = 20 * torch.randn(len(sizes), inputs, generator=generator)
    owners = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = centres[owners] + 0.1 * torch.randn(len(owners), inputs, generator=generator)
    order = torch.randperm(len(owners), generator=generator)
    return rows[order], owners[order]


def merged_by_hand(rows: torch.Tensor, labels: npt.NDArray[np.int32]) -> Floats:
    """Return the centroids (experts, inputs) once the smallest cluster was merged again and again.

    A cluster is a list of its rows here, and its centroid their mean.
    """
    exact = rows.double().numpy()
    clusters = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    while len(clusters) > 1 and min(map(len, clusters)) < 16:
        small = min(clusters, key=len)
        centre = exact[small].mean(axis=0)
        others = [cluster for cluster in clusters if cluster is not small]
        far = [np.linalg.norm(exact[other].mean(axis=0) - centre) for other in others]
        others[int(np.argmin(far))].extend(small)
        clusters = others
    return np.stack([exact[cluster].mean(axis=0) for cluster in clusters])


def has_centroids(router: CentroidRouter, centroids: Floats, rows: torch.Tensor) -> None:
    """See that a router without PCA scores rows as their distances from centroids do."""
    assert router.experts == len(centroids)
    places = router.assign(torch.from_numpy(centroids))
    assert sorted(places.tolist()) == list(range(len(centroids)))
    scores = (rows.double() @ router.matrix.double() + router.bias.double())[:, places].numpy()
    halves = -0.5 * np.square(rows.double().numpy()[:, None] - centroids).sum(axis=2)
    differences = (scores - scores[:, :1]) - (halves - halves[:, :1])
    assert np.abs(differences).max() <= 1e-4 * np.abs(halves).max()
    assert torch.equal(router.assign(rows), places[torch.from_numpy(halves.argmax(axis=1))])


@pytest.mark.parametrize(
    ("sizes", "experts"),
    [
        ([100, 16, 60, 17], 4),
        ([100, 15, 60, 16, 3, 40], None),
        ([100, 2, 2, 3, 4, 5], None),
        ([14, 13, 12, 11, 10, 9, 8], None),
        ([15, 9, 3], 1),
        ([5, 5, 5], 1),
        ([2, 4, 4], 1),
        ([15, 15], 1),
        ([15, 17], 1),
        ([16, 16], 2),
    ],
)
def test_small_clusters_are_merged_with_their_nearest_the_smallest_first(
    sizes: list[int], experts: int | None
) -> None:
    for seed in range(3):
        rows, _ = groups(sizes, seed=seed)
        labels = scikit(rows, len(sizes), 0, 0)["kmeans"].labels_
        assert sorted(np.bincount(labels)) == sorted(sizes)  # so that k-means found the groups
        router = fit_router(rows, len(sizes), components=0)
        assert experts in {None, router.experts}
        has_centroids(router, merged_by_hand(rows, labels), rows)


def test_small_clusters_are_merged_after_pca() -> None:
    rows, owners = groups([100, 15, 60, 3, 40], inputs=40)
    router = fit_router(rows, 5, components=4)
    pipeline = scikit(rows, 5, 4, 0)
    reduced = torch.from_numpy(pipeline["pca"].transform(rows.numpy()))
    labels = pipeline["kmeans"].labels_
    assert sorted(np.bincount(labels)) == [3, 15, 40, 60, 100]
    centroids = merged_by_hand(reduced, labels)
    assert router.experts == len(centroids) == 3
    nearest = torch.cdist(reduced.double(), torch.from_numpy(centroids)).argmin(dim=1)
    chosen = router.assign(rows)
    pairs = set(zip(chosen.tolist(), nearest.tolist(), strict=True))
    assert len(pairs) == 3  # the same partition, its parts named in another order perhaps
    for group in (0, 2, 4):
        assert len(chosen[owners == group].unique()) == 1


def test_outliers_in_tiny_clusters_become_one_experts_and_no_part_of_an_ordinary_one() -> None:
    rows = torch.cat([clustered(1000, 24, 2), 300 + 20 * clustered(40, 24, 5, seed=3)])
    labels = scikit(rows, 6, 0, 0)["kmeans"].labels_
    assert min(np.bincount(labels[1000:], minlength=6)[labels[1000:]]) < 16
    assert len(set(labels[1000:])) >= 4
    router = fit_router(rows, 6, components=0)
    chosen = router.assign(rows)
    assert not {*chosen[:1000].tolist()} & {*chosen[1000:].tolist()}
    assert chosen.bincount().min() >= 16


def test_there_are_no_more_experts_than_distinct_rows() -> None:
    rows = torch.eye(64)[:3].repeat_interleave(20, dim=0)
    for components in (None, 0, 2):
        router = fit_router(rows, 8, components=components)
        assert router.experts == 3
        assert sorted(router.assign(torch.eye(64)[:3]).tolist()) == [0, 1, 2]
        assert router.assign(rows).bincount().tolist() == [20, 20, 20]


@pytest.mark.parametrize("tokens", [1, 2, 20, 100])
@pytest.mark.parametrize("value", [0.0, 3.3, -1e4])
@pytest.mark.parametrize("inputs", [5, 64])
def test_rows_that_are_all_the_same_have_one_expert(inputs: int, value: float, tokens: int) -> None:
    router = fit_router(torch.full((tokens, inputs), value), 4)
    assert router.experts == 1
    assert torch.isfinite(router.matrix).all()
    assert torch.isfinite(router.bias).all()
    assert router.assign(clustered(50, inputs)).tolist() == [0] * 50


def test_one_expert_gets_all() -> None:
    rows = clustered(100, 64)
    router = fit_router(rows, 1)
    assert router.experts == 1
    assert router(rows).counts == [100]


def test_what_cannot_be_clustered_is_said() -> None:
    rows = clustered(50, 8)
    broken = rows.clone()
    broken[3, 1], broken[3, 2], broken[9, 0] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(ValueError, match=r"clusters.*\b50 tokens.*\b2 .*NaN"):
        fit_router(broken, 2)
    with pytest.raises(ValueError, match=r"clusters.*\b0 tokens"):
        fit_router(rows[:0], 2)
    with pytest.raises(ValueError, match=r"experts.*\b1\b.* 0$"):
        fit_router(rows, 0)
    with pytest.raises(ValueError, match=r"components.*\b0\b.* -1$"):
        fit_router(rows, 2, components=-1)


# At random.


def expected_counts(found: torch.Tensor, sizes: torch.Tensor) -> None:
    """See that counts are within five standard deviations of the binomial law."""
    shares, total = (sizes.double() / sizes.sum()).numpy(), int(found.sum())
    deviations = np.sqrt(total * shares * (1 - shares))
    assert (np.abs(found.numpy() - total * shares) <= 5 * deviations).all()


@pytest.mark.parametrize("inputs", [40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [[1, 1], [900, 90, 9, 1], [0, 5, 0, 0, 3, 2, 0], [7], [0.25, 0.5, 0.25]]
)
def test_random_experts_have_the_shares_asked_for(
    sizes: list[float], dtype: torch.dtype, inputs: int
) -> None:
    rows = torch.randn(20_000, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    shares = torch.tensor(sizes)
    router = random_router(inputs, shares, seed=3)
    assert router.experts == len(sizes)
    found = router.assign(rows).bincount(minlength=len(sizes))
    assert len(found) == len(sizes)
    expected_counts(found, shares)
    assert (found[shares == 0] == 0).all()


def test_the_random_expert_is_one_of_the_signs_and_survives_rounding() -> None:
    rows = torch.randn(400, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    router = random_router(24, torch.ones(7))
    chosen = router.assign(rows)
    assert torch.equal(router.assign(rows.repeat(3, 1)), chosen.repeat(3))
    assert torch.equal(router.assign(rows.float().T.contiguous().T), chosen)  # not its strides
    assert torch.equal(router.assign(rows.float() * (1 + 1e-6)), chosen)
    assert torch.equal(router.assign(rows.float().nextafter(torch.tensor(9.0))), chosen)
    turned = rows.clone()
    turned[:, 5] *= -1
    same = float((router.assign(turned) == chosen).float().mean())
    assert abs(same - 1 / 7) < 5 * (1 / 7 * 6 / 7 / 400) ** 0.5  # as if drawn anew


def test_every_input_matters_to_the_random_expert() -> None:
    rows = torch.randn(2000, 40, generator=torch.Generator().manual_seed(2))
    router = random_router(40, torch.ones(4))
    for place in range(40):
        turned = rows.clone()
        turned[:, place] *= -1
        same = (router.assign(turned) == router.assign(rows)).long().bincount(minlength=2)
        expected_counts(same, torch.tensor([3.0, 1.0]))


def test_rows_of_zeros_have_an_expert_that_gets_rows() -> None:
    for sizes in ([0, 0, 5, 1], [0, 7], [3, 0, 0]):
        chosen = random_router(8, torch.tensor(sizes)).assign(torch.zeros(3, 8))
        assert all(sizes[expert] > 0 for expert in chosen)


def test_random_experts_know_nothing_of_geometry() -> None:
    rows = torch.randn(8000, 64, generator=torch.Generator().manual_seed(3))
    rows[:4000, 0] += 100  # two clusters far apart
    sizes = torch.tensor([3.0, 2.0, 1.0])
    chosen = random_router(64, sizes).assign(rows)
    for part in chosen.split(4000):
        expected_counts(part.bincount(minlength=3), sizes)


def test_the_seed_decides_which_rows_go_where_at_random() -> None:
    rows, sizes = clustered(2000, 24), torch.ones(4)
    first, again, other = (random_router(24, sizes, seed=seed).assign(rows) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    expected_counts((first == other).long().bincount(minlength=2), torch.tensor([3.0, 1.0]))


@pytest.mark.parametrize("sizes", [[], [0.0, 0.0], [3.0, -1.0], [1.0, torch.nan]])
def test_no_shares_are_refused(sizes: list[float]) -> None:
    with pytest.raises(ValueError, match=f"sizes.* {re.escape(str(sizes))}$"):
        random_router(8, torch.tensor(sizes))


# Routes.


def check_routes(routes: Routes, chosen: torch.Tensor, experts: int) -> None:
    order = np.argsort(chosen.numpy(), kind="stable")
    assert np.array_equal(routes.order.numpy(), order)
    assert routes.counts == np.bincount(chosen.numpy(), minlength=experts).tolist()
    assert [expert for expert, *_ in routes.spans] == np.unique(chosen.numpy()).tolist()
    for expert, first, last in routes.spans:
        assert (chosen[routes.order[first:last]] == expert).all()
    assert routes.order.dtype == torch.int64
    assert {type(number) for number in (*routes.counts, *sum(routes.spans, ()))} <= {int}


@pytest.mark.parametrize("shape", [(40, 8), (4, 10, 8), (2, 5, 4, 8), (1, 8), (0, 8), (3, 0, 8)])
def test_routes_are_sorted_by_expert_and_keep_the_order(shape: tuple[int, ...]) -> None:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([1.0, 3.0, 0.0, 2.0])
    for router in (
        random_router(8, sizes),
        fit_router(clustered(300, 8, 4), 4),
        CentroidRouter(torch.zeros(8, 3), torch.tensor([0.0, 2.0, 2.0])),  # of ties the first
    ):
        chosen = router.assign(rows.reshape(-1, 8))
        check_routes(router(rows), chosen, router.experts)
    assert (chosen == 1).all()


@pytest.mark.parametrize("shape", [(1, 8), (1, 1, 8), (8,)])
def test_one_row_goes_where_it_goes_among_many(shape: tuple[int, ...]) -> None:
    rows = clustered(60, 8, 4)
    for router in (fit_router(rows, 3), random_router(8, torch.tensor([1.0, 3.0, 0.0, 2.0]))):
        together = router(rows)
        assert len(together.spans) == 3
        for expert, first, last in together.spans:
            for row in together.order[first:last].tolist():
                alone = router(rows[row].view(shape))
                check_routes(alone, torch.tensor([expert]), router.experts)
                assert alone.spans == [(expert, 0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_expert_of_one_row_is_the_one_among_many(dtype: torch.dtype) -> None:
    rows = clustered(300, 64).to(dtype)
    nothing = slice_rows(torch.zeros(5, 1, 64))
    for router in (fit_router(rows, 5), random_router(64, torch.ones(5))):
        chosen = router.assign(rows).tolist()
        for row, expert in zip(rows, chosen, strict=True):
            found = [router.one(row.view(shape)) for shape in ((64,), (1, 64), (1, 1, 64))]
            if isinstance(router, CentroidRouter):
                found[0] = nothing.one(row, None, *router.arrays)[1]
            assert found == [expert] * 3
            assert {type(one) for one in found} == {int}
        spread = rows.repeat_interleave(2, dim=1)[:, ::2]
        assert not spread.is_contiguous()
        assert router.one(spread[7:8]) == chosen[7]
    ties = CentroidRouter(torch.zeros(8, 3), torch.tensor([0.0, 2.0, 2.0]))
    assert ties.one(torch.ones(1, 8)) == 1  # the first


def test_routes_are_kept_for_the_same_tensor_only() -> None:
    router, rows = random_router(8, torch.ones(5)), clustered(50, 8)
    assert router.kept(rows) is None
    routes = router(rows)
    router.keep(rows, routes)
    assert router.kept(rows) is routes
    for other in (rows.clone(), rows[:], rows[:20], rows.view(50, 8), clustered(50, 8, seed=1)):
        assert router.kept(other) is None
    assert router.kept(rows) is routes
    with torch.inference_mode():
        other = rows + 0
        router.keep(other, router(other))
        assert router.kept(other) is not None
    assert router.kept(rows) is None


def test_routes_of_a_tensor_that_was_changed_in_place_are_not_kept() -> None:
    router, rows = random_router(8, torch.ones(5)), clustered(50, 8)
    router.keep(rows, router(rows))
    rows.neg_()
    assert router.kept(rows) is None


def test_routes_are_freed_with_their_tensor() -> None:
    router = random_router(8, torch.ones(5))
    for seed in range(20):  # the next tensor may get the address of the one before it
        rows = clustered(50, 8, seed=seed)
        assert router.kept(rows) is None
        routes = router(rows)
        router.keep(rows, routes)
        alive = weakref.ref(routes.order)
        del rows, routes
        assert alive() is None


@dataclasses.dataclass
class Kinds:
    centroid: CentroidRouter
    random: RandomRouter


@pytest.fixture
def kinds() -> Kinds:
    return Kinds(fit_router(clustered(300, 24), 5), random_router(24, torch.tensor([1.0, 2, 3])))


def bits(module: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (parameter.dtype, parameter.detach().numpy().tobytes())
        for name, parameter in module.named_parameters()
    }


def test_casting_a_model_leaves_its_routers_exact(kinds: Kinds) -> None:
    rows = clustered(200, 24)
    for router in (kinds.centroid, kinds.random):
        before, chosen = bits(router), router.assign(rows)
        model = nn.ModuleDict({"router": router, "other": nn.Linear(3, 3)})
        parameters = dict(router.named_parameters())
        for cast in (model.bfloat16, model.half, model.double, model.float):
            cast()
            assert bits(router) == before
        model.to(torch.bfloat16)
        assert model["other"].weight.dtype == torch.bfloat16
        assert bits(router) == before
        assert torch.equal(router.assign(rows), chosen)
        assert all(parameters[name] is value for name, value in router.named_parameters())
        assert not any(parameter.requires_grad for parameter in router.parameters())
        assert {p.device.type for p in copy.deepcopy(model).to("meta").parameters()} == {"meta"}


def test_a_copy_of_a_router_has_kept_nothing() -> None:
    router, rows = random_router(8, torch.ones(5)), clustered(50, 8)
    routes = router(rows)
    router.keep(rows, routes)
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):  # noqa: S301
        assert twin.kept(rows) is None
        check_routes(twin(rows), router.assign(rows), 5)
        assert bits(twin) == bits(router)
        assert twin.key is not router.key
    assert router.kept(rows) is routes


def test_a_router_is_known_by_its_parameters(kinds: Kinds) -> None:
    rows = clustered(100, 24)
    for router in (kinds.centroid, kinds.random):
        again = router_of({name: value.data for name, value in router.named_parameters()})
        assert type(again) is type(router)
        assert (again.experts, again.multiply_adds) == (router.experts, router.multiply_adds)
        assert torch.equal(again.assign(rows), router.assign(rows))
    for names, said in ((["bias"], "bias"), ([], "none"), (["key", "matrix"], "key, matrix")):
        with pytest.raises(ValueError, match=f"router.*parameters {said}$"):
            router_of(dict.fromkeys(names, torch.zeros(3)))
