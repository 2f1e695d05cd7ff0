"""Columns of divergences: quantiles against torch, errors against plain sums."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from entangle.model.divergence import (
    COLUMNS,
    Divergence,
    divergence_columns,
    quantile_over_windows,
)
from entangle.runs import store


def divergence(seed: int = 0, windows: int = 6, tokens: int = 400) -> Divergence:
    rng = np.random.default_rng(seed)
    kl = rng.exponential(size=(windows, tokens)).astype(np.float32)
    return Divergence(kl, *rng.uniform(size=(3, windows)))


@pytest.mark.parametrize("shape", [(6, 400), (1, 3), (7, 1), (2, 1001)])
@pytest.mark.parametrize("share", [0.999, 0.9, 0.5])
def test_quantiles_are_those_of_torch(shape: tuple[int, int], share: float) -> None:
    values = np.random.default_rng(1).normal(size=shape)
    found, error = quantile_over_windows(values, share)
    expected = torch.quantile(torch.from_numpy(values).flatten(), share)
    assert found == pytest.approx(float(expected), rel=1e-12)
    assert math.isnan(error) == (shape[0] == 1)


def test_the_error_of_a_quantile_is_its_spread_over_drawn_windows() -> None:
    values = np.random.default_rng(2).exponential(size=(12, 50)) * np.arange(1, 13)[:, None]
    rng = np.random.default_rng(3)
    drawn = [np.quantile(values[rng.integers(12, size=12)], 0.999) for _ in range(4000)]
    assert quantile_over_windows(values, 0.999)[1] == pytest.approx(np.std(drawn), rel=0.1)
    alike = np.tile(np.arange(50.0), (12, 1))
    assert quantile_over_windows(alike, 0.5)[1] == 0


def test_where_one_window_has_the_whole_tail_draws_without_it_count() -> None:
    values = np.zeros((20, 40))
    values[3] = 1.0
    drawn = 1 - (1 - 1 / 20) ** 20  # the probability that the window is drawn at all
    error = quantile_over_windows(values, 0.999)[1]
    assert error == pytest.approx(math.sqrt(drawn * (1 - drawn)), rel=0.1)


def test_columns_are_means_over_a_texts_windows() -> None:
    one, texts = divergence(), [[0, 2, 4], [1, 3, 5]]
    for place, windows in enumerate(texts):
        found = divergence_columns([one.stored(texts)], windows, place)
        assert tuple(found) == COLUMNS
        for name in ("kl", "agreement", "lost", "gained"):
            values = getattr(one, name)[windows].astype(float).reshape(3, -1).mean(axis=1)
            assert found[name] == pytest.approx(values.mean(), rel=1e-6)
            error = values.std(ddof=1) / math.sqrt(3)
            assert found[f"{name}_error"] == pytest.approx(error, rel=1e-5)
        assert found["kl_tail"] == pytest.approx(np.quantile(one.kl[windows], 0.999), rel=1e-6)
        assert found["kl_tail_error"] == quantile_over_windows(one.kl[windows], 0.999)[1]
    whole = one.columns()
    assert whole["kl"] == pytest.approx(one.kl.mean(), rel=1e-6)
    assert whole["kl_tail"] == pytest.approx(np.quantile(one.kl, 0.999), rel=1e-6)


def test_one_window_has_no_errors_also_when_read_from_json(tmp_path: Path) -> None:
    one = divergence(windows=1)
    store.write_json(tmp_path / "arm.json", one.stored([[0]]))
    found = divergence_columns([store.read_json(tmp_path / "arm.json")], [0])
    assert found["kl"] == pytest.approx(one.kl.mean(), rel=1e-6)
    assert all(math.isnan(found[name]) == name.endswith("_error") for name in COLUMNS)


def test_several_models_have_means_over_models() -> None:
    both = [divergence(0), divergence(1)]
    found = divergence_columns([one.stored([range(6)]) for one in both], range(6))
    lost = (both[0].lost + both[1].lost) / 2
    assert found["lost"] == pytest.approx(lost.mean())
    assert found["lost_error"] == pytest.approx(lost.std(ddof=1) / math.sqrt(6))
    tails = [one.columns() for one in both]
    for name in ("kl_tail", "kl_tail_error"):
        assert found[name] == pytest.approx(np.mean([one[name] for one in tails]))
    assert all(map(math.isnan, divergence_columns([both[0].stored([[0]]), None], [0]).values()))
    assert tuple(divergence_columns([None], [0])) == COLUMNS
