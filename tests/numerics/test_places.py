"""Places in a distribution: against all outputs, sorted."""

import numpy as np
import pytest
import torch

from entangle.numerics.histograms import Histograms
from entangle.numerics.levels import Levels
from entangle.numerics.places import Distribution
from tests.distributions import DISTRIBUTIONS
from tests.distributions import Distribution as Law


def counted(values: np.ndarray, pilot: int) -> Distribution:
    rows = torch.from_numpy(values)[:, None]
    histograms = Histograms.zeros(1, bins=1024)
    histograms.start(rows[:pilot])
    histograms.add(rows)
    return Distribution.of({name: one[0].numpy() for name, one in histograms.tensors().items()})


@pytest.mark.parametrize("massive", [0.0, 300.0])
@pytest.mark.parametrize("law", DISTRIBUTIONS, ids=str)
def test_a_place_is_the_share_below_to_within_its_error(law: Law, massive: float) -> None:
    values = law.sample(20_000).astype(np.float32)
    values[::400] += np.float32(massive)
    found = counted(values, 2_000)
    asked = np.concatenate([np.quantile(values, np.linspace(0.001, 0.999, 200)), values[:200]])
    places, errors = found.places(asked)
    ordered = np.sort(values)
    low, high = (np.searchsorted(ordered, asked, side) / len(values) for side in ("left", "right"))
    assert (places >= low - errors - 1e-4).all()
    assert (places <= high + errors + 1e-4).all()
    ends = np.array([values.min() - 1, values.max() + 1])
    assert [one.tolist() for one in found.places(ends)] == [[0, 1], [0, 0]]


def test_median_and_reach_are_those_of_all_outputs() -> None:
    values = DISTRIBUTIONS[0].sample(20_000).astype(np.float32)
    found, exact = counted(values, 20_000).scale, Levels.of(values)
    width = 16 / 1024 * float(values.std())
    assert [found.median, found.reach] == pytest.approx([exact.median, exact.reach], abs=width)


def test_a_value_at_an_edge_may_be_in_either_bin() -> None:
    """Float32 finds a value's bin, so tokens beside an edge may be counted in the other bin."""
    one = {"counts": np.array([0, 30, 10, 0]), "tail_count": np.zeros(2), "center": 0.0}
    found = Distribution.of(
        one | {"scale": 1.0, "minimum": -3.0, "maximum": 3.0}
    )  # bins of width 4
    asked = np.array([0.0, 4 / 8192, -4 / 8192, 0.01])
    places, errors = found.places(asked)
    assert places == pytest.approx([0.75] * 4, abs=0.002)
    assert errors == pytest.approx([0.75, 0.75, 0.75, 0.25], abs=0.002)
    value, error = found.quantile(0.75)  # the edge itself
    assert value == 0
    assert error == pytest.approx(4, abs=4 / 2048)  # the values of either bin


@pytest.mark.parametrize("law", DISTRIBUTIONS, ids=str)
def test_a_quantile_is_the_value_to_within_its_error(law: Law) -> None:
    values = law.sample(20_001).astype(np.float32)
    values[::400] += np.float32(300)  # the bins are coarse
    found = counted(values, 2_000)
    shares = np.random.default_rng(0).uniform(found.below[1], found.below[-2], 50)
    for share in (*shares, *found.below[1:-1:20]):  # also those that end with a bin
        value, error = found.quantile(share)
        assert abs(value - np.quantile(values, share, method="inverted_cdf")) <= error
