"""The state's laws, its numbers against NumPy's and SciPy's, and the certified bound."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks

from entangle.numerics.histograms import MAX_SQUARES, MAX_TOKENS, Histograms, _add_torch
from entangle.numerics.wasserstein import from_histograms, from_samples
from tests.distributions import (
    BIMODAL,
    DISTRIBUTIONS,
    EXPONENTIAL,
    GAUSSIAN,
    LAPLACE,
    STUDENT,
    TRIMODAL,
    UNIFORM,
    Array,
    Distribution,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=60)
UNIT = torch.tensor([[-1.0], [1.0]])  # a pilot of mean 0 and std 1: 1024 bins are 1/64 wide


def started(pilot: torch.Tensor, *batches: torch.Tensor, bins: int = 1024) -> Histograms:
    """Return the histograms of batches in bins that the pilot placed."""
    histograms = Histograms.zeros(pilot.shape[1], bins=bins)
    histograms.start(pilot)
    for batch in batches:
        histograms.add(batch)
    return histograms


def by_torch(pilot: torch.Tensor, *batches: torch.Tensor) -> Histograms:
    """Return the same, counted by what counts on a CUDA device."""
    histograms = started(pilot)
    for batch in batches:
        histograms.count.add_(len(batch))
        _add_torch(histograms, batch.float())
    return histograms


def assert_same(a: Histograms, b: Histograms) -> None:
    """Assert that two states are the same bits, their float sums to 1e-9 in what they give."""
    valid = torch.from_numpy(~a.invalid())
    for name, tensor in a.tensors().items():
        other = b.tensors()[name]
        if name in {"minimum", "maximum"}:  # of values that are NaN these say nothing
            assert torch.equal(tensor[valid], other[valid]), name
        elif name != "powers":
            assert torch.equal(tensor, other), name
    one, two = a.moments(), b.moments()
    for name in ("count", "mean", "std"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    for name in ("skewness", "kurtosis"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-9, atol=1e-9)
    near, far = from_histograms(a, one), from_histograms(b, two)
    np.testing.assert_array_equal(near.wasserstein, far.wasserstein)
    np.testing.assert_array_equal(near.error, far.error)
    np.testing.assert_array_equal(a.modes(one), b.modes(two))


def rows_of(*columns: Array) -> torch.Tensor:
    """Return rows (tokens, neurons) of float32 with these columns."""
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))


def wild(tokens: int, neurons: int, *, seed: int = 0) -> torch.Tensor:
    """Return rows with a few outliers on either side, some far out, in many of their neurons."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((tokens, neurons)) * np.logspace(-3, 3, neurons)
    rows *= np.where(rng.random(rows.shape) < 0.02, 10.0 ** rng.integers(1, 6, rows.shape), 1)
    return torch.from_numpy(rows.astype(np.float32))


@st.composite
def outputs(draw: st.DrawFn, neurons: int = 4) -> torch.Tensor:
    """Rows of laws at any place and scale, some with ties, some with massive outliers."""
    tokens = draw(st.integers(2, 300))
    columns = []
    for _ in range(neurons):
        law = draw(st.sampled_from(DISTRIBUTIONS))
        x = law.sample(tokens, seed=draw(st.integers(0, 99)))
        x = x.round(draw(st.sampled_from([0, 1, 9])))
        x = x * 10.0 ** draw(st.integers(-6, 6)) + draw(st.floats(-1e4, 1e4))
        places = st.integers(0, tokens - 1)
        for place, value in draw(st.dictionaries(places, st.floats(-1e7, 1e7), max_size=3)).items():
            x[place] = value
        columns.append(x)
    return rows_of(*columns)


def anything(tokens: st.SearchStrategy[int], neurons: int = 4) -> st.SearchStrategy[torch.Tensor]:
    """Rows of whatever floats: small and large, many of them equal."""
    elements = st.one_of(
        st.integers(-3, 3).map(float), st.floats(-4, 4, width=32), st.floats(-1e9, 1e9, width=32)
    )
    shapes = tokens.map(lambda tokens: (tokens, neurons))
    return arrays(np.float32, shapes, elements=elements).map(torch.from_numpy)


