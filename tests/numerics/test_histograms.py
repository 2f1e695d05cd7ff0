"""The state's laws, its numbers against NumPy's and SciPy's, and the certified bound."""

import functools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks

from entangle.numerics.gaussian import from_samples
from entangle.numerics.histograms import MAX_TOKENS, Histograms, _add_torch
from entangle.numerics.kernels.bins import MAX_SQUARES
from entangle.numerics.wasserstein import from_histograms
from tests.distributions import (
    BIMODAL,
    DISTRIBUTIONS,
    EXPONENTIAL,
    GAUSSIAN,
    LAPLACE,
    STUDENT,
    UNIFORM,
    Array,
    Distribution,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=60)
CPU = torch.device("cpu")
UNIT = torch.tensor([[-1.0], [1.0]])  # a pilot of mean 0 and std 1: 1024 bins are 1/64 wide


def started(
    pilot: torch.Tensor, *batches: torch.Tensor, bins: int = 1024, device: torch.device = CPU
) -> Histograms:
    """Return the histograms of batches in bins that the pilot placed, counted on a device."""
    histograms = Histograms.zeros(pilot.shape[1], bins=bins, device=device)
    histograms.start(pilot.to(device))
    for batch in batches:
        histograms.add(batch.to(device))
    return histograms if device == CPU else histograms.to(CPU)


def by_torch(pilot: torch.Tensor, *batches: torch.Tensor) -> Histograms:
    """Return the same, counted on the CPU as on a device without a kernel of its own."""
    histograms = started(pilot)
    for batch in batches:
        _add_torch(histograms, batch, None)
    return histograms


def assert_same(a: Histograms, b: Histograms) -> None:
    """Assert that two states are the same bits, their float sums to 1e-9 in what they give."""
    np.testing.assert_array_equal(a.invalid(), b.invalid())
    for name, tensor in a.tensors().items():
        if name != "powers":
            np.testing.assert_array_equal(tensor, b.tensors()[name], err_msg=name)
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
    off = np.abs(near.wasserstein - far.wasserstein)
    known = np.isfinite(off)  # not all in one step of the lattice that the other neurons made
    assert (off <= near.error + far.error + moved)[known].all()


# --- the certified bound


def assert_bound(histograms: Histograms, rows: torch.Tensor) -> None:
    """Assert that the distances are within their bounds, and NaN only where they must be."""
    distances = from_histograms(histograms, histograms.moments())
    exact = from_samples(rows)
    known = np.isfinite(distances.wasserstein)
    np.testing.assert_array_equal(known, np.isfinite(distances.error))
    off = np.abs(distances.wasserstein - exact)[known]
    assert (off <= distances.error[known] + 1e-10).all(), (off, distances.error[known])
    # A std below a step is none, and with tails, whose squares are whole bins', one below a bin.
    tails = histograms.tail_count.sum(dim=1) > 0
    finest = histograms.width * torch.where(tails, 1, 1 / 64)
    unresolved = (rows.double().std(dim=0, correction=0) <= finest).numpy()
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
@given(anything(st.integers(2, 40)), anything(st.integers(1, 3)), st.sampled_from([2, 8, 64, 1024]))
def test_the_bound_holds_for_anything(rows: torch.Tensor, pilot: torch.Tensor, bins: int) -> None:
    assert_bound(started(pilot, rows, bins=bins), rows)


def spread_tails() -> Array:
    """A Gaussian but for its tails, the same for their means: near the edge, and a few far out."""
    x = np.clip(GAUSSIAN.quantiles(4000), -1.503, 1.503)
    x[:13], x[-13:] = -10, 10
    return x


