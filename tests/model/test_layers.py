"""Layers are found by structure, all of them and no others, and weights are (neurons, inputs)."""

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    PreTrainedModel,
)

from entangle.model.experts import ExpertLinear
from entangle.model.layers import (
    LinearLayer,
    decoder_of,
    dequantised,
    device_of,
    find_blocks,
    find_layers,
    replace_layer,
    skipped_parameters,
    weight_of,
    write_weight,
)
from entangle.model.prunable import check_prunable
from entangle.model.sides import without_skipped
from entangle.numerics.routing import CentroidRouter, random_router
from tests.tiny_models import ARCHITECTURES, VOCABULARY, tiny_model, tiny_vision_model

LINEARS_IN_A_BLOCK = {
    "bloom": 4,
    "falcon": 4,
    "falcon-alibi": 4,
    "gpt-j": 6,
    "gpt-neox": 4,
    "gpt2": 4,
    "opt": 6,
    "phi": 6,
}  # seven elsewhere: q, k, v, o, gate, up, down


def matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Walk the modules in our own way: what has a matrix for a weight and embeds nothing."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
        and weight.ndim == 2
        and "Router" not in type(module).__name__
        and not isinstance(module, nn.Embedding)
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_of_the_blocks_is_found_and_none_outside(name: str) -> None:
    model = tiny_model(name)
    layers = find_layers(model)
    found = {layer.name: layer.module for layer in layers}
    in_blocks = {key: m for key, m in matrices(model).items() if re.search(r"\.\d+\.", key)}
    assert found == in_blocks
    assert list(found) == list(in_blocks)  # in the model's order
    assert model.lm_head not in found.values()
    depth = model.config.num_hidden_layers
    assert len(layers) == depth * LINEARS_IN_A_BLOCK.get(name, 7)
    for layer in layers:
        prefix, block, role = re.fullmatch(r"(\D+)\.(\d+)\.(\D\S*)", layer.name).groups()  # type: ignore[union-attr]
        assert (prefix, int(block), role) == (find_blocks(model)[0], layer.block, layer.role)


