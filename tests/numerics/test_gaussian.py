"""Distances against integrals, SciPy, POT and simulation; `test_histograms` holds their bound."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate, stats
from scipy.special import ndtr, ndtri

from entangle.numerics.gaussian import (
    NOISE,
    between_sorted,
    from_counts,
    from_samples,
    noise_floor,
    noise_floor_95,
)
from tests.distributions import (
    DISTRIBUTIONS,
    GAUSSIAN,
    TWO_POINTS,
    Array,
    Distribution,
    integrated,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=60)
named = pytest.mark.parametrize("law", DISTRIBUTIONS, ids=str)


def standardised(values: Array) -> Array:
    """Return the sorted values with zero mean and unit population std."""
    values = np.sort(values.astype(np.float64))
    values -= values.mean()
    values /= values.std()
    return values


# --- the named laws: our numbers, and that everything comes to them


@named
def test_a_laws_distance_is_the_integral_over_its_quantiles(law: Distribution) -> None:
    def difference(u: float) -> float:
        return abs(float(law.quantile(np.array(u)) - ndtri(u)))

    value, _ = integrate.quad(difference, 0, 1, points=[0.5], limit=1000, epsabs=1e-7)
    assert law.wasserstein == pytest.approx(value, abs=2e-6)


def test_two_points_in_closed_form() -> None:
    phi, cdf = stats.norm.pdf, stats.norm.cdf
    closed = math.sqrt(2 / math.pi) - 1 + 4 * (cdf(1) - 0.5 - phi(0) + phi(1))  # E||Z| - 1|
    assert TWO_POINTS.wasserstein == pytest.approx(closed, abs=1e-6)
    assert from_samples([[-1.0], [1.0]])[0] == pytest.approx(closed, abs=1e-12)
    assert from_samples([[5.0], [7.0], [7.0], [5.0]])[0] == pytest.approx(closed, abs=1e-12)


@named
def test_the_exact_distance_of_a_laws_quantiles(law: Distribution) -> None:
    values = law.quantiles(2**16)
    # 2^16 tokens end a heavy tail early, which lowers their std: by 7e-4 for Student's law.
    distance = from_samples(np.stack([values, 3 - 1e-3 * values], axis=1))
    assert distance == pytest.approx(law.wasserstein, abs=1e-4 + abs(1 - values.std()))


# --- exact, from samples


@repeatable
@given(arrays(np.float32, st.integers(2, 9), elements=st.floats(-8, 8, width=16)))
def test_exact_is_the_integral_of_the_empirical_distribution(values: Array) -> None:
    distance = from_samples(values[:, None])[0]
    if np.ptp(values) == 0:
        assert math.isnan(distance)
        return
    x = standardised(values)
    steps = np.arange(len(x) + 1) / len(x)
    truth = integrated(np.repeat(x, 2), np.repeat(steps, 2)[1:-1])
    assert distance == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_exact_is_scipys_distance_to_the_normal_law(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.gamma(2, 20, size=(300, 4)) * [1, -1, 2, 0.05]).astype(dtype)  # the last: ties
    # The grid's own distance to N(0, 1) is about √(log n)/n: 3e-5.
    grid = GAUSSIAN.quantiles(2**17)
    for distance, column in zip(from_samples(rows), rows.T, strict=True):
        truth = stats.wasserstein_distance(standardised(column), grid)
        assert distance == pytest.approx(truth, abs=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_tensor_is_taken_as_its_float_values(dtype: torch.dtype) -> None:
    rows = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    np.testing.assert_array_equal(from_samples(rows.requires_grad_()), from_samples(rows.double()))


@repeatable
@given(st.randoms(use_true_random=False), st.sampled_from(DISTRIBUTIONS), st.integers(-20, 20))
def test_order_scale_and_sign_are_nothing_to_the_distance(
    random: Any, law: Distribution, power: int
) -> None:
    values = law.sample(50, seed=random.randrange(1000))
    distance = from_samples(values[:, None])[0]
    shuffled = np.array(random.sample(list(values), k=50))
    variants = np.stack([shuffled, values * 2.0**power, values * 2.0**power + 1, -values], axis=1)
    assert from_samples(variants) == pytest.approx(distance, rel=1e-6)


@pytest.mark.parametrize("method", ["exact", "pot", "scipy"])
def test_a_neuron_without_a_distribution_is_nan_and_the_others_are_not(
    method: Literal["exact", "pot", "scipy"],
) -> None:
    rows = np.random.default_rng(0).standard_normal((20, 5))
    rows[:, 0], rows[3, 1], rows[3, 2], rows[3, 3] = 7.1, math.nan, math.inf, -math.inf
    distance = from_samples(rows, method=method)
    assert np.isnan(distance).tolist() == [True] * 4 + [False]
    assert distance[4] == from_samples(rows[:, 4:], method=method)[0]
    assert np.isnan(from_samples(rows[:0], method=method)).all()
    assert np.isnan(from_samples(rows[:1], method=method)).all()
    assert from_samples(rows[:, :0], method=method).shape == (0,)


def test_values_whose_squares_no_float_holds() -> None:
    near_the_end = np.array([[-3e38], [0], [3e38]], np.float32)
    assert from_samples(near_the_end)[0] == pytest.approx(from_samples([[-1], [0], [1]])[0])
    assert np.isnan(from_samples([[-1e200, 0], [1e200, 1e-200]])).all()


def test_what_is_no_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(tokens, neurons\).* \(3,\)"):
        from_samples([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"method.*'exact', 'pot'.*'scipy'.*'emd'"):
        from_samples([[1.0], [2.0]], method="emd")  # type: ignore[arg-type]


@named
def test_the_libraries_agree_to_the_distance_of_their_own_drawn_sample(law: Distribution) -> None:
    tokens, seed = 512, 3
    values = law.sample(tokens, seed=1)[:, None] * 5 + 2
    exact, pot, scipy = (
        from_samples(values, method=method, seed=seed)[0] for method in ("exact", "pot", "scipy")
    )
    # W1 is a metric: to the drawn sample and to N(0, 1), the distances of the same values differ
    # by at most that of the two Gaussians, here 0.068, which SciPy measures (to 3e-5) as above.
    drawn = np.random.default_rng(seed).standard_normal(tokens)
    own = stats.wasserstein_distance(drawn, GAUSSIAN.quantiles(2**17)) + 3e-5
    assert own == pytest.approx(0.068, abs=5e-4)  # 1.5/√n
    assert abs(scipy - exact) <= own
    assert scipy == pytest.approx(stats.wasserstein_distance(standardised(values[:, 0]), drawn))
    assert pot == pytest.approx(scipy, abs=1e-9)
    assert pot != from_samples(values, method="pot", seed=seed + 1)[0]


def test_the_mean_distance_of_a_drawn_sample() -> None:
    limit, _ = integrate.quad(lambda x: math.sqrt(ndtr(x) * ndtr(-x)), -12, 12)
    assert math.sqrt(2 / math.pi) * limit == pytest.approx(1.3, abs=0.02)  # as its docstring says


# --- between two sorted samples


def test_between_sorted_is_the_mean_difference_in_std_of_the_first() -> None:
    rng = np.random.default_rng(0)
    rows, others = (np.sort(rng.gamma(2, size, (5, 300))) for size in (20, 1))
    found = between_sorted(rows.astype(np.float32), others.astype(np.float32))
    for distance, one, other in zip(found, rows, others, strict=True):
        truth = stats.wasserstein_distance(one, other) / one.std()
        assert distance == pytest.approx(truth, rel=1e-6)


def test_between_sorted_constant_samples_give_nan_and_constant_others_do_not() -> None:
    columns = np.array([[7, 7], [1, 3]], np.float32)
    found = between_sorted(columns, np.array([[1, 2], [4, 4]], np.float32))
    assert math.isnan(found[0])
    assert found[1] == 2  # (3 + 1) / 2 over a std of 1
    with pytest.raises(ValueError, match=r"samples.*\(2, 2\).*\(1, 2\)"):
        between_sorted(columns, columns[:, :1])


# --- from counts; `test_wasserstein` has those of histograms


def test_counts_are_a_distribution_that_is_linear_inside_a_bin() -> None:
    """Four bins from -2 to 2: of one neuron with tokens beyond both ends, and of one without."""
    tails = np.array([[2, 1], [0, 0]])
    state = {
        "center": np.zeros(2),
        "scale": np.full(2, 0.25),  # a histogram reaches 8 scales to either side
        "counts": np.array([[3, 5, 4, 1], [1, 1, 1, 1]], np.int32),
        "count": np.array([16, 4]),
        "tail_count": tails,
        "tail_excess": np.array([[20, 42], [0, 0]]),  # in 64ths of a bin, the half of one not added
    }
    mean, std = np.array([0.25, 0.0]), np.array([1.25, 1.0])
    found = from_counts(state, mean, std)
    edges = (np.linspace(-2, 2, 5) - 0.25) / 1.25
    ends = (-2 - 21 / 2 / 64 - 0.25) / 1.25, (2 + 42.5 / 64 - 0.25) / 1.25  # the means of the tails
    inside = np.array([2, 5, 10, 14, 15]) / 16
    x = np.concatenate([[ends[0]] * 2, edges, [ends[1]] * 2])
    below = np.concatenate([[0, 2 / 16], inside, [15 / 16, 1]])
    assert found.wasserstein[0] == pytest.approx(integrated(x, below), abs=1e-6)
    uniform = integrated(np.linspace(-2, 2, 5), np.linspace(0, 1, 5))
    assert found.wasserstein[1] == pytest.approx(uniform, abs=1e-6)
    assert found.error[1] == 0.5 * (1 + 1 / 32)  # half a bin, and what the lattice may add
    excess = np.array([21 / 16, 42.5 / 16]) / 64 * 0.8  # of F beyond each edge
    gaussian = [edge * ndtr(edge) + stats.norm.pdf(edge) for edge in (edges[0], -edges[-1])]
    bound = 0.4 * (1 - 3 / 16 + 1 / 32) + 3 / 16 * 0.8**2 / 2
    bound += 2 * np.minimum(excess, gaussian).sum()
    assert found.error[0] == pytest.approx(bound, rel=1e-12)
    dead = from_counts(state, mean, np.array([np.nan, 1.0]))
    assert np.isnan(dead.wasserstein).tolist() == np.isnan(dead.error).tolist() == [True, False]
    assert dead.wasserstein[1] == found.wasserstein[1]


# --- the noise floor


def test_the_noise_is_its_integral() -> None:
    def spread(x: float) -> float:
        fitted = stats.norm.pdf(x) ** 2 * (1 + x**2 / 2)
        return math.sqrt(max(float(ndtr(x) * ndtr(-x) - fitted), 0))

    parts = [
        integrate.quad(spread, x, x + 2, epsabs=1e-14, epsrel=1e-13)[0] for x in range(0, 14, 2)
    ]
    assert pytest.approx(2 * math.sqrt(2 / math.pi) * sum(parts), abs=1e-12) == NOISE
    assert noise_floor(1) == NOISE


@pytest.mark.parametrize(
    ("tokens", "repeats"), [(64, 20_000), (512, 4_000), (4096, 600)], ids=["64", "512", "4096"]
)
def test_the_noise_floor_is_a_gaussian_neurons_distance(tokens: int, repeats: int) -> None:
    drawn = np.random.default_rng(tokens).standard_normal((tokens, repeats))
    distance = from_samples(drawn)
    mean, standard_error = distance.mean(), distance.std() / math.sqrt(repeats)
    assert 0.9 * noise_floor(tokens) - 3 * standard_error < mean
    assert mean < noise_floor(tokens) + 3 * standard_error
    # A share's standard error: this much more may exceed the 95% quantile by chance.
    chance = 3 * math.sqrt(0.05 * 0.95 / repeats)
    assert np.mean(distance > noise_floor_95(tokens)) < 0.05 + chance
    assert np.mean(distance > 0.95 * noise_floor_95(tokens)) > 0.05 - chance


def test_the_noise_floor_in_the_limit() -> None:
    x = np.linspace(-6, 6, 241)
    below, density = ndtr(x), stats.norm.pdf(x)
    covariance = np.minimum.outer(below, below) - np.outer(below, below)  # of √n (F - Φ), less
    covariance -= np.outer(density, density)  # what the fitted mean takes away,
    covariance -= np.outer(x * density, x * density) / 2  # and the fitted std
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))).astype(np.float32)
    drawn = root @ np.random.default_rng(0).standard_normal((241, 50_000), dtype=np.float32)
    distance = np.abs(drawn).sum(axis=0) * 0.05
    assert distance.mean() == pytest.approx(noise_floor(1), abs=0.0026)  # three standard errors
    assert noise_floor(4096) == pytest.approx(0.833 / 64, abs=1e-5)
    assert np.quantile(distance, 0.95) == pytest.approx(noise_floor_95(1), abs=0.01)
    assert math.isnan(noise_floor(0))
    assert math.isnan(noise_floor_95(0))


@repeatable
@given(st.integers(1, 2**31 - 2))
def test_more_tokens_lower_the_noise_floor(tokens: int) -> None:
    assert noise_floor(tokens + 1) < noise_floor(tokens) < noise_floor_95(tokens)
    assert noise_floor_95(tokens + 1) < noise_floor_95(tokens)
