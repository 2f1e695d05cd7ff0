"""Which windows are shown, found again by sorting."""

import numpy as np
import pytest

from entangle.measurement.window_choice import choose_windows


@pytest.mark.parametrize("modes", [[0.1], [-0.8, 1.2]])
def test_windows_are_those_of_the_ends_the_modes_and_quantiles(modes: list[float]) -> None:
    outputs = np.random.default_rng(0).normal(size=(30, 50)).astype(np.float32)
    found = choose_windows(outputs, modes)
    assert len({window for _, window, _ in found}) == len(found) == 8
    middle = [f"mode at {mode:.3g}" for mode in modes] if len(modes) > 1 else []
    middle = [*middle, "quantile 0.95", "quantile 0.05"][:2]
    assert [why for why, *_ in found] == ["highest"] * 3 + ["lowest"] * 3 + middle
    places = [(window, position) for _, window, position in found]
    by_window = sorted(range(30), key=lambda one: -outputs[one].max())[:3]
    assert places[:3] == [(one, int(outputs[one].argmax())) for one in by_window]
    others = [one for one in range(30) if one not in by_window]
    lowest = sorted(others, key=lambda one: outputs[one].min())[:3]
    assert places[3:6] == [(one, int(outputs[one].argmin())) for one in lowest]
    wanted = modes if len(modes) > 1 else np.quantile(outputs, [0.95, 0.05])
    for place, target in zip(places[6:], wanted, strict=True):
        assert outputs[place] == pytest.approx(target, abs=0.02)


def test_a_short_text_shows_each_window_once() -> None:
    outputs = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = choose_windows(outputs, [])
    assert [(window, position) for _, window, position in found] == [(2, 3), (1, 3), (0, 3)]
