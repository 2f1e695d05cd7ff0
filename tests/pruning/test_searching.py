"""A search for blocks: same total, weights of the method, the lowest KL divergence of its candidates."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import entangle
from entangle.model.layers import find_layers, weight_of
from entangle.numerics.evolution import SCORES
from entangle.pruning import searching
from entangle.pruning.levels import PrunedBlocks
from entangle.pruning.options import Pruning
from entangle.runs.setup import Setup
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model

WORDS: dict[str, Any] = {"layers": "*.mlp.*", "sparsity": 0.6}
TOTAL = sum(x.neurons * round(0.6 * x.inputs) for x in find_layers(tiny_model(), ["*.mlp.*"]))


def zeros_by_block(model: Any) -> dict[int, int]:
    found: dict[int, int] = {}
    for layer in find_layers(model, ["*.mlp.*"]):
        zeros = int((weight_of(layer) == 0).sum())
        found[layer.block] = found.get(layer.block, 0) + zeros
    return found


def test_blocks_have_the_weights_of_sparsify(tmp_path: Path) -> None:
    model, windows = tiny_model(), random_windows(12)
    setup = Setup.of(model, windows, layers="*.mlp.*", pruned=True)
    pruning = Pruning.of(sparsity=0.6, across="search", solve="greedy", propagate="dense")
    blocks = PrunedBlocks(setup, pruning, tmp_path)
    first = {0: TOTAL // 3 - 40, 1: TOTAL // 3 + 25, 2: TOTAL - 2 * (TOTAL // 3) + 15}
    other = dict(zip(first, [*first.values()][::-1], strict=True))
    for zeros in (first, other, first):  # at the end from the files
        blocks.put(zeros)
        truth = tiny_model()
        words: dict[str, Any] = {"solve": "greedy", "propagate": "dense", "across": "search"}
        entangle.sparsify(truth, windows, blocks=zeros, **WORDS, **words)
        assert zeros_by_block(model) == zeros_by_block(truth) == zeros
        for name, value in truth.state_dict().items():
            assert torch.equal(value, model.state_dict()[name])
    blocks.restore()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in tiny_model().state_dict().items())


def test_what_a_search_finds_has_the_lowest_divergence_and_the_same_total() -> None:
    model, windows = tiny_model(), random_windows(24)
    run = entangle.measure(model, windows)
    found = entangle.choose_budget(model, windows, by="search", run=run, scores=6 * SCORES, **WORDS)
    assert found.blocks is not None
    assert sum(found.blocks.values()) == TOTAL
    table = found.table
    assert table["across"].tolist() == ["uniform", "search", "entanglement", "search"]
    assert table["start"].tolist() == ["", "uniform", "", "entanglement"]
    assert table["scores"].tolist() == [0, 3 * SCORES, 0, 3 * SCORES]
    assert {*table["windows"]} == {6}
    for start, end in ((0, 1), (2, 3)):
        assert table["kl"][end] < table["kl"][start]
    # The best one, pruned and scored by the public functions on the same windows.
    rest, aside = windows.chosen(torch.arange(24) % 4 > 0), windows[::4]
    pruned = tiny_model()
    words: dict[str, Any] = {"across": "search", "solve": "greedy", "propagate": "dense"}
    entangle.sparsify(pruned, rest, blocks=found.blocks, **WORDS, **words)
    score = entangle.perplexity(pruned, aside, against=model)
    assert score.divergence is not None
    best = table.sort_values("kl").iloc[0]
    assert best["kl"] == pytest.approx(float(score.divergence.kl.mean()), rel=1e-4)
    assert best["nats"] == pytest.approx(score.nats, rel=1e-5)
    assert found.against_uniform == pytest.approx(best["nats"] - table["nats"][0], abs=1e-6)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in tiny_model().state_dict().items())


def test_a_finished_search_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {**WORDS, "across": "search", "scores": SCORES, "out": tmp_path / "out"}
    windows, search = random_windows(12), searching.search_blocks
    searches = []

    def once(*args: Any) -> Any:
        searches.append(args)
        return search(*args)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(searching, "search_blocks", once)
    with monkeypatch.context() as patch:
        patch.setattr("entangle.pruning.sparsifying.prune_model", killed)
        with pytest.raises(KeyboardInterrupt):
            entangle.sparsify(tiny_model(), windows, **words)
    model = tiny_model()
    entangle.sparsify(model, windows, **words)
    assert len(searches) == 1
    noted = json.loads((tmp_path / "out" / "search.json").read_text())
    assert {int(b): n for b, n in noted["zeros"].items()} == zeros_by_block(model)
    assert [row["across"] for row in noted["candidates"]] == ["uniform", "search"]


def test_a_sweep_searches_once_for_arms_that_have_the_same_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, search, searches = random_windows(12), searching.search_blocks, []

    def counted(*args: Any) -> Any:
        searches.append(args)
        return search(*args)

    monkeypatch.setattr(searching, "search_blocks", counted)
    table = entangle.sweep(
        tiny_model(),
        windows,
        random_windows(4, seed=9),
        method="sparsegpt",
        across=["uniform", "search"],
        solve=["greedy", "exact"],
        scores=SCORES,
        layers="*.mlp.*",
        sparsity=0.6,
        out=tmp_path / "out",
    )
    assert len(searches) == 1
    arms = table[table["method"] != "dense"]
    assert arms["scores"].tolist() == ["", str(SCORES)] * 2
    assert arms["realised"].nunique() == 1
    assert len([*(tmp_path / "out" / "searches").iterdir()]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"scores": SCORES - 1}, rf"{SCORES}.*{SCORES - 1}"),
        ({"across": "depth"}, "search.*across='depth'"),
        ({"by": "luck"}, "by='luck'"),
        ({"by": "strength", "scores": SCORES}, "run"),
    ],
)
def test_what_cannot_be_searched_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entangle.choose_budget(
            tiny_model(), random_windows(8), **{"by": "search", **WORDS, **words}
        )


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({0: 1, 1: 1}, r"blocks \[0, 1\].*blocks \[0, 1, 2\]"),
        ({0: 0, 1: 0, 2: TOTAL - 1}, "block 2"),
        ({0: 900, 1: 900, 2: 900}, r"2,700.*sparsity"),
    ],
)
def test_blocks_of_another_search_are_refused(blocks: dict[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entangle.sparsify(tiny_model(), random_windows(8), across="search", blocks=blocks, **WORDS)
    with pytest.raises(ValueError, match="across search"):
        entangle.sparsify(tiny_model(), random_windows(8), blocks=blocks, **WORDS)


def test_a_candidate_that_overflows_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model(), random_windows(12)
    put = PrunedBlocks.put

    def overflowing(self: Any, zeros: Any) -> None:
        put(self, zeros)
        if len({*zeros.values()}) > 1:  # any but the uniform one
            with torch.no_grad():
                weight_of(find_layers(model, ["*.2.mlp.down_proj"])[0]).mul_(math.inf)
            self._zeros.clear()

    monkeypatch.setattr(PrunedBlocks, "put", overflowing)
    found = entangle.choose_budget(model, windows, by="search", scores=SCORES, **WORDS)
    assert found.blocks is not None
    assert len({*found.blocks.values()}) == 1
