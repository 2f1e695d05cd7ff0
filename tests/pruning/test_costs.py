"""What layers cost, counted by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from entangle.model.experts import ExpertLinear
from entangle.model.layers import LinearLayer, find_layers, replace_layer, weight_of
from entangle.numerics.masks import Pruned
from entangle.numerics.routing import fit_router
from entangle.numerics.sparsity import Sparsity
from entangle.pruning import block, options
from entangle.pruning.calibration import calibrate
from entangle.pruning.costs import costs_of, model_multiply_adds, size_of
from entangle.pruning.options import Clustering
from tests.pruning.test_calibration import walk_of
from tests.tiny_models import tiny_model


def mixture(layer: LinearLayer) -> ExpertLinear:
    """Return three experts with one, two and three weights in each row."""
    rows = torch.randn(300, layer.inputs, generator=torch.Generator().manual_seed(0))
    router = fit_router(rows, 3)
    weight = torch.zeros(3, layer.neurons, layer.inputs)
    for index in range(3):
        weight[index, :, : index + 1] = 1
    return ExpertLinear(weight, None, router, [70, 20, 10])


def test_multiply_adds_are_weighed_by_the_tokens_of_each_expert() -> None:
    model = tiny_model("llama")
    (layer,) = find_layers(model, ["*.0.mlp.up_proj"])
    expanded = replace_layer(model, layer, mixture(layer))
    found = costs_of(expanded)
    assert found["multiply_adds"] == pytest.approx(layer.neurons * (0.7 + 0.2 * 2 + 0.1 * 3))
    assert found["stored"] == layer.neurons * 6
    assert found["router_multiply_adds"] == layer.inputs * 3
    shared = mixture(layer)
    shared.owns_router = False
    without = costs_of(replace_layer(model, layer, shared))
    assert without["router_multiply_adds"] == 0
    assert found["disk_bytes"] - without["disk_bytes"] == 4 * (layer.inputs * 3 + 3)


def test_a_model_expanded_in_part_needs_fewer_multiply_adds() -> None:
    model = tiny_model("llama")
    dense = model_multiply_adds(model)
    gate, up = find_layers(model, ["*.0.mlp.gate_proj", "*.0.mlp.up_proj"])
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    every = sum(weight_of(layer).numel() for layer in find_layers(model))
    assert dense == every + head.weight.numel()
    first, second = mixture(gate), mixture(up)
    second.router, second.owns_router = first.router, False
    replace_layer(model, gate, first)
    replace_layer(model, up, second)
    left = dense - 2 * gate.neurons * gate.inputs
    router = 3 * gate.inputs  # which both share
    assert model_multiply_adds(model) == pytest.approx(left + 2 * gate.neurons * 1.4 + router)


def test_a_folder_is_as_large_as_all_its_weights(tmp_path: Path) -> None:
    sizes = {"dense.safetensors": 100, "experts/0.safetensors": 23, "a.json": 7}
    for name, size in (sizes | {"blocks/0.safetensors": 400}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    assert size_of(tmp_path, without=tmp_path / "blocks") == 123


def test_the_damping_of_a_mixture_is_that_of_its_worst_expert(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walk = walk_of()
    (layer,) = find_layers(walk.model, ["*.0.mlp.down_proj"])
    clustering = Clustering(3)
    calibration = calibrate(walk, [layer], [clustering], advance=False)[clustering]
    weight = weight_of(layer).expand(3, -1, -1)
    monkeypatch.setattr(block, "prune", lambda *_, **__: Pruned(weight, (0.01, 1.0, 0.1)))
    (found,) = block.prune_layers(
        walk.model, [layer], calibration, options.Pruning(sparsity=Sparsity(0.5), experts=3)
    )
    assert found.row["damping"] == 1.0
