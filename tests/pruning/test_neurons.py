"""Rows that are pruned once: those of fewer neurons, and their outputs, against plain products."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer, weight_of
from entangle.model.sampling import walk_blocks
from entangle.numerics.masks import prune
from entangle.numerics.routing import CentroidRouter
from entangle.numerics.sparsity import Sparsity
from entangle.pruning import neurons
from entangle.pruning.calibration import calibrate
from entangle.pruning.neurons import SparseNeurons, load_neurons, prune_neurons, sparse_neurons
from entangle.pruning.options import ONE, Clustering
from entangle.runs import setup
from entangle.runs.setup import Setup
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model


def layer_of(module: nn.Module) -> LinearLayer:
    return LinearLayer("h.0.up", 0, "up", module)


def test_rows_among_others_are_those_rows() -> None:
    rows = SparseNeurons(torch.tensor([2, 3, 7, 11]), torch.randn(4, 5), None, [9])
    few = rows.among(torch.tensor([3, 11]))
    assert few.neurons.tolist() == [3, 11]
    assert torch.equal(few.weight, rows.weight[[1, 3]])
    assert torch.equal(rows.among(rows.neurons).weight, rows.weight)
    several = SparseNeurons(rows.neurons, torch.randn(3, 4, 5), None, [9, 1, 2])
    assert torch.equal(several.among(few.neurons).weight, several.weight[:, [1, 3]])
    assert several.among(few.neurons).counts == [9, 1, 2]


def modules() -> Sequence[nn.Module]:
    conv = Conv1D(8, 5)  # type: ignore[no-untyped-call]
    nn.init.normal_(conv.bias)
    return nn.Linear(5, 8), nn.Linear(5, 8, bias=False), conv


@pytest.mark.parametrize("kind", range(3))
def test_outputs_of_sparse_rows_have_the_layers_bias(kind: int) -> None:
    module, neurons = modules()[kind], torch.tensor([0, 3, 6])
    layer, inputs = layer_of(module), torch.randn(2, 4, 5)
    dense = SparseNeurons(neurons, weight_of(layer)[neurons], None, [1]).outputs(layer)
    with torch.no_grad():
        torch.testing.assert_close(dense(inputs), module(inputs)[..., neurons])
        zeros = SparseNeurons(neurons, torch.zeros(3, 5), None, [1]).outputs(layer)(inputs)
        bias = getattr(module, "bias", None)
        bias = torch.zeros(8) if bias is None else bias
        assert torch.equal(zeros, bias[neurons].expand(2, 4, 3))


@pytest.mark.parametrize("kind", range(3))
def test_outputs_of_several_experts_are_those_of_each_tokens_own(kind: int) -> None:
    torch.manual_seed(0)
    module, neurons = modules()[kind], torch.tensor([1, 5])
    router = CentroidRouter(torch.randn(5, 3), torch.zeros(3))
    rows = SparseNeurons(neurons, torch.randn(3, 2, 5), router, [1, 1, 1])
    inputs, bias = torch.randn(4, 6, 5), getattr(module, "bias", None)
    with torch.no_grad():
        found = rows.outputs(layer_of(module))(inputs)
        experts = router.assign(inputs.flatten(0, 1))
        assert len(set(experts.tolist())) == 3
        for expert, token, given in zip(
            experts, inputs.flatten(0, 1), found.flatten(0, 1), strict=True
        ):
            expected = rows.weight[expert] @ token + (0 if bias is None else bias[neurons])
            torch.testing.assert_close(given, expected)


# Pruned once, saved and read.

SEVERAL = Clustering(3)


def setup_of(name: str, layers: str) -> Setup:
    return Setup.of(tiny_model(name), random_windows(12), layers=layers, batch_size=2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])  # opt calls q, k, v, but has k, v, q
def test_what_is_saved_and_read_is_what_is_pruned_alone(name: str, tmp_path: Path) -> None:
    here = setup_of(name, "*.1.*")
    layers = here.layers
    assert {layer.block for layer in layers} == {1}
    kinds = [(ONE, Sparsity(0.5)), (SEVERAL, Sparsity(0.5)), (SEVERAL, Sparsity(0.25))]
    wanted = {layer.name: {0, 3, 5, 7} for layer in layers}
    prune_neurons(here, dict.fromkeys(kinds, wanted), tmp_path / "rows")
    walk = walk_blocks(here.model, random_windows(12), 2, 0)
    walk.advance()
    found = calibrate(walk, layers, [ONE, SEVERAL], advance=False)
    some = {layer.name: torch.tensor([3, 7]) for layer in layers}
    random_inputs = torch.randn(40, 64)
    for clustering, sparsity in kinds:
        read = load_neurons(tmp_path / "rows", layers, (clustering, sparsity), some)
        for layer in layers:
            calibration = found[clustering][layer.name]
            rows = read[layer.name]
            alone = sparse_neurons(layer, calibration, sparsity, some[layer.name])
            assert torch.equal(rows.weight, alone.weight)
            assert rows.counts == alone.counts == calibration.moments.count.reshape(-1).tolist()
            assert rows.neurons.tolist() == [3, 7]
            inputs = random_inputs[:, : layer.inputs]
            if clustering == ONE:
                assert rows.router is None
                whole = prune(weight_of(layer), calibration.moments, sparsity, solve="exact").weight
                assert torch.equal(rows.weight, whole[[3, 7]])
            else:
                assert rows.router is not None
                assert calibration.router is not None
                assert torch.equal(rows.router.assign(inputs), calibration.router.assign(inputs))
                owner = read[calibration.owner]
                assert rows.router is owner.router
                assert rows.owns_router == (owner is rows)
            assert torch.equal(rows.outputs(layer)(inputs), alone.outputs(layer)(inputs))


def test_what_is_there_is_not_pruned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned: list[int] = []
    walks: list[BlockWalk] = []

    def counted(weight: torch.Tensor, *args: Any, **options: Any) -> object:
        pruned.append(len(weight))
        return prune(weight, *args, **options)

    def walk(*args: Any) -> BlockWalk:
        walks.append(walk_blocks(*args))
        return walks[-1]

    monkeypatch.setattr(neurons, "prune", counted)
    monkeypatch.setattr(setup, "walk_blocks", walk)
    here = setup_of("llama", "*.up_proj")
    layers = here.layers
    wanted = {layer.name: {2, 7} for layer in layers}

    def prune_all(kinds: Sequence[tuple[Clustering, Sparsity]]) -> dict[str, bytes]:
        prune_neurons(here, dict.fromkeys(kinds, wanted), tmp_path)
        return {file.name: file.read_bytes() for file in sorted(tmp_path.iterdir())}

    assert prune_all([]) == {}
    assert walks == []
    kinds = [(ONE, Sparsity(0.5)), (SEVERAL, Sparsity.parse("2:4"))]
    whole = prune_all(kinds)
    assert list(whole) == [
        f"{b}-{end}.safetensors" for b in range(3) for end in ("1-0.5", "3-2of4")
    ]
    assert (pruned, len(walks)) == ([2] * 6, 1)
    assert prune_all(kinds) == whole
    assert (len(pruned), len(walks)) == (6, 1)
    (tmp_path / "1-3-2of4.safetensors").unlink()
    assert prune_all(kinds) == whole  # from the dense inputs of block 1
    assert (len(pruned), len(walks)) == (6 + 2, 2)
    (tmp_path / "0-1-0.5.safetensors").write_bytes(b"cut off")
    with pytest.raises(OSError, match=r"0-1-0\.5\.safetensors.*damaged"):
        load_neurons(
            tmp_path, layers, kinds[0], {layer.name: torch.tensor([2]) for layer in layers}
        )
