"""What a command runs on: checked before anything is spent, hashed once."""

import dataclasses
import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import entangle
from entangle.model.hashing import KIND, UNNAMED, kind_of, weights_hash
from entangle.model.text import TokenWindows, token_windows
from entangle.runs import setup
from entangle.runs.setup import COMMAND, Setup
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_it_is_checked_before_a_folder_is_touched(tmp_path: Path) -> None:
    left = tmp_path / "run.partial" / "state" / "kept"
    left.parent.mkdir(parents=True)
    for file in (left, tmp_path / "run.partial" / ".lock"):
        file.touch()
    for wrong in ({"batch_size": 0}, {"skip_first": -1}, {"layers": "*.nothing"}):
        with pytest.raises((ValueError, LookupError)):
            entangle.measure(
                tiny_model(), random_windows(), out=tmp_path / "run", overwrite=True, **wrong
            )
    assert left.exists()


def test_another_model_is_told_by_its_weights_and_not_by_its_layers() -> None:
    windows = random_windows(4)
    run = entangle.measure(tiny_model("llama"), windows)
    name = str(run.to_dataset()["neuron"][0].item())
    with pytest.raises(ValueError, match="other weights"):
        entangle.contexts(
            tiny_model("gpt2"), windows, run=run, neurons=name, tokenizer=tiny_tokenizer()
        )
    with pytest.raises(ValueError, match="other weights"):
        entangle.ablate(
            tiny_model("gpt2"), None, random_windows(3, seed=5), run=run, intervention="zero"
        )


def test_what_are_no_windows_is_told_with_the_order() -> None:
    model, windows = tiny_model(), random_windows(3)
    wrong: list[Any] = ["data/text.txt", tiny_tokenizer(), model]
    for one in wrong:
        with pytest.raises(TypeError, match=f"{type(one).__name__}.*model, windows, evaluation"):
            entangle.measure(model, one)
        with pytest.raises(TypeError, match=f"{type(one).__name__}.*model, windows, evaluation"):
            entangle.sweep(model, windows, one, sparsity=0.5)


def letters(size: int, length: int = 16, seed: int = 0) -> TokenWindows:
    """All windows of a random text: the same text for the same size and seed, however it is cut."""
    text = "".join(random.Random(seed).choices(string.ascii_letters, k=size))
    return token_windows([text], tiny_tokenizer(), windows=None, length=length, bos="never")


Texts = dict[str, Any]
SEEN: dict[str, Callable[[Any, Texts], object]] = {
    "sweep": lambda model, of: entangle.sweep(model, of["seen"], of["again"], sparsity=0.5),
    # A budget chooses how many weights each row keeps by the text of its run.
    "budget": lambda model, of: entangle.sweep(
        model, of["other"], of["again"], sparsity=0.5, budget="std", run=of["run"]
    ),
    "ablate": lambda model, of: entangle.ablate(model, of["seen"], of["again"], run=of["innocent"]),
    "ablated run": lambda model, of: entangle.ablate(
        model, None, of["again"], run=of["run"], intervention="zero"
    ),
    "disentangle": lambda model, of: entangle.disentangle(
        model, of["seen"], of["again"], run=of["innocent"]
    ),
}


@pytest.mark.parametrize("how", SEEN)
def test_text_that_was_seen_is_refused_however_it_is_cut(how: str) -> None:
    model = tiny_model()
    texts = {"seen": letters(640), "again": letters(640, 21), "other": letters(640, seed=1)}
    runs = {
        name: entangle.measure(model, texts[text])
        for name, text in (("run", "seen"), ("innocent", "other"))
    }
    with pytest.raises(ValueError, match=r"\b(100|9\d)\.\d% of the tokens of the evaluation"):
        SEEN[how](model, texts | runs)


def test_shares_below_the_limit_are_stated(tmp_path: Path) -> None:
    model = tiny_model()
    seen, other = letters(640), letters(1_600, seed=1)
    held_out = dataclasses.replace(other, tokens=torch.cat([other.tokens[:79], seen.tokens[:1]]))
    run, innocent = (entangle.measure(model, text) for text in (seen, letters(640, seed=2)))
    words: dict[str, Any] = {"sets": "wasserstein", "intervention": "zero", "out": tmp_path / "run"}
    table = entangle.ablate(model, None, held_out, run=run, **words)
    assert table.attrs["overlap"] == {"run": 1 / 80}
    assert (
        "1.25% of the tokens of the evaluation"
        in (tmp_path / "run" / "tables" / "ablation.md").read_text()
    )
    words |= {"overwrite": True}
    table = entangle.ablate(model, None, held_out, run=innocent.to_dataset(), **words)
    assert table.attrs["overlap"] == {"run": None}  # a dataset has no hashes of its text's runs
    assert "no hashes" in (tmp_path / "run" / "tables" / "ablation.md").read_text()
    words |= {"intervention": "sparsify"}
    table = entangle.ablate(model, seen, held_out, run=innocent, **words)
    assert table.attrs["overlap"] == {"windows": 1 / 80, "run": 0}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["overlap"] == {
        "windows": 1 / 80,
        "run": 0,
    }


