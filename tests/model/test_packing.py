"""An expanded model comes back from its folder bit for bit, or a message says what is damaged."""

import copy
import functools
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    PreTrainedModel,
)

import entangle
from entangle.model import packing
from entangle.model.experts import ExpertLinear
from entangle.model.hashing import weights_hash
from entangle.model.layers import LinearLayer, find_layers, replace_layer, weight_of
from entangle.model.loading import load_model, load_tokenizer, save_model
from entangle.model.packing import expanded_layers, is_expanded, load_tensors, save_tensors
from entangle.numerics.routing import CentroidRouter, RandomRouter, fit_router, random_router
from tests.measurement.test_recording import agrees, captured, flat, tokens, windows_of
from tests.tiny_models import (
    ARCHITECTURES,
    tiny_model,
    tiny_tokenizer,
    tiny_vision_model,
)


def vision() -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny_vision_model()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: functools.partial(tiny_model, name) for name in ARCHITECTURES},
    "vision": vision,
}
# Of which q, k and v are one layer.
NONE_SHARED = {"bloom", "falcon-alibi", "gpt2", "gpt-neox"}
IDS = tokens(4, 24)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        output: torch.Tensor = model(IDS).logits
    return output


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the inputs of all layers; those that have the same input, the same tensor."""
    heard: dict[str, torch.Tensor] = {}

    def listen(layer: LinearLayer) -> Any:
        return layer.module.register_forward_pre_hook(
            lambda _, args: heard.update({layer.name: args[0]})
        )

    handles = [listen(layer) for layer in find_layers(model)]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return heard


def expand(
    model: PreTrainedModel, *, at_random: bool = True, patterns: tuple[str, ...] = ("*",)
) -> PreTrainedModel:
    """Expand layers to three experts whose weights differ; every second router is a random one."""
    heard, generator = inputs_of(model), torch.Generator().manual_seed(1)
    routers: dict[int, CentroidRouter | RandomRouter] = {}
    for layer in find_layers(model, patterns):
        key = id(heard[layer.name])
        owns = key not in routers
        if owns:
            rows = heard[layer.name].flatten(0, -2)
            centroids = fit_router(rows, 3)
            routers[key] = centroids
            if at_random and len(routers) % 2 == 0:
                sizes = centroids.assign(rows).bincount(minlength=centroids.experts)
                routers[key] = random_router(layer.inputs, sizes)
        router, dense = routers[key], weight_of(layer)
        weights = []
        for expert in range(router.experts):
            kept = torch.rand(dense.shape, generator=generator) < 0.4
            weights.append(torch.where(kept, (1 + 0.1 * expert) * dense, 0.0).to(dense.dtype))
        weights[-1][0, 0] = -0.0
        bias = layer.module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        own = None if bias is None else bias.detach()
        counts = [10 + expert for expert in range(router.experts)]
        replace_layer(
            model, layer, ExpertLinear(torch.stack(weights), own, router, counts, owns_router=owns)
        )
    return model


@functools.cache
def expanded(name: str = "llama", *, at_random: bool = True) -> PreTrainedModel:
    """Return an expanded model that no test changes."""
    return expand(MODELS[name](), at_random=at_random)


def sharing(model: PreTrainedModel) -> list[int]:
    """Return for each layer the first that has the same router."""
    ids = [id(layer.module.router) for layer in find_layers(model)]
    return [ids.index(one) for one in ids]


def layers_of(model: PreTrainedModel) -> list[ExpertLinear]:
    modules = [layer.module for layer in expanded_layers(model)]
    return [module for module in modules if isinstance(module, ExpertLinear)]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# What comes back.


@pytest.mark.parametrize("name", MODELS)
def test_an_expanded_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    dense = logits(MODELS[name]())
    model = expanded(name)
    expected, folder = logits(model), tmp_path / "model"
    assert not torch.allclose(expected, dense)
    kinds = {type(module.router) for module in layers_of(model)}
    assert kinds == {CentroidRouter, RandomRouter}
    save_model(model, tiny_tokenizer(), folder)
    assert is_expanded(folder)
    loaded = load_model(folder)
    assert torch.equal(logits(loaded), expected)
    assert weights_hash(loaded) == weights_hash(model)
    assert not any(module.training for module in loaded.modules())
    assert loaded.name_or_path == str(folder)
    assert type(loaded) is type(model)
    assert sharing(loaded) == sharing(model)
    assert (len({*sharing(model)}) < len(sharing(model))) == (name not in NONE_SHARED)
    for found, module in zip(layers_of(loaded), layers_of(model), strict=True):
        assert found.counts == module.counts
        assert found.owns_router == module.owns_router
        assert type(found.router) is type(module.router)
        assert bits(found.weight) == bits(module.weight)
        assert not found.weight.requires_grad
    before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert before.keys() == after.keys()
    assert all(bits(before[key]) == bits(after[key]) for key in before)
    assert [p.requires_grad for p in before.values()] == [p.requires_grad for p in after.values()]
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(bits(buffers[key]) == bits(value) for key, value in model.named_buffers())


def test_an_expanded_model_goes_to_its_device_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU."""
    save_model(expanded(), None, tmp_path)
    load, on_host = packing.load_experts, []

    def load_experts(model: PreTrainedModel, *args: Any, **options: Any) -> None:
        on_host.append(sum(p.nbytes for p in model.parameters() if p.device.type == "cpu"))
        load(model, *args, **options)

    monkeypatch.setattr(packing, "load_experts", load_experts)
    away = packing.load_expanded(tmp_path, device="meta")
    assert {p.device.type for p in (*away.parameters(), *away.buffers())} == {"meta"}
    packing.load_expanded(tmp_path)
    blocks = len(on_host) // 2
    assert on_host[:blocks] == [0] * blocks
    assert all(on_host[blocks + 1 :])  # on the CPU the first block is there before the second
    assert blocks > 1


