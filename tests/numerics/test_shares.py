"""Who gets the zeros: totals to the last weight, and rules against their formulas."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import rankdata

from entangle.numerics.masks import wanda, wanda_scores
from entangle.numerics.shares import (
    largest_remainder,
    outlier_ratio,
    ranks_of,
    sparsity_by_quality,
    sparsity_by_rank,
    sparsity_by_score,
)
from tests.numerics.test_masks import problem

Array = npt.NDArray[np.float64]


@given(
    st.lists(
        st.tuples(st.floats(0, 1) | st.floats(-1e6, 1e6), st.integers(0, 900)),
        min_size=1,
        max_size=40,
    ),
    st.floats(0, 1),
)
@example([(1e300, 900), (-1e300, 5), (1e17, 0)], 0.5)
@example([(3.0, 100), (3.0, 100), (-2.0, 100)], 0.4)
def test_totals_are_exact_and_parts_within_their_sizes(
    parts: list[tuple[float, int]], share: float
) -> None:
    shares, sizes = (np.array(column) for column in zip(*parts, strict=True))
    total = round(share * int(sizes.sum()))
    counts = largest_remainder(shares, sizes, total)
    assert counts.sum() == total
    assert (counts >= 0).all()
    assert (counts <= sizes).all()


@pytest.mark.parametrize("share", [math.nan, math.inf, -math.inf])
def test_shares_that_are_not_finite_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"shares.*{share}"):
        largest_remainder([0.5, share], [10, 10], 7)


def test_shares_of_the_total_are_kept_to_less_than_one_weight() -> None:
    """Hamilton's method: each gets its quota's whole part, and one more by largest remainder."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 600, 30)
        shares = rng.uniform(0.3, 0.9, 30)
        total = round(float(shares @ sizes))
        shares *= total / float(shares @ sizes)
        counts = largest_remainder(shares, sizes, total)
        quotas = shares * sizes
        floors = np.floor(quotas).astype(int)
        best = np.argsort(-(quotas - floors), kind="stable")[: total - floors.sum()]
        floors[best] += 1
        assert counts.tolist() == floors.tolist()


def test_equal_rows_differ_by_at_most_one_weight() -> None:
    counts = largest_remainder(np.full(7, 0.7), np.full(7, 576), 2823)  # 403.2857 each
    assert sorted(counts.tolist()) == [403, 403, 403, 403, 403, 404, 404]
    assert counts.tolist()[:2] == [404, 404]  # of equal remainders the first


def test_shares_of_another_total_are_moved_alike_within_their_limits() -> None:
    counts = largest_remainder([0.1, 0.5, 0.9], [1000, 1000, 1000], 2100)
    assert counts.tolist() == [350, 750, 1000]  # 0.25 more each, but for the one that is full
    with pytest.raises(ValueError, match=r"\b30 weights.* 31$"):
        largest_remainder([0.5] * 3, [10] * 3, 31)


def test_ranks_are_ordinal_and_nan_is_in_the_middle() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 9, 50).astype(float)
    truth = (rankdata(values, method="ordinal") - 1) / 49
    np.testing.assert_allclose(ranks_of(values), truth)
    assert ranks_of([3.0, np.nan, 1.0, 2.0]).tolist() == [1.0, 0.5, 0.0, 0.5]
    assert ranks_of([5.0, np.nan, 2.0]).tolist() == [1.0, 0.5, 0.0]
    assert ranks_of([7.0]).tolist() == ranks_of([np.nan]).tolist() == [0.5]


@pytest.mark.parametrize(
    ("sparsity", "strength"), [*itertools.product([0.2, 0.5, 0.9], [0, 0.3, 1])]
)
def test_grading_keeps_the_mean_and_spares_the_high_ranks(sparsity: float, strength: float) -> None:
    shares = sparsity_by_rank(sparsity, ranks_of(np.arange(101.0)), strength)
    reach = strength * min(sparsity, 1 - sparsity)
    assert shares[0] == pytest.approx(sparsity + reach)
    assert shares[50] == pytest.approx(sparsity)
    assert shares[-1] == pytest.approx(sparsity - reach)
    assert shares.mean() == pytest.approx(sparsity)
    assert np.ptp(np.diff(shares)) < 1e-12
    with pytest.raises(ValueError, match=r"strength.*\b0\b.*\b1\b.* 1\.5$"):
        sparsity_by_rank(sparsity, [0.5], 1.5)


