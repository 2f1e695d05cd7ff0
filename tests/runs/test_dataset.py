"""Labels: each number stands at its neuron, and what could not be measured is said."""

import numpy as np
import pytest
import torch
import xarray as xr

from entangle.model.layers import find_layers
from entangle.numerics import gaussian
from entangle.numerics.histograms import Histograms
from entangle.runs import dataset, labelling
from tests.tiny_models import tiny_model


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
    name = layers[0].name
    assert summary["warnings"] == [
        f"2 with outputs that are NaN, infinite or beyond all bounds, so without a distance: "
        f"{name}:0, {name}:2",
        f"1 dead (constant), so without a distance: {name}:1",
        f"1 with an error bound above 0.1, so not ranked: {name}:4",
        "2 matrices in the blocks are no linear layers and were not measured: a.experts, b.experts",
    ]
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
    assert summary["warnings"] == [
        "24 dead (constant), so without a distance: "
        + ", ".join(f"{layers[0].name}:{i}" for i in range(3))
        + ", ..."
    ]
