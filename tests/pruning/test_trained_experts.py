"""Pruning of trained experts: each by the tokens that it had, saved as the model's class is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import entangle
from entangle.__main__ import main
from entangle.experiments.ablating import ablate
from entangle.experiments.sweeping import sweep
from entangle.measurement.measuring import measure
from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer, find_layers, weight_of
from entangle.model.loading import load_model, save_model
from entangle.numerics.masks import prune
from entangle.numerics.moments import InputMoments
from entangle.numerics.sparsity import Sparsity
from entangle.pruning import sparsifying
from entangle.pruning.calibration import calibrate, load_calibrations, save_calibrations
from entangle.pruning.options import ONE, SHRINKAGE
from tests.forking import forked_ranks
from tests.measurement.test_mixtures import EXPERTS, UNUSED, windows_of
from tests.model.test_eager import experts_of, hear
from tests.tiny_mixtures import MIXTURES, tiny_mixture, without_tokens
from tests.tiny_models import tiny_tokenizer

WINDOWS = windows_of(6)
HELD_OUT = windows_of(4, seed=2)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(HELD_OUT.tokens, use_cache=False).logits
    return found


def grams(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, int]]:
    """Compute the Gram of each expert's inputs, and their number, by hand."""
    heard, _ = hear(model, experts_of(model), input_ids=WINDOWS.tokens)
    return {
        name: (rows.inputs.double().T @ rows.inputs.double(), len(rows.tokens))
        for name, rows in heard.items()
    }


@pytest.fixture
def mixture() -> PreTrainedModel:
    model = tiny_mixture()
    without_tokens(model, UNUSED)
    return model


def of_block(model: PreTrainedModel) -> list[LinearLayer]:
    return [layer for layer in experts_of(model) if layer.block == 0]


def test_an_expert_has_the_gram_of_its_tokens_shrunk_towards_that_of_the_block(
    mixture: PreTrainedModel, tmp_path: Path
) -> None:
    layers, truth = of_block(mixture), grams(mixture)
    batches = [{"input_ids": part} for part in WINDOWS.tokens.split(4)]
    found = calibrate(BlockWalk(mixture, batches), layers, advance=False)[ONE]
    save_calibrations(tmp_path / "file", found)
    again = load_calibrations(tmp_path / "file", layers, torch.device("cpu"))
    for calibrations in (found, again):
        for layer in layers:
            one = calibrations[layer.name]
            gram, count = truth[layer.name]
            assert int(one.moments.count) == count
            torch.testing.assert_close(one.moments.gram.double(), gram, rtol=1e-4, atol=1e-4)
            key = layer.name.rpartition(".")[2]
            alike = [truth[x.name] for x in layers if x.name.endswith(key)]
            tokens = sum(n for _, n in alike)
            mean = sum((g for g, _ in alike), torch.zeros(())) / tokens
            added = SHRINKAGE * layer.inputs
            torch.testing.assert_close(
                one.used.gram.double(), gram + added * mean, rtol=1e-4, atol=1e-4
            )
    unused = found[f"model.layers.0.mlp.experts.{UNUSED}.down_proj"]
    assert (int(unused.moments.count), unused.energy) == (0, 0.0)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_pruned_model_is_loaded_by_transformers_and_scores_as_in_memory(
    name: str, tmp_path: Path
) -> None:
    model = tiny_mixture(name)
    patterns = ["*.mlp.input_linear.*", "*.mlp.output_linear.*"] if name == "jetmoe" else [EXPERTS]
    found = entangle.sparsify(model, WINDOWS, sparsity="0.5", layers=patterns, out=tmp_path / "out")
    layers = find_layers(model, patterns)
    assert [*found.layers["layer"]] == [layer.name for layer in layers]
    for layer in layers:  # every neuron has exactly half
        assert ((weight_of(layer) == 0).sum(dim=1) == layer.inputs // 2).all()
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(file)
    of_experts = [key for key in stored if "experts" in key or "put_linear" in key]
    zeros = sum(int((stored[key] == 0).sum()) for key in of_experts)
    assert zeros == found.layers["zeros"].sum() == sum(x.neurons * x.inputs for x in layers) / 2
    model_again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model_again.eval()), logits(model))
    if name == "mixtral":  # the keys of the files on the hub
        assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in stored


