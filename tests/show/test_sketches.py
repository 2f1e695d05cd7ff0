"""Small histograms against NumPy's of the raw outputs, up to the fine bins that their rims cut."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xarray as xr

from entangle.numerics.histograms import Histograms
from entangle.show.sketches import Sketches, sketch
from tests.distributions import (
    BIMODAL,
    EXPONENTIAL,
    GAUSSIAN,
    STUDENT,
    TWO_POINTS,
    UNIFORM,
    bulk_of,
)

Array = npt.NDArray[np.float64]

TOKENS = 4099  # no thousandth of it is whole, so that each quantile is one of its outputs
EPS = 1e-3  # fine bins: more than float32 arithmetic moves an output
SIDES = {"counts": ("neuron", "bin")}
SIDES |= dict.fromkeys(("tail_count", "tail_excess"), ("neuron", "tail"))
STATE = (*SIDES, "count", "center", "scale", "minimum", "maximum")


def held_in(histograms: Histograms) -> xr.Dataset:
    """Return what a run holds of histograms."""
    return xr.Dataset(
        {name: (SIDES.get(name, ("neuron",)), getattr(histograms, name).numpy()) for name in STATE}
    )


def massive(tokens: int) -> Array:
    """Return Gaussian outputs, two of which are a thousand times as large."""
    values = GAUSSIAN.sample(tokens, seed=5)
    values[[tokens // 3, tokens // 2]] = 1000, 900
    return values


LAWS: dict[str, Callable[[int], Array]] = {
    law.name: law.sample for law in (GAUSSIAN, BIMODAL, TWO_POINTS, UNIFORM, STUDENT, EXPONENTIAL)
}
LAWS |= {
    "far from zero": lambda tokens: 300 + 0.01 * GAUSSIAN.sample(tokens, seed=1),
    "massive outliers": massive,
    "cauchy": lambda tokens: np.random.default_rng(2).standard_cauchy(tokens),
    "lattice": lambda tokens: np.round(3 * GAUSSIAN.sample(tokens, seed=3)),
    "constant": lambda tokens: np.full(tokens, 2.5),
    "zero": np.zeros,
}
ALIVE = [name for name in LAWS if name not in {"constant", "zero"}]


@dataclasses.dataclass(frozen=True)
class Case:
    """Raw outputs (tokens, neurons), their histograms' state and their own moments."""

    rows: Array
    held: xr.Dataset
    mean: Array
    std: Array

    @property
    def fine(self) -> Array:
        """The widths of the fine bins (neurons,)."""
        return np.asarray(16 * self.held["scale"] / self.held.sizes["bin"], np.float64)

    @property
    def left(self) -> Array:
        """Where the histograms begin (neurons,)."""
        return np.asarray(self.held["center"] - 8 * self.held["scale"], np.float64)

    def sketch(self, bars: int = 40) -> Sketches:
        return sketch(self.held, self.mean, self.std, bars=bars)

    def alone(self, neuron: int) -> "Case":
        some = [neuron]
        held = self.held.isel(neuron=some)
        return Case(self.rows[:, some], held, self.mean[some], self.std[some])


def case_of(columns: list[Array], *, bins: int = 1024, pilot: int | None = None) -> Case:
    """Return a case whose bins are placed by the first ``pilot`` tokens, or by all."""
    rows = torch.from_numpy(np.stack(columns, axis=1)).float()
    histograms = Histograms.zeros(rows.shape[1], bins=bins)
    histograms.start(rows[:pilot])
    histograms.add(rows)
    raw = rows.double().numpy()
    std = raw.std(axis=0)
    std[np.ptp(raw, axis=0) == 0] = np.nan  # as a run says of a dead neuron
    return Case(raw, held_in(histograms), raw.mean(axis=0), std)


def inside(case: Case, neuron: int) -> Array:
    """Return the outputs that the histogram holds."""
    place = (case.rows[:, neuron] - case.left[neuron]) / case.fine[neuron]
    held: Array = case.rows[(place >= 0) & (place < case.held.sizes["bin"]), neuron]
    return held


