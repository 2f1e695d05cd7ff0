"""Shapes of an older run, which lacks them, are those that measuring it today stores."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import entangle
from entangle.runs import shapes, store
from entangle.runs.dataset import kinds_of, summary, trusted
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of today, and the same run as an older version wrote it."""
    folder = tmp_path_factory.mktemp("runs")
    today, older = folder / "today", folder / "older"
    entangle.measure(tiny_model("llama"), random_windows(20), layers=[LAYER], out=today)
    tree = store.open_run(today)
    data = tree.to_dataset().drop_vars(shapes.SHAPES).load()
    held = tree.children["histogram"].to_dataset(inherit=False).load()
    both = xr.DataTree.from_dict({"/": data, "/histogram": held})
    log = store.read_json(today / "log.json")
    store.write_run(older, [both], store.read_json(today / "run.json"), lambda: log)
    return today, older


def test_an_older_run_has_the_shapes_that_a_run_of_today_stores(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return computed(*arguments)  # type: ignore[arg-type]

    computed = shapes.shapes_of
    monkeypatch.setattr(shapes, "shapes_of", counted)
    monkeypatch.setattr(shapes, "_ROWS", 10)
    today, older = (store.open_run(run) for run in runs)
    assert not calls  # only when they are read
    for name in shapes.SHAPES:
        np.testing.assert_array_equal(older[name], today[name])
        assert older[name].attrs == today[name].attrs
    assert len(calls) == 4  # of 37 neurons, once for all variables
    some = older.to_dataset().isel(neuron=[3, 30, 7])
    np.testing.assert_array_equal(some["bimodality"], today["bimodality"].to_numpy()[[3, 30, 7]])
    assert entangle.rank(older, 5).equals(entangle.rank(today, 5))
    assert len(calls) == 4


def test_kinds_are_told_by_half_the_distance_where_the_bulks_is_known() -> None:
    values = {
        "wasserstein": [0.8, 0.8, 0.8, np.nan, 0.8, 0.8, 0.8, 0.8, 0.8],
        "wasserstein_error": [0.01] * 9,
        "wasserstein_bulk": [0.39, 0.41, 0.39, 0.3, np.nan, 0.1, 0.6, 0.6, 0.4],
        "wasserstein_bulk_error": [0.02, 0.02, 0.11, 0.01, np.nan, 0.2, 0.15, 0.01, 1],
        "far_variance": [0.4, 0.5, 0.0, 0.9, 0.0, 0.0, 0.0, 0.51, 0.9],
    }
    data = xr.Dataset({name: ("neuron", np.array(one)) for name, one in values.items()})
    data = data.assign_coords(neuron=[f"a:{i}" for i in range(9)], side=("neuron", ["output"] * 9))
    assert kinds_of(data).tolist() == [
        "outliers",
        "shape",
        *[""] * 3,
        "outliers",
        "shape",
        *["outliers"] * 2,
    ]
    assert trusted(data, "wasserstein_bulk").tolist() == [True, True, False, True] + [False] * 3 + [
        True,
        False,
    ]
    assert trusted(data, "kurtosis").tolist() == [True] * 3 + [False] + [True] * 5


def test_the_summary_has_the_bulks_beside_the_distances(runs: tuple[Path, Path]) -> None:
    run = store.open_run(runs[1])
    bulk = summary(run)["bulk"]
    values = run["wasserstein_bulk"].to_numpy()
    assert bulk["median"] == pytest.approx(np.median(values))
    assert bulk["largest"] == values.max()
    assert bulk["largest_neuron"] == f"{LAYER}:{values.argmax()}"
    assert bulk["unknown"] == 0
