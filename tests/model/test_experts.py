"""A mixture of experts against a loop over tokens, and packing against the bits themselves."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from entangle.model.experts import ExpertLinear, Packed, PackedLinear, pack, packed_bytes, unpack
from entangle.numerics.routing import CentroidRouter, Router, fit_router, random_router
from entangle.numerics.sparse import Sliced

INPUTS, NEURONS, EXPERTS = 12, 7, 4
FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return inputs in four groups, so that k-means finds as many experts."""
    centres = 4 * noise(EXPERTS, INPUTS, seed=11)
    rows: torch.Tensor = noise(*shape, INPUTS, seed=seed)
    chosen = torch.randint(EXPERTS, shape, generator=torch.Generator().manual_seed(seed))
    return rows + centres[chosen]


def routers() -> list[Router]:
    found = [fit_router(rows_of(400), EXPERTS), random_router(INPUTS, torch.ones(EXPERTS))]
    assert [router.experts for router in found] == [EXPERTS, EXPERTS]
    return [*found]


def layer_of(
    router: Router,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    owns_router: bool = True,
) -> ExpertLinear:
    weight = noise(router.experts, NEURONS, INPUTS, seed=5).to(dtype)
    own = noise(NEURONS, seed=6).to(dtype) if bias else None
    return ExpertLinear(weight, own, router, [1] * router.experts, owns_router=owns_router)


def token_by_token(layer: ExpertLinear, inputs: torch.Tensor) -> torch.Tensor:
    """Give each token alone to its own expert's linear."""
    outputs = [
        functional.linear(row, layer.weight[int(layer.router.assign(row[None]))], layer.bias)
        for row in inputs.reshape(-1, INPUTS)
    ]
    shape = (*inputs.shape[:-1], NEURONS)
    return torch.stack(outputs).view(shape) if outputs else torch.empty(shape, dtype=inputs.dtype)


