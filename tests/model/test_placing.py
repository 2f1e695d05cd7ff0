"""A model whose blocks stay in files is the model in memory, bit for bit, one block at a time."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import entangle
from entangle.measurement import measuring
from entangle.model import ranks
from entangle.model.blocks import BlockWalk
from entangle.model.hashing import weights_hash
from entangle.model.layers import find_blocks, find_layers, weight_of
from entangle.model.loading import load_model, save_model
from entangle.model.packing import save_tensors
from entangle.model.placing import (
    blocks_in_files,
    bytes_of_block,
    check_in_memory,
    input_device,
    is_offloaded,
    is_whole,
    load_block,
    read_weight_from,
    release_block,
    stored_parameters,
)
from entangle.model.sides import Recordable
from entangle.runs import store
from entangle.runs.store import open_run
from tests.model.test_blocks import BATCHES, whole_outputs
from tests.model.test_hooks import IDS, LEFT, RIGHT, counted, explode, hooks_left
from tests.model.test_loading import logits, write_gguf
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import ARCHITECTURES, save_tiny, tiny_model, tiny_vision_model

NAMES = ("llama", "gpt2", "gemma3", "mixtral")  # gpt2's weights are transposed, and one is tied
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of saved models."""
    folder = tmp_path_factory.mktemp("models")
    for name in (*ARCHITECTURES, "mixtral"):
        save_tiny(folder / name, name)
    return folder


def offloaded(models: Path, name: str = "llama", **options: Any) -> PreTrainedModel:
    return load_model(models / name, offload=models / f"{name} offloaded", **options)


def in_memory(module: nn.Module) -> list[bool]:
    return [not parameter.is_meta for parameter in module.parameters()]


def resident(model: PreTrainedModel) -> list[int]:
    """Return the blocks of which weights are in memory."""
    return [index for index, block in enumerate(find_blocks(model)[1]) if any(in_memory(block))]


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Where the weights are.


@pytest.mark.parametrize("name", [*ARCHITECTURES, "vision"])
def test_each_weight_has_one_place_and_those_of_blocks_are_in_files(name: str) -> None:
    config = (tiny_vision_model() if name == "vision" else tiny_model(name)).config
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    places = blocks_in_files(model, CPU)
    prefix, blocks = find_blocks(model)
    assert {place for place, where in places.items() if where == "disk"} == {
        f"{prefix}.{index}" for index in range(len(blocks))
    }
    assert {*places.values()} == {"disk", "cpu"}
    for key, _ in model.named_parameters():
        found = [where for place, where in places.items() if f"{key}.".startswith(f"{place}.")]
        assert found == ["disk" if key.startswith(f"{prefix}.") else "cpu"], key


@pytest.mark.parametrize("name", NAMES)
def test_only_blocks_are_in_files_and_the_model_computes_the_same(name: str, models: Path) -> None:
    model, whole = offloaded(models, name), load_model(models / name)
    prefix = find_blocks(model)[0] + "."
    names = [key for key, _ in model.named_parameters()]
    assert names == [key for key, _ in whole.named_parameters()]
    assert [not there for there in in_memory(model)] == [key.startswith(prefix) for key in names]
    assert (is_offloaded(model), is_whole(model), input_device(model)) == (True, True, CPU)
    assert (is_offloaded(whole), is_whole(whole), input_device(whole)) == (False, True, CPU)
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(whole))
    assert resident(model) == []


def test_a_model_that_is_not_loaded_is_not_whole(models: Path) -> None:
    model = offloaded(models)
    broken: Any = model
    broken.model.norm.weight = nn.Parameter(torch.empty(24, device="meta"))
    assert not is_whole(model)
    assert is_offloaded(model)
    empty = tiny_model().to("meta")  # type: ignore[arg-type]  # a device is right
    assert (is_whole(empty), is_offloaded(empty)) == (False, False)
    with pytest.raises(ValueError, match=r"weights.*not loaded"):
        BlockWalk(model, BATCHES)


