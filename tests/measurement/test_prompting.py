"""Values on a text of one's own are the model's, and their places those of all outputs."""

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.measurement.measuring import measure
from entangle.measurement.prompting import values_on
from tests.measurement.test_context_search import drawn_windows
from tests.tiny_mixtures import tiny_mixture, without_tokens
from tests.tiny_models import CONTEXT, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer(adds_bos=True)
DOWN = "model.layers.1.mlp.down_proj"
NEURONS = ["model.layers.0.mlp.up_proj:3", f"{DOWN}:7", f"{DOWN}:input:36"]
TEXT = "The naïve fox — 猫!\n"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def run(model: PreTrainedModel) -> xr.DataTree:
    return measure(model, drawn_windows(20), input_layers=[DOWN])


def heard(model: PreTrainedModel, tokens: Any) -> dict[str, Any]:
    """Return the neurons' values on tokens (windows, length), by plain hooks."""
    values: dict[str, Any] = {}
    layers: Any = model.get_submodule("model.layers")
    hooks = [
        layers[0].mlp.up_proj.register_forward_hook(
            lambda *a: values.update({NEURONS[0]: a[2][..., 3]})
        ),
        layers[1].mlp.down_proj.register_forward_hook(
            lambda *a: values.update({NEURONS[1]: a[2][..., 7]})
        ),
        layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda *a: values.update({NEURONS[2]: a[1][0][..., 36]})
        ),
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return {name: one.numpy() for name, one in values.items()}


def test_values_are_the_models_own_and_places_those_of_the_run(
    model: PreTrainedModel, run: xr.DataTree
) -> None:
    tokens = TOKENIZER(TEXT)["input_ids"]
    assert tokens[0] == 1  # the text begins as the run's windows do
    own, all_values = heard(model, torch.tensor([tokens])), heard(model, drawn_windows(20).tokens)
    found = values_on(model, TEXT, run=run, neurons=NEURONS, tokenizer=TOKENIZER)
    assert [one.neuron for one in found] == NEURONS
    assert [one.side for one in found] == ["output", "output", "input"]
    for one in found:
        assert "".join(one.tokens) == "<s>" + TEXT
        assert one.values == pytest.approx(own[one.neuron][0], rel=1e-4, abs=1e-5)
        ordered = np.sort(all_values[one.neuron].ravel())
        places = np.searchsorted(ordered, one.values) / len(ordered)
        assert (np.abs(one.quantiles - places) <= one.errors + 2e-3).all()
        assert np.ptp(one.quantiles) > 0.3
        far = np.abs(ordered - np.median(ordered))
        shades = ((one.values - np.median(ordered)) / np.quantile(far, 0.99)).clip(-1, 1)
        assert one.shades == pytest.approx(shades, abs=0.05)
        table = one.table
        assert table[one.side].tolist() == one.values.tolist()
        assert table["token"].tolist() == one.tokens


@pytest.mark.parametrize(
    ("text", "neuron", "message"),
    [
        ("", NEURONS[0], "no tokens"),
        ("long " * CONTEXT, NEURONS[0], f"context of {CONTEXT}"),
        ("text", f"{DOWN}:99", "24 neurons"),
    ],
)
def test_what_cannot_be_is_refused(
    model: PreTrainedModel, run: xr.DataTree, text: str, neuron: str, message: str
) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        values_on(model, text, run=run, neurons=neuron, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="other weights"):
        values_on(tiny_model(seed=1), "a", run=run, neurons=NEURONS[0], tokenizer=TOKENIZER)


def test_tokens_that_the_run_left_out_have_no_place(model: PreTrainedModel) -> None:
    run = measure(model, drawn_windows(8), layers=[DOWN], skip_first=2)
    (found,) = values_on(model, TEXT, run=run, neurons=NEURONS[1], tokenizer=TOKENIZER)
    for told in (found.quantiles, found.errors, found.shades):
        assert np.isnan(told[:2]).all()
        assert np.isfinite(told[2:]).all()
    assert np.isfinite(found.values).all()


def test_a_trained_expert_has_no_value_at_tokens_of_others() -> None:
    mixture = tiny_mixture()
    run = measure(mixture, drawn_windows(8), layers=["*.experts.*"])
    name = "model.layers.1.mlp.experts.0.down_proj:3"
    (found,) = values_on(mixture, TEXT, run=run, neurons=name, tokenizer=TOKENIZER)
    away = np.isnan(found.values)
    assert away.any()
    assert not away.all()
    np.testing.assert_array_equal(np.isnan(found.quantiles), away)
    np.testing.assert_array_equal(np.isnan(found.errors), away)
    without_tokens(mixture, 0)
    empty = measure(mixture, drawn_windows(8), layers=["*.experts.*"])
    with pytest.raises(ValueError, match="no token was sent"):
        values_on(mixture, TEXT, run=empty, neurons=name, tokenizer=TOKENIZER)
