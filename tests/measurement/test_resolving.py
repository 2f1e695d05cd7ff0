"""Second histograms of bulks that outliers have squeezed into a few bins."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import PreTrainedModel

import entangle
from entangle.measurement import resolving
from entangle.measurement.resolving import unresolved
from entangle.model.text import TokenWindows
from entangle.runs import store
from entangle.runs.shapes import distribution_of
from tests.distributions import Array, bulk_of
from tests.numerics.test_bulk import exact
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model

LAYER = "model.layers.1.mlp.up_proj"
WILD = [2, 5, 30]  # their outputs at the first token of a window are huge


class Case:
    """A model whose neurons have outliers, a run of it, and the raw outputs (tokens, neurons)."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = tiny_model("llama")
        self.windows: TokenWindows = random_windows(40, 40)
        self.run = folder / "run"
        module = self.model.get_submodule(LAYER)
        heard: list[torch.Tensor] = []

        def outliers(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[0, 0, WILD] = torch.tensor([1e4, -1e7, 1e3])
            heard.append(output.flatten(0, 1))
            return output

        self.handle = module.register_forward_hook(outliers)
        layers = ["model.layers.0.mlp.up_proj", LAYER]
        options: dict[str, Any] = {"layers": layers, "input_layers": LAYER}
        self.tree = entangle.measure(self.model, self.windows, out=self.run, **options)
        batches = self.windows.tokens.split(4)
        heard.clear()
        with torch.inference_mode():
            for batch in batches:
                self.model.model(input_ids=batch)
        self.rows: Array = torch.cat(heard).numpy()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    made = Case(tmp_path_factory.mktemp("resolving"))
    yield made
    made.handle.remove()


def bulks(tree: xr.DataTree) -> tuple[Array, Array]:
    data = tree.to_dataset()
    rows = data["layer"].to_numpy() == LAYER
    return (
        data["wasserstein_bulk"].to_numpy()[rows],
        data["wasserstein_bulk_error"].to_numpy()[rows],
    )


def test_bulks_in_few_bins_get_bins_of_their_own(case: Case, tmp_path: Path) -> None:
    run = shutil.copytree(case.run, tmp_path / "run")
    before, error = bulks(store.open_run(run))
    assert (error[WILD] > 0.1).all()
    others = np.setdiff1d(np.arange(37), WILD)
    assert (error[others] < 0.1).all()
    names = store.open_run(run).to_dataset()["neuron"].to_numpy()
    assert names[unresolved(store.open_run(run))].tolist() == [f"{LAYER}:{i}" for i in WILD]

    tree = entangle.resolve(case.model, case.windows, run=run)
    after, finer = bulks(tree)
    assert (finer[WILD] < 2 * error[others].max()).all()
    for i in range(37):
        truth = exact(case.rows[:, i])
        assert abs(after[i] - truth) <= finer[i] + 2e-4
    np.testing.assert_array_equal(after[others], before[others])
    # All else is as it was, and so is what another process opens.
    again = store.open_run(run)
    np.testing.assert_array_equal(bulks(again)[0], after)
    for name in ("wasserstein", "far_variance", "count", "std"):
        np.testing.assert_array_equal(again[name], case.tree[name])
    assert not len(unresolved(again))
    assert again["resolved"].sizes["resolved"] == len(WILD)
    third = entangle.resolve(case.model, case.windows, run=run).children["resolved"]
    assert third.equals(again.children["resolved"])  # nothing is left to do


def test_pictures_have_the_second_histogram(case: Case, tmp_path: Path) -> None:
    run = shutil.copytree(case.run, tmp_path / "run")
    tree = entangle.resolve(case.model, case.windows, run=run)
    for i in WILD:
        (ax,) = entangle.plots.neuron(tree, f"{LAYER}:{i}").axes
        bulk = bulk_of(case.rows[:, i])
        low, high = ax.get_xlim()
        assert low == pytest.approx(bulk[0] - 0.3 * np.ptp(bulk), abs=0.2 * np.ptp(bulk))
        assert high == pytest.approx(bulk[-1] + 0.3 * np.ptp(bulk), abs=0.2 * np.ptp(bulk))


def test_a_quantile_is_of_the_second_histogram(case: Case, tmp_path: Path) -> None:
    run = shutil.copytree(case.run, tmp_path / "run")
    tree = entangle.resolve(case.model, case.windows, run=run)
    for i in WILD:
        found = distribution_of(tree, f"{LAYER}:{i}")
        truth, spread = np.quantile(case.rows[:, i], 0.25), np.ptp(bulk_of(case.rows[:, i]))
        assert np.interp(0.25, found.below, found.knots) == pytest.approx(truth, abs=0.02 * spread)
        assert found.knots[0] <= case.rows[:, i].min()
        assert found.knots[-1] >= case.rows[:, i].max()


def test_another_model_or_other_windows_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="other windows"):
        entangle.resolve(case.model, random_windows(8), run=case.run)
    other = tiny_model("llama")
    with torch.no_grad():
        other.get_submodule(LAYER).weight.mul_(2)  # type: ignore[operator]
    with pytest.raises(ValueError, match="other weights"):
        entangle.resolve(other, case.windows, run=case.run)
    assert not (case.run / "resolved.npz").exists()


def test_a_file_that_is_damaged_or_of_another_run_is_refused(case: Case, tmp_path: Path) -> None:
    run = shutil.copytree(case.run, tmp_path / "run")
    entangle.resolve(case.model, case.windows, run=run)
    file = run / "resolved.npz"
    whole = file.read_bytes()
    for content in (b"", whole[:200], whole[:-100]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"resolved\.npz.*delete it"):
            store.open_run(run)
    other = tmp_path / "other"
    options: dict[str, Any] = {"layers": [LAYER], "out": other}
    entangle.measure(case.model, random_windows(8), **options)
    (other / "resolved.npz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"resolved\.npz is of another run"):
        store.open_run(other)


def test_a_bulk_of_one_value_stays_without_a_distance_and_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bins are fine enough for it, and the passes end: those of later calls too."""
    model = tiny_model("llama")

    def constant(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., 4] = 0.5
        output[0, 0, 4] = 100.0
        return output

    handle = model.get_submodule(LAYER).register_forward_hook(constant)
    entangle.measure(model, random_windows(20, 40), layers=[LAYER], out=tmp_path / "run")
    tree = entangle.resolve(model, random_windows(20, 40), run=tmp_path / "run")
    assert tree["wasserstein_bulk_error"].to_numpy()[4] > 0.5
    assert (np.delete(tree["wasserstein_bulk_error"].to_numpy(), 4) < 0.1).all()
    assert resolving.unresolvable(tree) == [f"{LAYER}:4"]
    monkeypatch.setattr(resolving, "_counted", None)  # a pass would fail
    again = entangle.resolve(model, random_windows(20, 40), run=tmp_path / "run")
    handle.remove()
    assert again.children["resolved"].equals(tree.children["resolved"])