def test_what_needs_the_model_in_memory_says_so(models: Path) -> None:
    check_in_memory(load_model(models / "llama"), "dancing")
    model = offloaded(models)
    message = r"^dancing .*in memory.*\boffload\b"
    for step in (lambda _: None, load_block):  # one whose weights were fetched is no other
        step(find_blocks(model)[1][0])
        with pytest.raises(ValueError, match=message):
            check_in_memory(model, "dancing")


@pytest.mark.parametrize("name", [*NAMES, "opt"])
def test_stored_parameters_and_their_hash_are_those_of_the_model_in_memory(
    name: str, models: Path
) -> None:
    model, whole = offloaded(models, name), load_model(models / name)
    expected = sorted(whole.named_parameters())
    blocks = find_blocks(model)[1]
    for step in (lambda _: None, load_block, release_block):
        step(blocks[1])
        stored = list(stored_parameters(model))
        assert [key for key, _ in stored] == [key for key, _ in expected]
        for (key, a), (_, b) in zip(stored, expected, strict=True):
            assert a.dtype == b.dtype, key
            assert torch.equal(a, b), key
        assert weights_hash(model) == weights_hash(whole)
    assert resident(model) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_that_was_asked_for_is_that_of_the_weights_in_files(
    dtype: str, models: Path
) -> None:
    model, whole = offloaded(models, dtype=dtype), load_model(models / "llama", dtype=dtype)
    assert {value.dtype for _, value in stored_parameters(model)} == {getattr(torch, dtype)}
    assert weights_hash(model) == weights_hash(whole)
    assert torch.equal(logits(model), logits(whole))


# Blocks come and go.


@pytest.mark.parametrize("name", NAMES)
def test_a_fetched_block_has_its_weights_until_it_is_given_back(name: str, models: Path) -> None:
    model, truth = offloaded(models, name), copies(load_model(models / name))
    prefix, blocks = find_blocks(model)
    expected = logits(load_model(models / name))
    load_block(blocks[1])
    assert resident(model) == [1]
    for key, parameter in blocks[1].named_parameters():
        assert torch.equal(parameter, truth[f"{prefix}.1.{key}"]), key
    places = [parameter.data_ptr() for parameter in blocks[1].parameters()]
    assert torch.equal(logits(model), expected)
    load_block(blocks[1])  # again: nothing
    assert [parameter.data_ptr() for parameter in blocks[1].parameters()] == places
    release_block(blocks[0])  # which was not fetched: nothing
    assert resident(model) == [1]
    release_block(blocks[1])
    assert resident(model) == []
    assert torch.equal(logits(model), expected)
    assert (is_offloaded(model), is_whole(model)) == (True, True)