@pytest.mark.parametrize("shape", [(50,), (3, 20), (2, 3, 10), (1,), (1, 1), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
def test_each_token_goes_through_the_weights_of_its_own_expert(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, device: torch.device
) -> None:
    inputs = rows_of(*shape).to(dtype)
    for router in routers():
        layer = layer_of(router, dtype, bias=bias)
        if inputs.numel() > 50 * INPUTS:
            assert len(router.assign(inputs.reshape(-1, INPUTS)).unique()) == EXPERTS
        outputs = copy.deepcopy(layer).to(device)(inputs.to(device)).cpu()
        assert (outputs.shape, outputs.dtype) == ((*shape, NEURONS), dtype)
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
        expected = token_by_token(layer, inputs)
        torch.testing.assert_close(outputs, expected, rtol=tolerance / 5, atol=tolerance)


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_all_tokens_may_be_one_experts(expert: int) -> None:
    bias = torch.zeros(EXPERTS)
    bias[expert] = 1.0
    layer = layer_of(CentroidRouter(torch.zeros(INPUTS, EXPERTS), bias))
    inputs = rows_of(4, 9)
    expected = functional.linear(inputs, layer.weight[expert], layer.bias)
    torch.testing.assert_close(layer(inputs), expected)


@pytest.mark.parametrize("experts", [[0, 3], [1, 2, 3], [2]])
def test_experts_without_tokens_are_passed_over(experts: list[int]) -> None:
    sizes = torch.zeros(EXPERTS)
    sizes[experts] = 1.0
    layer = layer_of(random_router(INPUTS, sizes))
    inputs = rows_of(200)
    assert layer.router.assign(inputs).unique().tolist() == experts
    with torch.no_grad():
        layer.weight[[e for e in range(EXPERTS) if e not in experts]] = torch.nan
    torch.testing.assert_close(layer(inputs), token_by_token(layer, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
def test_equal_experts_are_the_dense_layer(bias: bool, dtype: torch.dtype) -> None:
    dense = nn.Linear(INPUTS, NEURONS, bias=bias, dtype=dtype)
    inputs = rows_of(6, 11).to(dtype)
    for router in routers():
        weight = dense.weight.detach().expand(EXPERTS, -1, -1).clone()
        own = None if dense.bias is None else dense.bias.detach()
        layer = ExpertLinear(weight, own, router, [1] * EXPERTS)
        assert (layer.in_features, layer.out_features) == (dense.in_features, dense.out_features)
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(layer(inputs), dense(inputs), rtol=tolerance, atol=tolerance)


def test_gradients_flow_to_the_inputs_and_not_to_the_weights() -> None:
    for router in routers():
        layer = layer_of(router)
        inputs, upstream = rows_of(5, 8).requires_grad_(), noise(5, 8, NEURONS, seed=9)
        (layer(inputs) * upstream).sum().backward()
        chosen = router.assign(inputs.detach().reshape(-1, INPUTS))
        expected = torch.stack(
            [row @ layer.weight[e] for row, e in zip(upstream.view(-1, NEURONS), chosen, strict=True)]
        )  # fmt: skip
        assert inputs.grad is not None
        torch.testing.assert_close(inputs.grad.view(-1, INPUTS), expected, rtol=1e-4, atol=1e-4)
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_inputs_are_not_written_to() -> None:
    layer, inputs = layer_of(routers()[0]), rows_of(5, 8)
    before = inputs.clone()
    layer(inputs)
    assert torch.equal(inputs, before)


def test_inputs_may_lie_in_memory_as_they_like() -> None:
    for router in routers():
        layer = layer_of(router)
        inputs = rows_of(8, 5).transpose(0, 1)
        assert not inputs.is_contiguous()
        expected = token_by_token(layer, inputs.contiguous())
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-4, atol=1e-4)


def test_under_automatic_casting_it_is_as_inexact_as_a_dense_layer() -> None:
    inputs = rows_of(500)
    for router in routers():
        layer = layer_of(router)
        exact = layer(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = layer(inputs)
            dense = nn.Linear(INPUTS, NEURONS)(inputs)
        assert outputs.dtype == dense.dtype == torch.bfloat16
        torch.testing.assert_close(outputs.float(), exact, rtol=0.02, atol=0.2)  # no other expert


def test_layers_that_share_a_router_ask_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    router = routers()[0]
    layers = [layer_of(router, owns_router=owns) for owns in (True, False, False)]
    asked: list[int] = []
    assign = CentroidRouter.assign

    def counting(self: CentroidRouter, rows: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        return assign(self, rows)

    monkeypatch.setattr(CentroidRouter, "assign", counting)
    for batch in (4, 5):
        inputs = rows_of(batch, 10, seed=batch)
        outputs = [layer(inputs) for layer in layers]
        assert asked == [40, 50][: batch - 3]
        assert torch.equal(outputs[0], outputs[2])
        expected = token_by_token(layers[1], inputs)
        torch.testing.assert_close(outputs[1], expected, rtol=1e-4, atol=1e-4)
        asked[:] = [40, 50][: batch - 3]
    twins = copy.deepcopy(nn.ModuleList(layers))
    assert twins[0].router is twins[2].router is not router
    assert torch.equal(twins[2](inputs), outputs[2])


@pytest.mark.parametrize(
    ("weights", "counts", "message"), [(3, 4, "3 weights and 4 counts"), (4, 5, "4 weights and 5 counts"), (5, 5, "5 weights and 5 counts")]
)  # fmt: skip
def test_another_number_of_experts_than_the_router_has_is_refused(
    weights: int, counts: int, message: str
) -> None:
    router = routers()[1]
    with pytest.raises(ValueError, match=rf"router.*\b4 experts.*{message}$"):
        ExpertLinear(torch.zeros(weights, 7, 12), None, router, [1] * counts)


@pytest.mark.parametrize("tokens", [1, 30])
def test_no_order_of_calls_gives_a_token_to_another_expert(tokens: int) -> None:
    for router in routers():
        owner, other = layer_of(router), layer_of(router, owns_router=False)
        packed = PackedLinear(other.weight, other.bias, router, owns_router=False)
        for inference in (False, True):
            with torch.inference_mode(inference):
                first, second = rows_of(tokens, seed=1), rows_of(tokens, seed=2)
                for layer, inputs in [
                    (other, first),  # before the owner
                    (owner, first),
                    (other, second),  # another tensor than the owner's
                    (other, first),
                    (packed, first),
                    (packed, second),
                    (owner, second.neg_()),  # changed in place
                    (packed, second),
                    (other, second),
                    (owner, first.neg_()),
                    (owner, first.neg_()),  # twice the same layer
                    (other, first),
                ]:
                    expected = token_by_token(other, inputs)
                    torch.testing.assert_close(layer(inputs), expected, rtol=1e-4, atol=1e-4)
                if not inference:  # torch counts the changes of this tensor
                    expected = token_by_token(other, first.neg_())
                    torch.testing.assert_close(other(first), expected, rtol=1e-4, atol=1e-4)


def test_it_prints_its_size() -> None:
    layer = layer_of(routers()[1], bias=False)
    assert "experts=4, in_features=12, out_features=7, bias=False" in repr(layer)
    assert "bias=True" in repr(layer_of(routers()[1]))


# Without zeros.

SHAPES = [(50,), (3, 20), (2, 3, 10), (17,), (1,), (1, 1), (0,), (2, 0)]


def forbidden(*_: object) -> torch.Tensor:
    raise AssertionError("the other way was taken")


def only_empty(sliced: Sliced, rows: torch.Tensor, order: torch.Tensor, spans: Any) -> torch.Tensor:
    assert not spans, "the other way was taken"
    return torch.full((len(rows), sliced.neurons), torch.nan)


@pytest.fixture(params=["packed", "unpacked", "as it is faster"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have all products with tokens made in one way, and in no other."""
    if request.param != "as it is faster":
        packed = request.param == "packed"
        monkeypatch.setattr(Sliced, "is_faster", lambda *_: packed)
        if packed:
            monkeypatch.setattr(Sliced, "dense", forbidden)
        else:
            monkeypatch.setattr(Sliced, "products", only_empty)
    return str(request.param)


def thinned(layer: ExpertLinear, density: float = 0.3) -> ExpertLinear:
    """Make most of a layer's weights zeros, and one of an expert's rows all of it."""
    kept = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(8)) < density
    layer.weight.data[~kept] = 0.0
    layer.weight.data[1, 2] = 0.0
    return layer


def packed_of(layer: ExpertLinear) -> PackedLinear:
    """Pack a layer, with a router of its own."""
    router = copy.deepcopy(layer.router)
    return PackedLinear(layer.weight, layer.bias, router)


def exactly(layer: ExpertLinear, inputs: torch.Tensor) -> torch.Tensor:
    """Return the outputs in float64 of a layer's weights, each token's through its own expert."""
    bias = 0.0 if layer.bias is None else layer.bias.double()
    rows = inputs.reshape(-1, INPUTS)
    chosen = layer.router.assign(rows)
    outputs = torch.einsum("ti,tni->tn", rows.double(), layer.weight.double()[chosen]) + bias
    return outputs.view(*inputs.shape[:-1], NEURONS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_experts_are_the_same_layer(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    inputs = rows_of(*shape).to(dtype)
    if not inputs.numel():
        monkeypatch.undo()
    for router in routers():
        layer = thinned(layer_of(router, dtype, bias=bias))
        packed = packed_of(layer)
        assert (packed.in_features, packed.out_features) == (INPUTS, NEURONS)
        before = inputs.clone()
        outputs = packed(inputs)
        assert (outputs.shape, outputs.dtype) == ((*shape, NEURONS), dtype)
        # Unpacked, torch may round a bfloat16 before it adds the bias.
        once = way == "packed" or not bias
        rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2**-8, 1e-5 if once else 0.05)
        expected = exactly(layer, inputs)
        torch.testing.assert_close(outputs.double(), expected, rtol=rtol, atol=atol)
        torch.testing.assert_close(
            outputs, layer(inputs), rtol=2 * rtol, atol=max(atol, 0.05 * (dtype != torch.float32))
        )
        assert torch.equal(inputs, before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_router_it_is_one_layer(
    shape: tuple[int, ...], bias: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = nn.Linear(INPUTS, NEURONS, bias=bias)
    dense.weight.data[torch.rand(NEURONS, INPUTS) < 0.6] = 0.0
    packed = PackedLinear(dense.weight[None], dense.bias, None)
    inputs = rows_of(*shape)
    if not inputs.numel():
        monkeypatch.undo()
    outputs = packed(inputs)
    assert outputs.shape == (*shape, NEURONS)
    torch.testing.assert_close(outputs, dense(inputs).detach(), rtol=1e-5, atol=1e-5)
    assert "experts=1, in_features=12, out_features=7" in repr(packed)
    assert f"bias={bias}" in repr(packed)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert way


def test_inputs_of_packed_experts_may_lie_in_memory_as_they_like(way: str) -> None:
    for router in routers():
        layer = thinned(layer_of(router))
        inputs = rows_of(8, 5).transpose(0, 1)
        assert not inputs.is_contiguous()
        for each in (inputs, inputs[:1, :1], inputs[:, 3]):
            expected = exactly(layer, each).float()
            torch.testing.assert_close(packed_of(layer)(each), expected, rtol=1e-5, atol=1e-5)
    assert way


def test_packed_layers_that_share_a_router_ask_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    router = routers()[0]
    layers = [thinned(layer_of(copy.deepcopy(router))) for _ in range(2)]
    pairs = zip(layers, (True, False), strict=True)
    packed = [PackedLinear(x.weight, x.bias, router, owns_router=owns) for x, owns in pairs]
    mixed = [*packed, thinned(layer_of(router, owns_router=False))]
    asked: list[int] = []
    assign, one = CentroidRouter.assign, Sliced.one

    def counting_one(
        self: Sliced, inputs: torch.Tensor, expert: int | None, *arrays: Any
    ) -> tuple[torch.Tensor, int]:
        asked.extend([1] if expert is None else [])
        return one(self, inputs, expert, *arrays)

    def counting(self: CentroidRouter, rows: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        return assign(self, rows)

    for tokens in (40, 1):
        inputs = rows_of(1, tokens, seed=tokens)
        with monkeypatch.context() as patch:
            patch.setattr(CentroidRouter, "assign", counting)
            patch.setattr(Sliced, "one", counting_one)
            outputs = [layer(inputs) for layer in mixed]
        assert asked == [40, 1][: 1 + (tokens == 1)]
        expected = exactly(layers[0], inputs).float()
        assert torch.equal(outputs[0], outputs[1])
        for found in outputs:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    twins = copy.deepcopy(nn.ModuleList(mixed))
    assert twins[0].router is twins[2].router is not router
    assert torch.equal(twins[0](inputs), outputs[0])


def test_a_packed_layer_sees_that_its_router_was_moved_or_lies_transposed() -> None:
    layer = thinned(layer_of(routers()[0]))
    fitted = layer.router
    assert isinstance(fitted, CentroidRouter)
    turned = CentroidRouter(fitted.matrix.T.contiguous().T, fitted.bias)
    assert not turned.matrix.is_contiguous()
    packed, rows = PackedLinear(layer.weight, None, turned), rows_of(60)
    layer.bias = None

    def check(expected: torch.Tensor) -> None:
        found = torch.stack([packed(row) for row in rows])
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)

    before = exactly(layer, rows)
    check(before)
    for parameter in fitted.parameters():  # to other experts: those of the opposite rows
        parameter.data = -parameter.data
    turned.matrix.data, turned.bias.data = fitted.matrix.data, fitted.bias.data
    packed.to(torch.float32)
    after = exactly(layer, rows)
    assert not torch.allclose(after, before)
    check(after)
    twin = copy.deepcopy(packed)
    assert isinstance(twin.router, CentroidRouter)
    twin.router.matrix.data.zero_()
    twin.router.bias.data.copy_(torch.eye(EXPERTS)[2])
    torch.testing.assert_close(twin(rows[0]), layer.weight[2] @ rows[0], rtol=1e-5, atol=1e-5)
    check(after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_what_cannot_be_packed_is_refused(dtype: torch.dtype) -> None:
    router = routers()[1]
    with pytest.raises(ValueError, match=f"packed.* {dtype}$"):
        PackedLinear(torch.zeros(EXPERTS, NEURONS, INPUTS, dtype=dtype), None, router)


# Packing.


def special(dtype: torch.dtype) -> torch.Tensor:
    """Return every kind of float: zeros of both signs, NaNs with payloads, infinities, tiny ones."""
    size = 8 * dtype.itemsize
    exponent = {torch.float32: 0x7F80_0000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
    sign = 1 << (size - 1)
    patterns = [0, sign, exponent, exponent | sign, exponent | 1, exponent | sign | 5, 1, sign | 1]
    bits = np.array([*patterns, exponent - 1, 0, 0, 0x1234, 0], dtype=f"uint{size}")
    return torch.from_numpy(bits.view(f"int{size}")).view(dtype)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def sparse(shape: Sequence[int], dtype: torch.dtype, density: float) -> torch.Tensor:
    weight = noise(*shape, seed=3)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < density
    return torch.where(keep, weight, 0.0).to(dtype)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5, 7), (4, 16, 24), (5, 0, 3), ()])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_packing_keeps_every_bit(
    shape: tuple[int, ...], density: float, dtype: torch.dtype
) -> None:
    weight = sparse(shape, dtype, density)
    packed = pack(weight)
    again = unpack(packed, shape)
    assert (again.shape, again.dtype) == (weight.shape, dtype)
    assert raw(again.flatten()) == raw(weight.flatten())
    nonzero = int((weight != 0).sum())
    assert len(packed.values) == nonzero
    assert packed.mask.dtype == torch.uint8
    assert len(packed.mask) == (weight.numel() + 7) // 8
    size = len(raw(packed.mask)) + len(raw(packed.values))
    assert packed_bytes(weight) == size == (weight.numel() + 7) // 8 + nonzero * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_keeps_negative_zeros_and_nans(dtype: torch.dtype) -> None:
    weight = special(dtype)
    packed = pack(weight)
    assert raw(unpack(packed, weight.shape)) == raw(weight)
    zeros = 4  # of all thirteen, the positive ones
    assert len(packed.values) == len(weight) - zeros
    assert packed_bytes(weight) == 2 + (len(weight) - zeros) * dtype.itemsize


def test_a_mask_has_a_bit_for_each_weight_in_their_order() -> None:
    weight = torch.zeros(2, 5)
    weight[0, 0], weight[0, 3], weight[1, 4] = 3.0, -1.0, 2.0
    packed = pack(weight)
    assert packed.mask.tolist() == [0b10010000, 0b01000000]
    assert packed.values.tolist() == [3.0, -1.0, 2.0]


def test_a_weight_that_lies_transposed_is_packed_as_it_is_read() -> None:
    weight = sparse((6, 9), torch.float32, 0.4).T
    assert torch.equal(unpack(pack(weight), (9, 6)), weight)
    assert packed_bytes(weight) == 7 + 4 * int((weight != 0).sum())
    parameter = nn.Parameter(weight.clone())
    assert not pack(parameter).values.requires_grad


def test_packed_bytes_are_those_of_a_file() -> None:
    weight = sparse((4, 33, 21), torch.bfloat16, 0.3)
    packed = pack(weight)
    data = save({"mask": packed.mask, "values": packed.values})
    header = 8 + int.from_bytes(data[:8], "little")
    assert packed_bytes(weight) == len(data) - header


@pytest.mark.parametrize("shape", [(3, 5), (5, 3, 3), (4, 9), (5, 5), (1,), (0,)])
def test_what_is_no_weight_of_a_shape_is_refused(shape: tuple[int, ...]) -> None:
    packed = pack(torch.ones(3, 9))
    size = " x ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"^27 values.*\b4 bytes.* {size}$"):
        unpack(packed, shape)


def test_values_that_are_not_as_many_as_the_mask_says_are_refused() -> None:
    packed = pack(sparse((5, 8), torch.float32, 0.5))
    for values in (packed.values[1:], torch.cat([packed.values, torch.ones(1)]), packed.values[:0]):
        with pytest.raises(ValueError, match=rf"^{len(values)} values.*\b5 bytes.* 5 x 8$"):
            unpack(Packed(packed.mask, values), (5, 8))


def test_a_token_with_a_gradient_is_routed_too() -> None:
    for router in routers():
        layer = thinned(layer_of(router))
        inputs = rows_of(1, 1).requires_grad_()
        expected = exactly(layer, inputs).float()
        for found in (layer(inputs), PackedLinear(layer.weight, layer.bias, router)(inputs)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
