"""Distances of what is on a device, histograms and rows, against integrals and SciPy."""

import numpy as np
import pytest
import torch
from scipy import stats

from entangle.numerics.gaussian import from_counts, from_samples
from entangle.numerics.histograms import Histograms
from entangle.numerics.wasserstein import between_samples, from_histograms, sorted_columns
from tests.distributions import DISTRIBUTIONS, TWO_POINTS, Distribution, integrated

named = pytest.mark.parametrize("law", DISTRIBUTIONS, ids=str)


# --- between two samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_between_samples_is_scipys_distance_in_std_of_the_first(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.gamma(2, 20, (300, 4)) * [1, -1, 2, 0.05] + 3).to(dtype)
    others = torch.from_numpy(rng.standard_t(3, (300, 4)) * [9, 9, 1, 1]).to(dtype)
    found = between_samples(rows.requires_grad_(), others)
    for distance, a, b in zip(found, rows.detach().double().T, others.double().T, strict=True):
        truth = stats.wasserstein_distance(a.numpy(), b.numpy()) / a.numpy().std()
        assert distance == pytest.approx(truth, rel=1e-6)
    assert found[0] != pytest.approx(between_samples(others, rows)[0], rel=0.1)  # whose std matters


def test_between_samples_a_shift_is_its_size_and_order_is_nothing() -> None:
    rows = torch.from_numpy(np.stack([law.sample(200) for law in DISTRIBUTIONS[:4]], axis=1))
    shift = torch.tensor([0.0, 0.5, -2.0, 40.0])
    found = between_samples(rows, (rows + shift).flip(0))
    assert found == pytest.approx((shift.abs() / rows.std(dim=0, correction=0)).numpy(), abs=1e-6)


def test_between_samples_constant_rows_give_nan_and_constant_others_do_not() -> None:
    rows = torch.tensor([[7.0, 1.0, 7.0], [7.0, 3.0, 7.0]])
    found = between_samples(rows, torch.tensor([[1.0, 4.0, 7.0], [2.0, 4.0, 7.0]]))
    assert np.isnan(found).tolist() == [True, False, True]
    assert found[1] == 2  # (3 + 1) / 2 over a std of 1
    with pytest.raises(ValueError, match=r"samples.*\(2, 3\).*\(1, 3\)"):
        between_samples(rows, rows[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_columns_are_sorted_as_float32(dtype: torch.dtype) -> None:
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = sorted_columns(rows.requires_grad_())
    assert found.dtype == np.float32
    assert torch.equal(torch.from_numpy(found), rows.detach().float().sort(dim=0).values.T)


# --- from histograms


@pytest.mark.parametrize("bins", [2, 4, 16, 128])
@pytest.mark.parametrize("spread", [0.05, 0.7, 4.0])
@pytest.mark.parametrize("shift", [0.0, 3.0, -30.0])
def test_a_histograms_distance_is_the_integral_of_its_linear_distribution(
    bins: int, spread: float, shift: float
) -> None:
    rows = torch.from_numpy(np.stack([law.sample(200) for law in DISTRIBUTIONS[1:5]], axis=1))
    histograms = Histograms.zeros(4, bins=bins)
    histograms.start(rows * spread + shift)  # bins too narrow, too wide, in another place
    histograms.add(rows)
    moments = histograms.moments()
    for i, distance in enumerate(from_histograms(histograms, moments).wasserstein):
        edges = (histograms.edges(i) - moments.mean[i]) / moments.std[i]
        tails = histograms.tail_count[i].numpy() / 200
        excess = (histograms.tail_excess[i] + histograms.tail_count[i] / 2).numpy() / 200 / 64
        inside = tails[0] + np.append(0, histograms.counts[i].numpy().cumsum()) / 200
        ends, cumulative = edges, inside
        if tails[0]:
            atom = edges[0] - excess[0] / tails[0] * (edges[1] - edges[0])
            ends = np.append([atom, atom], ends)
            cumulative = np.append([0, tails[0]], cumulative)
        if tails[1]:
            atom = edges[-1] + excess[1] / tails[1] * (edges[1] - edges[0])
            ends, cumulative = np.append(ends, [atom, atom]), np.append(cumulative, [inside[-1], 1])
        assert distance == pytest.approx(integrated(ends, cumulative), abs=1e-6)


@named
def test_the_histogram_of_a_laws_quantiles(law: Distribution) -> None:
    rows = torch.from_numpy(law.quantiles(2**15)[:, None])
    histograms = Histograms.from_rows(rows)
    distances = from_histograms(histograms, histograms.moments())
    assert distances.error[0] < 0.0085  # half a bin, 1/128 std, and what the tails may hide
    exact = from_samples(rows)[0]
    assert distances.wasserstein[0] == pytest.approx(exact, abs=distances.error[0])
    if law is not TWO_POINTS:  # in it a bin holds but one value, at the bin's edge
        assert distances.wasserstein[0] == pytest.approx(exact, abs=6e-5)


def test_a_histograms_distance_is_that_of_its_counts() -> None:
    rows = torch.from_numpy(np.stack([law.sample(200) for law in DISTRIBUTIONS], axis=1))
    rows[:, 0] = 1  # dead
    histograms = Histograms.from_rows(rows)
    moments = histograms.moments()
    state = {name: tensor.numpy() for name, tensor in histograms.tensors().items()}
    alone = from_counts(state, moments.mean, moments.std)
    found = from_histograms(histograms, moments)
    np.testing.assert_array_equal(found.wasserstein, alone.wasserstein)
    np.testing.assert_array_equal(found.error, alone.error)
    assert np.isnan(found.wasserstein).tolist() == [True] + [False] * (len(DISTRIBUTIONS) - 1)