def test_a_fetched_block_reads_no_file_while_it_runs(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = offloaded(models)
    blocks = find_blocks(model)[1]
    hooked: Any = blocks[0].get_submodule("mlp.up_proj")
    loader = hooked._hf_hook.weights_map
    while hasattr(loader, "dataset"):  # accelerate's view of one module's part
        loader = loader.dataset
    reads: list[str] = []
    own = type(loader).__getitem__

    def read(self: Any, key: str) -> Any:
        reads.append(key)
        return own(self, key)

    monkeypatch.setattr(type(loader), "__getitem__", read)
    walk = BlockWalk(model, BATCHES)
    reads.clear()
    parameters = [f"model.layers.0.{key}" for key, _ in blocks[0].named_parameters()]
    walk.record_inputs([], lambda *_: None)
    walk.record_inputs([], lambda *_: None)
    walk.advance()
    assert sorted(reads) == sorted(parameters)  # once each, for so many batches


def test_what_is_written_to_fetched_weights_is_in_no_file(models: Path) -> None:
    before = contents(models / "gpt2")
    model, truth = offloaded(models, "gpt2"), logits(load_model(models / "gpt2"))
    block = find_blocks(model)[1][0]
    load_block(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert not torch.equal(logits(model), truth)
    release_block(block)
    assert torch.equal(logits(model), truth)
    assert contents(models / "gpt2") == before


def test_in_a_model_in_memory_nothing_is_fetched_or_given_back() -> None:
    model, truth = tiny_model("gpt2"), copies(tiny_model("gpt2"))
    places = [parameter.data_ptr() for parameter in model.parameters()]
    for block in find_blocks(model)[1]:
        load_block(block)
        release_block(block)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert all(torch.equal(value, truth[key]) for key, value in model.named_parameters())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_kept_weights_are_read_from_their_file_from_then_on(
    name: str, dtype: str, models: Path, tmp_path: Path
) -> None:
    """A layer of each module, biases beside them as they were; the truth is the changed model."""
    model, whole = offloaded(models, name, dtype=dtype), load_model(models / name, dtype=dtype)
    tensors = {}
    for number, layer in enumerate(find_layers(whole)):
        if number % 2:
            weight: Any = layer.module.weight
            weight.data.mul_(-0.5)
            tensors[f"new {layer.name}"] = weight.detach()
    save_tensors(tmp_path / "new.safetensors", tensors)
    block = find_blocks(model)[1][0]
    load_block(block)
    for number, layer in enumerate(find_layers(model)):
        if number % 2:
            read_weight_from(layer, tmp_path / "new.safetensors", f"new {layer.name}")
    release_block(block)
    assert weights_hash(model) == weights_hash(whole)
    assert torch.equal(logits(model), logits(whole))
    load_block(block)
    mine = {layer.name: layer for layer in find_layers(whole)}
    for layer in find_layers(model):
        if layer.block == 0:
            assert torch.equal(weight_of(layer), weight_of(mine[layer.name]))


# What is loaded so.


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_device_map_with_room_for_all_is_the_model(
    name: str, models: Path, tmp_path: Path
) -> None:
    whole = load_model(models / name)
    for offload in (None, tmp_path / "off"):
        model = load_model(models / name, device_map="auto", offload=offload)
        assert (is_offloaded(model), is_whole(model)) == (False, True)
        assert not any(module.training for module in model.modules())
        assert weights_hash(model) == weights_hash(whole)
        assert torch.equal(logits(model).cpu(), logits(whole).cpu())


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"offload": "off"}])
def test_an_expanded_model_or_a_gguf_file_is_not_spread(
    options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model(mlp_bias=False, num_attention_heads=4, num_key_value_heads=2)
    write_gguf(tmp_path / "a.gguf", model, "smollm")
    words: dict[str, Any] = {"experts": 2, "layers": "*.0.mlp.up_proj"}
    entangle.sparsify(model, random_windows(), sparsity=0.5, out=tmp_path / "expanded", **words)
    files = contents(tmp_path)
    for name, what in (("a.gguf", "GGUF"), ("expanded", "expanded")):
        message = rf"/{name} .*\b{what}\b.*device_map.*\boffload\b"
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / name, **options)  # type: ignore[arg-type]
        load_model(tmp_path / name)
    assert contents(tmp_path) == files


def test_weights_that_are_missing_are_told_of_a_model_in_files_too(tmp_path: Path) -> None:
    model: Any = tiny_model()
    del model.model.layers[1].mlp.up_proj.weight
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"\b1 of .*weights.* model\.layers\.1\.mlp\.up_proj"):
        load_model(tmp_path / "model", offload=tmp_path / "off")


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_in_files_is_saved_as_the_model_in_memory(
    name: str, models: Path, tmp_path: Path
) -> None:
    save_model(offloaded(models, name), None, tmp_path / "a")
    save_model(load_model(models / name), None, tmp_path / "b")
    assert weights_hash(load_model(tmp_path / "a")) == weights_hash(load_model(tmp_path / "b"))
    assert weights_hash(load_model(tmp_path / "a")) == weights_hash(load_model(models / name))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_a_saved_model_holds_no_more_than_a_block(
    name: str, models: Path, tmp_path: Path
) -> None:
    """All tensors of a file are in memory when it is written."""
    model = offloaded(models, name)
    save_model(model, None, tmp_path)
    blocks = [sum(p.numel() * 4 for p in b.parameters()) for b in find_blocks(model)[1]]
    assert bytes_of_block(model) == max(blocks)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= max(blocks) or len(sizes) == 1


