"""contexts.json: what is read is what was written, also by older versions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entangle.numerics.levels import Levels
from entangle.runs.contexts_file import add_contexts, packed, read_contexts

TOKEN = {"window": 1, "position": 3, "before": "a", "token": " b", "after": ""}
OLDER: dict[str, Any] = {  # a neuron of a version before 0.2.0
    "tokens": 8,
    "wasserstein": 0.5,
    "low": None,
    "high": None,
    "positions": [0.25, 0],
    "contexts": [TOKEN | {"why": "highest", "output": 1, "deviation": 2.5}],
    "frequent": [{"token": " b", "share": 0.5}],
    "without": [{"what": "position 0", "tokens": 8, "variance": 1.0, "wasserstein": None}],
}


def neuron(*windows: int, skipped: int = 0) -> dict[str, Any]:
    scale = Levels(1.0, 2.0, 0.01)
    levels = np.arange(-2, 3 - skipped, dtype=np.int8)
    shown = [
        {"why": "highest", "window": window, "position": 3, "levels": packed(levels)}
        for window in windows
    ]
    return OLDER | {
        "scale": {"median": 1.0, "reach": 2.0, "step": 0.01},
        "windows": shown,
        "values": scale.values(levels).tolist(),
    }


def texts(*windows: int) -> dict[int, list[str]]:
    return {window: [f"{window}é{token}" for token in range(5)] for window in windows}


def test_neurons_share_their_windows(tmp_path: Path) -> None:
    add_contexts(tmp_path, {"a:0": neuron(7, 2), "a:1": neuron(7, skipped=2)}, texts(2, 7))
    assert list(json.loads((tmp_path / "contexts.json").read_text())["windows"]) == ["2", "7"]
    kept = read_contexts(tmp_path)
    first, second = kept.windows_of("a:0")
    assert (first.window, second.window, first.why, first.position) == (7, 2, "highest", 3)
    assert first.tokens == texts(7)[7]
    assert first.values == pytest.approx(1 + 2 * np.sinh([-0.02, -0.01, 0, 0.01, 0.02]))
    assert first.shades == pytest.approx((first.values - 1) / 2)
    (cut,) = kept.windows_of("a:1")  # the first two tokens are not counted
    assert np.isnan(cut.values[:2]).all()
    assert cut.values[2:].tolist() == kept.neurons["a:1"]["values"]
    assert np.isnan(cut.shades[:2]).all()


def test_windows_that_nobody_shows_any_more_are_left_out(tmp_path: Path) -> None:
    add_contexts(tmp_path, {"a:0": neuron(7, 2), "a:1": neuron(3)}, texts(2, 3, 7))
    add_contexts(tmp_path, {"a:0": neuron(11)}, texts(11))
    kept = read_contexts(tmp_path)
    assert list(kept.windows) == ["3", "11"]
    assert kept.windows["3"] == texts(3)[3]
    assert set(kept.neurons) == {"a:0", "a:1"}


def test_a_file_of_an_older_version_is_read_and_added_to(tmp_path: Path) -> None:
    older = {"a:0": OLDER, "windows:1": OLDER | {"wasserstein": 0.1}}
    (tmp_path / "contexts.json").write_text(json.dumps(older))
    kept = read_contexts(tmp_path)
    assert kept.neurons == older
    assert kept.windows_of("a:0") == []
    add_contexts(tmp_path, {"a:1": neuron(3)}, texts(3))
    assert read_contexts(tmp_path).neurons.keys() == {"a:0", "a:1", "windows:1"}
    assert read_contexts(tmp_path / "no folder").neurons == {}