def check_bars(case: Case, bars: int) -> None:
    """Each bar has the tokens between its rims, but for some of the two fine bins cut there."""
    found = case.sketch(bars)
    assert found.shares.shape == (case.rows.shape[1], bars)
    for neuron in range(case.rows.shape[1]):
        values, tokens = inside(case, neuron), len(case.rows)
        rims = np.linspace(found.low[neuron], found.high[neuron], bars + 1)
        expected, _ = np.histogram(values, rims)
        fine = case.fine[neuron]
        place = (values - case.left[neuron]) / fine
        edges = np.floor((rims - case.left[neuron]) / fine)
        cut = np.array([np.sum((place > edge - EPS) & (place < edge + 1 + EPS)) for edge in edges])
        error = np.abs(found.shares[neuron] * tokens - expected)
        assert (error <= cut[:-1] + cut[1:] + 1e-6).all()
        # All together the errors of inner rims cancel.
        within = np.sum((values >= rims[0]) & (values <= rims[-1]))
        total = found.shares[neuron].sum() * tokens
        assert total == pytest.approx(within, abs=cut[0] + cut[-1] + 1e-6)
        assert (found.shares[neuron] >= 0).all()
        assert total <= len(values) + 1e-6


@pytest.mark.parametrize("bins", [1024, 64])
@pytest.mark.parametrize("bars", [40, 7, 300])
@pytest.mark.parametrize("name", ALIVE)
def test_bars_hold_the_tokens_between_their_rims(name: str, bars: int, bins: int) -> None:
    check_bars(case_of([LAWS[name](TOKENS)], bins=bins), bars)


def test_a_smooth_law_has_bars_far_closer_than_the_cut_bins_allow() -> None:
    """Of a cut bin the sketch takes as much as is cut off: to sampling error, not to a bin."""
    case = case_of([law.quantiles(TOKENS) for law in (GAUSSIAN, UNIFORM)], bins=128)
    found = case.sketch()
    for neuron in range(2):
        rims = np.linspace(found.low[neuron], found.high[neuron], 41)
        expected = np.histogram(case.rows[:, neuron], rims)[0] / TOKENS
        assert case.fine[neuron] > 0.6 * np.diff(rims)[0]  # or no bin is cut
        error = np.abs(found.shares[neuron] - expected)
        steep = np.sum(error > 0.03 * expected.max())
        assert steep <= (0 if neuron == 0 else 4)  # the uniform's own two ends


@pytest.mark.parametrize("bins", [1024, 64])
@pytest.mark.parametrize("name", ALIVE)
def test_a_sketch_follows_the_bulk_and_leaves_room_beside_it(name: str, bins: int) -> None:
    case = case_of([LAWS[name](TOKENS)], bins=bins)
    found, bulk = case.sketch(), bulk_of(case.rows[:, 0])
    extent, fine = np.ptp(bulk), case.fine[0]
    # The bulk's ends are known up to a bin; where tokens are sparse, the next token may be far.
    error = 3 * fine + 0.15 * extent
    assert found.low[0] == pytest.approx(bulk[0] - 0.3 * extent, abs=error)
    assert found.high[0] == pytest.approx(bulk[-1] + 0.3 * extent, abs=error)
    assert found.low[0] < bulk[0] + fine
    assert bulk[-1] - fine < found.high[0]


def test_the_axes_of_known_laws() -> None:
    laws = (GAUSSIAN, UNIFORM, STUDENT, EXPONENTIAL)
    case = case_of([law.quantiles(TOKENS) for law in laws])
    found = case.sketch()
    # Symmetric laws lose half a per cent at each end, and the exponential one per cent at its end.
    ends = np.array([law.quantile(np.array([0.005, 0.995])) for law in laws[:3]] + [[-1, 3.605]])
    room = 0.3 * np.diff(ends, axis=1)[:, 0]
    assert found.low == pytest.approx(ends[:, 0] - room, abs=0.1)
    assert found.high == pytest.approx(ends[:, 1] + room, abs=0.1)


