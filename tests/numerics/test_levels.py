"""Levels: no value is farther off than half a level, however far the massive ones are."""

import numpy as np
import pytest

from entangle.numerics.levels import Levels
from tests.distributions import DISTRIBUTIONS, Distribution

MASSIVE = [0.0, 1e2, 1e6]  # of a few values, in std


@pytest.mark.parametrize("massive", MASSIVE)
@pytest.mark.parametrize("law", DISTRIBUTIONS, ids=str)
def test_values_come_back_to_within_half_a_level(law: Distribution, massive: float) -> None:
    values = 7 + 3 * law.sample(20_000).astype(np.float32)
    values[:5] += np.float32(massive)
    scale = Levels.of(values)
    levels = scale.levels(values)
    assert levels.dtype == np.int8
    assert np.abs(levels).max() == 127
    off = np.abs(scale.values(levels) - values)
    far = np.abs(values - np.median(values))
    assert (off <= 0.53 * scale.step * np.hypot(scale.reach, far) + 1e-6).all()
    if len(np.unique(values)) > 100:  # the bound is not idle
        assert off.max() > 0.4 * scale.step * scale.reach
    near = far <= np.quantile(far, 0.99)
    assert off[near].max() < (0.02 if massive == 0 else 0.08) * scale.reach
    # Levels keep the order of values.
    assert (np.diff(levels[np.argsort(values)].astype(int)) >= 0).all()


def test_a_shade_is_the_distance_to_the_median_and_full_for_the_farthest_hundredth() -> None:
    values = np.arange(
        1001, dtype=np.float32
    )  # median 500, the farthest hundredth beyond 5 and 995
    scale = Levels.of(values)
    assert [scale.median, scale.reach] == pytest.approx([500, 495])
    assert scale.shades(np.array([500, 995, 1000, 5, 0, 252.5])) == pytest.approx(
        [0, 1, 1, -1, -1, -0.5]
    )


def test_values_that_are_nearly_all_equal_have_the_largest_distance_as_reach() -> None:
    values = np.zeros(1000, np.float32)
    values[[3, 7]] = 5, -2
    scale = Levels.of(values)
    assert (scale.median, scale.reach) == (0, 5)
    assert scale.values(scale.levels(values)) == pytest.approx(values, abs=5 * 0.004)
    constant = Levels.of(np.full(9, 4, np.float32))
    assert constant.values(constant.levels(np.full(9, 4, np.float32))).tolist() == [4] * 9
