"""Layers with plain weights of their own can be pruned; others are named, and keep their forward."""

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.pytorch_utils import Conv1D

from entangle.model.layers import find_blocks, find_layers, write_weight
from entangle.model.packing import pack_layers
from entangle.model.prunable import check_prunable, multiplies, unprunable_layers
from tests.tiny_models import ARCHITECTURES, tiny_model


class Twice(nn.Linear):
    """A linear layer that is more than a product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A linear layer with another name, and nothing else."""


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_layers_with_weights_of_their_own_can_be_pruned(name: str, dtype: torch.dtype) -> None:
    check_prunable(find_layers(tiny_model(name, dtype=dtype)))
    check_prunable([])


class Packed(nn.Parameter):
    """Floating-point by its dtype, and something else by its making, as in torchao."""


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        (nn.Parameter(torch.ones(37, 24, dtype=torch.int8), requires_grad=False), "int8"),
        (nn.Parameter(torch.ones(444, 1, dtype=torch.uint8), requires_grad=False), "uint8"),
        (nn.Parameter(torch.ones(37, 3, dtype=torch.int32), requires_grad=False), "int32"),
        (nn.Parameter(torch.ones(37, 24).to(torch.float8_e4m3fn)), "float8_e4m3fn"),
        (Packed(torch.ones(37, 24)), "float32"),
    ],
)
def test_a_quantised_layer_is_refused(weight: nn.Parameter, dtype: str) -> None:
    layers = find_layers(tiny_model())
    up = next(layer for layer in layers if layer.name == "model.layers.1.mlp.up_proj")
    up.module.weight = weight
    message = rf"model\.layers\.1\.mlp\.up_proj .*quantised.*Linear, torch\.{dtype}\b"
    with pytest.raises(ValueError, match=message):
        check_prunable(layers)
    check_prunable([layer for layer in layers if layer is not up])


def share_a_weight(blocks: Any) -> None:
    blocks[2].mlp.up_proj.weight = blocks[1].mlp.up_proj.weight


def share_a_layer(blocks: Any) -> None:
    blocks[2].mlp.up_proj = blocks[1].mlp.up_proj


@pytest.mark.parametrize("share", [share_a_weight, share_a_layer])
def test_layers_that_are_one_weight_are_refused_together(share: Callable[[Any], None]) -> None:
    model = tiny_model()
    share(find_blocks(model)[1])
    names = (rf"model\.layers\.{block}\.mlp\.up_proj" for block in (1, 2))
    message = f"{'.* '.join(names)} .*one weight"
    for patterns in ("*", "*.1.*"):  # leaving out one of them would change it all the same
        with pytest.raises(ValueError, match=message):
            check_prunable(find_layers(model, [patterns]), find_layers(model))
    check_prunable(find_layers(model, ["*.0.*", "*.down_proj"]), find_layers(model))


def test_layers_that_are_equal_by_chance_can_be_pruned() -> None:
    layers = find_layers(tiny_model(), "*.up_proj")
    for layer in layers:
        write_weight(layer, torch.zeros(37, 24))
    check_prunable(layers)


# Linear layers that are more than a product with their weight.


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_layers_of_these_architectures_are_products(name: str) -> None:
    assert unprunable_layers(find_layers(tiny_model(name))) == {}


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(24, 37),
        nn.Linear(24, 37, bias=False, dtype=torch.bfloat16),
        nn.Linear(24, 37, device="meta"),
        Conv1D(37, 24),  # type: ignore[no-untyped-call]
        Renamed(24, 37),
        FalconLinear(24, 37),  # its forward is written out, and rounds otherwise
        FalconLinear(24, 37, bias=False, device="meta"),
    ],
)
def test_a_product_is_known_by_what_it_computes(module: nn.Module) -> None:
    before = copy.deepcopy(module.state_dict())
    assert multiplies(module)
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert value.is_meta or torch.equal(value, before[name])
    assert module.weight.shape in {(37, 24), (24, 37)}  # as before
    if isinstance(module, nn.Linear):
        assert (module.in_features, module.out_features) == (24, 37)


def with_own_forward() -> nn.Module:
    module = nn.Linear(24, 37)
    module.forward = types.MethodType(lambda self, x: x @ self.weight.T * 3, module)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: Twice(24, 37),
        lambda: Twice(24, 37, bias=False, device="meta"),
        lambda: Llama4Router(types.SimpleNamespace(hidden_size=24, num_local_experts=4, num_experts_per_tok=1)),  # type: ignore[no-untyped-call]
        lambda: parametrizations.weight_norm(nn.Linear(24, 37)),
        lambda: parametrizations.orthogonal(nn.Linear(24, 24)),
        with_own_forward,
    ],
)  # fmt: skip
def test_what_is_more_than_a_product_is_none(make: Callable[[], nn.Module]) -> None:
    assert not multiplies(make())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_a_hook_computes_is_none_of_the_layers_own() -> None:
    assert not multiplies(weight_norm(nn.Linear(24, 37)))


def test_a_product_that_is_quantised_stays_refused() -> None:
    model = tiny_model()
    up: Any = find_blocks(model)[1][1].mlp
    up.up_proj = FP8Linear(24, 37, has_bias=True)
    layers = find_layers(model)
    assert unprunable_layers(layers) == {}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj .*quantised.*FP8Linear.*float8"):
        check_prunable(layers)


def test_packing_leaves_a_layer_with_a_forward_of_its_own_as_it_is() -> None:
    model: Any = tiny_model()
    twice = model.model.layers[1].mlp.up_proj = Twice(24, 37)
    for layer in find_layers(model):
        write_weight(layer, (torch.randn(layer.neurons, layer.inputs) - 1).relu())
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        pack_layers(model, find_layers(model))
        found = model(tokens).logits
    assert model.model.layers[1].mlp.up_proj is twice
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "PackedLinear"
    torch.testing.assert_close(found, expected)


def test_the_reason_names_the_class() -> None:
    model: Any = tiny_model()
    model.model.layers[1].mlp.up_proj = Twice(24, 37)
    ((name, reason),) = unprunable_layers(find_layers(model)).items()
    assert name == "model.layers.1.mlp.up_proj"
    assert "Twice" in reason
