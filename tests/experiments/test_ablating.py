"""Ablation: each arm against the model treated by hand, and its costs, kills and refusals."""

import copy
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from transformers import PreTrainedModel

import entangle
from entangle.experiments.ablating import neurons_of
from entangle.experiments.interventions import Arm
from entangle.measurement.ranking import Neurons
from entangle.model.layers import LinearLayer, find_layers, weight_of
from entangle.model.sampling import walk_blocks
from entangle.model.scoring import NotFiniteError
from entangle.model.text import TokenWindows
from entangle.numerics.masks import prune
from entangle.numerics.sparsity import Sparsity
from entangle.pruning import neurons as sparse_neurons
from entangle.pruning.calibration import Calibration, calibrate
from entangle.pruning.neurons import SparseNeurons
from entangle.pruning.options import ONE, SHRINKAGE, Clustering
from entangle.runs import setup
from entangle.runs.setup import COMMAND
from tests.model.test_hooks import hooks_left
from tests.pruning.test_sparsifying import placed, random_windows
from tests.tiny_models import tiny_model

NAMES = ("llama", "gpt2", "gpt-neox", "qwen2")
SHARE = 0.2
MIXTURE = Clustering(4)


def windows() -> TokenWindows:
    return random_windows(12)


def held_out() -> TokenWindows:
    return random_windows(5, seed=7)


_RUNS: dict[str, xr.DataTree] = {}


def run_of(name: str) -> xr.DataTree:
    """Return the run of a tiny model, measured on a text of its own, once."""
    if name not in _RUNS:
        text = random_windows(10, seed=11)
        _RUNS[name] = entangle.measure(tiny_model(name), text, difficulty=60)
    return _RUNS[name]


def run(model: PreTrainedModel, name: str = "llama", **options: Any) -> pd.DataFrame:
    words: dict[str, Any] = {"share": [SHARE], "seeds": 2, "batch_size": 2}
    words |= {"sparsity": [0.75], "sets": ["wasserstein", "random"]}
    calibration = options.pop("windows", windows())
    evaluation = options.pop("evaluation", held_out())
    return entangle.ablate(model, calibration, evaluation, run=run_of(name), **words | options)


def untouched(model: PreTrainedModel, name: str = "llama") -> bool:
    before, now = tiny_model(name).state_dict(), model.state_dict()
    same = all(torch.equal(tensor, before[key]) for key, tensor in now.items())
    return same and now.keys() == before.keys() and hooks_left(model) == 0


def chosen(name: str, layers: Sequence[LinearLayer], neurons: str = "wasserstein") -> Neurons:
    return neurons_of(run_of(name), Arm("zero", None, 1, neurons, SHARE, 0, None), layers)


def calibrated(name: str, clustering: Clustering) -> dict[str, Calibration]:
    """Return calibrations of all layers, from the dense model's inputs."""
    model = tiny_model(name)
    layers, walk = find_layers(model), walk_blocks(model, windows(), 2, 0)
    last = max(layer.block for layer in layers)
    found: dict[str, Calibration] = {}
    for block in range(last + 1):
        here = [layer for layer in layers if layer.block == block]
        found |= calibrate(walk, here, [clustering], advance=block < last)[clustering]
    return found


def nats_of(
    model: PreTrainedModel, hooks: Mapping[str, Callable[..., torch.Tensor]]
) -> list[float]:
    """Score a model whose layers' outputs hooks of the tests' own make from inputs and outputs."""
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, outputs, hook=hook: hook(args[0], outputs)
        )
        for name, hook in hooks.items()
    ]
    found: list[float] = entangle.perplexity(model, held_out(), batch_size=2).window_nats.tolist()
    for handle in handles:
        handle.remove()
    return found


def silence(layer: LinearLayer, neurons: torch.Tensor) -> None:
    """Make neurons zero by their weights."""
    weight_of(layer)[neurons] = 0
    bias = getattr(layer.module, "bias", None)
    if bias is not None:
        bias.detach()[neurons] = 0


