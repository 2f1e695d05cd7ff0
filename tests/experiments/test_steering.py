"""What a steered neuron does to predictions is a plain comparison of two models' probabilities."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.experiments.steering import Steering, steer, steered
from entangle.measurement.measuring import measure
from entangle.model.generating import generate
from entangle.model.scoring import perplexity
from entangle.model.text import TokenWindows
from tests.measurement.test_context_search import drawn_windows
from tests.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LAYER = "model.layers.1.mlp.up_proj"
NEURON = f"{LAYER}:9"
SKIP = 3


@dataclasses.dataclass(frozen=True)
class Case:
    model: PreTrainedModel
    windows: TokenWindows
    run: xr.DataTree
    outputs: np.ndarray[Any, Any]  # (tokens,) of NEURON

    def steered(self, settings: str | list[str], **options: Any) -> Steering:
        return steered(
            self.model,
            self.windows,
            run=self.run,
            neuron=NEURON,
            settings=settings,
            tokenizer=TOKENIZER,
            **options,
        )

    def logits(self, value: float | None) -> torch.Tensor:
        """Return the logits of all windows, with the neuron's output edited by hand."""

        def edit(_: Any, __: Any, outputs: torch.Tensor) -> torch.Tensor:
            outputs = outputs.clone()
            outputs[..., 9] = value if value is not None else outputs[..., 9]
            return outputs

        handle = self.model.get_submodule(LAYER).register_forward_hook(edit)
        with torch.inference_mode():
            logits: torch.Tensor = self.model(self.windows.tokens).logits
        handle.remove()
        return logits


@pytest.fixture(scope="module")
def case() -> Case:
    model, windows = tiny_model("llama"), drawn_windows(6, 20)
    run = measure(model, windows, layers="*.up_proj")
    heard: list[torch.Tensor] = []
    handle = model.get_submodule(LAYER).register_forward_hook(lambda *x: heard.append(x[2]))
    with torch.inference_mode():
        model(windows.tokens)
    handle.remove()
    return Case(model, windows, run, heard[0][..., 9].flatten().numpy())


