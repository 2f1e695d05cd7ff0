"""Labels: each number stands at its neuron, and what could not be measured is said."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import entangle
from entangle.model.layers import find_layers
from entangle.numerics import gaussian
from entangle.numerics.histograms import Histograms
from entangle.runs import dataset, labelling, store
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model

NEURON = "model.layers.0.mlp.up_proj:3"


@pytest.fixture
def histograms() -> Histograms:
    layers = find_layers(tiny_model("gpt2"))
    neurons = sum(layer.neurons for layer in layers)
    rows = torch.randn(500, neurons, generator=torch.Generator().manual_seed(1))
    return Histograms.from_rows(rows * torch.arange(1, neurons + 1) + 3)


def test_a_row_per_neuron_in_model_order(histograms: Histograms) -> None:
    layers = find_layers(tiny_model("gpt2"))
    tree = labelling.to_tree(histograms, layers, {"model": "tiny"})
    frame = tree.to_dataset().to_dataframe()
    expected = [(layer.name, i) for layer in layers for i in range(layer.neurons)]
    assert list(zip(frame["layer"], frame["index"], strict=True)) == expected
    assert frame["role"].iloc[0] == "attn.c_attn"
    assert frame["block"].iloc[-1] == 1
    assert frame["std"].tolist() == histograms.moments().std.tolist()
    weights = [layer.module.weight.T for layer in layers]  # Conv1D holds (inputs, neurons)
    norms = np.concatenate([np.linalg.norm(w.detach().numpy(), axis=1) for w in weights])  # type: ignore[operator]
    assert np.allclose(frame["weight_norm"], norms)
    assert tree.attrs == {"model": "tiny"}


def test_every_variable_says_what_it_is_and_its_unit(histograms: Histograms) -> None:
    tree = labelling.to_tree(histograms, find_layers(tiny_model("gpt2")), {})
    found_later = {name for name in dataset.UNITS if name.split("_")[0] == "difficulty"}
    found_later |= {"held_out_wasserstein", "held_out_difficulty", "distance_to_dense"}
    found_later |= {"wasserstein_within", "wasserstein_share", "improvement", "improvement_halves"}
    assert set(tree.data_vars) | found_later == set(dataset.UNITS)
    assert not found_later & set(tree.data_vars)
    for variable in tree.data_vars.values():
        assert variable.attrs["long_name"]
        assert variable.attrs["units"]


def test_the_tree_holds_the_whole_mergeable_state(histograms: Histograms) -> None:
    tree = labelling.to_tree(histograms, find_layers(tiny_model("gpt2")), {})
    again = labelling.from_tree(tree)
    for name, tensor in histograms.tensors().items():
        assert torch.equal(getattr(again, name), tensor), name
    twice = again.merged(histograms)
    assert (twice.count == 1000).all()
    with pytest.raises(ValueError, match="no histograms"):
        labelling.from_tree(xr.DataTree(tree.to_dataset()))


def test_the_summary_counts_what_has_no_distance() -> None:
    layers = find_layers(tiny_model("gpt2"))
    neurons = sum(layer.neurons for layer in layers)
    rows = torch.randn(400, neurons, generator=torch.Generator().manual_seed(1))
    rows[7, 0] = float("nan")
    rows[:, 1] = 5.0
    rows[300, 2] = 1e30
    pilot = rows[:100].clone()
    pilot[:, 4] *= 1e-3  # the pilot sees next to nothing of what follows
    histograms = Histograms.zeros(neurons)
    histograms.start(pilot)
    histograms.add(rows)
    attributes = {"model": "tiny", "skipped_parameters": ["a.experts", "b.experts"]}
    tree = labelling.to_tree(histograms, layers, attributes)
    summary = dataset.summary(tree)
    error = tree["wasserstein_error"].to_numpy()
    assert error[4] > dataset.TRUSTED_ERROR
    name = re.escape(layers[0].name)
    expected = [
        rf"2 .*NaN.* {name}:0, {name}:2",
        rf"1 dead.* {name}:1",
        rf"1 .*error bound.* 0\.1\b.* {name}:4",
        r"2 matrices.* a\.experts, b\.experts",
    ]
    for said, pattern in zip(summary["warnings"], expected, strict=True):
        assert re.fullmatch(pattern, said)
    assert dataset.trusted(tree).tolist() == [i > 2 and i != 4 for i in range(neurons)]
    ranked = tree["wasserstein"].to_numpy()[dataset.trusted(tree)]
    assert summary["largest"] == ranked.max()
    assert summary["median"] == np.median(ranked)
    assert summary["noise_floor"] == gaussian.noise_floor(400)


def test_nothing_measurable_is_said_too() -> None:
    layers = find_layers(tiny_model("gpt2"), ["*.0.attn.c_proj"])
    histograms = Histograms.from_rows(torch.ones(50, layers[0].neurons))
    summary = dataset.summary(labelling.to_tree(histograms, layers, {}))
    assert summary["largest_neuron"] == "none"
    assert np.isnan(summary["largest"])
    (said,) = summary["warnings"]
    names = ", ".join(f"{layers[0].name}:{i}" for i in range(3))
    assert re.fullmatch(rf"24 dead.* {re.escape(names)}, \.\.\.", said)


# --- neurons by name, and netCDF


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, xr.DataTree]:
    """A run as it was measured, opened, written by a version without names, and disentangled."""
    place, model = tmp_path_factory.mktemp("runs"), tiny_model("llama")
    layers, windows = ["*.up_proj", "*.0.mlp.down_proj"], random_windows(40)
    words: dict[str, Any] = {"layers": layers, "out": place / "run"}
    measured = entangle.measure(model, windows, difficulty=20, **words)
    about = store.read_json(place / "run" / "run.json")
    held = measured.children["histogram"].to_dataset(inherit=False)
    older = xr.DataTree.from_dict(
        {
            "/": measured.to_dataset().drop_vars(["neuron", "side"]),
            "/histogram": held.rename(tail="side"),  # as the dimension was called
        }
    )
    store.write_run(place, [older], about, dict)
    for name in ("neuron", "side"):
        assert (place / "run" / "neurons.zarr" / name).is_dir()
        assert not (place / "neurons.zarr" / name).exists()
    texts = random_windows(40, seed=1), random_windows(30, seed=2)
    found = entangle.disentangle(model, *texts, run=measured, experts=[2], neurons=[NEURON])
    return {
        "measured": measured,
        "opened": entangle.open_run(place / "run"),
        "older": entangle.open_run(place),
        "disentangled": found,
    }


@pytest.mark.parametrize("name", ["measured", "opened", "older", "disentangled"])
def test_a_neuron_is_found_by_its_name(name: str, runs: dict[str, xr.DataTree]) -> None:
    data = runs[name].to_dataset()
    row = data.sel(neuron=NEURON)
    layer, _, index = NEURON.rpartition(":")
    assert (str(row["layer"].item()), int(row["index"])) == (layer, int(index))
    (place,) = np.flatnonzero((data["layer"] == layer) & (data["index"] == int(index)))
    assert row.drop_vars("neuron").equals(data.isel(neuron=place).drop_vars("neuron"))
    weight: Any = tiny_model("llama").get_submodule(layer).weight
    norm = np.linalg.norm(weight[int(index)].detach().numpy())
    assert float(row["weight_norm"]) == pytest.approx(norm, rel=1e-6)
    both = data.sel(neuron=[NEURON, f"{layer}:0"])  # in the order that is asked for
    assert both["index"].to_numpy().tolist() == [3, 0]
    assert data["neuron"].to_numpy().tolist() == [
        f"{a}:{b}" for a, b in zip(data["layer"].to_numpy(), data["index"].to_numpy(), strict=True)
    ]


@pytest.mark.parametrize("name", ["measured", "opened", "older"])
def test_a_histogram_is_found_by_its_neurons_name(name: str, runs: dict[str, xr.DataTree]) -> None:
    row = runs[name]["histogram"].to_dataset().sel(neuron=NEURON)
    data = runs["measured"].to_dataset()
    names = data["neuron"].to_numpy().tolist()
    state = runs["measured"].children["histogram"].to_dataset(inherit=False)
    held = state.isel(neuron=names.index(NEURON))
    assert row.drop_vars("neuron").equals(held)
    inside, tails = row["counts"].to_numpy(), row["tail_count"].to_numpy()
    assert inside.sum() + tails.sum() == 640 == data.sel(neuron=NEURON)["count"]


def test_an_older_run_is_the_run_once_it_is_opened(runs: dict[str, xr.DataTree]) -> None:
    assert runs["older"].identical(runs["opened"].drop_nodes("text"))
    assert (runs["older"]["side"] == "output").all()
    assert runs["opened"].identical(runs["measured"])


@pytest.mark.parametrize("kind", ["measured", "opened", "older", "disentangled"])
def test_a_run_may_be_kept_as_netcdf(
    kind: str, runs: dict[str, xr.DataTree], tmp_path: Path
) -> None:
    run = runs[kind]
    run.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "run.nc", engine="h5netcdf") as opened:
        again = opened.load()
    xr.testing.assert_equal(again, run)
    assert [node.path for node in again.subtree] == [node.path for node in run.subtree]
    for node, other in zip(again.subtree, run.subtree, strict=True):
        for name, variable in other.to_dataset(inherit=False).variables.items():
            held = node[str(name)]
            if variable.dtype.kind not in {"U", "T"}:  # texts may come as objects
                assert held.dtype == variable.dtype
            assert held.attrs == variable.attrs
    assert again.attrs.keys() == run.attrs.keys()
    for key, value in run.attrs.items():  # of one item netCDF makes the item
        np.testing.assert_array_equal(np.atleast_1d(again.attrs[key]), np.atleast_1d(value))
    assert dataset.disentangled(again) == dataset.disentangled(run)
    assert bool(dataset.disentangled(again)) == (kind == "disentangled")
    expected = run.to_dataset().sel(neuron=NEURON)
    xr.testing.assert_equal(again.to_dataset().sel(neuron=NEURON), expected)


def test_attributes_are_flat_and_what_is_none_is_left_out() -> None:
    about: dict[str, Any] = {"a": None, "b": {"é": [1, None]}, "c": [], "d": 0, "e": "text"}
    flat = dataset.attributes_of(about)
    assert flat == {"b": '{"é": [1, null]}', "c": [], "d": 0, "e": "text"}
    assert dataset.attributes_of(flat) == flat
    data = xr.Dataset(attrs=dataset.attributes_of({"disentangled": about}))
    assert dataset.disentangled(data) == dataset.disentangled(xr.DataTree(data)) == about
    assert dataset.disentangled(xr.Dataset(attrs={"disentangled": about})) == about  # an older run
    assert dataset.disentangled(xr.Dataset(attrs=flat)) == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.mlp.up_proj:37", r"0\.mlp\.up_proj .*\b37 neurons.*\b0 to 36\b"),
        ("model.layers.0.mlp.up_proj:-1", r"0\.mlp\.up_proj .*\b37 neurons.*\b0 to 36\b"),
        ("model.layers.0.mlp.up_proj:03", r"0\.mlp\.up_proj .*\b37 neurons.*\b0 to 36\b"),
        ("model.layers.0.mlp.up_prj:3", r"LAYER:INDEX.* model\.layers\.0\.mlp\.up_proj:0\b"),
        ("model.layers.0.mlp.up_proj", r"LAYER:INDEX.* model\.layers\.0\.mlp\.up_proj:0\b"),
        ("", r"LAYER:INDEX.* model\.layers\."),
    ],
)
def test_a_neuron_that_is_none_is_told(
    name: str, message: str, runs: dict[str, xr.DataTree]
) -> None:
    data = runs["measured"].to_dataset()
    dataset.check_neuron(data, NEURON)
    with pytest.raises(LookupError, match=f"no neuron '{name}'.*{message}"):
        dataset.check_neuron(data, name)


def test_values_are_those_of_the_neurons_asked_for_in_their_order(
    runs: dict[str, xr.DataTree],
) -> None:
    layer = NEURON.rpartition(":")[0]
    data = runs["measured"].to_dataset()
    here = data["std"].to_numpy()[data["layer"].to_numpy() == layer]
    assert dataset.values_of(data, "std", layer, [5, 0, 36]).tolist() == here[[5, 0, 36]].tolist()
    with pytest.raises(LookupError, match=rf"\b2 of .*\b3 neurons.* {layer}\b"):
        dataset.values_of(data, "std", layer, [5, 37, 0])
    with pytest.raises(LookupError, match=r"no beauty\b"):
        dataset.values_of(data, "beauty", layer, [5])
