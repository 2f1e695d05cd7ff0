"""Interventions: which arms there are, whose neurons they treat, and what becomes of outputs."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from entangle import arguments
from entangle.experiments.ablating import ablate, changed_outputs, missing_sets, neurons_of
from entangle.experiments.interventions import (
    INTERVENTIONS,
    SETS,
    Ablation,
    Arm,
)
from entangle.model.layers import LinearLayer
from entangle.numerics.sparsity import Sparsity

WORDS: dict[str, Any] = {
    "intervention": ["sparsify"],
    "sparsity": [0.9],
    "experts": [1],
    "sets": ["wasserstein"],
    "share": [0.03],
    "seeds": 2,
    "solve": "greedy",
}


def layer_of(module: nn.Module, name: str = "h.0.up", block: int = 0) -> LinearLayer:
    return LinearLayer(name, block, "up", module)


@pytest.fixture
def run() -> xr.Dataset:
    """Return a run of two layers of 20 neurons in two blocks, without difficulty."""
    generator = np.random.default_rng(0)
    names = ("wasserstein", "kurtosis", "weight_norm", "std", "mean")
    variables = {name: generator.uniform(size=40) for name in names}
    variables["wasserstein_error"] = np.zeros(40)
    return xr.Dataset(
        {name: ("neuron", value) for name, value in variables.items()},
        coords={
            "layer": ("neuron", ["h.0.up"] * 20 + ["h.1.up"] * 20),
            "block": ("neuron", [0] * 20 + [1] * 20),
            "role": ("neuron", ["up"] * 40),
            "index": ("neuron", [*range(20)] * 2),
        },
    )


# Arms.


def test_arms_are_all_combinations_each_once(run: xr.Dataset) -> None:
    ablation = Ablation.of(
        intervention=["sparsify", "zero", "mean", "zero"],
        sparsity=[0.5, "0.5", "2:4"],
        experts=[1, 4],
        sets=["wasserstein", "random", "difficulty", "wasserstein"],
        share=[0.03, 0.1],
        seeds=3,
    )
    known = [name for name in ablation.sets if name not in missing_sets(run, ablation.sets)]
    arms = ablation.arms(known, [None])
    assert len(arms) == len(set(arms)) == (2 * 2 + 2) * 2 * (1 + 3)
    kinds = list(dict.fromkeys((arm.intervention, str(arm.sparsity), arm.experts) for arm in arms))
    assert kinds == [
        ("sparsify", "0.5", 1),
        ("sparsify", "2:4", 1),
        ("sparsify", "0.5", 4),
        ("sparsify", "2:4", 4),
        ("zero", "None", 1),
        ("mean", "None", 1),
    ]
    assert {arm.seed for arm in arms if arm.neurons == "random"} == {0, 1, 2}
    assert {arm.seed for arm in arms if arm.neurons != "random"} == {None}
    assert [arm.clustering.experts for arm in arms[::16]] == [1, 4, 1]
    assert missing_sets(run, ["difficulty", *SETS]) == ["difficulty", "wasserstein_bulk"]
    assert missing_sets(xr.DataTree(run), ["random", "bottom", "std"]) == []


def test_an_arm_of_each_block(run: xr.Dataset) -> None:
    words = WORDS | {"sets": ["bottom", "random"], "intervention": ["negative"]}
    arms = Ablation.of(**words).arms(words["sets"], [0, 1])
    assert [(arm.neurons, arm.block, arm.seed) for arm in arms] == [
        ("bottom", 0, None),
        ("bottom", 1, None),
        ("random", 0, 0),
        ("random", 0, 1),
        ("random", 1, 0),
        ("random", 1, 1),
    ]
    assert arms[2].settings() == {
        "intervention": "negative",
        "sparsity": "",
        "experts": 1,
        "neurons": "random",
        "share": 0.03,
        "seed": 0,
        "block": 0,
    }
    sparse = Arm("sparsify", Sparsity.parse("1:4"), 1, "std", 0.5, None, None)
    assert sparse.settings()["sparsity"] == "1:4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"intervention": ["luck"]}, "sparsify, zero, mean, negative.*'luck'"),
        ({"sets": ["beauty"]}, "wasserstein, bottom, random, .*'beauty'"),
        ({"sparsity": ["much"]}, "sparsity.*n:m.*'much'"),
        ({"sparsity": [1.5]}, r"sparsity.*n:m.*\b1\.5"),
        ({"share": [0.0]}, r"share.*\b0\.0\b"),
        ({"share": [0.1, 1.1]}, r"share.*\b1\.1\b"),
        ({"share": [math.nan]}, r"share.*\bnan\b"),
        ({"experts": [4, 0]}, r"\b1 expert.*\b0\b"),
        ({"sets": ["random"], "seeds": 0}, r"\b1 seed.*\b0\b"),
        ({"sets": ["wasserstein"], "seeds": -1}, r"seeds.* -1$"),
        *[
            ({name: []}, rf"one value.*\b{name}\b")
            for name in WORDS
            if name not in {"seeds", "solve"}
        ],
    ],
)
def test_words_that_are_none_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ablation.of(**WORDS | words)


def test_without_random_neurons_no_seed_is_needed() -> None:
    Ablation.of(**WORDS | {"seeds": 0, "sets": ["wasserstein", "bottom"], "share": [1]})
    Ablation.of(**WORDS | {"intervention": INTERVENTIONS, "sets": SETS})


@pytest.mark.parametrize("block", [None, 0, 1])
def test_each_set_is_what_its_name_says(run: xr.Dataset, block: int | None) -> None:
    layers = [layer_of(nn.Linear(3, 20), f"h.{i}.up", i) for i in range(2)]
    expected_layers = ["h.0.up", "h.1.up"] if block is None else [f"h.{block}.up"]

    def chosen(name: str, share: float = 0.25, seed: int | None = None) -> dict[str, list[int]]:
        arm = Arm("zero", None, 1, name, share, seed, block)
        found = neurons_of(run, arm, layers)
        assert list(found) == expected_layers
        return {layer: neurons.tolist() for layer, neurons in found.items()}

    for name in ("wasserstein", "bottom", "kurtosis", "weight_norm", "std"):
        for layer, neurons in chosen(name).items():
            key = "wasserstein" if name == "bottom" else name
            values = run[key].to_numpy()[run["layer"].to_numpy() == layer]
            order = np.argsort(values if name == "bottom" else -values)[:5]
            assert neurons == sorted(order.tolist())
    first, second = chosen("random", seed=0), chosen("random", seed=1)
    assert first != second
    assert {len(neurons) for neurons in (*first.values(), *second.values())} == {5}
    assert all({*first[layer]} < {*chosen("random", 0.5, 0)[layer]} for layer in first)


# Outputs.

CHOSEN = [1, 4]


def outputs_after(
    intervention: str, outputs: torch.Tensor, inputs: torch.Tensor | None = None, **words: Any
) -> torch.Tensor:
    options: dict[str, Any] = {"means": {}, "sparse": {}} | words
    change = changed_outputs(intervention, {"h.0.up": torch.tensor(CHOSEN)}, **options)
    kept = outputs.clone()
    inputs = torch.zeros(0) if inputs is None else inputs
    found = change(layer_of(nn.Linear(3, 6)), inputs, outputs)
    assert torch.equal(outputs, kept)  # what the layer gave is not written to
    return found


@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (1, 1, 6)])
@pytest.mark.parametrize("intervention", ["zero", "mean", "negative", "sparsify"])
def test_the_chosen_neurons_change_and_no_others(intervention: str, shape: tuple[int, ...]) -> None:
    outputs, inputs = torch.randn(shape), torch.randn(*shape[:-1], 3)
    means = torch.tensor([0.25, -3.0], dtype=torch.float64)
    weight = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, -1.0]])
    found = outputs_after(
        intervention,
        outputs,
        inputs,
        means={"h.0.up": means},
        sparse={"h.0.up": lambda rows: rows @ weight.T},
    )
    assert found.shape == outputs.shape
    expected = outputs.clone().reshape(-1, 6)
    for token, row in enumerate(inputs.reshape(-1, 3)):
        for place, neuron in enumerate(CHOSEN):
            expected[token, neuron] = {
                "zero": 0.0,
                "mean": float(means[place]),
                "negative": max(float(expected[token, neuron]), 0.0),
                "sparsify": float(2 * row[1]) if place == 0 else float(row[0] - row[2]),
            }[intervention]
    torch.testing.assert_close(found.reshape(-1, 6), expected)
    others = [0, 2, 3, 5]
    assert torch.equal(found[..., others], outputs[..., others])


def test_the_dtype_of_the_outputs_stays() -> None:
    outputs = torch.randn(4, 6).bfloat16()
    means = {"h.0.up": torch.tensor([0.5, 1.5], dtype=torch.float64)}
    for intervention in ("zero", "mean", "negative"):
        assert outputs_after(intervention, outputs, means=means).dtype == torch.bfloat16
    assert outputs_after("mean", outputs, means=means)[:, CHOSEN].tolist() == [[0.5, 1.5]] * 4


def test_without_chosen_neurons_nothing_changes() -> None:
    none = {"h.0.up": torch.tensor([], dtype=torch.int64)}
    outputs = torch.randn(4, 6)
    for name in ("zero", "mean", "negative"):
        means = {"h.0.up": torch.zeros(0)}
        change = changed_outputs(name, none, means=means, sparse={})
        assert torch.equal(change(layer_of(nn.Linear(3, 6)), torch.randn(4, 3), outputs), outputs)


def test_the_words_of_the_command_line_are_those_of_the_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["ablate", "RUN", "--evaluation", "TEXT", "--out", "NEW"]
    found = vars(arguments.parser().parse_args(words))
    options = inspect.signature(Ablation.of).parameters
    assert [*options] == [*WORDS]
    given = {name: found[name] for name in options if found[name] is not None}
    assert {*options} - {*given} == {"sparsity", "experts", "solve"}  # of `sparsify` only
    assert Ablation.of(**given) == Ablation.of()
    of_ablate = inspect.signature(ablate).parameters
    assert all(of_ablate[name].default == one.default for name, one in options.items())
    with pytest.raises(SystemExit):
        arguments.parser().parse_args(["ablate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(INTERVENTIONS)} [sparsify]" in said
    assert f"{', '.join(SETS)} [all]" in said