def arm_of(table: pd.DataFrame, **words: Any) -> Any:
    rows = table[np.logical_and.reduce([table[name] == word for name, word in words.items()])]
    assert len(rows) == 1
    return rows.iloc[0]


def scores_as(row: Any, nats: Sequence[float], name: str = "llama") -> bool:
    dense = entangle.perplexity(tiny_model(name), held_out(), batch_size=2)
    assert row["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    change = np.array(nats) - dense.window_nats
    assert row["difference"] == pytest.approx(change.mean(), rel=1e-3, abs=1e-6)
    assert row["difference_error"] == pytest.approx(change.std(ddof=1) / math.sqrt(5), rel=1e-3)
    return abs(float(row["difference"])) > 1e-4  # or it shows nothing


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, SparseNeurons]]:
    """Collect the rows that are swapped in, by layer, arm after arm."""
    seen: list[tuple[str, SparseNeurons]] = []
    outputs = SparseNeurons.outputs

    def noted(rows: SparseNeurons, layer: LinearLayer) -> Any:
        seen.append((layer.name, rows))
        return outputs(rows, layer)

    monkeypatch.setattr(SparseNeurons, "outputs", noted)
    return seen


# Sparsified neurons.


@pytest.mark.parametrize("sparsity", ["0.75", "0.33"])
@pytest.mark.parametrize("name", NAMES)
def test_an_arm_is_the_dense_model_with_its_rows_pruned(
    name: str, sparsity: str, swapped: list[tuple[str, SparseNeurons]], device: torch.device
) -> None:
    model, replaced = placed(tiny_model(name), device), copy.deepcopy(tiny_model(name))
    table = run(model, name, sparsity=[sparsity], sets=["wasserstein"])
    assert untouched(model.cpu(), name)
    layers, calibrations = find_layers(replaced), calibrated(name, ONE)
    neurons = chosen(name, layers)
    assert [layer for layer, _ in swapped] == [layer.name for layer in layers]
    treated = zeros = 0
    for layer, (_, rows) in zip(layers, swapped, strict=True):
        some, weight = torch.from_numpy(neurons[layer.name]), weight_of(layer)
        moments = calibrations[layer.name].moments
        alone = prune(weight[some], moments, Sparsity.parse(sparsity), solve="exact").weight
        whole = prune(weight, moments, Sparsity.parse(sparsity), solve="exact").weight
        assert rows.neurons.tolist() == some.tolist()
        assert len(some) == round(SHARE * layer.neurons)
        assert rows.weight.device.type == device.type
        assert torch.equal(alone, whole[some])
        if device.type == "cpu":
            assert torch.equal(rows.weight, alone)
        else:  # Grams are other sums
            alone = rows.weight.cpu()
            assert ((alone == 0) != (whole[some] == 0)).float().mean() < 0.01
        assert (alone == 0).sum(dim=1).tolist() == [round(float(sparsity) * layer.inputs)] * len(
            some
        )
        weight[some] = alone
        treated, zeros = treated + alone.numel(), zeros + int((alone == 0).sum())
    row = arm_of(table, set="wasserstein")
    assert scores_as(row, nats_of(replaced, {}), name)
    score = entangle.perplexity(replaced, held_out(), against=tiny_model(name), batch_size=2)
    assert score.divergence is not None
    for column, value in score.divergence.columns().items():
        assert row[column] == pytest.approx(value, rel=1e-3, abs=1e-6), column
    assert row["kl"] > 1e-5
    parameters = list(replaced.parameters())
    sizes = sum(p.numel() for p in parameters)
    assert row["realised"] == zeros / treated
    assert row["model_sparsity"] == sum(int((p == 0).sum()) for p in parameters) / sizes
    assert row["neurons"] == sum(map(len, neurons.values()))