def test_each_of_several_processes_has_its_own_device(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(ValueError, match=r"device_map.*torchrun.*\b2\b"):
        load_model(models / "llama", device_map="auto")


def test_a_file_is_no_place_for_weights(models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/below/it"):
        with pytest.raises(NotADirectoryError, match=r"offload .*folder.*/file is a file"):
            load_model(models / "llama", offload=tmp_path / folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_of_a_model_in_files_has_the_weights_norms(name: str, models: Path) -> None:
    found = []
    for model in (offloaded(models, name), load_model(models / name)):
        with entangle.record(model) as recorder, torch.inference_mode():
            model(IDS)
        found.append(recorder.dataset())
        assert not resident(model) or not is_offloaded(model)
    xr.testing.assert_identical(found[0].drop_attrs(), found[1].drop_attrs())


# Walks.


@contextmanager
def watching(model: PreTrainedModel) -> Iterator[list[list[int]]]:
    """Note at each run of a linear layer which blocks are in memory."""
    seen: list[list[int]] = []
    handles = [
        layer.module.register_forward_hook(lambda *_: seen.append(resident(model)))
        for layer in find_layers(model)
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_a_walk_is_that_of_the_model_in_memory_with_one_block_there(
    name: str, models: Path
) -> None:
    model, truth = offloaded(models, name), whole_outputs(load_model(models / name), BATCHES)
    walk = BlockWalk(model, BATCHES)
    assert resident(model) == []
    blocks = find_blocks(model)[1]
    steps: list[Callable[[], object]] = [
        walk.advance,
        lambda: walk.record_inputs([], lambda *_: None, advance=True),
        lambda: walk.record_rows([], lambda *_: None),
    ]
    for number, outputs in enumerate(truth):
        found: list[torch.Tensor] = []
        handle = blocks[number].register_forward_hook(
            lambda _, __, out: found.append(out if isinstance(out, torch.Tensor) else out[0])  # noqa: B023
        )
        with watching(model) as seen:
            steps[number % 3]()
        handle.remove()
        assert len(found) == len(outputs)
        assert all(map(torch.equal, found, outputs))
        assert seen
        assert all(there == [number] for there in seen)
        assert all(in_memory(blocks[number]))
        assert resident(model) == [number]
    assert walk.done


def test_a_second_walk_has_one_block_in_memory_too(models: Path) -> None:
    model = offloaded(models)
    walk = BlockWalk(model, BATCHES)
    while not walk.done:
        walk.advance()
    again = BlockWalk(model, BATCHES)
    with watching(model) as seen:
        again.advance()
    assert {len(there) for there in seen} == {1}


# What is recorded.


def recorded(walk: BlockWalk, layers: Sequence[Recordable]) -> dict[str, list[torch.Tensor]]:
    rows: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}

    def keep(layer: Recordable, values: torch.Tensor, places: torch.Tensor | None) -> None:
        rows[layer.name].append(values.clone() if places is None else values[places])

    walk.record_rows(layers, keep)
    return rows


@pytest.mark.parametrize("skip_first", [0, 3])
@pytest.mark.parametrize("place", ["memory", "files"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon"])
def test_recorded_rows_are_the_outputs_of_the_tokens_that_count(
    name: str, place: str, skip_first: int, models: Path
) -> None:
    whole = load_model(models / name)
    truth: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in find_layers(whole)}
    handles = [
        layer.module.register_forward_hook(
            lambda _, __, values, key=layer.name: truth[key].append(values.clone())
        )
        for layer in find_layers(whole)
    ]
    with torch.no_grad():
        for batch in BATCHES:
            whole(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    model = whole if place == "memory" else offloaded(models, name)
    walk = BlockWalk(model, BATCHES, skip_first=skip_first)
    while not walk.done:
        layers = [layer for layer in find_layers(model) if layer.block == walk.block][::2]
        for key, rows in recorded(walk, layers).items():
            assert len(rows) == len(BATCHES)
            for batch, got, all_rows in zip(BATCHES, rows, truth[key], strict=True):
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                kept = counted(mask, skip_first)
                assert torch.equal(got, all_rows.reshape(*kept.shape, -1)[kept]), key
    assert hooks_left(model) == 0


def test_recording_carries_the_weights_as_they_are() -> None:
    model, changed = tiny_model("gpt2"), tiny_model("gpt2")
    walk = BlockWalk(model, BATCHES)
    for one in (model, changed):
        weight_of(find_layers(one)[0]).mul_(0.5)
    recorded(walk, [])
    assert walk.block == 1
    last = whole_outputs(changed, BATCHES)[1]
    found: list[torch.Tensor] = []
    handle = find_blocks(model)[1][1].register_forward_hook(
        lambda _, __, out: found.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    walk.advance()
    handle.remove()
    assert all(map(torch.equal, found, last))


def test_a_layer_that_does_not_run_once_is_an_error_of_recording() -> None:
    model = tiny_model()
    mlp: Any = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + forward(x)
    walk = BlockWalk(model, BATCHES)
    with pytest.raises(RuntimeError, match=r"3 of 7 .* 5 batches, .*gate_proj \(10 times\)"):
        recorded(walk, [layer for layer in find_layers(model) if layer.block == 0])
    assert hooks_left(model) == 0
    assert walk.block == 0


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_nothing_is_left_after_an_error_of_what_records(error: BaseException) -> None:
    model = tiny_model()
    walk = BlockWalk(model, BATCHES)
    with pytest.raises(type(error)) as caught:
        walk.record_rows([find_layers(model)[0]], explode(error))
    assert caught.value is error
    assert hooks_left(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("starts", "expected"),
    [(None, [0, 24, 48]), ([0, 48, 96], [0, 48, 96]), ([7, 3, 5], [7, 3, 5])],
)
@pytest.mark.parametrize("skip_first", [0, 2])
def test_places_are_where_each_batch_begins_and_its_tokens_that_count(
    starts: list[int] | None, expected: list[int], skip_first: int
) -> None:
    masks = [torch.ones_like(IDS), RIGHT, LEFT]
    batches = [{"input_ids": IDS, "attention_mask": mask} for mask in masks]
    walk = BlockWalk(tiny_model(), batches, skip_first=skip_first, places=starts)
    assert len(walk.places) == 3
    for place, mask, start in zip(walk.places, masks, expected, strict=True):
        kept = counted(mask, skip_first).flatten()
        assert place.tolist() == [start + i for i in range(24) if kept[i]]


# A run of a model in files.


def same_tree(a: xr.DataTree, b: xr.DataTree) -> None:
    assert [node.path for node in a.subtree] == [node.path for node in b.subtree]
    for one, other in zip(a.subtree, b.subtree, strict=True):
        left, right = (node.to_dataset(inherit=False).load() for node in (one, other))
        xr.testing.assert_identical(left, right)
        for name in left.variables:  # bits: identical takes 0 and -0, and any NaN, for the same
            if left[name].dtype.kind == "f":
                assert left[name].to_numpy().tobytes() == right[name].to_numpy().tobytes(), name


SOME = ["*.k_proj", "*.up_proj", "*.c_attn", "*.mlp.c_proj"]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("gpt2", {"difficulty": 40, "skip_first": 2, "layers": SOME[2:]}),
    ("llama", {"layers": ["*.1.*"], "bins": 256, "input_layers": ["*.down_proj", "*.0.*.q_proj"]}),
    ("gpt2", {"shard": "2/2", "layers": SOME[2:], "input_layers": SOME[3:]}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_a_run_of_a_model_in_files_is_that_of_the_model_in_memory(
    name: str, options: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    words: dict[str, Any] = {"batch_size": 2, "bins": 128} | options
    truth = entangle.measure(load_model(models / name), random_windows(7), **words)
    assert truth.sizes["neuron"] > 90
    model = offloaded(models, name)
    same_tree(entangle.measure(model, random_windows(7), **words), truth)
    out = tmp_path / "run"
    same_tree(entangle.measure(model, random_windows(7), out=out, **words), truth)
    same_tree(open_run(out), truth)
    entangle.measure(load_model(models / name), random_windows(7), out=tmp_path / "b", **words)
    files = [contents(tmp_path / folder) for folder in ("run", "b")]
    for each in files:
        each.pop("log.json")
    assert files[0] == files[1]
    assert ("tables/difficulty.csv" in files[0]) == ("difficulty" in options)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["b", "run"]


@dataclasses.dataclass
class Interrupted:
    """Records of blocks, and the error that one of them is to meet."""

    at: int | None = None
    after: bool = False  # when the block is recorded, but nothing of it saved
    blocks: list[int] = dataclasses.field(default_factory=list)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    state, record = Interrupted(), BlockWalk.record_rows

    def noting(self: BlockWalk, *args: Any) -> None:
        block = self.block
        if block == state.at and not state.after:
            raise KeyboardInterrupt
        record(self, *args)
        state.blocks.append(block)
        if block == state.at:
            raise KeyboardInterrupt

    monkeypatch.setattr(BlockWalk, "record_rows", noting)
    return state


def measured(models: Path, out: Path, **options: Any) -> xr.DataTree:
    words: dict[str, Any] = {"batch_size": 2, "bins": 128, "layers": SOME[:2]} | options
    return entangle.measure(offloaded(models), random_windows(7), out=out, **words)


@pytest.mark.parametrize(
    ("at", "after", "difficulty"),
    [(0, False, 0), (1, False, 30), (1, True, 0), (2, False, 0), (2, True, 30)],
)
def test_a_run_that_was_interrupted_goes_on_behind_the_blocks_that_are_done(
    at: int, difficulty: int, after: bool, models: Path, tmp_path: Path, records: Interrupted
) -> None:
    whole = measured(models, tmp_path / "whole", difficulty=difficulty)
    assert records.blocks == [0, 1, 2]
    records.at, records.after = at, after
    with pytest.raises(KeyboardInterrupt):
        measured(models, tmp_path / "run", difficulty=difficulty)
    assert not (tmp_path / "run").exists()
    state = tmp_path / "run.partial" / "state"
    saved = sorted(path.name for path in state.iterdir()) if at else []
    assert saved == [f"block-{block}.safetensors" for block in range(at)]
    assert (tmp_path / "run.partial").exists() == (at > 0)
    records.at, records.blocks = None, []
    same_tree(measured(models, tmp_path / "run", difficulty=difficulty), whole)
    assert records.blocks == [0, 1, 2][at:]
    files = [contents(tmp_path / folder) for folder in ("run", "whole")]
    for each in files:
        each.pop("log.json")
    assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_a_run_interrupted_when_all_blocks_are_done_runs_none_again(
    models: Path, tmp_path: Path, records: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Path, trees: Iterable[xr.DataTree], *__: Any) -> None:
        list(trees)
        raise KeyboardInterrupt

    whole = measured(models, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_run", stop)
        with pytest.raises(KeyboardInterrupt):
            measured(models, tmp_path / "run")
    records.blocks = []
    walks: list[Any] = []
    monkeypatch.setattr(measuring, "BlockWalk", lambda *args, **_: walks.append(args))
    same_tree(measured(models, tmp_path / "run"), whole)
    assert (records.blocks, walks) == ([], [])


def test_an_unfinished_run_of_other_settings_or_damaged_is_told(
    models: Path, tmp_path: Path, records: Interrupted
) -> None:
    records.at = 2
    with pytest.raises(KeyboardInterrupt):
        measured(models, tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"unfinished.*settings.*\bbins: 128, now 256\b"):
        measured(models, tmp_path / "run", bins=256)
    assert contents(tmp_path) == before
    file = tmp_path / "run.partial" / "state" / "block-1.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    records.at = None
    with pytest.raises(OSError, match=r"block-1\.safetensors .*damaged"):
        measured(models, tmp_path / "run")
    file.unlink()
    records.blocks = []
    run = measured(models, tmp_path / "run")
    assert 1 in records.blocks
    assert 0 not in records.blocks
    same_tree(run, measured(models, tmp_path / "whole"))
    with warnings.catch_warnings(record=True) as said:
        open_run(tmp_path / "run")
    assert said == []