@pytest.mark.parametrize("name", [*ALIVE, "constant"])
def test_tokens_that_the_pilot_missed_are_in_no_bar(name: str) -> None:
    """The bins fit the first tokens; what came later lies far beyond them, on either side."""
    values = LAWS[name](TOKENS)
    spread = 1.0 if name == "constant" else float(np.std(values[:500]))
    values[-300:-150] += 40 * spread
    values[-150:] -= 70 * spread
    case = case_of([values], pilot=500)
    assert len(inside(case, 0)) <= TOKENS - 300
    check_bars(case, 40)
    found = case.sketch()
    # More than 1% is beyond the histogram on either side, so the bulk is: all of it is shown.
    extent = case.held.sizes["bin"] * case.fine[0]
    assert found.low[0] == pytest.approx(case.left[0] - 0.3 * extent)
    assert found.high[0] == pytest.approx(case.left[0] + 1.3 * extent)
    assert found.shares.sum() == pytest.approx(len(inside(case, 0)) / TOKENS, abs=1e-9)


def test_a_constant_neuron_has_no_sketch_and_spoils_no_other() -> None:
    names = [GAUSSIAN.name, "constant", "massive outliers", "zero", BIMODAL.name]
    case = case_of([LAWS[name](TOKENS) for name in names])
    found = case.sketch()
    dead = np.array([name in {"constant", "zero"} for name in names])
    assert (np.isnan(found.low) == dead).all()
    assert (np.isnan(found.high) == dead).all()
    assert (np.isnan(found.shares) == dead[:, None]).all()
    for neuron in np.flatnonzero(~dead):
        alone = case.alone(int(neuron)).sketch()
        assert (alone.shares[0] == found.shares[neuron]).all()


def test_a_neuron_without_any_finite_output_has_no_sketch_and_spoils_no_other() -> None:
    columns = [LAWS[GAUSSIAN.name](TOKENS), np.full(TOKENS, math.nan), LAWS[UNIFORM.name](TOKENS)]
    case = case_of(columns)
    found = case.sketch()
    for values in (found.low[1], found.high[1], found.shares[1]):
        assert np.isnan(values).all()
    for neuron in (0, 2):
        alone = case.alone(neuron).sketch()
        assert (alone.shares[0] == found.shares[neuron]).all()


def test_several_neurons_are_as_each_alone() -> None:
    case = case_of([scale * LAWS[name](TOKENS) for scale in (1, 50) for name in LAWS])
    whole = case.sketch()
    for neuron in range(case.rows.shape[1]):
        alone = case.alone(neuron).sketch()
        for name in ("low", "high", "shares"):
            one, other = getattr(whole, name)[neuron], getattr(alone, name)[0]
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("tokens", [2, 3, 17])
def test_few_tokens_are_all_there(tokens: int) -> None:
    case = case_of([STUDENT.sample(tokens, seed=4), GAUSSIAN.sample(tokens, seed=4)])
    found = case.sketch()
    assert (found.low <= case.rows.min(axis=0) + case.fine).all()
    assert (found.high >= case.rows.max(axis=0) - case.fine).all()
    assert found.shares.sum(axis=1) == pytest.approx(np.ones(2), abs=1e-9)


def test_a_shift_and_a_scale_move_the_rims_alone() -> None:
    values = BIMODAL.sample(TOKENS)
    plain = case_of([values]).sketch()
    moved = case_of([4096 * values + 2048]).sketch()  # exact in float32, as a power of two
    assert moved.low == pytest.approx(4096 * plain.low + 2048, rel=1e-4)
    assert moved.high == pytest.approx(4096 * plain.high + 2048, rel=1e-4)
    assert moved.shares == pytest.approx(plain.shares, abs=3 / TOKENS)
