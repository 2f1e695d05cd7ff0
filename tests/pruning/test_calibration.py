"""Samples and moments of a layer's inputs, against the model run as a whole."""

from pathlib import Path

import pytest
import torch

from entangle.model.blocks import BlockWalk
from entangle.model.layers import find_layers, weight_of
from entangle.model.sampling import sample_inputs, walk_blocks
from entangle.numerics.routing import RandomRouter
from entangle.pruning.calibration import (
    calibrate,
    load_calibrations,
    load_inputs,
    save_calibrations,
    save_inputs,
)
from entangle.pruning.options import ONE, Clustering
from tests.pruning.test_sparsifying import inputs_of, random_windows
from tests.tiny_models import tiny_model

WINDOWS = random_windows(20)  # of 16 tokens
CPU = torch.device("cpu")


def walk_of(batch_size: int = 2, skip_first: int = 0) -> BlockWalk:
    return walk_blocks(tiny_model("llama"), WINDOWS, batch_size, skip_first)


def places_of(rows: torch.Tensor, among: torch.Tensor) -> list[int]:
    """Return where among all inputs (tokens, inputs) each of some lies."""
    return [int((among - row).abs().sum(dim=1).argmin()) for row in rows]


@pytest.mark.parametrize("skip_first", [0, 3])
def test_the_same_tokens_are_chosen_in_any_batches(skip_first: int) -> None:
    model = tiny_model("llama")
    layers = [layer for layer in find_layers(model) if layer.block == 0]
    every = inputs_of(model, layers, WINDOWS, 0)
    chosen = {}
    for batch_size in (1, 3, 20):
        walk = walk_of(batch_size, skip_first)
        here = [layer for layer in find_layers(walk.model) if layer.block == 0]
        rows = sample_inputs(walk, here, 50, seed=0)
        assert {len(values) for values in rows.values()} == {50}
        down = "model.layers.0.mlp.down_proj"
        chosen[batch_size] = places_of(rows[down], every[down])
        for layer in layers:  # each the inputs of the very same tokens
            mine = every[layer.name][chosen[batch_size]]
            assert torch.allclose(rows[layer.name], mine, atol=1e-5), layer.name
        assert rows["model.layers.0.mlp.gate_proj"] is rows["model.layers.0.mlp.up_proj"]
        assert walk.block == 0
    assert chosen[1] == chosen[3] == chosen[20]
    assert len(set(chosen[1])) == 50
    assert all(place % 16 >= skip_first for place in chosen[1])
    assert len({place // 16 for place in chosen[1]}) > 12  # from all over the text


def test_a_seed_chooses_and_a_sample_holds_no_more_than_there_is() -> None:
    names = []
    for seed in (0, 1):
        walk = walk_of()
        (layer,) = find_layers(walk.model, ["*.0.mlp.down_proj"])
        names.append(sample_inputs(walk, [layer], 50, seed)[layer.name])
        everything = sample_inputs(walk, [layer], 1000, seed, advance=True)[layer.name]
        assert len(everything) == 320
        assert walk.block == 1
    assert not torch.equal(names[0], names[1])


def test_moments_are_those_of_each_cluster() -> None:
    model = tiny_model("llama")
    layers = [layer for layer in find_layers(model) if layer.block == 0]
    every = inputs_of(model, layers, WINDOWS, 0)
    walk = walk_of(3)
    here = [layer for layer in find_layers(walk.model) if layer.block == 0]
    heard = sample_inputs(walk, here, 1000, seed=0)  # all of them, to the bit as heard
    clusterings = [ONE, Clustering(3), Clustering(3, "random"), Clustering(3, components=0)]
    found = calibrate(walk, here, clusterings, advance=True)
    assert walk.block == 1
    assert list(found) == clusterings
    for clustering, calibrations in found.items():
        for layer in layers:
            calibration, rows = calibrations[layer.name], every[layer.name]
            energy = (rows.double() @ weight_of(layer).double().T).square().sum()
            assert calibration.energy == pytest.approx(float(energy), rel=1e-5)
            if clustering == ONE:
                assert calibration.router is None
                gram = rows.double().T @ rows.double()
                assert torch.allclose(calibration.moments.gram.double(), gram, rtol=1e-4, atol=1e-3)
                continue
            assert calibration.router is not None
            seen = heard[layer.name]
            labels = calibration.router.assign(seen)
            assert calibration.moments.count.tolist() == labels.bincount().tolist()
            for index, gram in enumerate(calibration.moments.gram):
                mine = seen[labels == index].double()
                assert torch.allclose(gram.double(), mine.T @ mine, rtol=1e-4, atol=1e-3)
        assert calibrations[layers[0].name].router is calibrations[layers[1].name].router
        assert calibrations[layers[0].name].moments is calibrations[layers[1].name].moments


def test_a_clustering_is_the_same_bits_with_or_without_others() -> None:
    alone, beside = walk_of(), walk_of()
    several = [ONE, Clustering(2), Clustering(3), Clustering(3, "random")]
    found = [
        calibrate(walk, find_layers(walk.model, ["*.0.mlp.*"]), clusterings, advance=True)
        for walk, clusterings in ((alone, [Clustering(3)]), (beside, several))
    ]
    for name, mine in found[0][Clustering(3)].items():
        theirs = found[1][Clustering(3)][name]
        assert torch.equal(mine.moments.lower, theirs.moments.lower)
        assert mine.moments.count.tolist() == theirs.moments.count.tolist()


@pytest.mark.parametrize("seed", [0, 2, 2**40])
def test_any_seed_draws_the_random_control(seed: int) -> None:
    routers = []
    for one in (seed, seed + 1):
        walk = walk_of()
        layers = find_layers(walk.model, ["*.0.mlp.down_proj"])
        found = calibrate(walk, layers, [Clustering(3, "random")], seed=one, advance=False)
        routers.append(found[Clustering(3, "random")][layers[0].name].router)
    first, second = routers
    assert isinstance(first, RandomRouter)
    assert isinstance(second, RandomRouter)
    assert not torch.equal(first.key, second.key)


def test_calibrations_and_rows_come_back_from_disk_bit_for_bit(tmp_path: Path) -> None:
    walk = walk_of()
    layers = [layer for layer in find_layers(walk.model) if layer.block == 0]
    rows = sample_inputs(walk, layers, 50, 0)
    save_inputs(tmp_path / "rows.safetensors", rows)
    loaded = load_inputs(tmp_path / "rows.safetensors", CPU)
    assert loaded.keys() == rows.keys()
    assert all(torch.equal(loaded[name], rows[name]) for name in rows)
    assert loaded["model.layers.0.mlp.gate_proj"] is loaded["model.layers.0.mlp.up_proj"]
    clusterings = [ONE, Clustering(3), Clustering(3, "random")]
    for clustering, calibrations in calibrate(walk, layers, clusterings, advance=False).items():
        file = tmp_path / f"{clustering.assign}{clustering.experts}.safetensors"
        save_calibrations(file, calibrations)
        again = load_calibrations(file, layers, CPU)
        assert again.keys() == calibrations.keys()
        for name, calibration in calibrations.items():
            assert again[name].energy == calibration.energy
            assert torch.equal(again[name].moments.lower, calibration.moments.lower)
            assert torch.equal(again[name].moments.count, calibration.moments.count)
            first, second = calibration.router, again[name].router
            assert type(first) is type(second)
            if first is not None and second is not None:
                assert torch.equal(first.assign(rows[name]), second.assign(rows[name]))
        gate, up = (again[f"model.layers.0.mlp.{role}_proj"] for role in ("gate", "up"))
        assert gate.moments is up.moments
        assert gate.router is up.router