def test_windows_set_aside_may_be_the_runs_own() -> None:
    model, windows = tiny_model(), letters(640)
    run = entangle.measure(model, windows)
    found = entangle.choose_budget(
        model, windows, run=run, sparsity=0.5, budget="std", strength=0.1
    )
    assert found.table.attrs["overlap"] == {"windows": 0}


def test_weights_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counting(model: Any, kind: str) -> str:
        hashed.append(weights_hash(model, kind))
        return hashed[-1]

    monkeypatch.setattr(setup, "weights_hash", counting)
    model, windows = tiny_model(), random_windows(6)
    run = entangle.measure(model, windows)
    assert hashed == [run.attrs["weights"]] == [weights_hash(model)]
    entangle.sparsify(model, windows, sparsity=0.5, budget="std", run=run)
    assert len(hashed) == 2
    fresh, held = tiny_model(), random_windows(3, seed=5)
    entangle.ablate(fresh, windows, held, run=run, sets="wasserstein", share=0.1)
    assert len(hashed) == 3
    entangle.sweep(fresh, windows, held, sparsity=0.5, budget=["uniform", "std"], run=run)
    assert len(hashed) == 4


def test_commands_that_share_a_model_hash_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counting(model: Any, kind: str) -> str:
        hashed.append(kind)
        return weights_hash(model, kind)

    monkeypatch.setattr(setup, "weights_hash", counting)
    model, windows = tiny_model(), random_windows(8)
    run = entangle.measure(model, windows)
    words: dict[str, Any] = {"sparsity": 0.5, "budget": "std", "run": run}
    for measured in (run.attrs["weights"], weights_hash(model, UNNAMED)):
        run.attrs["weights"] = measured
        hashed.clear()
        with setup.hashed_once():
            entangle.choose_budget(model, windows, strength=0.1, **words)
            found = entangle.sparsify(tiny_model(), windows, **words)
        assert found.attributes["weights"] == weights_hash(tiny_model())
        assert sorted(hashed) == sorted({KIND, kind_of(measured)})
    assert weights_hash(model) == weights_hash(tiny_model())  # the search restores the weights
    hashed.clear()
    entangle.sparsify(tiny_model(), windows, **words)
    assert hashed == [UNNAMED, KIND]  # outside the body nothing is kept


def test_runs_with_a_hash_of_an_older_or_a_newer_version() -> None:
    model, windows = tiny_model(), random_windows(6)
    run = entangle.measure(model, windows)
    words: dict[str, Any] = {"sparsity": 0.5, "budget": "std", "run": run}
    old = weights_hash(model, UNNAMED)
    run.attrs["weights"] = old
    other = tiny_model(seed=1)
    refused = rf"other weights.*{old[:12]}.*{weights_hash(other, UNNAMED)[:12]}"
    with pytest.raises(ValueError, match=refused):
        entangle.sparsify(other, windows, **words)
    found = entangle.sparsify(model, windows, **words)
    assert kind_of(found.attributes["weights"]) == KIND
    run.attrs["weights"] = "sha3-256:" + "0" * 64
    with pytest.raises(ValueError, match=rf"sha3-256.*{KIND}"):
        entangle.sparsify(tiny_model(), windows, **words)


@pytest.fixture
def command() -> Iterator[str]:
    token = COMMAND.set("entangle measure it")
    yield "entangle measure it"
    COMMAND.reset(token)


def test_the_command_that_runs_is_in_the_provenance(command: str) -> None:
    found = Setup.of(tiny_model(), random_windows(3))
    assert found.provenance()["command"] == command
    assert found.provenance()["tokens"] == found.tokens == 3 * 16


def test_in_python_no_command_runs() -> None:
    assert Setup.of(tiny_model(), random_windows(3)).provenance()["command"] is None


def test_layers_are_in_the_order_of_the_model_and_known_by_block() -> None:
    found = Setup.of(tiny_model(), random_windows(3), layers=["*.2.mlp.*", "*.0.mlp.up_proj"])
    assert [layer.name for layer in found.layers] == [
        "model.layers.0.mlp.up_proj",
        *(f"model.layers.2.mlp.{role}_proj" for role in ("gate", "up", "down")),
    ]
    assert {block: len(some) for block, some in found.blocks.items()} == {0: 1, 2: 3}
    assert found.last_block == 2