@pytest.mark.parametrize("skip_first", [0, SKIP])
def test_the_divergence_and_the_moved_tokens_are_plain_sums(case: Case, skip_first: int) -> None:
    found = case.steered("zero", batch_size=4, skip_first=skip_first)
    first = max(skip_first, 1)
    dense, other = (
        case.logits(value).double()[:, first - 1 : -1].log_softmax(-1) for value in (None, 0.0)
    )
    kl = (dense.exp() * (dense - other)).sum(-1)  # (windows, tokens)
    (one,) = found.settings
    assert found.tokens == kl.numel()
    assert one.divergence.kl == pytest.approx(kl.numpy(), rel=1e-3, abs=1e-6)
    columns, error = one.told(), kl.mean(1).std(correction=1) / len(kl) ** 0.5
    assert columns["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert columns["kl_error"] == pytest.approx(float(error), rel=1e-3)
    assert columns["agreement"] == pytest.approx(
        float((dense.argmax(-1) == other.argmax(-1)).double().mean())
    )
    targets = case.windows.tokens[:, first:, None]
    losses = [-part.gather(-1, targets)[..., 0].mean(1) for part in (other, dense)]
    assert one.nats == pytest.approx(float((losses[0] - losses[1]).mean()), rel=1e-3, abs=1e-7)
    change = (other.exp() - dense.exp()).mean(1)  # (windows, vocabulary)
    order = change.mean(0).argsort(descending=True).tolist()
    order = [token for token in order if token < len(TOKENIZER)]
    for moved, expected in ((one.up, order), (one.down, order[::-1])):
        assert [x.id for x in moved] == expected[: len(moved)]
        assert len(moved) >= 5
        for x in moved:
            error = change[:, x.id].std(correction=1) / len(change) ** 0.5
            assert x.change == pytest.approx(float(change[:, x.id].mean()), rel=1e-3, abs=1e-8)
            assert x.error == pytest.approx(float(error), rel=1e-3, abs=1e-8)
            assert x.before == pytest.approx(float(dense.exp()[..., x.id].mean()), rel=1e-4)


def test_it_is_the_divergence_that_perplexity_computes_of_an_edited_model(case: Case) -> None:
    found = case.steered(["scale:-2", "mean"], batch_size=5)
    for one in found.settings:
        with steer(case.model, NEURON, one.setting, run=case.run) as value:
            assert value == one.value
            score = perplexity(case.model, case.windows, against=tiny_model("llama"))
        assert score.divergence is not None
        assert one.divergence.kl == pytest.approx(score.divergence.kl, rel=1e-4, abs=1e-7)
        dense = perplexity(case.model, case.windows)
        assert one.nats == pytest.approx(score.nats - dense.nats, abs=1e-6)


def test_mean_and_quantiles_are_those_of_the_measured_outputs(case: Case) -> None:
    values = {
        one.setting: one.value
        for one in case.steered(["mean", "quantile:0", "quantile:0.3", "quantile:1"]).settings
    }
    assert values["mean"] == pytest.approx(
        float(case.outputs.mean()), abs=float(1e-3 * case.outputs.std())
    )
    assert values["quantile:0"] == pytest.approx(float(case.outputs.min()))
    assert values["quantile:1"] == pytest.approx(float(case.outputs.max()))
    width = 16 * case.outputs.std() / 1024  # of a bin, nearly
    ends = np.quantile(case.outputs, [0.28, 0.32])
    assert ends[0] - width < values["quantile:0.3"] < ends[1] + width


def test_continuations_are_those_of_the_edited_model(case: Case) -> None:
    found = case.steered(["zero", "quantile:1"], prompt="The quick", prompt_tokens=8)
    untouched = generate(case.model, TOKENIZER, "The quick", tokens=8).text
    assert found.continuation == untouched
    for one in found.settings:

        def edit(_: Any, __: Any, outputs: torch.Tensor, value: Any = one.value) -> torch.Tensor:
            outputs[..., 9] = value
            return outputs

        handle = case.model.get_submodule(LAYER).register_forward_hook(edit)
        assert one.continuation == generate(case.model, TOKENIZER, "The quick", tokens=8).text
        handle.remove()


def test_what_makes_no_sense_is_refused(case: Case) -> None:
    bad: Any = [
        ("zeros", "expected a setting", ValueError),
        ([], "at least one", ValueError),
    ]
    for settings, message, kind in bad:
        with pytest.raises(kind, match=message):
            case.steered(settings)
    with pytest.raises(ValueError, match="needs the run"), steer(case.model, NEURON, "mean"):
        pass
    gate = "model.layers.1.mlp.gate_proj:9"  # which was not measured
    with (
        pytest.raises(LookupError, match="no neuron"),
        steer(case.model, gate, "mean", run=case.run),
    ):
        pass
    with steer(case.model, gate, "zero", run=case.run) as value:
        assert value == 0
    with pytest.raises(ValueError, match="other weights"):
        steered(
            tiny_model("llama", seed=1),
            case.windows,
            run=case.run,
            neuron=NEURON,
            settings="zero",
            tokenizer=TOKENIZER,
        )


def test_a_quantile_in_a_tail_is_refused_with_what_there_is(case: Case) -> None:
    far = measure(case.model, case.windows, layers="*.up_proj", batch_size=1)
    held = far.children["histogram"].to_dataset(inherit=False)
    tails = held["tail_count"].to_numpy().copy()
    tails[far.to_dataset().get_index("neuron").get_loc(NEURON)] = [0, 40]
    held = held.assign(tail_count=(held["tail_count"].dims, tails))
    far["histogram"] = xr.DataTree(held)
    with (
        pytest.raises(ValueError, match="beyond its histogram"),
        steer(case.model, NEURON, "quantile:0.9", run=far),
    ):
        pass
    with steer(case.model, NEURON, "quantile:0.2", run=far) as value:
        assert value is not None
