"""Tokens' parts of a distance against integrals, and resampled windows against brute force."""

import re
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate
from scipy.special import ndtr, ndtri

from entangle.numerics.contributions import bootstrap, distance_parts
from entangle.numerics.gaussian import from_samples
from tests.distributions import DISTRIBUTIONS

Array = npt.NDArray[Any]
repeatable = settings(derandomize=True, deadline=None, max_examples=60)


def some_rows(tokens: int, seed: int = 0) -> Array:
    """Return samples of all named laws, at other means and scales, and a rounded one: ties."""
    columns = [
        (i + 1) * law.sample(tokens, seed=seed + i) - i for i, law in enumerate(DISTRIBUTIONS)
    ]
    columns.append(np.round(2 * columns[0]))
    return np.stack(columns, axis=1).astype(np.float32)


def integrated_parts(values: Array) -> Array:
    """Return each token's part by quadrature over its own bin, the mean over equal values."""
    n, values = len(values), values.astype(np.float64)
    order = np.argsort(values, kind="stable")
    parts = np.zeros(n)
    for place, token in enumerate(order):
        x = (values[token] - values.mean()) / values.std()
        first, last = place / n, (place + 1) / n
        stops = [first, *([ndtr(x)] if first < ndtr(x) < last else []), last]
        for begin, end in pairwise(stops):
            area, _ = integrate.quad(lambda u, x=x: x - ndtri(u), begin, end, limit=200)
            parts[token] += abs(area)
    return np.array([parts[values == value].mean() for value in values])


# --- each token's part


@repeatable
@given(arrays(np.float32, st.integers(2, 7), elements=st.floats(-8, 8, width=16)))
def test_a_tokens_part_is_the_integral_over_its_own_bin(values: Array) -> None:
    parts = distance_parts(values[:, None])
    if np.ptp(values) == 0:
        assert np.isnan(parts).all()
        return
    np.testing.assert_allclose(parts[:, 0], integrated_parts(values), atol=1e-7)


@pytest.mark.parametrize("tokens", [2, 3, 10, 1000])
def test_the_parts_add_up_to_the_exact_distance(tokens: int) -> None:
    rows = some_rows(tokens)
    parts = distance_parts(rows)
    assert parts.shape == rows.shape
    assert (parts[np.isfinite(parts)] > -1e-15).all()
    # Of two tokens the rounded law's are equal, and sums of NaN are NaN.
    np.testing.assert_allclose(parts.sum(axis=0), from_samples(rows), rtol=1e-11)
    assert np.isfinite(parts).all(axis=0).sum() >= len(DISTRIBUTIONS) - 1


def test_an_outlier_has_the_largest_part() -> None:
    values = ndtri((np.arange(999) + 0.5) / 999)
    rows = np.append(values, 100.0)[:, None]
    parts = distance_parts(rows)[:, 0]
    assert parts.argmax() == 999
    # (100 / std - what N(0, 1) has there: φ(3.09) · 1000) / 1000, with a std of √(100²/1000 + 1).
    assert parts[999] == pytest.approx(100 / 11**0.5 / 1000 - 0.00337, abs=1e-4)
    gaussian = distance_parts(values[:, None])[:, 0]
    assert gaussian.sum() < 0.01 < 0.5 < parts.sum()


def test_tokens_with_equal_values_have_equal_parts() -> None:
    rows = np.array([[0, 3], [1, 3], [0, 1], [0, 3], [-5, 2], [1, 3]], np.float32)
    parts = distance_parts(rows)
    assert parts[0, 0] == parts[2, 0] == parts[3, 0] != parts[1, 0]
    assert parts[1, 0] == parts[5, 0]
    assert parts[0, 1] == parts[1, 1] == parts[3, 1] == parts[5, 1]
    np.testing.assert_allclose(parts[:, 0], integrated_parts(rows[:, 0]), atol=1e-8)
    signed = np.array([[0.0], [-0.0], [1.0], [2.0]])  # zeros are equal, whatever their sign
    assert len(set(distance_parts(signed)[:2, 0])) == 1


def test_the_order_of_tokens_is_nothing_to_their_parts() -> None:
    rows = some_rows(200)
    order = np.random.default_rng(1).permutation(200)
    np.testing.assert_array_equal(distance_parts(rows)[order], distance_parts(rows[order]))


def test_scale_shift_and_sign_are_nothing_to_the_parts() -> None:
    rows = some_rows(50)
    parts = distance_parts(rows)
    np.testing.assert_array_equal(distance_parts(rows * np.float32(2**-20)), parts)
    np.testing.assert_allclose(distance_parts(-rows), parts, atol=1e-14)
    np.testing.assert_allclose(distance_parts(np.round(rows * 64) + 7), distance_parts(np.round(rows * 64)), atol=1e-14)  # fmt: skip


def without_distribution(tokens: int) -> Array:
    """Return samples of which all but the last neuron have no distribution."""
    rows = np.random.default_rng(0).standard_normal((tokens, 7)).astype(np.float32)
    rows[:, 0] = 7.1
    rows[3, 1:6] = np.nan, np.inf, -np.inf, np.inf, -np.inf
    rows[4, 4], rows[5, 5] = -np.inf, np.nan
    return rows


