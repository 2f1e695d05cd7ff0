"""Models that hold no zeros: against the same folder loaded with them, and bytes counted by hand."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import entangle
from entangle.model import loading
from entangle.model.experts import ExpertLinear, Mixture, PackedLinear
from entangle.model.layers import LinearLayer, find_layers, replace_layer, weight_of
from entangle.model.loading import load_model, save_model
from entangle.model.packing import pack_layer, weight_bytes
from entangle.numerics.sparse import Sliced
from tests.measurement.test_recording import tokens, windows_of
from tests.model.test_packing import IDS, MODELS, bits, expanded, logits
from tests.tiny_models import tiny_model

PRUNED = ("llama", "gpt2", "opt", "qwen2")


def thin(model: PreTrainedModel, density: float = 0.3, patterns: tuple[str, ...] = ("*",)) -> None:
    generator = torch.Generator().manual_seed(1)
    for layer in find_layers(model, patterns):
        kept = torch.rand(layer.neurons, layer.inputs, generator=generator) < density
        weight_of(layer).mul_(kept)


@functools.cache
def pruned(name: str) -> PreTrainedModel:
    """Return a pruned model that no test changes; of block 1 less than half is zero."""
    model = tiny_model(name)
    thin(model)
    for layer in find_layers(model, ["*.1.*"]):
        weight_of(layer)[weight_of(layer) == 0] = 0.01
        weight_of(layer)[:, : layer.inputs // 3] = 0.0
    return model


def modules(model: PreTrainedModel) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def sliced_bytes(weight: torch.Tensor) -> int:
    """Return the bytes of slices of eight rows of a weight (experts, neurons, inputs), by hand."""
    experts, neurons, _ = weight.shape
    slices = -(-neurons // 8)
    steps = 0
    for expert in weight:
        lengths = sorted(((expert != 0).sum(1)).tolist(), reverse=True)
        steps += sum(lengths[at] for at in range(0, neurons, 8))
    number = 2 if weight.dtype == torch.bfloat16 else 4
    return steps * 8 * (number + 2) + experts * 8 * (8 * slices + slices + 1)


def parameter_bytes(model: PreTrainedModel) -> int:
    every = [*model.parameters(), *model.buffers()]  # both give what is tied once
    return sum(x.numel() * x.element_size() for x in every)


def dense_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights (experts, neurons, inputs) of all layers."""
    found = {layer.name: weight_of(layer) for layer in find_layers(model)}
    return {name: weight if weight.ndim == 3 else weight[None] for name, weight in found.items()}


def check_packed(packed: PreTrainedModel, whole: PreTrainedModel) -> None:
    """See that the layers that are half zeros are packed, with the same bits, and no others."""
    weights = dense_weights(whole)
    sparse = {name for name, w in weights.items() if 2 * (w == 0).sum() >= w.numel()}
    found = modules(packed)
    assert found.keys() == sparse
    for name, module in found.items():
        assert isinstance(module.sliced, Sliced)
        for expert, weight in enumerate(weights[name]):
            assert torch.equal(module.sliced.dense(expert), weight)
    saved = sum(w.numel() * w.element_size() for n, w in weights.items() if n in sparse)
    slices = sum(sliced_bytes(weights[name]) for name in sparse)
    assert weight_bytes(packed) == parameter_bytes(whole) - saved + slices
    assert weight_bytes(whole) == parameter_bytes(whole)
    assert not any(module.training for module in packed.modules())


@pytest.mark.parametrize("name", PRUNED)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_pruned_model_is_the_same_without_its_zeros(
    name: str, dtype: str, tmp_path: Path
) -> None:
    save_model(pruned(name), None, tmp_path)
    whole = load_model(tmp_path, dtype=dtype)
    packed = load_model(tmp_path, dtype=dtype, packed=True)
    check_packed(packed, whole)
    found = modules(packed)
    assert 0 < len(found) < len(find_layers(whole))
    plain = {"gpt2": Conv1D}.get(name, nn.Linear)
    for layer in find_layers(whole):
        if layer.name not in found:
            assert layer.block == 1
            assert type(packed.get_submodule(layer.name)) is plain
    tolerance = 1e-5 if dtype == "auto" else 0.05
    torch.testing.assert_close(logits(packed), logits(whole), rtol=tolerance, atol=tolerance)
    assert logits(packed).dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)


