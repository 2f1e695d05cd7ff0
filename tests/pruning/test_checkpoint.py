"""Pruning that was interrupted goes on with the blocks that are done, and ends with the same bytes."""

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader
from transformers import PreTrainedModel

import entangle
from entangle.model.folders import new_file
from entangle.model.layers import LinearLayer, find_blocks, find_layers, weight_of
from entangle.model.loading import load_model, save_model
from entangle.model.sparse_inputs import rule_tensors
from entangle.pruning import block as pruned_block
from entangle.pruning import checkpoint, sparsifying
from entangle.pruning.block import PrunedLayer
from entangle.pruning.checkpoint import FinishedBlocks
from entangle.pruning.sparsifying import Sparsified
from entangle.runs import store
from tests.forking import Forked
from tests.model.test_hooks import explode
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import save_tiny, tiny_tokenizer

# What transformers says when a model larger than memory is saved.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")

DEPTH = {"llama": 3, "gpt2": 2}  # gpt2's weights are stored transposed
ARMS: list[dict[str, Any]] = [
    {"propagate": "sparse"},
    {"propagate": "dense"},
    {"propagate": "sparse", "experts": 3},
    {"propagate": "dense", "experts": 3},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of saved models."""
    folder = tmp_path_factory.mktemp("models")
    for name in DEPTH:
        save_tiny(folder / name, name)
    return folder


def loaded(models: Path, name: str, place: str = "memory") -> PreTrainedModel:
    words: dict[str, Any] = {} if place == "memory" else {"offload": models / f"{name} offloaded"}
    return load_model(models / name, **words)


def sparsify(model: PreTrainedModel, out: Path | None, **options: Any) -> Sparsified:
    words: dict[str, Any] = {"batch_size": 2, "tokenizer": tiny_tokenizer()} | options
    sparsity = words.pop("sparsity", 0.5)
    return entangle.sparsify(model, random_windows(), sparsity=sparsity, out=out, **words)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files but log.json, which says how long it took."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def same_state(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    left, right = (one.state_dict() | rule_tensors(one) for one in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@contextmanager
def pruning(at: int | None = None) -> Iterator[list[int]]:
    """Note the blocks that are pruned, and interrupt one."""
    blocks: list[int] = []
    own = pruned_block.prune_layers

    def prune(
        model: PreTrainedModel, layers: Sequence[LinearLayer], *args: Any, **words: Any
    ) -> Any:
        if layers[0].block == at:
            raise KeyboardInterrupt
        blocks.append(layers[0].block)
        return own(model, layers, *args, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsifying, "prune_layers", prune)
        yield blocks


def interrupted(model: PreTrainedModel, out: Path, at: int, **options: Any) -> None:
    with pruning(at) as blocks, pytest.raises(KeyboardInterrupt):
        sparsify(model, out, **options)
    assert blocks == list(range(at))
    assert not out.exists()
    partial = out.with_name(out.name + ".partial")
    assert partial.exists() == (at > 0)  # with nothing to go on with nothing is left
    there = {path.name for path in (partial / "blocks").glob("*.json")}
    assert there == {f"{block}.json" for block in range(at)}


@pytest.mark.parametrize("arm", ARMS, ids=str)
@pytest.mark.parametrize("name", DEPTH)
def test_interrupted_at_any_block_it_ends_with_the_same_bytes(
    name: str, arm: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    truth = loaded(models, name)
    whole = sparsify(truth, tmp_path / "whole", **arm)
    expected = contents(tmp_path / "whole")
    assert ("expansion.json" in expected) == ("experts" in arm)
    assert "blocks/0.json" not in expected
    for at in range(DEPTH[name]):
        interrupted(loaded(models, name), tmp_path / str(at), at, **arm)
        model = loaded(models, name)
        with pruning() as blocks:
            found = sparsify(model, tmp_path / str(at), **arm)
        assert blocks == list(range(at, DEPTH[name]))
        assert contents(tmp_path / str(at)) == expected
        pd.testing.assert_frame_equal(found.layers, whole.layers, check_exact=True)
        assert (found.sparsity, found.error) == (whole.sparsity, whole.error)
        assert found.attributes == whole.attributes
        assert same_state(model, truth)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("arm", ARMS, ids=str)
@pytest.mark.parametrize("name", DEPTH)
def test_a_model_in_files_becomes_the_same_model(
    name: str, arm: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    truth = loaded(models, name)
    whole = sparsify(truth, tmp_path / "whole", **arm)
    before = contents(models / name)
    found = sparsify(loaded(models, name, "files"), tmp_path / "files", **arm)
    assert contents(models / name) == before
    pd.testing.assert_frame_equal(found.layers, whole.layers, check_exact=True)
    one, other = (load_model(tmp_path / folder) for folder in ("files", "whole"))
    assert same_state(one, other)
    assert same_state(one, truth)
    files = [contents(tmp_path / folder) for folder in ("files", "whole")]
    if "experts" not in arm:  # a block in a file, or all in one
        for each in files:
            for file in [name for name in each if name.startswith("model")]:
                del each[file]
            noted = json.loads(each.pop("sparsity.json"))
            each["layers"] = json.dumps(noted["layers"]).encode()
    assert files[0] == files[1]


@pytest.mark.parametrize("places", [("files", "files"), ("memory", "files"), ("files", "memory")])
@pytest.mark.parametrize("arm", ARMS[1:3], ids=str)
@pytest.mark.parametrize("name", DEPTH)
def test_where_the_weights_are_may_change_when_it_goes_on(
    name: str, arm: dict[str, Any], places: tuple[str, str], models: Path, tmp_path: Path
) -> None:
    truth = loaded(models, name)
    sparsify(truth, tmp_path / "whole", **arm)
    at = DEPTH[name] - 1
    interrupted(loaded(models, name, places[0]), tmp_path / "run", at, **arm)
    with pruning() as blocks:
        sparsify(loaded(models, name, places[1]), tmp_path / "run", **arm)
    assert blocks == [at]
    assert same_state(load_model(tmp_path / "run"), truth)
    if "experts" in arm:
        assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("place", "arm"),
    [
        *(("memory", arm) for arm in ARMS),
        *(("files", arm) for arm in ARMS),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", DEPTH)
def test_interrupted_while_the_model_is_written_it_prunes_nothing_again(
    name: str,
    place: str,
    arm: dict[str, Any],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And of what was written nothing stays, as it may be cut into other files than the next."""
    truth = loaded(models, name)
    sparsify(truth, tmp_path / "whole", **arm)

    def half(model: PreTrainedModel, _: Any, folder: Path, *described: Any) -> None:
        save_model(model, None, folder, *described)
        for file in folder.glob("model*.safetensors"):
            file.write_bytes(file.read_bytes()[:-9])
        raise KeyboardInterrupt

    other = {"memory": "files", "files": "memory"}[place]
    with monkeypatch.context() as patch:
        patch.setattr(sparsifying, "save_model", half)
        with pytest.raises(KeyboardInterrupt):
            sparsify(loaded(models, name, other), tmp_path / "run", **arm)
    with pruning() as blocks:
        found = sparsify(loaded(models, name, place), tmp_path / "run", **arm)
    assert blocks == []
    assert same_state(load_model(tmp_path / "run"), truth)
    table = json.loads((tmp_path / "whole" / "sparsity.json").read_text())
    assert (found.sparsity, found.error) == (table["sparsity"], table["error"])
    if place == "memory" or "experts" in arm:
        assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_table_of_blocks_that_are_all_read_is_the_table(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, which JSON does not have, and whole numbers come back as what they were."""
    whole = sparsify(loaded(models, "gpt2"), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(sparsifying, "save_model", explode(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            sparsify(loaded(models, "gpt2"), tmp_path / "run")
    found = sparsify(loaded(models, "gpt2"), tmp_path / "run")
    pd.testing.assert_frame_equal(found.layers, whole.layers, check_exact=True)


@pytest.mark.parametrize("arm", ARMS[1:3], ids=str)
def test_a_block_whose_files_are_half_there_is_pruned_again(
    arm: dict[str, Any], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparsify(loaded(models, "llama"), tmp_path / "whole", **arm)
    write = store.write_json

    def stop(file: Path, content: Any) -> None:
        if file.name == "1.json":
            raise KeyboardInterrupt
        write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            sparsify(loaded(models, "llama"), tmp_path / "run", **arm)
    partial = tmp_path / "run.partial"
    assert (partial / ("experts" if "experts" in arm else "blocks") / "1.safetensors").exists()
    with pruning() as blocks:
        sparsify(loaded(models, "llama"), tmp_path / "run", **arm)
    assert blocks == [1, 2]
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("place", ["memory", "files"])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": ["*.1.mlp.*", "*.2.self_attn.*"], "propagate": "dense"},
        {"across": "owl"},
        {"method": "wanda", "mask": "block", "sparsity": 0.7, "skip_first": 2},
        # The inputs of down_proj are no groups of 4.
        {"sparsity": "2:4", "layers": ["*.self_attn.*", "*.up_proj"], "method": "magnitude"},
        {"inputs": "teal", "input_shares": "uniform", "propagate": "dense"},
        {"inputs": "wina", "input_shares": "uniform", "layers": ["*.mlp.*"], "experts": 2},
    ],
    ids=str,
)
def test_other_ways_to_prune_go_on_too(
    options: dict[str, Any], place: str, models: Path, tmp_path: Path
) -> None:
    truth = loaded(models, "llama")
    whole = sparsify(truth, tmp_path / "whole", **options)
    with pruning(2), pytest.raises(KeyboardInterrupt):
        sparsify(loaded(models, "llama", place), tmp_path / "run", **options)
    found = sparsify(loaded(models, "llama", place), tmp_path / "run", **options)
    assert same_state(load_model(tmp_path / "run"), truth)
    pd.testing.assert_frame_equal(found.layers, whole.layers, check_exact=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.6}, r"sparsity\D+0\.5\D+0\.6\b"),
        ({"experts": 4}, r"experts\D+3\D+4\b"),
        ({"propagate": "dense"}, r"propagate.*\bsparse\b.+\bdense\b"),
        ({"shrinkage": 0.0}, r"shrinkage\D+0\.5\D+0\.0"),
        ({"batch_size": 3}, r"batch_size\D+2\D+3\b"),
        ({"layers": ["*.mlp.*"]}, r"layers\W+\*\W.+\*\.mlp\.\*"),
    ],
)
def test_other_arguments_do_not_go_on_with_it(
    options: dict[str, Any], message: str, models: Path, tmp_path: Path
) -> None:
    interrupted(loaded(models, "gpt2"), tmp_path / "run", 1, experts=3)
    before = contents(tmp_path)
    model = loaded(models, "gpt2")
    with pytest.raises(FileExistsError, match=rf"run\.partial.*{message}.*--overwrite"):
        sparsify(model, tmp_path / "run", **{"experts": 3} | options)
    assert same_state(model, loaded(models, "gpt2"))
    assert contents(tmp_path) == before


def test_other_weights_do_not_go_on_with_it_and_overwrite_begins_anew(
    models: Path, tmp_path: Path
) -> None:
    interrupted(loaded(models, "gpt2"), tmp_path / "run", 1)
    other = loaded(models, "gpt2")
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    with pytest.raises(FileExistsError, match=r"run\.partial.*\bweights\b.*--overwrite"):
        sparsify(other, tmp_path / "run")
    sparsify(loaded(models, "gpt2"), tmp_path / "whole", sparsity=0.7)
    with pruning() as blocks:
        sparsify(loaded(models, "gpt2"), tmp_path / "run", sparsity=0.7, overwrite=True)
    assert blocks == [0, 1]
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize("place", ["memory", "files"])
def test_a_damaged_block_is_told(place: str, models: Path, tmp_path: Path) -> None:
    interrupted(loaded(models, "gpt2"), tmp_path / "run", 1)
    file = tmp_path / "run.partial" / "blocks" / "0.json"
    file.write_text(file.read_text()[:-9])
    with pytest.raises(OSError, match=r"blocks/0\.json.*damaged"):
        sparsify(loaded(models, "gpt2", place), tmp_path / "run")
    file.unlink()
    sparsify(loaded(models, "gpt2", place), tmp_path / "run")
    sparsify(loaded(models, "gpt2"), tmp_path / "whole")
    assert same_state(load_model(tmp_path / "run"), load_model(tmp_path / "whole"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize("experts", [1, 3])
def test_damaged_weights_of_a_block_are_told(experts: int, models: Path, tmp_path: Path) -> None:
    interrupted(loaded(models, "gpt2"), tmp_path / "run", 1, experts=experts)
    folder = "experts" if experts > 1 else "blocks"
    cut(tmp_path / "run.partial" / folder / "0.safetensors")
    with pytest.raises(OSError, match=rf"{folder}/0\.safetensors.*damaged"):
        sparsify(loaded(models, "gpt2"), tmp_path / "run", experts=experts)


# The blocks themselves.


@pytest.mark.parametrize("name", DEPTH)
def test_what_is_saved_of_a_block_is_what_is_loaded(
    name: str, models: Path, tmp_path: Path
) -> None:
    model = loaded(models, name)
    layers = [layer for layer in find_layers(model) if layer.block == 1]
    nothing = torch.empty(0, dtype=torch.float64)
    rows: list[dict[str, Any]] = [
        {"layer": layer.name, "error": 0.1 + number / 3, "zeros": number}
        for number, layer in enumerate(layers)
    ]
    with torch.no_grad():
        for layer in layers:
            weight: Any = layer.module.weight
            weight.mul_(torch.rand(weight.shape) > 0.5)
    done = FinishedBlocks(model, tmp_path)
    assert done.finished == set()
    done.save(layers, [PrunedLayer(row, nothing, nothing) for row in rows])
    assert done.finished == {1}
    fresh = loaded(models, name)
    again = FinishedBlocks(fresh, tmp_path)
    assert again.finished == {1}
    found = again.load([layer for layer in find_layers(fresh) if layer.block == 1])
    assert [one.row for one in found] == rows
    assert all(len(one.lost) == len(one.held_out) == 0 for one in found)
    assert same_state(fresh, model)
    assert not same_state(fresh, loaded(models, name))
    assert again.described() == {}
    (tmp_path / "other").touch()
    again.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_experts_of_a_model_in_files_are_let_go_block_by_block(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[int]] = []
    release_experts = FinishedBlocks.release_experts

    def watched(self: FinishedBlocks, block: int) -> None:
        release_experts(self, block)
        experts = [x for x in find_layers(model) if type(x.module).__name__ == "ExpertLinear"]
        held.append([layer.block for layer in experts if not weight_of(layer).is_meta])

    monkeypatch.setattr(checkpoint.FinishedBlocks, "release_experts", watched)
    model = loaded(models, "llama", "files")
    sparsify(model, tmp_path / "run", experts=3)
    assert held == [[], [], []]
    held.clear()
    model = loaded(models, "llama")
    sparsify(model, tmp_path / "memory", experts=3)
    assert list(map(len, held)) == [7, 14, 21]


# What needs the model in memory.


def test_a_model_in_files_needs_a_folder_to_be_pruned_into(models: Path) -> None:
    model = loaded(models, "llama", "files")
    with pytest.raises(ValueError, match=r"weights.*in files.*\bout\b"):
        sparsify(model, None)


def test_what_tries_many_prunings_needs_the_model_in_memory(models: Path, tmp_path: Path) -> None:
    windows, held_out = random_windows(), random_windows(5, seed=7)
    run = entangle.measure(loaded(models, "llama"), random_windows(6, seed=11))
    model = loaded(models, "llama", "files")
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"sweep.*in memory.*offload"):
        entangle.sweep(model, windows, held_out, sparsity=[0.5], out=out)
    with pytest.raises(ValueError, match=r"ablation.*in memory.*offload"):
        entangle.ablate(model, windows, held_out, run=run, out=out)
    with pytest.raises(ValueError, match=r"disentangling.*in memory.*offload"):
        entangle.disentangle(model, windows, held_out, run=run, experts=[2], out=out)
    assert list(tmp_path.iterdir()) == []
    score = entangle.perplexity(model, held_out)  # but scoring does not
    expected = entangle.perplexity(loaded(models, "llama"), held_out)
    assert np.array_equal(score.window_nats, expected.window_nats)


# Killed.

KILLED = """
import sys, torch
from pathlib import Path
from tests.pruning.test_checkpoint import sparsify
from entangle.model.loading import load_model
torch.set_num_threads(1)
sparsify(load_model(sys.argv[1]), Path(sys.argv[2]), experts=3)
"""


def test_killed_after_a_block_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", num_hidden_layers=12)
    sparsify(load_model(tmp_path / "model"), tmp_path / "whole", experts=3)
    blocks = tmp_path / "killed.partial" / "blocks"
    process = Forked(["-c", KILLED, tmp_path / "model", tmp_path / "killed"])
    while process.poll() is None and not (blocks / "0.json").exists():
        time.sleep(0.002)
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # or the machine is too fast for this test
    left = [block for block in range(12) if (blocks / f"{block}.json").exists()]
    assert left == list(range(len(left)))
    assert 0 < len(left) < 12
    for file in blocks.glob("*.partial.json"):  # see the test below
        file.unlink()
    with pruning() as blocks_pruned:
        sparsify(load_model(tmp_path / "model"), tmp_path / "killed", experts=3)
    assert blocks_pruned == list(range(len(left), 12))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_killed_while_a_block_is_written_it_goes_on(models: Path, tmp_path: Path) -> None:
    """What `folders.new_file` leaves of a file when the process is killed is no finished block."""
    interrupted(loaded(models, "gpt2"), tmp_path / "run", 1)
    kept = tmp_path / "run.partial" / "blocks"
    for name, data in [("1.json", b'{"rows": ['), ("1.safetensors", b"cut off")]:
        half = new_file(kept / name)
        half.__enter__().write_bytes(data)  # and no exit
    with pruning() as blocks:
        sparsify(loaded(models, "gpt2"), tmp_path / "run")
    assert blocks == [1]
    sparsify(loaded(models, "gpt2"), tmp_path / "whole")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def on_the_host(models: Path, name: str) -> PreTrainedModel:
    """Return a model whose blocks wait on the host, as accelerate leaves them beside a full GPU."""
    model = loaded(models, name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    loader = OffloadedWeightsLoader(state_dict=state, index={})
    prefix, blocks = find_blocks(model)
    for number, block in enumerate(blocks):
        attach_align_device_hook(
            block,
            execution_device=torch.device("cpu"),
            offload=True,
            weights_map=loader,
            module_name=f"{prefix}.{number}",
        )
    vars(model)["hf_device_map"] = {"": 0, prefix: "cpu"}
    return model


@pytest.mark.parametrize("arm", [{"propagate": "sparse"}, {"propagate": "dense"}, {"experts": 3}])
@pytest.mark.parametrize("name", DEPTH)
def test_of_a_model_on_the_host_what_is_pruned_is_written_too(
    name: str, arm: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    sparsify(loaded(models, name), tmp_path / "memory", **arm)
    sparsify(on_the_host(models, name), tmp_path / "host", **arm)
    one, other = (load_model(tmp_path / place) for place in ("memory", "host"))
    for (key, expected), (_, found) in zip(
        one.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected), key


def test_what_is_offloaded_by_hand_is_not_pruned(models: Path, tmp_path: Path) -> None:
    model = loaded(models, "llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"gate_proj.*offload.*load_model"):
        sparsify(model, tmp_path / "out", layers="*.mlp.*")
