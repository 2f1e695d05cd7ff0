"""The GPU's kernel against the CPU's and against a loop over values; by the interpreter without a GPU."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from entangle.numerics.histograms import Histograms
from entangle.numerics.kernels.bins import MAX_EXCESS, MAX_SQUARES, STEPS
from tests.numerics.test_histograms import CPU, UNIT, assert_same, started, wild

kernel = pytest.importorskip("entangle.numerics.kernels.histograms_triton")
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def counted(
    pilot: torch.Tensor,
    *batches: torch.Tensor,
    bins: int = 1024,
    places: torch.Tensor | None = None,
    shared: bool = False,
) -> Histograms:
    """Return the histograms of batches in bins that the pilot placed, counted by the kernel."""
    histograms = started(pilot, bins=bins).to(GPU)
    places = None if places is None else places.to(GPU)
    for batch in batches:
        kernel.add_rows(batch.to(GPU), places, *histograms.tensors().values(), shared=shared)
    return histograms.to(CPU)


def by_loop(values: list[float], center: float, inverse: float, bins: int) -> dict[str, Any]:
    """Count the values of a neuron one by one, with Python's integers."""
    c, v, edge = np.float32(center), np.float32(inverse), STEPS // 2 * bins
    counts, tails, excesses, squares = [0] * bins, [0, 0], [0, 0], [0, 0]
    steps, nonfinite, beyond = [0, 0], 0, 0
    for x in map(np.float32, values):
        with np.errstate(all="ignore"):
            y = np.floor((x - c) * v)
        if -edge <= y < edge:
            q = int(y)
            counts[(q + edge) // STEPS] += 1
            steps = [steps[0] + q, steps[1] + q * (q + 1)]
        elif not math.isfinite(x):
            nonfinite += 1
        else:
            far = (float(x) - float(c)) * float(v)
            excess, side = max(math.floor(abs(far)) - edge, 0), int(far >= 0)
            if excess > MAX_EXCESS * STEPS:
                beyond += 1
                continue
            tails[side] += 1
            excesses[side] += excess
            squares[side] = min(squares[side] + round(((excess + 0.5) / STEPS) ** 2), MAX_SQUARES)
    return {
        "counts": counts,
        "steps": steps,
        "tail_count": tails,
        "tail_excess": excesses,
        "tail_square": squares,
        "nonfinite": nonfinite,
        "beyond": beyond,
        "count": len(values),
    }


@pytest.mark.parametrize(
    ("dtype", "shared"),
    [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)],
)
def test_it_counts_as_the_cpu_does(
    dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_PROGRAMS", 1)  # so 8 neurons each: the second has 3
    rows = wild(120, 22, seed=1)
    rows[40:60, ::6] *= 1e9
    rows[6, 4], rows[8, 16], rows[10, 16] = math.nan, -math.inf, math.inf
    rows = rows.to(dtype)[::2, ::2]  # of strides 44 and 2
    pilot = torch.tensor([[-1.0], [1.0], [0.5]]) * torch.logspace(-3, 3, 22)[::2]
    places = torch.tensor([*range(1, 37), 59, 38])
    whole, some = rows[:50], rows[places]
    expected = started(pilot, whole, some)
    found = counted(pilot, whole, shared=shared).merged(
        counted(pilot, rows, places=places, shared=shared)
    )
    assert_same(found, expected)
    assert (expected.nonfinite > 0).sum() >= 2
    assert (expected.tail_count > 0).sum() >= 6


@pytest.mark.parametrize("bins", [2, 6, 1024, 2048])
@pytest.mark.parametrize("shared", [False, True])
def test_it_counts_as_a_loop_over_values_does(bins: int, shared: bool) -> None:
    rng = np.random.default_rng(bins)
    edges = np.array([8, -8, 8 + 2.0**24, 10 + 2.0**24, 8 * (1 + 2.0**-20)], np.float32)
    values = [
        *(20 * rng.standard_normal(9)),
        *rng.integers(-600, 600, 9) / 64,
        *edges.tolist(),
        *np.nextafter(edges, np.float32(0)).tolist(),
        *(0.0, -0.0, 1e-45, -1e-45, 1e-40, 1e30, -1e30, math.nan, math.inf, -math.inf),
    ]
    pilot = UNIT * (3.0 if bins == 6 else 1.0)
    rows = torch.tensor(values, dtype=torch.float32)[:, None]
    found = counted(pilot, rows, rows.flip(0), bins=bins, shared=shared)
    inverse = float((STEPS / found.width).float())
    for name, expected in by_loop(rows.flatten().tolist() * 2, 0, inverse, bins).items():
        np.testing.assert_array_equal(found.tensors()[name][0], expected, err_msg=name)
    assert found.minimum.isnan().all()
    assert found.maximum.isnan().all()


def test_a_scale_near_the_smallest_number() -> None:
    pilot = torch.tensor([[-1e-40, 0.0], [1e-40, 1e-38], [3e-39, 0.0]])
    rows = torch.cat([pilot, -pilot, 1e9 * pilot, pilot * 0.25, torch.full((1, 2), 1e-30)])
    assert_same(counted(pilot, rows), started(pilot, rows))


def test_squares_end_at_their_limit_in_one_batch_and_over_several() -> None:
    far, near = 8 + 2.0**24, 8 + 2.0**23  # 2^60 and 2^58 squared bins
    pilot = UNIT.expand(2, 2)
    below = torch.tensor([[far, -far]] * 3 + [[near, -near]] * 3 + [[9.0, 0]])
    for full, batches in (
        (0, [below]),
        (2, [below, below[3:4], below]),
        (2, [below.repeat(40, 1)]),
    ):
        found = counted(pilot, *batches)
        assert_same(found, started(pilot, *batches))
        assert int((found.tail_square == MAX_SQUARES).sum()) == full


def test_more_tiles_than_there_are_bits_to_mark_those_with_tails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "_TILES", {False: (32, 2, 1)})
    rows = torch.linspace(-7, 7, 67 * 32 - 5)[:, None].clone()
    rows[40], rows[65 * 32], rows[66 * 32 + 9] = 9.0, -30.0, 31.0  # in tiles 1, 65 and 66
    found = counted(UNIT, rows)
    assert_same(found, started(UNIT, rows))
    assert found.tail_count.tolist() == [[1, 2]]


def test_the_same_batches_give_the_same_bits() -> None:
    pilot, rows = wild(64, 2), wild(300, 2, seed=1)
    one, two = (counted(pilot, rows, rows[:9]) for _ in range(2))
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[name]), name
    nothing = counted(pilot, rows[:0])
    kernel.add_rows(rows.to(GPU), torch.zeros(0).long().to(GPU), *nothing.tensors().values())
    assert_same(nothing, started(pilot))