def owners(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers that own a router."""
    return [name for name, m in model.named_modules() if isinstance(m, Mixture) and m.owns_router]


@pytest.mark.parametrize("name", MODELS)
def test_an_expanded_model_is_the_same_without_its_zeros(name: str, tmp_path: Path) -> None:
    save_model(expanded(name, at_random=False), None, tmp_path)
    whole, packed = load_model(tmp_path), load_model(tmp_path, packed=True)
    check_packed(packed, whole)
    assert not any(isinstance(module, ExpertLinear) for module in packed.modules())
    assert not any(module.training for module in packed.modules())
    assert owners(packed) == owners(whole)
    for layer in find_layers(whole):
        module, packed_one = layer.module, packed.get_submodule(layer.name)
        assert isinstance(module, ExpertLinear)
        assert isinstance(packed_one, PackedLinear)
        assert (packed_one.in_features, packed_one.out_features) == (layer.inputs, layer.neurons)
        assert (packed_one.bias is None) is (module.bias is None)
    assert {n for n, _ in packed.named_parameters()} == {
        n for n, _ in whole.named_parameters() if not n.endswith(tuple(weights_of_experts(whole)))
    }
    torch.testing.assert_close(logits(packed), logits(whole), rtol=1e-4, atol=1e-4)
    assert weight_bytes(packed) < weight_bytes(whole)


def weights_of_experts(model: PreTrainedModel) -> list[str]:
    return [f"{layer.name}.weight" for layer in find_layers(model)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_expanded_model_becomes_another_dtype_before_it_is_packed(
    dtype: str, tmp_path: Path
) -> None:
    save_model(expanded("llama"), None, tmp_path)
    whole, packed = (load_model(tmp_path, dtype=dtype, packed=each) for each in (False, True))
    assert owners(packed) == owners(whole)
    other = dict(whole.named_parameters())
    for name, parameter in packed.named_parameters():
        assert parameter.dtype == other[name].dtype
        assert bits(parameter) == bits(other[name])
    weights = dense_weights(whole)
    assert modules(packed).keys() == weights.keys()
    for name, module in modules(packed).items():
        assert isinstance(module.sliced, Sliced)
        assert module.sliced.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        for expert, weight in enumerate(weights[name]):
            assert torch.equal(module.sliced.dense(expert), weight.to(module.sliced.dtype))
    assert packed.config.dtype == getattr(torch, dtype)


def test_half_of_a_layer_must_be_zero() -> None:
    model = tiny_model("llama")
    up, down = find_layers(model, ["*.1.mlp.up_proj"])[0], find_layers(model, ["*.1.*down_proj"])[0]
    half = up.neurons * up.inputs // 2
    for layer, zeros in ((up, half), (down, half - 1)):
        flat = weight_of(layer).view(-1)
        flat[:] = 1.0
        flat[:zeros] = 0.0
        pack_layer(model, layer)
    assert isinstance(model.get_submodule(up.name), PackedLinear)
    assert type(model.get_submodule(down.name)) is nn.Linear


def test_experts_of_which_less_than_half_is_zero_stay_and_share_the_router(tmp_path: Path) -> None:
    model = expanded_with_a_dense_layer()
    dense = "model.layers.1.self_attn.k_proj"
    save_model(model, None, tmp_path)
    whole, packed = load_model(tmp_path), load_model(tmp_path, packed=True)
    kept = [name for name, m in packed.named_modules() if isinstance(m, ExpertLinear)]
    assert kept == [dense]
    check_packed(packed, whole)
    assert owners(packed) == owners(whole)
    router = packed.get_submodule("model.layers.1.self_attn.q_proj").router
    assert packed.get_submodule(dense).router is router
    assert not isinstance(router, torch.Tensor)
    names = [f"model.layers.1.self_attn.{role}_proj" for role in "qkv"]
    assert [packed.get_submodule(name).owns_router for name in names] == [True, False, False]
    torch.testing.assert_close(logits(packed), logits(whole), rtol=1e-4, atol=1e-4)


def test_pruned_layers_beside_experts_are_packed_too(tmp_path: Path) -> None:
    model = copy.deepcopy(expanded("llama", at_random=False))
    for layer in find_layers(model, ["*.1.mlp.*"]):
        mixture = layer.module
        assert isinstance(mixture, ExpertLinear)
        one = nn.Linear(layer.inputs, layer.neurons, bias=mixture.bias is not None)
        one.weight.data = mixture.weight[1].clone()
        one.register_parameter("bias", mixture.bias)
        replace_layer(model, layer, one)
    save_model(model, None, tmp_path)
    for dtype in ("auto", "bfloat16"):
        whole, packed = (load_model(tmp_path, dtype=dtype, packed=each) for each in (False, True))
        check_packed(packed, whole)
        found = modules(packed)["model.layers.1.mlp.up_proj"]
        assert found.router is None
        tolerance = 1e-4 if dtype == "auto" else 0.05
        torch.testing.assert_close(logits(packed), logits(whole), rtol=tolerance, atol=tolerance)


def expanded_with_a_dense_layer() -> PreTrainedModel:
    model = copy.deepcopy(expanded("llama", at_random=False))
    weight = model.get_submodule("model.layers.1.self_attn.k_proj").weight
    assert isinstance(weight, torch.Tensor)
    weight.data[weight == 0] = 0.01
    return model


def test_a_dense_model_is_left_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    save_model(model, None, tmp_path)
    packed = load_model(tmp_path, packed=True)
    assert not modules(packed)
    state, other = packed.state_dict(), model.state_dict()
    assert state.keys() == other.keys()
    assert all(bits(state[name]) == bits(other[name]) for name in state)
    assert weight_bytes(packed) == parameter_bytes(model)
    assert len(find_layers(packed)) == len(find_layers(model))


def test_float64_and_other_devices_are_left_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_device", lambda name: torch.device(name.replace("auto", "cpu")))
    model = tiny_model("llama")
    thin(model)
    save_model(model.double(), None, tmp_path / "exact")
    packed = load_model(tmp_path / "exact", packed=True)
    assert {p.dtype for p in packed.parameters()} == {torch.float64}
    assert not modules(packed)
    for folder in ("exact", "mixture"):
        save_model(expanded("llama"), None, tmp_path / "mixture")
        there = load_model(tmp_path / folder, dtype="float32", packed=True, device="meta")
        assert not modules(there)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = tmp_path_factory.mktemp("models") / "pruned"
    save_model(pruned("llama"), None, folder)
    return load_model(folder, packed=True)


def refuses(deed: Any) -> None:
    with pytest.raises(ValueError, match=r"layers.* packed.* packed=False"):
        deed()


def test_a_packed_model_is_for_running_only(packed: PreTrainedModel, tmp_path: Path) -> None:
    windows = windows_of(tokens(4, 16))
    refuses(lambda: find_layers(packed))
    refuses(lambda: entangle.measure(packed, windows))
    refuses(lambda: entangle.sparsify(packed, windows, sparsity=0.5))
    with pytest.raises(RuntimeError, match=r"cannot save.*packed=False"):
        save_model(packed, None, tmp_path / "saved")
    assert [*tmp_path.rglob("*.*")] == []
    found, expected = (
        entangle.perplexity(packed, windows),
        entangle.perplexity(pruned("llama"), windows),
    )
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)


def test_a_packed_model_continues_as_the_other_does(packed: PreTrainedModel) -> None:
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    both: list[Any] = [packed, pruned("llama")]
    mask = torch.ones_like(IDS)
    found, expected = (model.generate(IDS, attention_mask=mask, **options) for model in both)
    assert torch.equal(found, expected)


def test_pack_layer_replaces_the_module_where_it_is() -> None:
    model = tiny_model("gpt2")
    (layer,) = find_layers(model, ["*.0.mlp.c_fc"])
    weight_of(layer)[:, ::2] = 0.0
    dense: LinearLayer = layer
    rows = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    expected = dense.module(rows).detach()
    pack_layer(model, layer)
    module = model.get_submodule(layer.name)
    assert isinstance(module, PackedLinear)
    assert (module.in_features, module.out_features) == (24, 41)  # GPT-2 stores it transposed
    torch.testing.assert_close(module(rows), expected, rtol=1e-5, atol=1e-5)


def test_another_width_is_refused_and_not_read_beyond(tmp_path: Path) -> None:
    layer = PackedLinear(torch.eye(12)[None], None, None)
    for inputs in (torch.ones(1, 5), torch.ones(1, 40), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=rf"\b12 inputs.* {inputs.shape[-1]}$"):
            layer(inputs)


def test_a_packed_layer_gives_its_weight_but_no_state() -> None:
    weight = torch.eye(12)
    layer = PackedLinear(weight[None], None, None)
    assert torch.equal(layer.weight, weight)
    with pytest.raises(ValueError, match=r"layers.* packed.* packed=False"):
        layer.state_dict()