# --- laws


@repeatable
@given(st.lists(anything(st.integers(0, 9)), min_size=1, max_size=5), st.data())
def test_any_split_order_and_merge_of_the_same_batches_gives_the_same_bits(
    batches: list[torch.Tensor], data: st.DataObject
) -> None:
    pilot = torch.tensor([[-1.0, 0, 5, 1e6], [1, 0, 6, -1e6]])
    whole = started(pilot, torch.cat(batches))
    states = [started(pilot)]  # empty: neutral
    for batch in data.draw(st.permutations(batches)):
        if data.draw(st.booleans()):
            states.append(started(pilot))
        states[-1].add(batch)
    while len(states) > 1:
        one = states.pop(data.draw(st.integers(0, len(states) - 1)))
        two = states.pop(data.draw(st.integers(0, len(states) - 1)))
        states.append(one.merged(two))
    assert_same(whole, states[0])


def test_merging_is_associative_and_commutative_and_the_empty_state_neutral() -> None:
    rows = wild(300, 70)
    a, b, c = (started(rows, part) for part in rows.split(100))
    empty = started(rows)
    assert_same(a.merged(b).merged(c), a.merged(b.merged(c)))
    assert_same(a.merged(b), b.merged(a))
    assert_same(a.merged(empty), a)
    assert_same(empty.merged(a), a)
    assert_same(empty.merged(empty), empty)
    assert_same(a, started(rows, rows[:100]))  # merging leaves what it merges


def test_more_rows_than_are_summed_at_once() -> None:
    rows = wild(2**18 + 70, 1)
    assert_same(started(rows, rows), started(rows, *rows.split(2**17)))


def test_a_slice_is_a_view() -> None:
    rows = wild(50, 130)
    whole, parts = Histograms.zeros(130), Histograms.zeros(130)
    whole.start(rows)
    whole.add(rows)
    parts.start(rows)  # the scales of all neurons, as in `whole`
    for some in (slice(0, 1), slice(1, 66), slice(66, 130)):
        parts[some].add(rows[:, some])
    assert_same(whole, parts)
    copied = Histograms.zeros(64)
    copied.copy_(whole[66:])
    assert_same(copied, whole[66:])
    copied.add(rows[:, 66:])
    assert int(copied.count[0]) == 2 * int(whole.count[66])


@repeatable
@given(outputs(), st.integers(-20, 20))
def test_a_power_of_two_in_scale_changes_no_bit_of_the_distance(
    rows: torch.Tensor, power: int
) -> None:
    one, two = Histograms.from_rows(rows), Histograms.from_rows(rows * 2.0**power)
    near, far = from_histograms(one, one.moments()), from_histograms(two, two.moments())
    np.testing.assert_array_equal(near.wasserstein, far.wasserstein)
    np.testing.assert_array_equal(near.error, far.error)
    np.testing.assert_array_equal(one.moments().mean * 2.0**power, two.moments().mean)


@repeatable
@given(outputs(), st.floats(0.1, 10), st.floats(-3, 3))
def test_an_affine_map_changes_the_distance_by_no_more_than_the_two_bounds(
    rows: torch.Tensor, scale: float, shift: float
) -> None:
    mapped = -scale * rows.double() + shift * rows.double().std(dim=0)
    mapped = mapped.float()
    one, two = Histograms.from_rows(rows), Histograms.from_rows(mapped)
    near, far = from_histograms(one, one.moments()), from_histograms(two, two.moments())
    # Rounding to float32 moves the values themselves, and so the exact distance.
    moved = np.abs(from_samples(rows) - from_samples(mapped)) + 1e-12
    both = ~np.isnan(moved)
    assert (np.abs(near.wasserstein - far.wasserstein) <= near.error + far.error + moved)[both].all()


# --- the certified bound