MISLED = {  # pilot, values, and what the bound may be at most
    "a massive activation": (GAUSSIAN.sample(999), np.append(LAPLACE.sample(4095), 1e4), 0.04),
    "many of them": (GAUSSIAN.sample(99), np.append(LAPLACE.sample(4000), np.full(96, 3e3)), 0.35),
    "mean off": (GAUSSIAN.sample(99), 4 + LAPLACE.sample(4096), 0.01),
    "mean outside": (GAUSSIAN.sample(99), 12 + UNIFORM.sample(4096), 8),
    "far too wide": (GAUSSIAN.sample(99), 0.05 * BIMODAL.sample(4096), 0.2),
    "far too narrow": (GAUSSIAN.sample(99), 9 * EXPONENTIAL.sample(4096), 0.2),
    "heavy tails": (GAUSSIAN.sample(99), np.random.default_rng(0).standard_cauchy(4096), 0.1),
    "rounded": (1e4 + GAUSSIAN.sample(99) / 100, 1e4 + LAPLACE.sample(4096) / 100, 0.01),
    "spread tails": (np.array([-1.5 / 8, 1.5 / 8]), spread_tails(), 0.1),
    "all in the tails": (np.array([-1e-3, 1e-3]), 9 * GAUSSIAN.sample(4096).round() + 0.5, 1.6),
    "on the bins' edges": (np.array([-1, 1]), (9 * GAUSSIAN.sample(4096)).round() / 16, 0.02),
    "below the edges": (np.array([-1, 1]), EXPONENTIAL.sample(999).round() / 16 - 1e-7, 0.15),
}


@pytest.mark.parametrize("bins", [16, 1024, 2048])
@pytest.mark.parametrize(("pilot", "values", "limit"), MISLED.values(), ids=MISLED)
def test_the_bound_holds_and_says_something_where_the_pilot_misleads(
    pilot: Array, values: Array, limit: float, bins: int
) -> None:
    rows = rows_of(values)
    histograms = started(rows_of(pilot), rows, bins=bins)
    assert_bound(histograms, rows)
    assert bins < 1024 or from_histograms(histograms, histograms.moments()).error[0] < limit


def test_a_neuron_constant_in_the_pilot_and_alive_at_its_layers_scale() -> None:
    pilot = rows_of(*([GAUSSIAN.sample(64)] * 3), np.full(64, 3.0), np.full(64, -2.0))
    rows = rows_of(*([GAUSSIAN.sample(4096)] * 3), 3 + LAPLACE.sample(4096), BIMODAL.sample(4096))
    histograms = started(pilot, rows)
    assert_bound(histograms, rows)
    distances = from_histograms(histograms, histograms.moments())
    assert (distances.error < 0.01).all()
    np.testing.assert_allclose(distances.wasserstein, from_samples(rows), atol=2e-4)


