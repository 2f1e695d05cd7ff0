"""The real 135M model pruned on real text: against the published algorithm, and as it is saved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import entangle
from benchmarks.prune import published
from entangle.model.layers import find_layers, weight_of
from entangle.model.sampling import walk_blocks
from entangle.numerics.masks import sparse_gpt, wanda
from entangle.numerics.moments import output_energy
from entangle.numerics.sparsity import Sparsity
from entangle.pruning.calibration import Calibration, calibrate
from entangle.pruning.options import ONE

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "smollm2-135m"
THIRD = ["model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"]  # down_proj takes minutes
FIFTH = ["model.layers.5.mlp.up_proj", "model.layers.5.mlp.down_proj"]

pytestmark = pytest.mark.real


class Calibrated:
    """The calibration of two layers of block 5 by 16,384 tokens, and the walk's own check."""

    def __init__(self) -> None:
        self.model = entangle.load_model(MODEL)
        windows = entangle.token_windows(
            DATA / "python-docs", entangle.load_tokenizer(MODEL), windows=32
        )
        walk = walk_blocks(self.model, windows, 4, 0)
        while walk.block < 5:
            walk.advance()
        layers = find_layers(self.model, FIFTH)
        self.weights = {layer.name: weight_of(layer) for layer in layers}
        self.calibrations: dict[str, Calibration] = calibrate(walk, layers, advance=False)[ONE]

    def error(self, layer: str, pruned: torch.Tensor) -> float:
        calibration, weight = self.calibrations[layer], self.weights[layer].double()
        lost = output_energy(weight - pruned.double(), calibration.moments).sum()
        return float(lost) / calibration.energy


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    return Calibrated()


@pytest.mark.parametrize("layer", FIFTH)
@pytest.mark.parametrize("text", ["0.5", "0.8", "2:4"])
def test_a_real_layer_loses_no_more_than_by_the_published_algorithm(
    calibrated: Calibrated, layer: str, text: str
) -> None:
    weight, moments = calibrated.weights[layer], calibrated.calibrations[layer].moments
    sparsity = Sparsity.parse(text)
    assert int(moments.count) == 32 * 512
    ours = calibrated.error(layer, sparse_gpt(weight, moments, sparsity, mask="block").weight)
    assert ours <= 1.0001 * calibrated.error(layer, published(weight, moments.gram, sparsity))
    by_row = calibrated.error(layer, sparse_gpt(weight, moments, sparsity, mask="row").weight)
    assert ours <= by_row < 1.15 * ours
    assert by_row < calibrated.error(layer, wanda(weight, moments, sparsity))


def test_errors_are_near_those_of_the_published_code(calibrated: Calibrated) -> None:
    """Its figures were measured by others, with its own code, on other windows of such a text."""
    layer = FIFTH[0]
    weight, moments = calibrated.weights[layer], calibrated.calibrations[layer].moments
    anchors = {"0.5": (0.03915, 0.0627), "0.8": (0.2231, 0.3118), "2:4": (0.07335, 0.1186)}
    for text, (expected, of_wanda) in anchors.items():
        sparsity = Sparsity.parse(text)
        pruned = sparse_gpt(weight, moments, sparsity, mask="block").weight
        assert calibrated.error(layer, pruned) == pytest.approx(expected, rel=0.06)
        assert calibrated.error(layer, wanda(weight, moments, sparsity)) == pytest.approx(
            of_wanda, rel=0.06
        )


def test_the_pruned_model_loads_anywhere_and_scores_the_same(tmp_path: Path) -> None:
    model, tokenizer = entangle.load_model(MODEL), entangle.load_tokenizer(MODEL)
    few: dict[str, Any] = {"windows": 2, "length": 128}
    windows = entangle.token_windows(DATA / "python-docs", tokenizer, **few)
    held_out = entangle.token_windows(DATA / "python-docs", tokenizer, **few, purpose="evaluation")
    dense = entangle.perplexity(model, held_out)
    found = entangle.sparsify(
        model, windows, sparsity=0.5, method="wanda", tokenizer=tokenizer, out=tmp_path / "pruned"
    )
    pruned = entangle.perplexity(model, held_out)
    assert dense.perplexity < pruned.perplexity < 20 * dense.perplexity
    assert len(found.layers) == 210
    assert found.sparsity == 0.5
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    plain.eval()
    assert np.array_equal(entangle.perplexity(plain, held_out).window_nats, pruned.window_nats)
    zeros = sum(int((weight_of(layer) == 0).sum()) for layer in find_layers(plain))
    assert zeros == found.layers["zeros"].sum() == found.layers["weights"].sum() / 2


def test_sixteen_experts_lose_less_on_text_that_they_have_not_seen(tmp_path: Path) -> None:
    tokenizer = entangle.load_tokenizer(MODEL)
    windows = entangle.token_windows(DATA / "python-docs", tokenizer, windows=32)
    held = entangle.token_windows(
        DATA / "python-docs", tokenizer, windows=4, length=128, purpose="evaluation"
    )
    model = entangle.load_model(MODEL)
    table = entangle.sweep(
        model,
        windows,
        held,
        sparsity=[0.7],
        method=["sparsegpt"],
        experts=[1, 16],
        assign=["kmeans", "random"],
        propagate=["dense"],
        layers=THIRD,
        solve=["greedy"],
        out=tmp_path / "sweep",
    )
    one, clusters, control = table["held_out_error"][1:]
    assert clusters < 0.95 * one < 0.95 * control  # a random split is worse than one expert
    assert table["held_out_improvement"][2] > 1.03 > 1 > table["held_out_improvement"][3]
    assert table["density"][2] == pytest.approx(0.3 + 16 * 576 / (2 * 576 * 1536), abs=1e-3)
    entangle.sparsify(
        model, windows, sparsity=0.7, experts=16, propagate="dense", layers=THIRD, solve="greedy",
        out=tmp_path / "mixture",
    )  # fmt: skip
    loaded = entangle.load_model(tmp_path / "mixture")
    score = entangle.perplexity(loaded, held)
    assert score.nats == table["nats"][2]
    kept = entangle.perplexity(model, held[:1])  # a batch of one: other last bits
    assert kept.nats == pytest.approx(score.window_nats[0], rel=1e-5)
    size = sum(file.stat().st_size for file in (tmp_path / "mixture" / "experts").iterdir())
    assert 0 <= size - table["disk_bytes"][2] < 5_000  # names and shapes
    assert size < 16 * (0.3 + 1 / 32) * 2 * 576 * 1536 * 4 * 1.003  # and two routers