def test_parts_are_spread_by_their_scores_around_the_weighted_mean() -> None:
    scores, sizes = np.array([0.25, 0.0, 0.15, 0.08]), np.array([10.0, 20.0, 10.0, 40.0])
    shares = sparsity_by_score(0.7, scores, sizes, 0.08)
    assert float(shares @ sizes) == pytest.approx(0.7 * sizes.sum())
    assert np.ptp(shares) == pytest.approx(0.16)
    slopes = np.diff(shares) / np.diff(scores)
    assert slopes == pytest.approx([-0.16 / 0.25] * 3)
    assert sparsity_by_score(0.7, [2.0, 2.0], [1, 5], 0.08).tolist() == [0.7, 0.7]
    tight = sparsity_by_score(0.97, scores, sizes, 0.08)
    assert tight.min() >= 0
    assert tight.max() == pytest.approx(1)
    assert float(tight @ sizes) == pytest.approx(0.97 * sizes.sum())


def test_outliers_are_the_scores_above_five_times_their_mean() -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    squares = torch.rand(30, generator=torch.Generator().manual_seed(1)) ** 4 * 100
    scores = weight.abs().double().numpy() * np.sqrt(squares.double().numpy())
    truth = (scores > 5 * scores.mean()).mean()
    assert outlier_ratio(wanda_scores(weight, squares)) == pytest.approx(truth)
    assert truth > 0


def test_even_quality_prunes_as_much_and_leaves_the_outputs_a_higher_cosine() -> None:
    weight, rows, moments = problem(neurons=30, inputs=64, tokens=500)
    weight[:10] *= torch.linspace(0.1, 8, 64)  # rows whose weight lies on few inputs
    shares = sparsity_by_quality(weight, moments, 0.7)
    assert shares.mean() == pytest.approx(0.7, abs=1e-3)
    assert np.ptp(shares) > 0.02

    def cosine(shares: Array) -> float:
        counts = largest_remainder(shares, np.full(30, 64), round(0.7 * 30 * 64))
        pruned = wanda(weight, moments, torch.from_numpy(counts))
        dense, sparse = (rows.double() @ w.double().T for w in (weight, pruned))
        return float((dense * sparse).sum() / (dense.norm() * sparse.norm()))

    assert cosine(shares) > cosine(np.full(30, 0.7)) + 1e-4


def test_even_quality_is_the_best_of_steps_that_a_plain_loop_takes() -> None:
    """One rate and two steps, with outputs instead of Grams."""
    weight, rows, moments = problem(neurons=30, inputs=64, tokens=500)
    weight[:10] *= torch.linspace(0.1, 8, 64)
    total, sizes = round(0.7 * 30 * 64), np.full(30, 64)

    def quality_of(shares: Array) -> tuple[float, Array]:
        pruned = wanda(weight, moments, torch.from_numpy(largest_remainder(shares, sizes, total)))
        dense, sparse = (rows.double() @ w.double().T for w in (weight, pruned))
        each = (dense * sparse).sum(0) / (dense.norm(dim=0) * sparse.norm(dim=0))
        return float((dense * sparse).sum() / (dense.norm() * sparse.norm())), each.numpy()

    best, quality = quality_of(np.full(30, 0.7))
    found, shares = np.full(30, 0.7), np.full(30, 0.7)
    for _ in range(2):
        shares = shares - 0.05 * (quality - quality.mean()) / np.ptp(quality)
        shares = shares + 0.7 - shares.mean()
        whole, quality = quality_of(shares)
        if whole > best:
            best, found = whole, shares
    assert np.ptp(found) > 0.01
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("entangle.numerics.shares.STEPS", 2)
        patch.setattr("entangle.numerics.shares.RATES", (-0.05,))
        np.testing.assert_allclose(sparsity_by_quality(weight, moments, 0.7), found, atol=1e-4)


def test_a_wide_spread_gives_way_at_both_ends() -> None:
    scores, sizes = [0.0, 1.0, 5.0], [1.0, 1.0, 1.0]
    for sparsity in (0.03, 0.98):
        found = sparsity_by_score(sparsity, scores, sizes, 0.08)
        assert found.min() >= 0
        assert found.max() <= 1
        assert np.average(found) == pytest.approx(sparsity)
        assert found.min() == pytest.approx(0) or found.max() == pytest.approx(1)