def is_tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", MODELS)
def test_tied_embeddings_stay_one_parameter_and_others_two(name: str, tmp_path: Path) -> None:
    model = expanded(name)
    save_model(model, None, tmp_path)
    one = [is_tied(each) for each in (model, load_model(tmp_path))]
    assert one[0] == one[1] == bool(model.config.get_text_config().tie_word_embeddings)


def test_weights_that_the_configuration_ties_and_the_model_does_not_stay_apart(
    tmp_path: Path,
) -> None:
    model: Any = tiny_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(2.0 * model.lm_head.weight.detach().flip(0))
    save_model(expand(model), None, tmp_path)
    loaded: Any = load_model(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(logits(loaded), logits(model))


def generated(model: Any) -> torch.Tensor:
    mask, least = torch.ones_like(IDS), {"min_new_tokens": 8, "max_new_tokens": 8}
    found = model.generate(IDS, attention_mask=mask, do_sample=False, **least)
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_it_generates_the_same_text_with_and_without_a_cache(name: str, tmp_path: Path) -> None:
    # Any rounding sends a token to another of random experts, and a cache rounds elsewhere.
    model = expanded(name, at_random=False)
    save_model(model, None, tmp_path)
    loaded = load_model(tmp_path)
    ids = IDS
    with torch.inference_mode():
        for _ in range(8):
            scores = model(input_ids=ids, use_cache=False).logits[:, -1].clone()
            scores[:, 2] = -torch.inf  # no end, as below
            ids = torch.cat([ids, scores.argmax(dim=1, keepdim=True)], dim=1)
    assert torch.equal(generated(model), ids)
    assert torch.equal(generated(loaded), ids)


def test_with_random_experts_too_which_any_rounding_would_change(tmp_path: Path) -> None:
    model = expanded()
    save_model(model, None, tmp_path)
    assert torch.equal(generated(load_model(tmp_path)), generated(model))


def test_its_way_to_generate_is_kept(tmp_path: Path) -> None:
    model: Any = copy.deepcopy(expanded())
    model.generation_config.update(do_sample=True, top_k=7, max_new_tokens=3)
    save_model(model, None, tmp_path)
    found = load_model(tmp_path).generation_config
    assert (found.do_sample, found.top_k, found.max_new_tokens) == (True, 7, 3)


def test_only_entangle_loads_it_and_nothing_else_guesses(tmp_path: Path) -> None:
    save_model(expanded(), tiny_tokenizer(), tmp_path)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    text = "Größe 12 <s>"
    ids = tiny_tokenizer()(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids
    assert load_tokenizer(tmp_path)(text)["input_ids"] == ids


@pytest.mark.parametrize("patterns", [("*.1.mlp.*",), ("*.up_proj", "*.2.self_attn.[qk]_proj")])
def test_some_layers_may_be_expanded_and_others_not(
    patterns: tuple[str, ...], tmp_path: Path
) -> None:
    model = expand(tiny_model(), patterns=patterns)
    chosen = [layer.name for layer in find_layers(tiny_model(), patterns)]
    save_model(model, None, tmp_path)
    loaded = load_model(tmp_path)
    assert [layer.name for layer in expanded_layers(loaded)] == chosen
    plain = [layer for layer in find_layers(loaded) if layer.name not in chosen]
    assert {type(layer.module) for layer in plain} == {nn.Linear}
    assert torch.equal(logits(loaded), logits(model))
    assert weights_hash(loaded) == weights_hash(model)


def test_buffers_that_are_stored_come_back_too(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        vocab_size=260,
        hidden_size=24,
        intermediate_size=37,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.eval()  # type: ignore[no-untyped-call]
    correction = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    correction.copy_(torch.linspace(-0.3, 0.3, 8))
    others = ("*.self_attn.*", "*layers.0.mlp.*", "*.shared_experts.*")  # than trained experts
    save_model(expand(model, patterns=others), None, tmp_path)
    loaded = load_model(tmp_path)
    found = loaded.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    assert torch.equal(found, correction)
    assert torch.equal(logits(loaded), logits(model))


def test_a_copy_of_a_model_is_saved_as_the_model_is(tmp_path: Path) -> None:
    model = expanded()
    expected = logits(model)
    for name, each in (("a", model), ("b", copy.deepcopy(model))):
        save_model(each, None, tmp_path / name)
    assert torch.equal(logits(load_model(tmp_path / "b")), expected)
    for file in ("dense.safetensors", "experts/0.safetensors", "expansion.json", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# What lies in the folder.


def header_bytes(file: Path) -> int:
    """Return how many bytes of a safetensors file are no tensors."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
    return 8 + int(length)


def number_of_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_holds_what_is_not_zero_and_no_dense_copy(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = expand(tiny_model(name, dtype=dtype))
    save_model(model, None, tmp_path)
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} == {
        *("config.json", "generation_config.json", "dense.safetensors", "expansion.json"),
        *(f"experts/{block}.safetensors" for block in range(model.config.num_hidden_layers)),
    }
    dense = load_file(tmp_path / "dense.safetensors")
    names = {layer.name for layer in find_layers(model)}
    expected = {
        key for key, _ in model.named_parameters() if not any(key.startswith(f"{n}.") for n in names)
    }  # fmt: skip
    assert dense.keys() == expected
    assert not any(name in key for key in dense for name in names)
    seen: set[int] = set()
    for block in range(model.config.num_hidden_layers):
        total = 0
        for layer in find_layers(model, f"*.{block}.*"):
            module: Any = layer.module
            raw = np.frombuffer(bits(module.weight), dtype=f"uint{8 * dtype.itemsize}")
            total += (raw.size + 7) // 8 + int(np.count_nonzero(raw)) * dtype.itemsize
            total += 0 if module.bias is None else number_of_bytes([module.bias])
            if id(module.router) not in seen:
                total += number_of_bytes(module.router.parameters())
            seen.add(id(module.router))
        file = tmp_path / "experts" / f"{block}.safetensors"
        assert file.stat().st_size == header_bytes(file) + total
    sizes = [module.weight.numel() for module in layers_of(model)]
    kept = sum(int((module.weight != 0).sum()) for module in layers_of(model))
    assert 0.38 < kept / sum(sizes) < 0.42  # as `expand` made them


def test_the_description_says_what_each_layer_is(tmp_path: Path) -> None:
    model = expanded()
    save_model(model, None, tmp_path)
    described = json.loads((tmp_path / "expansion.json").read_text())["layers"]
    assert list(described) == [layer.name for layer in find_layers(model)]
    for layer in find_layers(model):
        module: Any = layer.module
        assert described[layer.name] == {
            "block": layer.block,
            "experts": len(module.weight),
            "neurons": layer.neurons,
            "inputs": layer.inputs,
            "router": described[layer.name]["router"],
            "tokens": module.counts,
        }
        assert model.get_submodule(described[layer.name]["router"]).router is module.router
    assert (
        described["model.layers.1.self_attn.v_proj"]["router"] == "model.layers.1.self_attn.q_proj"
    )


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_all_files_may_be_read_by_the_same_people(tmp_path: Path, umask: int, mode: int) -> None:
    model = expanded()
    before = os.umask(umask)
    try:
        save_model(model, tiny_tokenizer(), tmp_path / "model")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "model").rglob("*") if file.is_file()]
    assert len(files) > 7
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_a_plain_model_in_its_place_is_the_plain_one(tmp_path: Path) -> None:
    save_model(expanded(), None, tmp_path)
    save_model(tiny_model(), None, tmp_path)
    assert not is_expanded(tmp_path)
    assert weights_hash(load_model(tmp_path)) == weights_hash(tiny_model())


def test_of_a_gguf_file_beside_it_the_file_is_meant(tmp_path: Path) -> None:
    save_model(expanded(), None, tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"a recipe for bread")
    with pytest.raises(ValueError, match=r"load .*/x\.gguf: .*transformers.* GGUF"):
        load_model(tmp_path / "x.gguf")


# Its dtype.


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt-j"])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
def test_the_weights_are_cast_and_neither_buffers_nor_routers(
    name: str, asked: str, tmp_path: Path
) -> None:
    model = expanded(name)
    save_model(model, None, tmp_path)
    dtype = torch.float32 if asked == "auto" else getattr(torch, asked)
    loaded = load_model(tmp_path, dtype=asked)
    routers = {id(p) for module in layers_of(loaded) for p in module.router.parameters()}
    original = dict(model.named_parameters())
    for key, parameter in loaded.named_parameters():
        expected = original[key].detach()
        expected = expected if id(parameter) in routers else expected.to(dtype)
        assert parameter.dtype == expected.dtype
        assert bits(parameter) == bits(expected)
    buffers = dict(model.named_buffers())
    for key, buffer in loaded.named_buffers():
        assert (buffer.dtype, bits(buffer)) == (buffers[key].dtype, bits(buffers[key]))
    assert loaded.dtype == dtype
    if asked != "auto":
        assert loaded.config.dtype == dtype
    assert torch.isfinite(logits(loaded)).all()
    assert is_tied(loaded) == bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_parts_and_in_half_precision_is_kept_so(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_model(dtype=dtype).save_pretrained(tmp_path / "dense", max_shard_size="10KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    model = expand(load_model(tmp_path / "dense"))
    save_model(model, None, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    routers = {id(p) for module in layers_of(loaded) for p in module.router.parameters()}
    dtypes = {p.dtype for p in loaded.parameters() if id(p) not in routers}
    assert dtypes == {dtype}
    assert loaded.dtype == loaded.config.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert weights_hash(loaded) == weights_hash(model)
    twice = load_model(tmp_path / "model", dtype="float32")
    assert {p.dtype for p in twice.parameters()} <= {torch.float32, torch.float64, torch.int64}


# What is damaged is told.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model(expanded(), tiny_tokenizer(), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


@contextmanager
def described(folder: Path) -> Iterator[Any]:
    """Give what expansion.json says, to be changed."""
    about = json.loads((folder / "expansion.json").read_text())
    yield about
    (folder / "expansion.json").write_text(json.dumps(about))


def refused(folder: Path, message: str, *, packed: bool = False) -> None:
    """See that loading says what is damaged, and where, in an error for people."""
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_model(folder, packed=packed)
    assert type(caught.value) in {ValueError, OSError, FileNotFoundError}
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_the_copy_can_be_loaded_before_it_is_damaged(folder: Path) -> None:
    with described(folder):
        pass
    assert torch.equal(logits(load_model(folder)), logits(expanded()))


FILES = ("config.json", "dense.safetensors", "experts/0.safetensors", "experts/2.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    no_model = r"no model.*config\.json"
    refused(folder, no_model if name == "config.json" else rf"damaged.* {name} .*missing")


def test_without_its_description_it_is_no_model_at_all(folder: Path) -> None:
    (folder / "expansion.json").unlink()
    refused(folder, r"load .*transformers.*no file named model\.safetensors")


def test_without_any_experts_it_is_damaged(folder: Path) -> None:
    shutil.rmtree(folder / "experts")
    refused(folder, r"damaged.* experts/0\.safetensors .*missing")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_changed_byte_is_seen(folder: Path, name: str, where: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[round(where * (len(data) - 1))] ^= 1
    (folder / name).write_bytes(data)
    refused(folder, rf"damaged.* {name} .*\bwritten\b")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_off_is_seen(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 10)
    refused(folder, rf"damaged.* {name} .*\bwritten\b")


@pytest.mark.parametrize("text", ["", "{not", "[]", "null", "3", '"text"', '{"format": 1}', "[1]"])
def test_a_description_that_cannot_be_read_is_refused(folder: Path, text: str) -> None:
    (folder / "expansion.json").write_text(text)
    refused(folder, r"damaged.* expansion\.json .*\bread\b")


def test_a_description_of_other_bytes_is_refused(folder: Path) -> None:
    (folder / "expansion.json").write_bytes(b"\xff\xfe{}")
    refused(folder, r"damaged.* expansion\.json .*\bread\b")


@pytest.mark.parametrize("key", ["format", "layers", "sha256"])
def test_a_description_without_one_of_its_parts_is_refused(folder: Path, key: str) -> None:
    with described(folder) as about:
        del about[key]
    refused(folder, rf"damaged.* expansion\.json .*\bread\b.*'{key}'")


@pytest.mark.parametrize("version", [0, 3, "1", None, [2]])
def test_another_format_is_refused_with_what_to_do(folder: Path, version: Any) -> None:
    with described(folder) as about:
        about["format"] = version
    refused(folder, rf"\bformat {re.escape(str(version))}.*\bformats 1 and 2\b")


@pytest.mark.parametrize("sums", [None, 3, ["config.json"], "config.json"])
def test_sums_that_are_none_are_refused(folder: Path, sums: Any) -> None:
    with described(folder) as about:
        about["sha256"] = sums
    refused(folder, r"damaged.* expansion\.json .*\bread\b")


UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
Q, K = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def rename(layers: Any, name: str, other: str) -> None:
    layers[other] = layers.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: rename(layers, UP, "model.layers.7.mlp.up_proj"),
        lambda layers: rename(layers, UP, "model.layers.1.mlp.side_proj"),
        lambda layers: rename(layers, UP, "lm_head"),
        lambda layers: layers[UP].update(neurons=38),
        lambda layers: layers[UP].update(neurons=layers[UP]["inputs"], inputs=37),
        lambda layers: layers[Q].update(neurons=48, inputs=12),
        lambda layers: layers[UP].update(neurons="37"),
        lambda layers: layers[UP].update(neurons=-37),
        lambda layers: layers[UP].update(experts=2),
        lambda layers: layers[UP].update(experts=300),
        lambda layers: layers[UP].update(experts=None),
        lambda layers: layers[UP].update(router=DOWN + "s"),
        lambda layers: layers[UP].update(router=None),
        lambda layers: layers[UP].update(block=2),
        lambda layers: layers[UP].update(block=[1]),
        lambda layers: layers[UP].update(tokens=[1]),
        lambda layers: layers[UP].update(tokens=7),
        lambda layers: layers[UP].clear(),
        lambda layers: layers.update({UP: "a layer"}),
        lambda layers: layers.update({UP: None}),
    ],
)
def test_a_description_that_does_not_fit_its_files_is_refused(
    folder: Path, change: Callable[[Any], None]
) -> None:
    with described(folder) as about:
        change(about["layers"])
    refused(folder, r"damaged.* expansion\.json .*belong together")


def test_a_block_that_is_not_there_is_a_file_that_is_not_there(folder: Path) -> None:
    with described(folder) as about:
        about["layers"][UP]["block"] = 5
    refused(folder, r"experts/5\.safetensors")


@pytest.mark.parametrize("layers", [[], None, "all", [UP]])
def test_a_description_of_no_layers_is_refused(folder: Path, layers: Any) -> None:
    with described(folder) as about:
        about["layers"] = layers
    refused(folder, r"damaged.* expansion\.json .*belong together")


def test_a_layer_that_is_not_described_has_no_weights(folder: Path) -> None:
    with described(folder) as about:
        del about["layers"][UP]
    for packed in (False, True):
        refused(folder, rf"damaged.*no weights.* {UP}\.weight", packed=packed)


def test_weights_that_the_model_has_not_are_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(expanded())
    model.register_parameter("more", nn.Parameter(torch.ones(3)))
    save_model(model, None, tmp_path)
    refused(tmp_path, r"belong together.* more\b")


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    model: Any = copy.deepcopy(expanded())
    del model.model.norm.weight
    save_model(model, None, tmp_path)
    refused(tmp_path, r"damaged.*no weights.* model\.norm\.weight")


def test_dense_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    model: Any = copy.deepcopy(expanded())
    model.model.norm.weight = nn.Parameter(torch.ones(25))
    save_model(model, None, tmp_path)
    refused(tmp_path, r"belong together.*size mismatch for model\.norm\.weight")


# A disk that is full, and files of tensors alone.


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_full_disk_is_an_error_of_the_system(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, save_file = expanded(), safetensors.torch.save_file
    written: list[Path] = []

    def fail(tensors: Any, file: Path, metadata: Any) -> None:
        if len(written) == calls:
            Path(file).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        written.append(file)
        save_file(tensors, file, metadata)

    monkeypatch.setattr(packing, "save_file", fail)
    where = ["dense", "experts/0", "experts/1", "experts/2"][calls]
    message = rf"write {tmp_path}/{where}\.safetensors: .*No space left on device"
    with pytest.raises(OSError, match=message):
        save_model(model, None, tmp_path)
    assert len([*tmp_path.rglob("*.safetensors")]) == calls
    assert not is_expanded(tmp_path)


def test_a_file_of_tensors_is_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "more" / "x.safetensors"
    tensors = {"a b": torch.arange(6).view(2, 3).T, "c": torch.tensor([-0.0, torch.nan])}
    save_tensors(file, tensors)
    found = load_tensors(file)
    assert found.keys() == tensors.keys()
    assert all(bits(found[key]) == bits(value) for key, value in tensors.items())
    assert found["a b"].shape == (3, 2)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(OSError, match=rf"{file} .*damaged"):
        load_tensors(file)
    with pytest.raises(FileNotFoundError, match=r"y\.safetensors"):
        load_tensors(tmp_path / "y.safetensors")


# It is measured and scored as any model is.


def test_an_expanded_model_is_measured_by_what_its_layers_put_out() -> None:
    model = expanded()
    windows = windows_of(tokens(12))
    run = entangle.measure(model, windows, batch_size=5)
    with captured(model) as outputs:
        for batch in windows.tokens.split(5):
            model(batch)
    agrees(run.to_dataset(), flat(outputs))
    table = run.to_dataset().to_dataframe()
    for layer in find_layers(model):
        module: Any = layer.module
        weight = module.weight.double().numpy()
        norms = np.mean([np.sqrt((expert**2).sum(axis=1)) for expert in weight], axis=0)
        rows = table[table["layer"] == layer.name]
        assert np.allclose(rows["weight_norm"], norms, rtol=1e-6)
        assert len(rows) == layer.neurons


def test_an_expanded_model_is_scored_by_its_likelihood(tmp_path: Path) -> None:
    model, windows = expanded(), windows_of(tokens(6, seed=4))
    with torch.inference_mode():
        scores = torch.cat([model(batch).logits for batch in windows.tokens.split(3)])
    expected = [
        float(cross_entropy(score[:-1].double(), ids[1:]))
        for score, ids in zip(scores, windows.tokens, strict=True)
    ]
    found = entangle.perplexity(model, windows, batch_size=3).window_nats
    assert np.allclose(found, expected, rtol=1e-5)
    save_model(model, None, tmp_path)
    loaded = entangle.load_model(tmp_path)
    assert np.array_equal(entangle.perplexity(loaded, windows, batch_size=3).window_nats, found)