def test_projections_outside_the_blocks_are_no_layers() -> None:
    outside = set(matrices(tiny_model("opt"))) - {
        layer.name for layer in find_layers(tiny_model("opt"))
    }
    assert outside == {"lm_head", "model.decoder.project_in", "model.decoder.project_out"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_inputs_times_the_transposed_weight_plus_bias(name: str) -> None:
    model = tiny_model(name)
    heard: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in find_layers(model):

        def hook(_: nn.Module, args: Any, output: torch.Tensor, key: str = layer.name) -> None:
            heard[key] = (args[0].clone(), output.clone())  # some models write over theirs

        layer.module.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.arange(3, 15)[None])
    for layer in find_layers(model):
        inputs, outputs = heard[layer.name]
        weight, bias = weight_of(layer), getattr(layer.module, "bias", None)
        assert weight.shape == (layer.neurons, layer.inputs)
        assert (inputs.shape[-1], outputs.shape[-1]) == (layer.inputs, layer.neurons)
        expected = inputs @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_weight_is_a_view_so_that_writing_to_it_changes_the_model(name: str) -> None:
    (layer,) = find_layers(
        tiny_model(name), "*.1.mlp.c_fc" if name == "gpt2" else "*.1.mlp.up_proj"
    )
    weight_of(layer)[5] = 0.0
    with torch.no_grad():
        outputs = layer.module(torch.randn(9, layer.inputs))
    alive = (outputs.std(dim=0) > 1e-6).tolist()
    assert alive == [neuron != 5 for neuron in range(layer.neurons)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_weight_is_what_the_layer_multiplies_by(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layer = find_layers(model)[5]
    parameter = layer.module.weight
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.inputs, layer.neurons, generator=generator).T  # not contiguous
    write_weight(layer, weight)
    inputs = torch.randn(9, layer.inputs, generator=generator).to(dtype)
    with torch.no_grad():
        outputs = layer.module(inputs)
    expected = nn.functional.linear(inputs, weight.to(dtype), layer.module.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(outputs, expected)
    assert layer.module.weight is parameter
    assert isinstance(parameter, nn.Parameter)
    assert (parameter.dtype, parameter.requires_grad) == (dtype, True)
    after = model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == [
        f"{layer.name}.weight"
    ]


# What else is in a block.


def test_the_matrices_of_fused_experts_are_layers_and_routers_are_listed_as_skipped() -> None:
    model = tiny_model("mixtral")
    assert [layer.role for layer in find_layers(model, "model.layers.1.*")] == [
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"mlp.experts.{n}.{key}_proj" for n in range(4) for key in ("gate_up", "down")),
    ]
    assert skipped_parameters(model) == [f"model.layers.{b}.mlp.gate.weight" for b in (0, 1)]
    layer = find_layers(model, "model.layers.1.mlp.experts.2.down_proj")[0]
    whole = model.get_parameter("model.layers.1.mlp.experts.down_proj")
    assert (layer.neurons, layer.inputs) == (24, 40)
    before = whole.detach().clone()
    write_weight(layer, torch.zeros(24, 40))
    assert not whole[2].any()
    assert torch.equal(whole[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_elsewhere_nothing_is_skipped(name: str) -> None:
    assert skipped_parameters(tiny_model(name)) == []


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("model.layers.1.mlp.up_proj", ["1.mlp.up_proj"]),
        ("*.mlp.up_proj", ["0.mlp.up_proj", "1.mlp.up_proj", "2.mlp.up_proj"]),
        (["*.2.*.[qk]_proj", "*.0.mlp.up_proj"], ["0.mlp.up_proj", "2.self_attn.q_proj", "2.self_attn.k_proj"]),
        (["*.1.mlp.*", "*.1.mlp.up_proj"], ["1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"]),
    ],
)  # fmt: skip
def test_patterns_choose_layers_in_the_models_order_and_once(
    patterns: str | list[str], expected: list[str]
) -> None:
    layers = find_layers(tiny_model("llama"), patterns)
    assert [layer.name.removeprefix("model.layers.") for layer in layers] == expected


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("mlp.up_proj", r"\*\.mlp\.up_proj"),
        ("model.layers.1.mlp.up_prj", r"model\.layers\.1\.mlp\.up_proj"),
        ("*.mlp.fc1", r"mlp\.down_proj, mlp\.gate_proj, mlp\.up_proj, self_attn\.k_proj"),
        ("lm_head", r"model\.layers\.0\.self_attn\.q_proj"),
        ("*.7.mlp.up_proj", r"model\.layers\.0\.self_attn\.q_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_a_hint(pattern: str, hint: str) -> None:
    message = f"no layer.*{re.escape(repr(pattern))}.* {hint}"
    with pytest.raises(LookupError, match=message):
        find_layers(tiny_model("llama"), ["*.mlp.*", pattern])


def test_the_blocks_are_the_text_decoders_even_if_a_vision_encoder_is_as_deep() -> None:
    model = tiny_vision_model()
    assert find_blocks(model)[0] == "model.language_model.layers"
    assert {layer.inputs for layer in find_layers(model, "*.mlp.up_proj")} == {24}


def test_the_blocks_are_found_whatever_get_decoder_says() -> None:
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2}
    config = ModernBertDecoderConfig(
        vocab_size=VOCABULARY, num_attention_heads=3, pad_token_id=0, **sizes
    )
    model: Any = ModernBertDecoderForCausalLM(config)
    assert model.get_decoder() is model.decoder  # its output layer
    assert find_blocks(model) == ("model.layers", model.model.layers)
    assert decoder_of(model) is model.model
    vision: Any = tiny_vision_model()
    vision.get_decoder = lambda: vision.lm_head
    assert decoder_of(vision) is vision.model.language_model
    assert find_blocks(vision)[0] == "model.language_model.layers"


def test_of_several_lists_the_one_nearest_to_the_embedding_is_the_blocks() -> None:
    model: Any = tiny_model()
    images = nn.ModuleDict({"encoder": nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])})
    model.model.images = images  # an image encoder in the same module, as in GIT
    model.model._modules = {"images": images} | model.model._modules
    assert next(iter(dict(model.model.named_children()))) == "images"
    assert find_blocks(model)[0] == "model.layers"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_decoder_is_what_transformers_calls_so(name: str) -> None:
    model: Any = tiny_model(name)
    assert decoder_of(model) is model.get_decoder()


def with_lora(model: Any) -> Any:
    """Wrap a layer as peft does, without peft."""
    wrapper = nn.Module()
    wrapper.base_layer = model.model.layers[1].mlp.up_proj
    wrapper.lora_A = nn.ModuleDict({"default": nn.Linear(24, 4, bias=False)})
    wrapper.lora_B = nn.ModuleDict({"default": nn.Linear(4, 37, bias=False)})
    model.model.layers[1].mlp.up_proj = wrapper
    return model


