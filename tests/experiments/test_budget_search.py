"""The chosen budget is the one with the best score on the windows set aside, and on no others."""

import dataclasses
from typing import Any

import pytest
import torch

import entangle
from entangle.experiments import budget_search
from entangle.experiments.sweeping import sweep_arms
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model

OPTIONS: dict[str, Any] = {"layers": "*.mlp.*", "across": ["depth"]}


def test_it_is_the_best_of_a_sweep_on_a_fourth_of_the_windows() -> None:
    model, windows = tiny_model("llama"), random_windows(22)
    run = entangle.measure(model, windows)
    found = entangle.choose_budget(model, windows, sparsity=0.6, run=run, **OPTIONS)
    aside = torch.arange(22) % 4 == 0
    rest, scored = (
        dataclasses.replace(windows, tokens=windows.tokens[which]) for which in (~aside, aside)
    )
    assert found.table["windows"][0] == 6
    nats = {}
    for budget in budget_search.VARIABLES:
        for strength in budget_search.STRENGTHS:
            pruned = tiny_model("llama")
            words: Any = {"budget": budget, "strength": strength, "across": "depth", "run": run}
            entangle.sparsify(
                pruned, rest, sparsity=0.6, propagate="dense", layers="*.mlp.*", **words
            )
            nats[budget, strength] = entangle.perplexity(pruned, scored).nats
    best = min(nats, key=lambda key: nats[key])
    assert (found.budget, found.strength) == best
    assert len(found.table) == 2 + len(nats)  # dense, and uniform rows
    uniform = tiny_model("llama")
    entangle.sparsify(
        uniform, rest, sparsity=0.6, propagate="dense", layers="*.mlp.*", across="depth"
    )
    base = entangle.perplexity(uniform, scored).nats
    assert found.against_uniform == pytest.approx(nats[best] - base, rel=1e-6)
    assert found.against_uniform_error > 0
    assert model.state_dict()["model.layers.0.mlp.up_proj.weight"].ne(0).all()


def test_a_named_variable_is_kept() -> None:
    model, windows = tiny_model("llama"), random_windows(8)
    run = entangle.measure(model, windows)
    found = entangle.choose_budget(model, windows, sparsity=0.6, run=run, budget=["std"], **OPTIONS)
    assert found.budget == "std"
    assert found.strength in budget_search.STRENGTHS
    assert {*found.table["budget"][2:]} == {"std"}
    with pytest.raises(ValueError, match=r"window.*\b4\b.*\b3\b"):
        entangle.choose_budget(model, random_windows(3), sparsity=0.6, run=run, **OPTIONS)


def test_uniform_rows_win_where_grading_only_hurts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model("llama"), random_windows(8)
    run = entangle.measure(model, windows)
    swept = sweep_arms

    def worse(*args: Any, **words: Any) -> Any:
        table = swept(*args, **words)
        table.loc[table["budget"] != "uniform", "nats"] += 100
        return table

    monkeypatch.setattr(budget_search, "sweep_arms", worse)
    found = entangle.choose_budget(
        model, windows, sparsity=0.6, run=run, layers="*.mlp.*", budget=["std"]
    )
    assert (found.budget, found.strength) == ("uniform", 0.0)


def test_it_prunes_as_it_is_told() -> None:
    model, windows = tiny_model("llama"), random_windows(8)
    run = entangle.measure(model, windows)
    words: dict[str, Any] = {"layers": "*.mlp.*", "budget": ["std"], "strength": [0.2]}
    found = entangle.choose_budget(model, windows, sparsity=0.6, run=run, method="wanda", **words)
    assert {*found.table["method"]} == {"dense", "wanda"}
    with pytest.raises(ValueError, match=r"\btrim\b.*strength"):
        entangle.choose_budget(model, windows, sparsity=0.6, run=run, budget=["std", "trim"])
    with pytest.raises(ValueError, match="experts=4"):
        entangle.choose_budget(model, windows, sparsity=0.6, run=run, experts=4)
    with pytest.raises(ValueError, match=r"sparsity.*one value.*\[0\.3, 0\.9\]"):
        entangle.choose_budget(model, windows, sparsity=[0.3, 0.9], run=run)