def test_a_neuron_without_a_distribution_has_no_parts_and_the_others_have() -> None:
    rows = without_distribution(20)
    parts = distance_parts(rows)
    assert np.isnan(parts[:, :6]).all()
    np.testing.assert_array_equal(parts[:, 6:], distance_parts(rows[:, 6:]))
    assert parts[:, 6].sum() == pytest.approx(from_samples(rows)[6])
    assert np.isnan(distance_parts(rows[:1])).all()
    assert distance_parts(rows[:0]).shape == (0, 7)
    assert distance_parts(rows[:, :0]).shape == (20, 0)


def test_values_whose_squares_no_float32_holds() -> None:
    ends = np.array([[-3e38], [0], [3e38]], np.float32)
    np.testing.assert_allclose(distance_parts(ends), distance_parts([[-1], [0], [1]]))
    least = np.array([[0], [1e-45], [3e-45]], np.float32)
    np.testing.assert_allclose(distance_parts(least), distance_parts([[0], [1], [2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tensor_is_taken_as_its_float_values(dtype: torch.dtype) -> None:
    rows = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = rows.float().numpy()
    np.testing.assert_array_equal(distance_parts(rows.requires_grad_()), distance_parts(plain))
    np.testing.assert_array_equal(bootstrap(rows, 10, draws=5), bootstrap(plain, 10, draws=5))


@pytest.mark.parametrize("samples", [[1.0, 2.0], [[[1.0], [2.0]]], 3.0])
def test_what_is_no_sample_is_refused(samples: Any) -> None:
    message = rf"\(tokens, neurons\).* {re.escape(str(np.shape(samples)))}$"
    with pytest.raises(ValueError, match=message):
        distance_parts(samples)
    with pytest.raises(ValueError, match=message):
        bootstrap(samples, 1)


# --- resampled windows


def resampled(rows: Array, window: int, draws: int, seed: int) -> Array:
    """Return the distances of the drawn windows' tokens, put one after the other."""
    pieces = rows.reshape(-1, window, rows.shape[1])
    drawn = np.random.default_rng(seed).integers(len(pieces), size=(draws, len(pieces)))
    return np.stack([from_samples(np.concatenate(pieces[one])) for one in drawn])


@pytest.mark.parametrize(("window", "windows"), [(1, 12), (4, 5), (25, 3), (7, 30)])
def test_the_bootstrap_is_the_distance_of_the_drawn_windows(window: int, windows: int) -> None:
    rows = some_rows(window * windows)
    found = bootstrap(rows, window, draws=40, seed=7)
    np.testing.assert_allclose(found, resampled(rows, window, 40, 7), rtol=1e-9)
    assert np.ptp(found, axis=0).min() > 1e-3  # the draws differ


def test_200_draws_by_seed_0_unless_told_otherwise() -> None:
    rows = some_rows(20)
    found = bootstrap(rows, 4)
    assert found.shape == (200, rows.shape[1])
    np.testing.assert_array_equal(found, bootstrap(rows, 4, draws=200, seed=0))
    assert not np.array_equal(found, bootstrap(rows, 4, seed=1))


def test_draws_of_a_single_window_are_its_own_distance() -> None:
    rows = some_rows(30)
    np.testing.assert_allclose(
        bootstrap(rows, 30, draws=3), np.tile(from_samples(rows), (3, 1)), rtol=1e-11
    )
    assert np.isnan(bootstrap([[1.0], [1.0]], 2, draws=3)).all()
    assert np.isnan(bootstrap([[1.0]], 1, draws=3)).all()


def test_a_draw_of_constant_windows_alone_has_no_distance() -> None:
    rows = np.full((12, 1), 0.1, np.float32)  # no sum of it is exact in float32
    rows[:4, 0] = [3, 1, 4, 1]
    found, truth = bootstrap(rows, 4, draws=100), resampled(rows, 4, 100, 0)
    assert 0 < np.isnan(truth).sum() < 100
    np.testing.assert_allclose(found, truth, rtol=1e-9)  # NaN where the truth is


def test_neurons_without_a_distribution_have_no_draws_and_the_others_have() -> None:
    rows = without_distribution(20)
    found = bootstrap(rows, 5, draws=30)
    assert np.isnan(found[:, :6]).all()
    np.testing.assert_allclose(found[:, 6:], resampled(rows[:, 6:], 5, 30, 0), rtol=1e-9)


def test_windows_that_depend_make_a_wider_interval_than_tokens_that_do_not() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.gamma(2, size=(40, 1)) + 0.1 * rng.standard_normal((40, 25))).reshape(-1, 1)
    windows, tokens = (bootstrap(rows, size).std() for size in (25, 1))
    assert windows > 3 * tokens  # about √25 times as wide


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (3, r"windows of 3 tokens.*\b10 tokens"),
        (11, r"windows of 11 tokens.*\b10 tokens"),
        (0, r"windows.*\b1 token\b.* 0$"),
        (-5, r"windows.*\b1 token\b.* -5$"),
    ],
)
def test_tokens_that_are_no_whole_windows_are_refused(window: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(some_rows(10), window)
