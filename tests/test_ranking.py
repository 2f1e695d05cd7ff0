"""Order: checked against pandas on the whole frame."""

import numpy as np
import pytest
import xarray as xr

import entangle


@pytest.fixture
def run() -> xr.Dataset:
    distance = [0.1, 0.5, np.nan, 0.5, 0.3, 0.9, 0.2, 0.4]
    error = [0.01, 0.01, np.nan, 0.01, 0.01, 0.2, 0.01, 0.01]
    values = np.arange(8.0)
    variables = dict.fromkeys(("mean", "std", "skewness", "kurtosis", "modes"), values)
    variables |= {"wasserstein": np.array(distance), "wasserstein_error": np.array(error)}
    return xr.Dataset(
        {name: ("neuron", value) for name, value in variables.items()},
        coords={
            "layer": ("neuron", ["h.0.up"] * 4 + ["h.0.down"] * 4),
            "block": ("neuron", [0] * 8),
            "role": ("neuron", ["up"] * 4 + ["down"] * 4),
            "index": ("neuron", [0, 1, 2, 3] * 2),
        },
    )


def test_the_most_entangled_come_first_and_ties_keep_the_order_of_the_model(
    run: xr.Dataset,
) -> None:
    table = entangle.top_neurons(run, 4)
    assert table["neuron"].tolist() == ["h.0.up:1", "h.0.up:3", "h.0.down:3", "h.0.down:0"]
    assert table["wasserstein"].tolist() == [0.5, 0.5, 0.4, 0.3]
    # Over the medians of those that can be ranked: of 0.1, 0.5, 0.5 and of 0.3, 0.2, 0.4.
    assert table["layer_ratio"].tolist() == pytest.approx([1, 1, 0.4 / 0.3, 1])


def test_neurons_without_a_trusted_distance_are_left_out(run: xr.Dataset) -> None:
    names = entangle.top_neurons(run, 100)["neuron"].tolist()
    assert len(names) == 6
    assert not {"h.0.up:2", "h.0.down:1"} & set(names)
    assert entangle.top_neurons(run, 0).empty


def test_by_another_variable_of_some_layers(run: xr.Dataset) -> None:
    table = entangle.top_neurons(run, 2, by="mean", layers="*.up")
    assert table["neuron"].tolist() == ["h.0.up:3", "h.0.up:1"]
    assert list(table.columns[:3]) == ["neuron", "mean", "layer_ratio"]


def test_unknown_names_are_refused(run: xr.Dataset) -> None:
    with pytest.raises(LookupError, match=r"'beauty'.*wasserstein"):
        entangle.top_neurons(run, by="beauty")
    with pytest.raises(LookupError, match=r"no layer of this run matches '\*.x'"):
        entangle.top_neurons(run, layers=["*.x"])
    with pytest.raises(LookupError, match="'layer'"):
        entangle.top_neurons(run, by="layer")