@pytest.mark.parametrize("name", NAMES)
def test_with_several_experts_each_token_has_the_rows_of_its_own(
    name: str, swapped: list[tuple[str, SparseNeurons]]
) -> None:
    model, dense = tiny_model(name), tiny_model(name)
    table = run(model, name, experts=[4], sets=["wasserstein"])
    assert untouched(model, name)
    layers, calibrations = find_layers(dense), calibrated(name, MIXTURE)
    neurons, hooks, sizes = chosen(name, layers), {}, []
    for layer, (_, rows) in zip(layers, swapped, strict=True):
        some, weight = torch.from_numpy(neurons[layer.name]), weight_of(layer)
        calibration = calibrations[layer.name]
        moments, router = calibration.moments.shrunk(SHRINKAGE), calibration.router
        assert router is not None
        sizes.append(router.experts)
        alone = prune(weight[some], moments, Sparsity(0.75), solve="exact").weight
        assert torch.equal(rows.weight, alone)
        assert torch.equal(
            rows.weight, prune(weight, moments, Sparsity(0.75), solve="exact").weight[:, some]
        )
        one = prune(
            weight[some], moments.expert(router.experts - 1), Sparsity(0.75), solve="exact"
        ).weight
        assert torch.equal(rows.weight[-1], one)
        assert rows.counts == calibration.moments.count.tolist()
        bias = getattr(layer.module, "bias", None)

        def hook(  # token by token
            inputs: torch.Tensor,
            outputs: torch.Tensor,
            some: torch.Tensor = some,
            alone: torch.Tensor = alone,
            router: Any = router,
            bias: Any = bias,
        ) -> torch.Tensor:
            rows, found = inputs.reshape(-1, inputs.shape[-1]), outputs.clone()
            flat = found.view(-1, outputs.shape[-1])
            for token, row in enumerate(rows):
                expert = int((row @ router.matrix + router.bias).argmax())
                values = (alone[expert] * row).sum(dim=1)
                flat[token, some] = values if bias is None else values + bias[some]
            return found

        hooks[layer.name] = hook
    assert max(sizes) > 2
    row = arm_of(table, set="wasserstein")
    assert scores_as(row, nats_of(dense, hooks), name)
    layer_rows = [rows for _, rows in swapped]
    zeros = sum(float((rows.weight == 0).sum()) / len(rows.weight) for rows in layer_rows)
    assert row["realised"] == pytest.approx(
        zeros / sum(rows.weight[0].numel() for rows in layer_rows)
    )
    size = sum(p.numel() for p in model.parameters())
    assert row["model_sparsity"] == pytest.approx(
        (sum(int((p == 0).sum()) for p in model.parameters()) + zeros) / size
    )