def test_where_the_pilot_places_the_bins() -> None:
    pilot = torch.tensor([[0.0, 2, 0, 5, math.nan], [6, 26, 2e-9, 5, 0]])
    histograms = started(pilot)
    np.testing.assert_allclose(histograms.center, [3, 14, 1e-9, 5, 0])
    np.testing.assert_allclose(histograms.scale, [3, 12, 3e-3, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(histograms.edges(1)[[0, 512, 1024]], [-82, 14, 110], rtol=1e-6)
    np.testing.assert_allclose(started(pilot[:, 3:]).scale, [1, 1])  # no neuron is alive


# --- counts, on both kernels

Fill = Callable[..., Histograms]


@pytest.fixture(params=["a device's own", "torch's"])
def fill(device: torch.device, request: pytest.FixtureRequest) -> Fill:
    """Count on each device, and by torch on the CPU."""
    if request.param == "a device's own":
        return functools.partial(started, device=device)
    if device != CPU:
        pytest.skip("torch's is the device's own")
    return by_torch


def test_counts_and_sums_are_numpys(fill: Fill) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([3 * rng.standard_normal(9999), np.arange(-5000, 5000) / 512])  # edges too
    x = x.astype(np.float32).astype(np.float64)
    histograms = fill(UNIT, rows_of(x))
    inside = x[(x >= -8) & (x < 8)]
    counts, edges = np.histogram(inside, 1024, (-8, 8))
    np.testing.assert_array_equal(histograms.counts[0], counts)
    np.testing.assert_array_equal(histograms.edges(0), edges)
    steps = np.floor(inside * 4096)
    np.testing.assert_array_equal(histograms.steps[0], [steps.sum(), (steps * (steps + 1)).sum()])
    for side, tail in enumerate((-x[x < -8], x[x >= 8])):
        excess = np.floor((tail - 8) * 4096)
        assert histograms.tail_count[0, side] == len(tail) > 0
        assert histograms.tail_excess[0, side] == excess.sum()
        assert histograms.tail_square[0, side] == np.rint(((excess + 0.5) / 64) ** 2).sum()
    assert (histograms.minimum[0], histograms.maximum[0]) == (x.min(), x.max())
    assert histograms.count[0] == len(x)


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 127, 129, 300])
@pytest.mark.parametrize("neurons", [1, 63, 64, 65, 130])
def test_the_kernels_agree(tokens: int, neurons: int) -> None:
    pilot, rows = wild(64, neurons), wild(tokens, neurons, seed=1)
    rows[tokens // 2 :, ::7] *= 1e9
    rows[tokens // 3 : tokens // 2, ::5] = math.nan
    rows[-1:, ::11] = -math.inf
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        batch = rows.to(dtype)
        histograms = started(pilot, batch, batch)
        assert_same(histograms, by_torch(pilot, batch, batch))
        assert_same(histograms, started(pilot, torch.cat([batch, batch]).double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_rows_at_these_places_count(device: torch.device, dtype: torch.dtype) -> None:
    rows, places = wild(90, 70).to(dtype), torch.tensor([3, 0, 88, 41, 42])
    histograms = Histograms.zeros(70, device=device)
    histograms.start(rows.to(device), places.to(device))
    histograms.add(rows.to(device), places.to(device))
    assert_same(histograms.to(CPU), started(rows[places], rows[places]))
    torched = started(rows[places])
    _add_torch(torched, rows, places)
    assert_same(torched, started(rows[places], rows[places]))
    for none in (rows[:0], rows[:0].to(device)):
        histograms.add(none.to(device))
    histograms.add(rows.to(device), places[:0].to(device))
    assert_same(histograms.to(CPU), started(rows[places], rows[places]))


def test_rows_that_are_not_contiguous() -> None:
    rows = wild(90, 90)
    for view in (rows[:, ::2], rows.T, rows[::3], rows[:1].expand(70, -1)):
        assert_same(Histograms.from_rows(view), Histograms.from_rows(view.contiguous()))


def test_values_that_cannot_be_summed_are_counted_and_make_their_neuron_nan(fill: Fill) -> None:
    pilot, rows = wild(64, 5), wild(200, 5, seed=1)
    rows[[3, 130], 1], rows[5, 2], rows[[7, 150], 3] = (
        math.nan,
        -math.inf,
        torch.tensor([1e30, -1e30]),
    )
    histograms = fill(pilot, rows)
    assert histograms.nonfinite.tolist() == [0, 2, 1, 0, 0]
    for end in (histograms.minimum, histograms.maximum):
        assert end.isnan().tolist() == [False, True, True, False, False]
    ends = torch.stack([histograms.minimum[3], histograms.maximum[3]])
    assert torch.equal(ends, torch.tensor([-1e30, 1e30]))
    assert histograms.beyond.tolist() == [0, 0, 0, 2, 0]
    assert histograms.invalid().tolist() == [False, True, True, True, False]
    moments = histograms.moments()
    distances = from_histograms(histograms, moments)
    for numbers in (moments.mean, moments.std, moments.skewness, moments.kurtosis):
        assert np.isnan(numbers).tolist() == histograms.invalid().tolist()
    assert np.isnan(distances.wasserstein).tolist() == histograms.invalid().tolist()
    assert (histograms.modes(moments) > 0).tolist() == (~histograms.invalid()).tolist()
    assert moments.count.tolist() == [200] * 5
    rows[:, 1:4] = 0
    for some in (slice(0, 1), slice(4, 5)):
        assert_same(histograms[some], fill(pilot, rows)[some])


def test_where_the_lattice_ends(fill: Fill) -> None:
    last, next_float = 8 + 2.0**24, 10 + 2.0**24  # 2^30 bins of 1/64 beyond the edge
    histograms = fill(UNIT, torch.tensor([[last], [-last], [0]]))
    assert (int(histograms.beyond), histograms.tail_count.tolist()) == (0, [[1, 1]])
    assert histograms.moments().std[0] == pytest.approx(last * math.sqrt(2 / 3))
    for far in (next_float, -next_float):
        assert int(fill(UNIT, torch.tensor([[far], [0]])).beyond) == 1


def test_sums_that_would_overflow_are_flagged_and_never_wrap(fill: Fill) -> None:
    far = torch.tensor([[8 + 2.0**24, 1], [-8 - 2.0**24, -2], [0, 0]])  # 2^60 squared bins
    pilot = UNIT.expand(2, 2)
    three = fill(pilot, *[far] * 3)
    np.testing.assert_allclose(
        three.moments().std, torch.cat([far] * 3).double().std(0, correction=0), rtol=1e-4
    )
    for over in (
        fill(pilot, *[far] * 9),
        fill(pilot, torch.cat([far] * 200)),
        three.merged(three),
        three.merged(three).merged(three.merged(three)),
    ):
        assert over.invalid().tolist() == [True, False]
        assert over.beyond.tolist() == [0, 0]
        assert ((over.tail_square >= 0) & (over.tail_square <= MAX_SQUARES)).all()
        moments = over.moments()
        assert np.isnan(moments.std).tolist() == [True, False]
        assert moments.mean[1] == three.moments().mean[1]


# --- moments and modes


@pytest.mark.parametrize("far", [0.0, 5.0, 20.0], ids=["near", "off", "in the tails"])
def test_moments_are_numpys_and_scipys(far: float) -> None:
    values = [law.sample(3000, seed=i) for i, law in enumerate([*DISTRIBUTIONS, STUDENT])]
    values[-1][:2] = 1000, -3000
    rows = rows_of(*values) * torch.logspace(-4, 4, 10) + 1
    pilot = rows - far * rows.double().std(dim=0) * torch.ones(10)
    histograms, exact = started(pilot.float(), rows), rows.double().numpy()
    moments = histograms.moments()
    width = histograms.width.numpy()
    tails = histograms.tail_count.sum(dim=1).numpy() / 3000  # whose squares are whole bins'
    half_step = width / 128 * (1 + 1e-6)
    assert (np.abs(moments.mean - exact.mean(axis=0)) <= half_step).all()
    error = half_step + tails * width**2 / 2 / exact.std(axis=0)
    assert (np.abs(moments.std - exact.std(axis=0)) <= error).all()
    np.testing.assert_allclose(moments.skewness, stats.skew(exact), rtol=0.01, atol=0.03)
    # A square's error in m2 enters kurtosis as 6 m1² times itself.
    rough = 6 * far**2 * (tails * width**2 / exact.var(axis=0)).max() / 2
    np.testing.assert_allclose(
        moments.kurtosis, stats.kurtosis(exact), rtol=0.01, atol=0.03 + rough
    )
    np.testing.assert_array_equal(histograms.minimum, exact.min(axis=0))
    np.testing.assert_array_equal(histograms.maximum, exact.max(axis=0))


def test_a_dead_neuron_has_its_mean_and_no_distance() -> None:
    rows = torch.tensor([7.1, 0.0, -1e20, 1e-30]).expand(50, 4)
    pilot = torch.cat([rows, rows + torch.tensor([[1.0, 0, 1e20, 0]])])
    for histograms in (Histograms.from_rows(rows), started(pilot, rows)):
        moments = histograms.moments()
        np.testing.assert_array_equal(moments.mean, rows[0].double())
        assert np.isnan([moments.std, moments.skewness, moments.kurtosis]).all()
        assert np.isnan(from_histograms(histograms, moments).wasserstein).all()
        assert histograms.modes(moments).tolist() == [0] * 4
        assert not histograms.invalid().any()


def test_nothing_counted_is_nothing_known() -> None:
    for histograms in (started(wild(9, 3)), Histograms.zeros(3)):
        moments = histograms.moments()
        assert np.isnan([moments.mean, moments.std, moments.skewness, moments.kurtosis]).all()
        assert np.isnan(from_histograms(histograms, moments).error).all()
        assert histograms.modes(moments).tolist() == [0] * 3


def peaks(values: Array) -> int:
    """Return the modes of values by their definition, on a grid of 0.01 std."""
    density, _ = np.histogram((values - values.mean()) / values.std(), np.linspace(-10, 10, 2001))
    smooth = gaussian_filter1d(density.astype(np.float64), 20)
    return len(find_peaks(smooth, prominence=0.05 * smooth.max())[0])


@pytest.mark.parametrize("law", DISTRIBUTIONS, ids=str)
def test_a_law_has_its_modes(law: Distribution) -> None:
    values = law.sample(20_000)
    histograms = Histograms.from_rows(rows_of(values * 3 - 7))
    assert histograms.modes(histograms.moments()).tolist() == [law.modes] == [peaks(values)]


def test_a_peak_is_a_mode_from_a_twentieth_of_the_highest() -> None:
    for share, modes in ((0.04, 1), (0.06, 2)):
        few = 8 + GAUSSIAN.quantiles(round(20_000 * share))
        histograms = Histograms.from_rows(rows_of(np.append(GAUSSIAN.quantiles(20_000), few)))
        assert histograms.modes(histograms.moments()).tolist() == [modes]


def test_modes_are_the_peaks_of_the_smoothed_samples() -> None:
    rng = np.random.default_rng(0)
    shape = (2000, 600)  # more neurons than are looked at together, of one to four modes
    rows = rng.standard_normal(shape) + rng.integers(0, rng.integers(1, 5, 600), shape) * 5
    histograms = Histograms.from_rows(torch.from_numpy(rows).float())
    modes = histograms.modes(histograms.moments())
    np.testing.assert_array_equal(modes, [peaks(column) for column in rows.T])
    assert set(modes) == {1, 2, 3, 4}


# --- what is refused


def test_shapes_and_numbers_that_do_not_fit_are_refused() -> None:
    for bins in (0, 7, 2050):
        with pytest.raises(ValueError, match=rf"bins .*\b2 to 2048\b.* {bins}$"):
            Histograms.zeros(3, bins=bins)
    rows = wild(10, 3)
    histograms = started(rows)
    for wrong in (rows[:, :2], rows[0], rows[None]):
        message = rf"\(tokens, 3\).* {re.escape(str(tuple(wrong.shape)))}$"
        with pytest.raises(ValueError, match=message):
            histograms.add(wrong)
        with pytest.raises(ValueError, match=message):
            Histograms.zeros(3).start(wrong)
    with pytest.raises(ValueError, match=r"pilot.* no rows"):
        Histograms.zeros(3).start(rows[:0])


def test_the_pilot_comes_first_and_once() -> None:
    rows = wild(10, 3)
    with pytest.raises(RuntimeError, match=r"bins.* pilot"):
        Histograms.zeros(3).add(rows)
    for histograms in (started(rows), started(rows, rows)):
        with pytest.raises(RuntimeError, match=r"bins.* already"):
            histograms.start(rows)


def test_states_of_another_pilot_or_shape_do_not_merge() -> None:
    rows = wild(10, 3)
    histograms = started(rows, rows)
    with pytest.raises(ValueError, match=r"\b3 neurons of 1024 bins.*\b2 neurons of 1024 bins"):
        histograms.merged(started(rows[:, :2]))
    with pytest.raises(ValueError, match=r"\b3 neurons of 1024 bins.*\b3 neurons of 512 bins"):
        histograms.merged(started(rows, bins=512))
    other = rows.clone()
    other[0, 1] += 1
    with pytest.raises(ValueError, match=r"\b1 of 3 neurons.*bins"):
        histograms.merged(started(other))
    with pytest.raises(ValueError, match=r"\b1 of 1 neurons.*bins"):
        started(UNIT).merged(started(2 * UNIT))  # the center is the same
    with pytest.raises(ValueError, match=r"\b3 of 3 neurons.*bins"):
        histograms.merged(Histograms.zeros(3))


def test_more_tokens_than_can_be_counted_are_refused() -> None:
    rows = wild(10, 3)
    histograms = started(rows)
    histograms.count.fill_(MAX_TOKENS - 9)
    with pytest.raises(OverflowError, match=str(MAX_TOKENS)):
        histograms.add(rows)
    with pytest.raises(OverflowError, match=str(MAX_TOKENS)):
        histograms.merged(started(rows, rows))
    assert histograms.to(CPU).count.tolist() == [MAX_TOKENS - 9] * 3
    histograms.add(rows[:9])


def test_what_a_device_cannot_say_at_once_is_said_when_its_state_is_copied() -> None:
    late, many = started(UNIT, UNIT), started(UNIT)
    late.center.fill_(math.nan)
    many.count.fill_(MAX_TOKENS + 1)
    for state, error, message in (
        (late, RuntimeError, r"bins.* pilot"),
        (many, OverflowError, str(MAX_TOKENS + 1)),
    ):
        with pytest.raises(error, match=message):
            state.to(CPU)
        with pytest.raises(error, match=message):
            Histograms.zeros(1).copy_(state)