def with_prompt(model: Any) -> Any:
    """Wrap a model as peft does for learned prompts, without peft."""
    return type("PeftModel", (nn.Module,), {"__module__": "peft.peft_model", "config": None})()


@pytest.mark.parametrize("adapted", [with_lora, with_prompt])
def test_a_model_with_an_adapter_is_refused_at_once(adapted: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"adapter.*merge_and_unload"):
        find_layers(adapted(tiny_model()))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own use of transformers
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prompt", "prefix"])
def test_a_model_of_peft_is_refused_at_once_until_it_is_merged(method: str) -> None:
    peft: Any = importlib.import_module("peft")
    text = {"task_type": "CAUSAL_LM"}
    config = {
        "lora": lambda: peft.LoraConfig(target_modules=["up_proj"], **text),
        "dora": lambda: peft.LoraConfig(target_modules=["up_proj"], use_dora=True, **text),
        "ia3": lambda: peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[], **text),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **text),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **text),
    }[method]()
    model = peft.get_peft_model(tiny_model(), config)
    with pytest.raises(ValueError, match=r"adapter.*merge_and_unload"):
        find_layers(model)
    if method in {"lora", "dora", "ia3"}:
        assert len(find_layers(model.merge_and_unload())) == 21


class CodesLinear(nn.Module):
    """A linear layer as quantisations make them: no base class in common, codes for a weight."""

    def __init__(self, dense: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.scale = float(dense.weight.detach().abs().max()) / 127
        self.register_buffer("qweight", (dense.weight.detach().T / self.scale).round().char())
        self.bias = dense.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes: Any = self.qweight
        return nn.functional.linear(x, codes.T * self.scale, self.bias)


def test_quantised_layers_of_any_class_are_found_with_their_sizes() -> None:
    model: Any = tiny_model()
    before = [(x.name, x.neurons, x.inputs) for x in find_layers(model)]
    for block in model.model.layers:
        block.mlp.up_proj = CodesLinear(block.mlp.up_proj)
    found = find_layers(model)
    assert [(x.name, x.neurons, x.inputs) for x in found] == before
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj .*quantised \(CodesLinear"):
        check_prunable(found)
    codes = find_layers(model, "*.up_proj")
    assert [dequantised(layer) for layer in codes] == [None] * 3
    assert {device_of(layer) for layer in codes} == {torch.device("cpu")}


def test_a_weight_that_knows_its_numbers_is_dequantised() -> None:
    model: Any = tiny_model()
    codes = torch.randint(-127, 127, (37, 24), dtype=torch.int8)
    (layer,) = find_layers(model, "*.1.mlp.up_proj")

    class Codes(nn.Parameter):
        def dequantize(self) -> torch.Tensor:
            return self.detach() * 0.05

    layer.module.weight = Codes(codes, requires_grad=False)
    found = dequantised(layer)
    assert found is not None
    torch.testing.assert_close(found, codes * 0.05)
    layer.module.weight = nn.Parameter(codes, requires_grad=False)  # codes alone
    assert dequantised(layer) is None


def test_hooks_of_a_layer_stay_when_it_is_replaced() -> None:
    model: Any = tiny_model()
    (layer,) = find_layers(model, "*.1.mlp.up_proj")
    heard: list[int] = []
    handle = layer.module.register_forward_hook(lambda *_: heard.append(1))
    replace_layer(model, layer, mixture_of(layer))
    model(torch.arange(3, 9)[None])
    assert heard == [1]
    handle.remove()
    model(torch.arange(3, 9)[None])
    assert heard == [1]


def test_excluded_layers_are_left_out() -> None:
    model = tiny_model()
    found = [x.role for x in find_layers(model, "*.1.mlp.*", exclude="*.up_proj")]
    assert found == ["mlp.gate_proj", "mlp.down_proj"]
    rest = find_layers(model, exclude=["*.0.*", "model.layers.2.mlp.up_proj"])
    assert len(rest) == 13
    with pytest.raises(LookupError, match=re.escape("'*.up_prj'")):
        find_layers(model, "*", exclude=["*.up_proj", "*.up_prj"])
    with pytest.raises(LookupError, match=r"no layer is left.*\*\.up_proj.*\*\.mlp\.\*"):
        find_layers(model, "*.up_proj", exclude="*.mlp.*")


def test_skipped_layers_may_be_matched_but_not_named() -> None:
    layers = find_layers(tiny_model(), "*.up_proj")
    skipped = {layers[1].name: "it is deaf"}
    assert without_skipped(layers, skipped, ["*.up_proj"]) == [layers[0], layers[2]]
    message = r"layers\.1\.mlp\.up_proj.*it is deaf"
    with pytest.raises(ValueError, match=message):
        without_skipped(layers, skipped, ["*.up_proj", layers[1].name])
    with pytest.raises(ValueError, match=f"none of the 1 layers.*{message}"):
        without_skipped(layers[1:2], skipped, ["*.1.*"])


def test_a_model_without_such_blocks_is_refused() -> None:
    model = tiny_model("gpt2")
    model.config.n_layer = 5
    with pytest.raises(ValueError, match=r"\b5 .*blocks.*GPT2LMHeadModel"):
        find_blocks(model)
    wrapped: Any = nn.DataParallel(tiny_model("gpt2"))
    with pytest.raises(ValueError, match=r"transformers.*DataParallel"):
        find_layers(wrapped)


def test_a_layer_prints_short_and_compares_by_name() -> None:
    first, *_ = find_layers(tiny_model("gpt2"))
    assert (
        repr(first)
        == "LinearLayer(name='transformer.h.0.attn.c_attn', block=0, role='attn.c_attn')"
    )
    assert first == LinearLayer(first.name, 0, "attn.c_attn", nn.Identity())


# Expanded layers.


def mixture_of(layer: LinearLayer, experts: int = 3) -> ExpertLinear:
    """Return equal experts of a layer's weights."""
    weight, bias = weight_of(layer), layer.module.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    own = None if bias is None else bias.detach().clone()
    router = random_router(layer.inputs, torch.ones(experts))
    return ExpertLinear(weight.expand(experts, -1, -1).clone(), own, router, [1] * experts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_replaced_layer_is_found_in_the_old_ones_place(name: str) -> None:
    model, ids = tiny_model(name), torch.arange(3, 15)[None]
    with torch.no_grad():
        before = model(ids).logits
    dense = find_layers(model)
    replaced = [replace_layer(model, layer, mixture_of(layer)) for layer in dense[1::2]]
    found = find_layers(model)
    assert [(layer.name, layer.block, layer.role) for layer in found] == [
        (layer.name, layer.block, layer.role) for layer in dense
    ]
    sizes = [(layer.neurons, layer.inputs) for layer in dense]
    assert [(layer.neurons, layer.inputs) for layer in found] == sizes
    for old, new, got in zip(dense[1::2], found[1::2], replaced, strict=True):
        assert got.module is new.module is model.get_submodule(old.name)
        assert (got.name, got.block, got.role) == (old.name, old.block, old.role)
        assert weight_of(got).shape == (3, old.neurons, old.inputs)
        assert all(torch.equal(expert, weight_of(old)) for expert in weight_of(got))
    for old, new in zip(dense[::2], found[::2], strict=True):
        assert new.module is old.module
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for layer in replaced:
            weight_of(layer).zero_()
        assert not torch.allclose(model(ids).logits, before, rtol=1e-2, atol=1e-2)


def test_an_expanded_layer_may_be_replaced_by_a_plain_one() -> None:
    model = tiny_model("gpt2")
    (layer,) = find_layers(model, "*.1.mlp.c_fc")
    expanded = replace_layer(model, layer, mixture_of(layer))
    back = replace_layer(model, expanded, layer.module)
    assert find_layers(model, "*.1.mlp.c_fc")[0].module is back.module is layer.module


def test_an_expanded_layer_is_refused_with_its_number_of_experts() -> None:
    model = tiny_model()
    (up,) = find_layers(model, "*.1.mlp.up_proj")
    replace_layer(model, up, mixture_of(up, experts=5))
    layers = find_layers(model)
    message = r"model\.layers\.1\.mlp\.up_proj .*expanded.*\b5 experts"
    with pytest.raises(ValueError, match=message):
        check_prunable(layers, layers)
    check_prunable([layer for layer in layers if layer != up], layers)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_routers_are_not_listed_as_skipped(name: str) -> None:
    model = tiny_model(name)
    before = skipped_parameters(model)
    for layer in find_layers(model):
        router = CentroidRouter(torch.ones(layer.inputs, 2), torch.ones(2))
        weight = torch.ones(2, layer.neurons, layer.inputs)
        replace_layer(model, layer, ExpertLinear(weight, None, router, [1, 1]))
    assert skipped_parameters(model) == before