@pytest.mark.parametrize("solve", ["greedy", "exact"])
def test_weights_are_those_of_the_shrunk_gram_also_without_tokens(
    mixture: PreTrainedModel, solve: Any
) -> None:
    layers = of_block(mixture)
    dense = {layer.name: weight_of(layer).clone() for layer in layers}
    batches = [{"input_ids": part} for part in WINDOWS.tokens.split(4)]
    found = calibrate(BlockWalk(mixture, batches), layers, advance=False)[ONE]
    pruned = entangle.sparsify(
        mixture, WINDOWS, sparsity="0.5", layers="*.0.*.experts.*", solve=solve
    ).layers.set_index("layer")
    for layer in layers:
        one = found[layer.name]
        pooled = one.pooled
        assert pooled is not None
        pair = InputMoments.stack([one.moments, pooled])
        used = pair.shrunk(SHRINKAGE, pooled).expert(0)
        truth = prune(dense[layer.name], used, Sparsity(0.5), solve=solve).weight
        assert torch.equal(weight_of(layer), truth)
        row = pruned.loc[layer.name]
        assert row["tokens"] == int(one.moments.count)
        assert np.isnan(row["error"]) == (f".{UNUSED}." in layer.name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 4}, r"expanded to 4 experts.*exclude '\*\.mlp\.experts\.\*'"),
        ({"inputs": "teal"}, r"sparse inputs.*exclude"),
    ],
)
def test_what_trained_experts_cannot_do_is_refused(options: Any, message: str) -> None:
    model = tiny_mixture()
    with pytest.raises(ValueError, match=message):
        entangle.sparsify(model, WINDOWS, sparsity="0.5", **options)
    found = entangle.sparsify(
        model, WINDOWS, sparsity="0.5", exclude=EXPERTS, **{"components": 0} | options
    )
    assert not found.layers["layer"].str.contains("experts").any()


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("killed", [False, True])
def test_experts_of_a_model_in_files_become_what_they_become_in_memory(
    killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_mixture()
    model.save_pretrained(tmp_path / "model")
    options: Any = {"sparsity": "0.5", "layers": ["*.experts.[02].*", "*.o_proj"]}
    entangle.sparsify(model, WINDOWS, **options)
    offloaded = load_model(tmp_path / "model", offload=tmp_path / "blocks")
    if killed:
        with monkeypatch.context() as patched:
            patched.setattr(sparsifying, "save_model", raises_interrupt)
            with pytest.raises(KeyboardInterrupt):
                entangle.sparsify(offloaded, WINDOWS, **options, out=tmp_path / "out")
        offloaded = load_model(tmp_path / "model", offload=tmp_path / "blocks-again")
    entangle.sparsify(offloaded, WINDOWS, **options, out=tmp_path / "out")
    again = load_model(tmp_path / "out")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)
        assert torch.equal(again.get_parameter(name) == 0, parameter == 0)


def raises_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_killed_command_goes_on_behind_its_finished_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"sparsity": "0.5", "layers": EXPERTS}
    model = tiny_mixture()
    entangle.sparsify(model, WINDOWS, **options)
    with monkeypatch.context() as patched:
        patched.setattr(sparsifying, "save_model", raises_interrupt)
        with pytest.raises(KeyboardInterrupt):
            entangle.sparsify(tiny_mixture(), WINDOWS, **options, out=tmp_path / "out")
    again = tiny_mixture()
    entangle.sparsify(again, WINDOWS, **options, out=tmp_path / "out")
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_a_sweep_and_an_ablation_leave_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny_mixture()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = measure(model, WINDOWS)
    options: Any = {"layers": EXPERTS, "propagate": ["dense", "sparse"], "budget": "wasserstein"}
    table = sweep(model, WINDOWS, HELD_OUT, run=run, sparsity=["0.5", "2:4"], **options)
    assert table["problem"].eq("").all()
    assert table["realised"].iloc[1:].tolist() == pytest.approx([0.5] * (len(table) - 1), abs=0.01)
    found = ablate(model, WINDOWS, HELD_OUT, run=run, layers=EXPERTS, share=0.5, seeds=1)
    assert found["problem"].eq("").all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config._experts_implementation == "grouped_mm"


def test_neurons_of_experts_that_are_set_to_zero_are_rows_of_zeros(tmp_path: Path) -> None:
    model = tiny_mixture()
    run = measure(model, WINDOWS)
    found = ablate(
        model,
        None,
        HELD_OUT,
        run=run,
        layers=EXPERTS,
        share=0.25,
        sets="wasserstein",
        intervention="zero",
    )
    data = run.to_dataset()
    for layer in experts_of(model):
        own = data.isel(neuron=(data["layer"] == layer.name).to_numpy())
        worst = own["wasserstein"].to_numpy().argsort()[-round(0.25 * layer.neurons) :]
        weight_of(layer)[worst] = 0
    again = ablate(
        tiny_mixture(), None, HELD_OUT, run=run, layers="*.o_proj", intervention="zero", sets="std"
    )
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(
            logits(model)[:, :-1].flatten(0, 1), HELD_OUT.tokens[:, 1:].flatten()
        )
    assert found["perplexity"].iloc[1] == pytest.approx(float(nats.exp()), rel=1e-4)
    assert found["perplexity"].iloc[0] == again["perplexity"].iloc[0]


def test_two_processes_measure_and_prune_as_one_does(tmp_path: Path) -> None:
    """Batches of eight tokens, of which each process sends some to experts that the other has not."""
    model = tiny_mixture(num_local_experts=8)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 8)
    words: list[str | Path] = ["--text", tmp_path / "text.txt", "--windows", "6", "--length", "8"]
    words += ["--batch-size", "1", "--layers", EXPERTS, "--device", "cpu"]
    commands: dict[str, list[str]] = {
        "measure": [],
        "sparsify": ["--sparsity", "0.5", "--method", "wanda"],
    }
    for name, more in commands.items():
        line: list[str | Path] = [
            "-m",
            "entangle",
            name,
            tmp_path / "model",
            *words,
            *more,
            "--out",
        ]
        done = forked_ranks(2, *line, tmp_path / f"{name}-2")
        assert done.returncode == 0, done.stderr
        assert main([*map(str, line[2:]), str(tmp_path / f"{name}-1")]) == 0
    two, one = (entangle.open_run(tmp_path / f"measure-{n}").to_dataset() for n in (2, 1))
    assert (two["count"] == one["count"]).all()
    assert (one["count"] == 0).any()
    assert two["wasserstein"].identical(one["wasserstein"])
    pruned = [load_model(tmp_path / f"sparsify-{n}") for n in (2, 1)]
    for key, parameter in pruned[0].named_parameters():
        other = pruned[1].get_parameter(key)  # sums are rounded in another order: near ties differ
        assert (parameter != other).float().mean() < 0.01, key