def test_the_rows_of_every_arm_are_those_of_one_pruning(
    swapped: list[tuple[str, SparseNeurons]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned, scored = [], []

    def counted_prune(weight: torch.Tensor, moments: Any, sparsity: Any, **options: Any) -> Any:
        pruned.append((len(weight), sparsity))
        return prune(weight, moments, sparsity, **options)

    def counted_score(*args: Any, **options: Any) -> Any:
        scored.append(args)
        return entangle.perplexity(*args, **options)

    monkeypatch.setattr(sparse_neurons, "prune", counted_prune)
    monkeypatch.setattr(setup, "score_of", counted_score)
    model = tiny_model("llama")
    words: dict[str, Any] = {"sparsity": [0.5, 0.75], "experts": [1, 4]}
    sets = ["wasserstein", "random", "bottom", "std", "difficulty"]
    for few, arms in ((["wasserstein"], 1), (sets, 4 + 2)):
        pruned.clear()
        scored.clear()
        swapped.clear()
        table = run(model, sets=few, **words)
        assert len(pruned) == 21 * 2 * 2  # layers, sparsities, clusterings
        assert len(scored) == 1 + 4 * arms
        assert len(swapped) == 21 * 4 * arms
        assert len(table) == 1 + 4 * len(few)
    layers, calibrations = find_layers(model), calibrated("llama", ONE)
    checked = 0
    for (name, rows), layer in zip(swapped, layers * 24, strict=True):
        assert name == layer.name
        if rows.router is None:
            share = float((rows.weight[0] == 0).float().mean())
            sparsity = Sparsity(0.5 if share < 0.6 else 0.75)
            moments = calibrations[name].moments
            expected = prune(
                weight_of(layer)[rows.neurons], moments, sparsity, solve="exact"
            ).weight
            assert torch.equal(rows.weight, expected)
            checked += 1
    assert checked == 21 * 2 * 6


def test_groups_of_inputs_are_sparsified_and_those_that_cannot_be_are_refused() -> None:
    model = tiny_model("llama")
    table = run(model, sparsity=["1:4"], layers=["*.self_attn.*", "*.up_proj"])
    row = arm_of(table, set="wasserstein")
    assert row["realised"] == 0.75
    assert row["sparsity"] == "1:4"
    with pytest.raises(ValueError, match=r"down_proj.*\b2:4\b.*groups.*\b37\b"):
        run(model, sparsity=["2:4"])


@pytest.mark.parametrize("neurons", ["wasserstein", "bottom", "random", "kurtosis", "difficulty"])
def test_of_each_set_the_neurons_are_zero(neurons: str) -> None:
    table = run(tiny_model("llama"), intervention=["zero"], sets=[neurons], seeds=1, windows=None)
    zeroed: Any = copy.deepcopy(tiny_model("llama"))
    layers = find_layers(zeroed)
    for layer in layers:
        some = torch.from_numpy(chosen("llama", layers, neurons)[layer.name])
        silence(layer, some)
    assert scores_as(arm_of(table, set=neurons), nats_of(zeroed, {}))


@pytest.mark.parametrize("intervention", ["zero", "mean", "negative"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_hooks_written_by_hand(
    name: str, intervention: str, device: torch.device
) -> None:
    model, dense = placed(tiny_model(name), device), tiny_model(name)
    table = run(model, name, intervention=[intervention], sets=["wasserstein"], windows=None)
    assert untouched(model.cpu(), name)
    frame = run_of(name).to_dataset().to_dataframe()
    hooks, layers = {}, find_layers(dense)
    for layer in layers:
        some = chosen(name, layers)[layer.name].tolist()
        of_layer = frame[frame["layer"] == layer.name].set_index("index")["mean"]

        def hook(
            _: torch.Tensor, outputs: torch.Tensor, some: list[int] = some, means: Any = of_layer
        ) -> torch.Tensor:
            found = outputs.clone()
            for neuron in some:
                column = found[..., neuron]
                if intervention == "negative":
                    column[column < 0] = 0
                else:
                    column.fill_(means[neuron] if intervention == "mean" else 0)
            return found

        hooks[layer.name] = hook
    row = arm_of(table, set="wasserstein")
    assert scores_as(row, nats_of(dense, hooks), name)
    assert math.isnan(row["realised"])
    assert row["sparsity"] == ""


def test_random_sets_are_scored_one_by_one_and_merged(tmp_path: Path) -> None:
    table = run(tiny_model("llama"), intervention=["zero"], seeds=3, out=tmp_path / "run")
    arms = pd.read_csv(tmp_path / "run" / "tables" / "arms.csv")
    random = arms[arms["set"] == "random"]
    assert random["seed"].tolist() == [0, 1, 2]
    assert random["perplexity"].nunique() == 3
    merged, layers = arm_of(table, set="random"), find_layers(tiny_model("llama"))
    assert merged["perplexity"] == pytest.approx(random["perplexity"].mean(), rel=1e-12)
    assert merged["seeds"] == 3
    assert merged["neurons"] == arm_of(table, set="wasserstein")["neurons"]
    drawn = chosen("llama", layers, "random")
    hooks = {
        layer: lambda _, outputs, some=some: outputs.index_fill(-1, torch.from_numpy(some), 0)
        for layer, some in drawn.items()
    }
    first = math.exp(np.mean(nats_of(tiny_model("llama"), hooks)))
    assert random["perplexity"].iloc[0] == pytest.approx(first, rel=1e-5)


def test_the_dense_model_comes_first_and_scores_as_ever() -> None:
    dense = entangle.perplexity(tiny_model("llama"), held_out(), batch_size=2, skip_first=3)
    table = run(tiny_model("llama"), intervention=["zero"], skip_first=3)
    first = table.iloc[0]
    assert first["intervention"] == "dense"
    assert first["perplexity"] == dense.perplexity
    assert (first["tokens"], first["windows"]) == (dense.tokens, 5)
    assert (table["tokens"] == dense.tokens).all()


def test_tokens_that_are_skipped_are_not_pruned_by(
    swapped: list[tuple[str, SparseNeurons]],
) -> None:
    run(tiny_model("llama"), sets=["wasserstein"], skip_first=4, layers="*.0.mlp.up_proj")
    model = tiny_model("llama")
    (layer,) = find_layers(model, "*.0.mlp.up_proj")
    walk = walk_blocks(model, windows(), 2, 4)
    moments = calibrate(walk, [layer], advance=False)[ONE][layer.name].moments
    ((_, rows),) = swapped
    assert int(moments.count) == 12 * 12
    assert torch.equal(
        rows.weight,
        prune(weight_of(layer)[rows.neurons], moments, Sparsity(0.75), solve="exact").weight,
    )


# A block at a time.


@pytest.mark.parametrize("intervention", ["sparsify", "zero"])
def test_a_block_at_a_time_only_its_neurons_are_treated(
    intervention: str, swapped: list[tuple[str, SparseNeurons]]
) -> None:
    model = tiny_model("llama")
    table = run(model, intervention=[intervention], sets=["wasserstein"], per_block=True)
    assert untouched(model)
    assert table["block"].tolist() == ["", "0", "1", "2"]
    layers, calibrations = find_layers(model), calibrated("llama", ONE)
    for block in range(3):
        replaced: Any = copy.deepcopy(tiny_model("llama"))
        here = [layer for layer in find_layers(replaced) if layer.block == block]
        neurons = chosen("llama", layers)
        treated = 0
        for layer in here:
            some, weight = torch.from_numpy(neurons[layer.name]), weight_of(layer)
            treated += len(some)
            if intervention == "sparsify":
                weight[some] = prune(
                    weight[some],
                    calibrations[layer.name].moments,
                    Sparsity(0.75),
                    solve="exact",
                ).weight
                continue
            silence(layer, some)
        row = arm_of(table, block=str(block))
        assert row["neurons"] == treated
        assert scores_as(row, nats_of(replaced, {}))
        if intervention == "sparsify":
            parameters = list(replaced.parameters())
            zeros = sum(int((p == 0).sum()) for p in parameters)
            assert row["model_sparsity"] == zeros / sum(p.numel() for p in parameters)
    names = [layer.name for layer in layers] if intervention == "sparsify" else []
    assert [name for name, _ in swapped] == names


def test_only_matching_layers_are_treated_and_blocks_without_one_have_no_arm() -> None:
    model = tiny_model("llama")
    words: dict[str, Any] = {"intervention": ["zero"], "sets": ["wasserstein"]}
    table = run(model, layers=["*.2.mlp.*", "*.0.*.q_proj"], per_block=True, **words)
    assert table["block"].tolist() == ["", "0", "2"]
    neurons = chosen("llama", find_layers(model, ["*.2.mlp.*", "*.0.*.q_proj"]))
    hooks = {
        name: lambda _, outputs, some=some: outputs.index_fill(-1, torch.from_numpy(some), 0)
        for name, some in neurons.items()
    }
    (query,) = (name for name in hooks if "q_proj" in name)
    row = arm_of(table, block="0")
    assert scores_as(row, nats_of(model, {query: hooks.pop(query)}))
    assert scores_as(arm_of(table, block="2"), nats_of(model, hooks))
    with pytest.raises(LookupError, match=r"layer.*'\*\.gate'"):
        run(model, layers="*.gate")


# What goes wrong.


def other_run() -> xr.DataTree:
    return entangle.measure(tiny_model("llama", seed=1), random_windows(10, seed=11))


def test_what_cannot_be_ablated_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    measured, other = run_of("llama"), other_run()
    on_evaluation = entangle.measure(tiny_model("llama"), held_out())
    monkeypatch.setattr(setup, "score_of", never)
    monkeypatch.setattr(setup, "walk_blocks", never)
    model, out = tiny_model("llama"), tmp_path / "run"
    texts = (windows(), held_out())

    def refused(match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            entangle.ablate(*args, out=out, **{"run": measured} | options)

    hashes = [run.attrs["weights"][:17] for run in (other, measured)]
    refused("weights.*{}.*{}".format(*hashes), model, *texts, run=other)
    refused(r"\b100\.0% .*evaluation \(random\)", model, *texts, run=on_evaluation)
    shared = TokenWindows(
        torch.cat([held_out().tokens[:2], windows().tokens[:1]]), "mixed", 3, 0, "never"
    )
    refused(r"\b33\.3% .*mixed.*window 3 on", model, windows(), shared)
    refused("sparsify.*windows", model, None, held_out())
    both = {"intervention": ["zero", "sparsify"]}
    refused("sparsify.*windows", model, None, held_out(), **both)
    for long in ((windows(), random_windows(2, 65)), (random_windows(2, 65), held_out())):
        refused(r"\b65 tokens.*context.*\b64\b", model, *long)
    refused(r"share.*\b1\b.*\b0\b", model, *texts, share=[0])
    refused("sparsify, .*'luck'", model, *texts, intervention=["luck"])
    refused(r"\b1 seed.*\b0\b", model, *texts, seeds=0)
    refused("skip_first", model, *texts, skip_first=16)
    refused("training mode", tiny_model("llama").train(), *texts)
    assert list(tmp_path.iterdir()) == []
    assert untouched(model)


def test_without_sparsified_neurons_windows_are_not_needed_nor_compared() -> None:
    words: dict[str, Any] = {"intervention": ["zero"], "sets": ["bottom"]}
    table = run(tiny_model("llama"), windows=None, **words)
    assert not table.attrs["pruned"]
    other = run(tiny_model("llama"), windows=held_out(), **words)
    assert other["perplexity"].tolist() == table["perplexity"].tolist()


def test_sets_that_the_run_has_no_variable_for_are_named_and_left_out(tmp_path: Path) -> None:
    plain = entangle.measure(tiny_model("llama"), random_windows(10, seed=11))
    words: dict[str, Any] = {"intervention": ["zero"], "seeds": 1, "out": tmp_path / "run"}
    table = entangle.ablate(tiny_model("llama"), None, held_out(), run=plain, **words)
    sets = ["wasserstein", "bottom", "random", "kurtosis", "weight_norm", "std", "wasserstein_bulk"]
    assert table["set"].tolist() == ["", *sets]
    assert table.attrs["missing_sets"] == ["difficulty"]
    assert "no difficulty" in (tmp_path / "run" / "tables" / "ablation.md").read_text()


@pytest.mark.parametrize("where", ["while pruning", "while scoring"])
def test_after_an_error_the_model_is_as_before(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    model = tiny_model("llama")
    if where == "while pruning":
        monkeypatch.setattr(sparse_neurons, "prune", failed)
    else:
        calls = []

        def late(*args: Any, **options: Any) -> Any:
            calls.append(hooks_left(model))
            if len(calls) == 2:  # the first is the dense model
                failed()
            return entangle.perplexity(*args, **options)

        monkeypatch.setattr(setup, "score_of", late)
    with pytest.raises(torch.OutOfMemoryError):
        run(model)
    assert untouched(model)
    if where == "while scoring":
        assert calls[0] == 0 < calls[1]


def test_a_layer_that_does_not_run_is_an_error() -> None:
    model: Any = tiny_model("llama")
    measured = entangle.measure(model, random_windows(10, seed=11), layers="*.mlp.*")
    model.model.layers[1].mlp.forward = torch.zeros_like
    with pytest.raises(RuntimeError, match=r"\b3 of 9 .*layers.*\b3 batches.*layers\.1\.mlp"):
        entangle.ablate(
            model, None, held_out(), run=measured, intervention=["zero"], sets=["std"], batch_size=2
        )
    assert hooks_left(model) == 0


def test_a_score_that_is_not_finite_is_a_problem_of_its_arm_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = run(tiny_model("llama"), sets=["wasserstein", "bottom"]), []

    def broken(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise NotFiniteError("not finite in 5 of 5 windows")
        return entangle.perplexity(*args, **options)

    monkeypatch.setattr(setup, "score_of", broken)
    words: dict[str, Any] = {"sets": ["wasserstein", "bottom"], "out": tmp_path / "run"}
    model = tiny_model("llama")
    table = run(model, **words)
    assert untouched(model)
    assert table["problem"].tolist() == ["", "not finite in 5 of 5 windows", ""]
    assert np.isfinite(table["perplexity"]).tolist() == [True, False, True]
    assert table.iloc[2]["perplexity"] == whole.iloc[2]["perplexity"]
    written = (tmp_path / "run" / "tables" / "ablation.md").read_text()
    assert re.search(r"sparsify top wasserstein.*not finite in 5 of 5 windows", written)

    def never_finite(*_: Any, **__: Any) -> None:
        raise NotFiniteError("not finite")

    monkeypatch.setattr(setup, "score_of", never_finite)
    with pytest.raises(NotFiniteError):
        run(tiny_model("llama"))


def test_outputs_that_overflow_make_an_arm_without_a_score() -> None:
    """Without a hook in between: means that no float32 holds."""
    measured = run_of("llama").to_dataset()
    means = np.full(measured.sizes["neuron"], 1e300)
    broken = measured.assign(mean=("neuron", means))
    table = entangle.ablate(
        tiny_model("llama"),
        None,
        held_out(),
        run=broken,
        intervention=["mean", "zero"],
        sets=["std"],
    )
    assert np.isfinite(table["perplexity"]).tolist() == [True, False, True]
    assert re.search(r"not finite.*\b5 of 5 windows", table["problem"][1])


def test_a_layer_without_a_trusted_neuron_stays_dense() -> None:
    measured = run_of("llama").to_dataset().load().copy(deep=True)
    names = measured["layer"].to_numpy()
    measured["wasserstein_error"][names == "model.layers.1.mlp.up_proj"] = 0.5
    words: dict[str, Any] = {"sets": ["wasserstein", "random"], "seeds": 2, "share": [SHARE]}
    words |= {"intervention": ["sparsify", "zero", "mean"], "layers": ["*.1.mlp.*"]}
    for experts in (1, 4):
        table = entangle.ablate(
            tiny_model("llama"), windows(), held_out(), run=measured, experts=[experts], **words
        )
        assert (table["neurons"][1:] == round(SHARE * 37) + round(SHARE * 24)).all()
        assert np.isfinite(table["perplexity"]).all()


# Folders.


def test_tables_are_written_with_what_they_were_made_of(tmp_path: Path) -> None:
    model, text = tiny_model("llama"), windows()
    token = COMMAND.set("entangle ablate")
    table = run(model, windows=text, share=[0.1, 0.3], experts=[1, 4], out=tmp_path / "run")
    COMMAND.reset(token)
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "arms",
        "log.json",
        "run.json",
        "tables",
    ]
    words_of = dict.fromkeys(("intervention", "sparsity", "block", "set", "problem"), str)
    written = pd.read_csv(folder / "tables" / "ablation.csv", dtype=words_of)
    filled = written.fillna(dict.fromkeys(words_of, ""))
    pd.testing.assert_frame_equal(filled, table, check_exact=True)
    about = json.loads((folder / "run.json").read_text())
    assert about == json.loads(json.dumps(table.attrs))
    expected = {
        "command": "entangle ablate",
        "fingerprint": text.fingerprint,
        "evaluation_fingerprint": held_out().fingerprint,
        "evaluation_windows": 5,
        "evaluation_length": 16,
        "tokens": 192,
        "layers": ["*"],
        "pruned": True,
        "missing_sets": [],
    }
    assert about | expected == about
    assert about["run"]["fingerprint"] == random_windows(10, seed=11).fingerprint
    assert len(about["arms"]) == 2 * 2 * 3 == len(list((folder / "arms").iterdir())) - 1
    log = json.loads((folder / "log.json").read_text())
    assert log["arms_run"] == 13
    markdown = (folder / "tables" / "ablation.md").read_text()
    assert re.search(r"\b192 tokens.*random.*\b12 windows of 16\b", markdown)
    assert re.search(r"\b75 tokens.*random.*\b5 windows of 16\b", markdown)
    with pytest.raises(FileExistsError, match=r"run exists.*--overwrite"):
        run(model, out=tmp_path / "run")


TABLES = ("arms.csv", "ablation.csv", "ablation.md")


@pytest.mark.parametrize("killed_at", [1, 5])
def test_killed_while_scoring_it_goes_on_and_prunes_nothing_again(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"experts": [1, 4], "intervention": ["sparsify", "negative"]}
    run(tiny_model("llama"), out=tmp_path / "whole", **words)
    scored, pruned = [], []

    def interrupted(*args: Any, **options: Any) -> Any:
        scored.append(args)
        if len(scored) == killed_at:
            raise KeyboardInterrupt
        return entangle.perplexity(*args, **options)

    def counted(*args: Any, **options: Any) -> Any:
        pruned.append(args)
        return prune(*args, **options)

    monkeypatch.setattr(setup, "score_of", interrupted)
    monkeypatch.setattr(sparse_neurons, "prune", counted)
    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        run(model, out=tmp_path / "run", **words)
    assert untouched(model)
    assert len(pruned) == (21 * 2 if killed_at > 1 else 0)  # the dense model is scored first
    assert len(list((tmp_path / "run.partial" / "arms").glob("*.json"))) == killed_at - 1
    assert not (tmp_path / "run").exists()
    if killed_at > 1:  # else there is nothing to lose
        with pytest.raises(
            FileExistsError, match=r"run\.partial.*skip_first\D+0\D+1\b.*--overwrite"
        ):
            run(model, out=tmp_path / "run", skip_first=1, **words)
    run(model, out=tmp_path / "run", **words)
    assert len(pruned) == 21 * 2
    assert len(scored) == 1 + 10  # 3 arms of each of 3 kinds, the dense model, and the killed one
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    assert log["arms_run"] == 10 - (killed_at - 1)
    for name in TABLES:
        both = [(tmp_path / folder / "tables" / name).read_bytes() for folder in ("whole", "run")]
        assert both[0] == both[1]
    assert not (tmp_path / "run" / "rows").exists()


def test_killed_while_pruning_it_prunes_only_the_blocks_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_model("llama"), experts=[1, 4], out=tmp_path / "whole")
    pruned = []

    def counted(*args: Any, **options: Any) -> Any:
        pruned.append(args)
        if len(pruned) == 14 + 14 + 3:  # in the last block
            raise KeyboardInterrupt
        return prune(*args, **options)

    monkeypatch.setattr(sparse_neurons, "prune", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model("llama"), experts=[1, 4], out=tmp_path / "run")
    pruned.clear()
    run(tiny_model("llama"), experts=[1, 4], out=tmp_path / "run")
    assert len(pruned) == 14
    for name in TABLES:
        both = [(tmp_path / folder / "tables" / name).read_bytes() for folder in ("whole", "run")]
        assert both[0] == both[1]
