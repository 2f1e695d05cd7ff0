"""A run's distances are compared with those of raw outputs, and one that is wrong is found."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import integrate

import entangle
from entangle.measurement import checking
from entangle.measurement.checking import bulk_of, by_pot, by_scipy, spread_neurons
from entangle.numerics.kernels.bulk_cpu import LIMIT
from tests import distributions
from tests.distributions import DISTRIBUTIONS, Distribution, integrated
from tests.measurement.test_context_search import Case, drawn_windows, measured
from tests.measurement.test_mixtures import UNUSED, rows_of, windows_of
from tests.measurement.test_resolving import LAYER, WILD
from tests.measurement.test_resolving import Case as OutlierCase
from tests.numerics.test_bulk import exact as exact_bulk
from tests.numerics.test_gaussian import standardised
from tests.tiny_mixtures import tiny_mixture, without_tokens
from tests.tiny_models import tiny_model

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", params=[("llama", 0), ("gpt2", 3)], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    name, skip_first = request.param
    return measured(tiny_model(name), drawn_windows(), skip_first)


def check(case: Case, run: xr.DataTree | xr.Dataset, neurons: Any = None) -> pd.DataFrame:
    return entangle.check(case.model, case.windows, run=run, neurons=neurons)


# --- the ways


@pytest.mark.parametrize("law", DISTRIBUTIONS, ids=str)
def test_each_way_finds_the_distance_of_a_law(law: Distribution) -> None:
    values = np.append(law.quantiles(600), 40.0)  # with an outlier
    z = standardised(values)
    steps = np.arange(len(z) + 1) / len(z)
    truth = integrated(np.repeat(z, 2), np.repeat(steps, 2)[1:-1])
    assert by_scipy(values, None) == pytest.approx(truth, abs=1e-6)
    assert by_pot(values, None) == pytest.approx(truth, abs=1e-6 + checking.mass_error(None))
    truth = exact_bulk(values)
    assert by_scipy(bulk_of(values), LIMIT) == pytest.approx(truth, abs=2e-4)
    assert by_pot(bulk_of(values), LIMIT) == pytest.approx(truth, abs=2e-4)


def test_a_bulk_is_all_but_the_farthest_hundredth() -> None:
    values = np.random.default_rng(0).gamma(2, size=1000).round(1)
    np.testing.assert_array_equal(np.sort(bulk_of(values)), distributions.bulk_of(values))


def test_constant_outputs_have_no_distance() -> None:
    for limit in (None, LIMIT):
        assert np.isnan(by_scipy(np.ones(9), limit))
        assert np.isnan(by_pot(np.ones(9), limit))


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_the_error_of_the_masses_is_their_distance_to_the_law(
    monkeypatch: pytest.MonkeyPatch, limit: float | None
) -> None:
    monkeypatch.setattr(checking, "MASSES", 4)
    law, masses = checking.law_of(limit), checking.masses.__wrapped__(limit)
    monkeypatch.setattr(checking, "masses", lambda _: masses)

    def apart(u: float) -> float:
        return abs(float(law.ppf(u)) - float(masses[int(4 * u)]))

    truth, _ = integrate.quad(apart, 0, 1, points=np.arange(1, 8) / 8, limit=500)
    assert checking.mass_error.__wrapped__(limit) == pytest.approx(truth / law.std(), abs=1e-6)


# --- of a run


def test_a_runs_distances_are_within_their_bounds_of_those_of_the_raw_outputs(case: Case) -> None:
    table = check(case, case.run)
    assert table["agrees"].all()
    assert len(table) == 15
    data = case.run.to_dataset().sel(neuron=table["neuron"].to_list())
    for name in ("wasserstein", "wasserstein_error", "wasserstein_bulk", "wasserstein_bulk_error"):
        np.testing.assert_array_equal(table[name], data[name])
    assert (table["tokens"] == case.outputs.shape[0]).all()
    for row in table.iloc[::4].to_dict(orient="records"):
        outputs = case.column(row["neuron"]).ravel()
        z = standardised(outputs)
        steps = np.arange(len(z) + 1) / len(z)
        truth = integrated(np.repeat(z, 2), np.repeat(steps, 2)[1:-1])
        assert [row[name] for name in ("exact", "scipy", "pot")] == pytest.approx(
            [truth] * 3, abs=2e-5
        )
        assert row["bulk_scipy"] == pytest.approx(exact_bulk(outputs), abs=2e-4)
        assert row["bulk_pot"] == pytest.approx(row["bulk_scipy"], abs=1e-5)


@pytest.mark.parametrize("variable", ["wasserstein", "wasserstein_bulk"])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_stored_distance_outside_its_bound_is_found(case: Case, variable: str, side: int) -> None:
    names = spread_neurons(case.run)[:3]
    (honest,) = check(case, case.run, names[1]).to_dict(orient="records")
    truth = honest["exact" if variable == "wasserstein" else "bulk_scipy"]
    for times, agrees in ((0.9, True), (1.1, False)):
        data = case.run.to_dataset().load().copy(deep=True)
        row = data["neuron"].to_numpy().tolist().index(names[1])
        data[variable][row] = truth + side * times * honest[f"{variable}_error"]
        assert check(case, data, names)["agrees"].tolist() == [True, agrees, True]


@pytest.mark.parametrize("way", ["by_pot", "by_scipy"])
def test_ways_that_do_not_agree_are_found_within_the_bound(
    case: Case, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    found = getattr(checking, way)
    monkeypatch.setattr(checking, way, lambda x, limit: found(x, limit) + 1e-4 * (limit is None))
    (row,) = check(case, case.run, spread_neurons(case.run)[1]).to_dict(orient="records")
    assert row["wasserstein_error"] > 1e-3
    assert not row["agrees"]


def test_neurons_of_trained_experts_and_inputs_are_checked_on_their_tokens() -> None:
    model, windows = tiny_mixture(), windows_of()
    without_tokens(model, UNUSED)
    run = entangle.measure(model, windows, layers="*.experts.*", input_layers="*.3.down_proj")
    expert = "model.layers.1.mlp.experts.3.down_proj"
    table = entangle.check(model, windows, run=run, neurons=[f"{expert}:5", f"{expert}:input:7"])
    assert table["agrees"].all()
    rows = rows_of(model)[expert]
    assert (table["tokens"] == len(rows)).all()
    assert len(rows) < windows.tokens.numel()
    assert entangle.check(model, windows, run=run)["agrees"].all()
    neuron = f"model.layers.0.mlp.experts.{UNUSED}.down_proj:0"
    with pytest.raises(ValueError, match=f"experts.{UNUSED}.*no distance.*without tokens"):
        entangle.check(model, windows, run=run, neurons=neuron)


def test_second_histograms_are_checked(tmp_path_factory: pytest.TempPathFactory) -> None:
    case = OutlierCase(tmp_path_factory.mktemp("checking"))
    names = [f"{LAYER}:{index}" for index in WILD]
    wide = entangle.check(case.model, case.windows, run=case.tree, neurons=names)
    fine = entangle.resolve(case.model, case.windows, run=case.run)
    table = entangle.check(case.model, case.windows, run=fine, neurons=names)
    case.handle.remove()
    assert wide["agrees"].all()
    assert table["agrees"].all()
    assert (table["wasserstein_bulk_error"] < 0.1 * wide["wasserstein_bulk_error"]).all()
    assert table["bulk_scipy"].to_list() == wide["bulk_scipy"].to_list()


def test_the_neurons_are_of_layers_that_are_spread(case: Case) -> None:
    data = case.run.to_dataset()
    layers = list(dict.fromkeys(data["layer"].to_numpy().tolist()))
    names = spread_neurons(case.run)
    spread = list(dict.fromkeys(name.rpartition(":")[0] for name in names))
    assert [layers.index(layer) for layer in spread] == [
        round(part * (len(layers) - 1) / 4) for part in range(5)
    ]
    for layer, most, middle, least in zip(
        spread, names[::3], names[1::3], names[2::3], strict=True
    ):
        distance = data["wasserstein"].to_numpy()[data["layer"] == layer]
        chosen = data["wasserstein"].sel(neuron=[most, middle, least]).to_numpy()
        np.testing.assert_array_equal(
            chosen, [distance.max(), np.sort(distance)[len(distance) // 2], distance.min()]
        )
    assert len(spread_neurons(case.run, layers=layers[:2])) == 6
    assert len(spread_neurons(case.run, exclude=layers[1:])) == 3
    nothing = data.assign(wasserstein_error=data["wasserstein_error"] + 1)
    with pytest.raises(LookupError, match="no neuron"):
        spread_neurons(nothing)


# --- refusals


def refused(case: Case, message: str, neurons: Sequence[str], **changes: Any) -> None:
    options: dict[str, Any] = {"model": case.model, "windows": case.windows, "run": case.run}
    with pytest.raises((ValueError, LookupError), match=message):
        entangle.check(neurons=neurons, **options | changes)


def test_what_was_not_measured_is_refused() -> None:
    model = tiny_model("llama")
    layer: Any = model.get_submodule(DOWN)
    with torch.no_grad():
        layer.weight[3], layer.bias[3] = 0, 7  # dead
    case = measured(model, drawn_windows(5), 0)
    neurons = [f"{DOWN}:5"]
    refused(case, "other windows", neurons, windows=drawn_windows(4))
    refused(case, "other weights", neurons, model=tiny_model("llama", seed=1))
    refused(case, r"down_proj:3 has no distance, as it is dead", [*neurons, f"{DOWN}:3"])
    refused(case, r"no neuron '.*:99'", [f"{DOWN}:99"])
    shard = entangle.measure(model, case.windows, shard="1/2")
    refused(case, "entangle merge", neurons, run=shard)