def assert_bound(histograms: Histograms, rows: torch.Tensor) -> None:
    """Assert that the distances are within their bounds, and NaN only where they must be."""
    distances = from_histograms(histograms, histograms.moments())
    exact = from_samples(rows)
    known = np.isfinite(distances.wasserstein)
    np.testing.assert_array_equal(known, np.isfinite(distances.error))
    off = np.abs(distances.wasserstein - exact)[known]
    assert (off <= distances.error[known] + 1e-10).all(), (off, distances.error[known])
    low, high = histograms.minimum.double(), histograms.maximum.double()
    unresolved = (high - low < histograms.width).numpy()  # all in one step, or in a tail's bin
    assert (known | unresolved | histograms.invalid()).all()


@repeatable
@given(outputs(), st.sampled_from([2, 8, 64, 1024, 2048]), st.data())
def test_the_bound_holds_for_laws_wherever_the_pilot_was(
    rows: torch.Tensor, bins: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(1, len(rows)), label="pilot's rows")
    scale = data.draw(st.sampled_from([0.0, 1e-4, 1e-2, 0.3, 1.0, 1.0, 1.0, 30.0, 1e3]))
    shift = data.draw(st.sampled_from([0.0, 0.0, 0.0, 0.5, -5.0, 1e3])) * rows.std(dim=0)
    pilot = rows.mean(dim=0) + shift + scale * (rows[:first] - rows.mean(dim=0))
    assert_bound(started(pilot, rows, bins=bins), rows)


@repeatable
@given(
    anything(st.integers(2, 40)), anything(st.integers(1, 3)), st.sampled_from([2, 8, 64, 1024])
)
def test_the_bound_holds_for_anything(rows: torch.Tensor, pilot: torch.Tensor, bins: int) -> None:
    assert_bound(started(pilot, rows, bins=bins), rows)


def spread_tails() -> Array:
    """A Gaussian but for its tails, the same for their means: near the edge, and a few far out."""
    x = np.clip(GAUSSIAN.quantiles(4000), -1.503, 1.503)
    x[:13], x[-13:] = -10, 10
    return x


ADVERSARIES: list[tuple[str, Array, Array, float]] = [
    # name, pilot, values, the bound that must be reached at least
    ("a massive activation", GAUSSIAN.sample(4096), np.append(LAPLACE.sample(4095), 1e4), 0.1),
    ("many of them", GAUSSIAN.sample(99), np.append(LAPLACE.sample(4000), np.full(96, 3e3)), 0.6),
    ("mean far off", GAUSSIAN.sample(99), 12 + UNIFORM.sample(4096), math.inf),
    ("mean off", GAUSSIAN.sample(99), 4 + LAPLACE.sample(4096), 0.02),
    ("narrow", GAUSSIAN.sample(99), 0.05 * BIMODAL.sample(4096), 0.2),
    ("wide", GAUSSIAN.sample(99), 9 * EXPONENTIAL.sample(4096), 0.8),
    ("heavy tails", GAUSSIAN.sample(99), np.random.default_rng(0).standard_cauchy(4096), 0.2),
    ("spread tails", np.array([-1.5 / 8, 1.5 / 8]), spread_tails(), 0.2),
    ("all outside", np.array([-1e-3, 1e-3]), np.round(9 * GAUSSIAN.sample(4096)) + 0.5, 2.0),
    ("at the bins' edges", np.array([-1, 1]), np.round(9 * GAUSSIAN.sample(4096)) / 16, 0.02),
    ("below the edges", np.array([-1, 1]), np.round(EXPONENTIAL.sample(999)) / 16 - 1e-7, 0.02),
]


@pytest.mark.parametrize("bins", [16, 1024, 2048])
@pytest.mark.parametrize(("pilot", "values", "limit"), [a[1:] for a in ADVERSARIES], ids=[a[0] for a in ADVERSARIES])
def test_the_bound_holds_where_a_pilot_misleads(
    pilot: Array, values: Array, limit: float, bins: int
) -> None:
    histograms = started(rows_of(pilot), rows_of(values), bins=bins)
    assert_bound(histograms, rows_of(values))
    if bins == 1024:  # and says something
        print(from_histograms(histograms, histograms.moments()), from_samples(rows_of(values)))
