"""Layers on a GPU, by Triton's interpreter without one: the CPU's outputs, and no waiting for them."""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, StaticCache

import entangle
from entangle.model.experts import ExpertLinear, Mixture, PackedLinear
from entangle.model.layers import find_layers, weight_of
from entangle.model.loading import load_model, save_model
from entangle.model.packing import pack_layer, weight_bytes
from entangle.numerics.device_weights import DeviceSliced
from entangle.numerics.routing import CentroidRouter, RandomRouter, Router, Routes
from tests.measurement.test_recording import tokens, windows_of
from tests.model.test_experts import (
    EXPERTS,
    INPUTS,
    NEURONS,
    exactly,
    layer_of,
    noise,
    routers,
    rows_of,
    thinned,
    token_by_token,
)
from tests.model.test_packed_layers import thin
from tests.model.test_packing import expand
from tests.tiny_models import tiny_model, tiny_tokenizer

kernel = pytest.importorskip("entangle.numerics.kernels.sparse_triton")

CUT = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

# What a GPU's program would wait for: numbers on the host, and sizes that depend on values.
WAITS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "is_nonzero", "equal"}
METHODS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__")


class _Watched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        masks = [x for x in args if isinstance(x, list | tuple)] if "index" in name else []
        by_mask = any(getattr(x, "dtype", None) == torch.bool for xs in masks for x in xs)
        if (name in WAITS or by_mask) and not _in_triton():
            raise AssertionError(f"the host waits for {name}")
        return func(*args, **kwargs or {})


def _in_triton() -> bool:
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("triton."):
            return True
        frame = frame.f_back
    return False


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Raise an AssertionError where the body copies something to the host."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return

    def refusing(name: str, method: Any) -> Any:
        def refuse(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            assert _in_triton(), f"the host waits for {name}"
            return method(self, *args, **kwargs)

        return refuse

    with pytest.MonkeyPatch.context() as patch, _Watched():  # type: ignore[no-untyped-call]
        for name in METHODS:
            patch.setattr(torch.Tensor, name, refusing(name, getattr(torch.Tensor, name)))
        yield


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own way to notice it")
def test_it_is_noticed_that_the_host_waits() -> None:
    layer, rows = layer_of(routers()[0]), rows_of(9)  # by the CPU's ways
    mask = rows[:, 0] > 0
    for deed in (
        lambda: layer(rows),
        lambda: layer(rows[:1]),
        lambda: rows.cpu(),
        lambda: rows[mask],
        lambda: int(rows[0, 0]),
        lambda: mask.bincount(),
    ):
        with pytest.raises(AssertionError, match="waits for"), nothing_waits():
            deed()
    with nothing_waits():
        assert rows.sum().shape == ()


def both(
    layer: ExpertLinear, router: Router, gpu: torch.device, *, owns_router: bool = True
) -> list[Mixture]:
    """Return a layer and its packed twin on the GPU, with this router, which is moved."""
    weight, bias, counts = layer.weight, layer.bias, layer.counts
    dense = ExpertLinear(weight, bias, router, counts, owns_router=owns_router)
    return [
        one.to(gpu) for one in (dense, PackedLinear(weight, bias, router, owns_router=owns_router))
    ]


@pytest.mark.parametrize("shape", [(18,), (3, 2), (1,), (1, 1), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_token_goes_through_its_own_expert_and_the_host_never_waits(
    shape: tuple[int, ...], dtype: torch.dtype, gpu: torch.device
) -> None:
    inputs = rows_of(*shape).to(dtype)
    for which, router in enumerate(routers()):
        layer = thinned(layer_of(router, dtype, bias=which == 0))
        for twin in both(layer, copy.deepcopy(router), gpu):
            on_card = inputs.to(gpu)
            with nothing_waits():
                outputs = twin(on_card)
            assert (outputs.shape, outputs.dtype) == ((*shape, NEURONS), dtype)
            expected = exactly(layer, inputs)
            torch.testing.assert_close(outputs.cpu().double(), expected, rtol=CUT[dtype], atol=1e-4)
            assert torch.equal(on_card.cpu(), inputs)


@pytest.mark.parametrize("shape", [(1,), (3,), (40,)])
def test_one_pruned_layer_is_the_same(shape: tuple[int, ...], gpu: torch.device) -> None:
    dense = nn.Linear(INPUTS, NEURONS)
    dense.weight.data[torch.rand(NEURONS, INPUTS) < 0.7] = 0.0
    packed, inputs = PackedLinear(dense.weight[None], dense.bias, None).to(gpu), rows_of(*shape)
    on_card = inputs.transpose(0, -1).contiguous().transpose(0, -1).to(gpu)
    with nothing_waits():
        outputs = packed(on_card)
    torch.testing.assert_close(outputs.cpu(), dense(inputs).detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(packed.weight.cpu(), dense.weight)
    with pytest.raises(ValueError, match=r"\b12 inputs.* 5$"):
        packed(torch.ones(1, 5, device=gpu))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What chose experts: the kernel of a product, or a router."""
    found: list[str] = []
    multiply = kernel.multiply

    def multiplying(*args: Any) -> Any:
        found.extend(["kernel"] if args[5] is not None else [])
        return multiply(*args)

    def asking(assign: Any) -> Any:
        def assigning(self: Router, rows: torch.Tensor) -> Any:
            found.append("router")
            return assign(self, rows)

        return assigning

    monkeypatch.setattr(kernel, "multiply", multiplying)
    for kind in (CentroidRouter, RandomRouter):
        monkeypatch.setattr(kind, "assign", asking(kind.assign))
    return found


@pytest.mark.parametrize("number", [1, 2, 18])
def test_layers_that_share_a_router_share_the_choice_on_the_device(
    number: int, gpu: torch.device, asked: list[str]
) -> None:
    for router in routers():
        layer = thinned(layer_of(router))
        shared = copy.deepcopy(router)
        owner = both(layer, shared, gpu)[1]
        layers = [owner, *both(layer, shared, gpu, owns_router=False)]
        for seed in range(2):
            inputs = rows_of(number, seed=seed)
            on_card = inputs.to(gpu)
            asked.clear()
            with torch.inference_mode(), nothing_waits():
                found = [one(on_card) for one in layers]
            alone = number == 1 and isinstance(router, CentroidRouter)
            assert asked == ["kernel" if alone else "router"]
            assert isinstance(shared.kept(on_card), Routes)
            for outputs in found:
                expected = exactly(layer, inputs).float()
                torch.testing.assert_close(outputs.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_where_gradients_or_casts_are_needed_torch_multiplies(gpu: torch.device) -> None:
    for router in routers():
        layer = layer_of(router)
        owner = both(layer, copy.deepcopy(router), gpu)[0]
        for number in (1, 20):
            inputs = rows_of(number).to(gpu).requires_grad_()
            owner(inputs).sum().backward()
            chosen = router.assign(inputs.detach().cpu())
            assert inputs.grad is not None
            expected = layer.weight[chosen].sum(dim=1)
            torch.testing.assert_close(inputs.grad.cpu(), expected, rtol=1e-4, atol=1e-4)
        rows = rows_of(20).to(gpu)
        with torch.autocast(gpu.type, dtype=torch.bfloat16):
            assert owner(rows).dtype == torch.bfloat16
        exact = layer_of(copy.deepcopy(router), torch.float64)
        expected = token_by_token(exact, rows.cpu().double())
        torch.testing.assert_close(exact.to(gpu)(rows.double()).cpu(), expected)


def test_a_packed_layer_is_moved_and_copied_with_its_weights(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = routers()[0]
    layer = thinned(layer_of(router))
    packed = both(layer, copy.deepcopy(router), gpu)[1]
    assert isinstance(packed, PackedLinear)
    assert isinstance(packed.sliced, DeviceSliced)
    rows = rows_of(3)
    twin = copy.deepcopy(packed).to(torch.bfloat16)
    assert twin.sliced.dtype == torch.float32
    assert torch.equal(twin.weight.cpu(), layer.weight)
    torch.testing.assert_close(packed(rows.to(gpu)).cpu(), exactly(layer, rows).float())
    if gpu.type == "cpu":
        monkeypatch.undo()
    back = packed.cpu()
    assert not isinstance(back.sliced, DeviceSliced)
    torch.testing.assert_close(back(rows), exactly(layer, rows).float())


@pytest.mark.parametrize("zeros", [0.59, 0.6])
def test_so_many_weights_must_be_zero_there(zeros: float, gpu: torch.device) -> None:
    model = tiny_model("llama").to(gpu)  # type: ignore[arg-type]
    (layer,) = find_layers(model, ["*.0.mlp.up_proj"])
    flat = weight_of(layer).view(-1)
    flat[:] = 1.0
    flat[: -int(-zeros * len(flat) // 1)] = 0.0
    pack_layer(model, layer)
    assert isinstance(model.get_submodule(layer.name), PackedLinear) == (zeros == 0.6)


def small(kind: str) -> PreTrainedModel:
    """Return a model of one block; of some of its layers less than 60% is zero."""
    model = tiny_model("llama", num_hidden_layers=1)
    if kind == "pruned":
        thin(model, patterns=("*.mlp.*",))
        return model
    return expand(model, at_random=False)


@pytest.mark.parametrize("kind", ["pruned", "expanded"])
def test_a_packed_model_runs_as_the_other_does(
    kind: str, gpu: torch.device, tmp_path: Path
) -> None:
    model = small(kind)
    save_model(model, None, tmp_path)
    packed = load_model(tmp_path, packed=True, device=str(gpu))
    mixtures = {name: m for name, m in packed.named_modules() if isinstance(m, PackedLinear)}
    layers = {layer.name: weight_of(layer) for layer in find_layers(model)}
    sparse = {name for name, w in layers.items() if (w == 0).sum() >= 0.6 * w.numel()}
    assert mixtures.keys() == sparse
    assert 0 < len(sparse) < len(layers)  # the others stay, some with a router of packed ones
    assert all(isinstance(module.sliced, DeviceSliced) for module in mixtures.values())
    assert weight_bytes(packed) < weight_bytes(model)
    ids = tokens(2, 12)
    with torch.inference_mode():
        found, expected = (one(ids.to(one.device)).logits.cpu() for one in (packed, model))
    nats, other = (
        cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for x in (found, expected)
    )
    assert float(nats) == pytest.approx(float(other), rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_commands_run_a_packed_model(
    gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small("pruned")
    save_model(model, None, tmp_path)
    packed = load_model(tmp_path, packed=True, device=str(gpu))
    windows = windows_of(tokens(1, 8))
    score = entangle.perplexity(packed, windows).perplexity
    text = entangle.generate(packed, tiny_tokenizer(), "The", tokens=3).text
    if gpu.type == "cpu":
        monkeypatch.undo()
    assert score == pytest.approx(entangle.perplexity(model, windows).perplexity, rel=1e-5)
    assert text == entangle.generate(model, tiny_tokenizer(), "The", tokens=3).text


def test_no_step_of_writing_with_a_static_cache_waits(gpu: torch.device) -> None:
    """So a CUDA graph can record it; the first step makes the cache."""
    model = small("expanded").to(gpu)  # type: ignore[arg-type]
    for layer in find_layers(model, ["*.mlp.*"]):
        weight_of(layer)[weight_of(layer).abs() < 0.02] = 0.0
        pack_layer(model, layer)
    cache = StaticCache(model.config, max_cache_len=3)
    ids, place = tokens(1, 2).to(gpu), torch.arange(2, device=gpu)[None]
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    with torch.inference_mode():
        model(input_ids=ids[:, :1], position_ids=place[:, :1], **options)
        with nothing_waits():
            found = model(input_ids=ids[:, 1:], position_ids=place[:, 1:], **options).logits
        expected = model(input_ids=ids, use_cache=False).logits[:, 1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("number", [1, 2, 200])
def test_a_cuda_graph_records_the_layers(number: int, gpu: torch.device) -> None:
    router = routers()[0]
    layer = thinned(layer_of(router))
    twins = both(layer, copy.deepcopy(router), gpu)
    still = rows_of(number).to(gpu)
    with torch.inference_mode():
        for twin in twins:
            twin(still)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [twin(still) for twin in twins]
        for seed in range(3):
            inputs = rows_of(number, seed=seed)
            still.copy_(inputs)
            graph.replay()
            for found in outputs:
                expected = exactly(layer, inputs).float()
                torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-4)


def test_experts_that_get_no_token_are_passed_over(gpu: torch.device) -> None:
    bias = torch.zeros(EXPERTS)
    bias[2] = 1.0
    router = CentroidRouter(torch.zeros(INPUTS, EXPERTS), bias)
    layer = layer_of(router)
    layer.weight.data[[0, 1, 3]] = torch.nan
    for twin in both(layer, router, gpu):
        for rows in (noise(2, INPUTS), noise(30, INPUTS)):
            expected = nn.functional.linear(rows, layer.weight[2], layer.bias)
            torch.testing.assert_close(twin(rows.to(gpu)).cpu(), expected, rtol=1e-5, atol=1e-5)


def test_packed_layers_keep_the_inputs_dtype_and_refuse_others(gpu: torch.device) -> None:
    for router in routers():
        layer = thinned(layer_of(router))
        packed = both(layer, copy.deepcopy(router), gpu)[1]
        for count in (1, 3, 90):
            rows = rows_of(count)
            with torch.autocast(gpu.type, dtype=torch.bfloat16):
                found = packed(rows.to(gpu))
            assert found.dtype == torch.float32
            torch.testing.assert_close(
                found.cpu().double(), exactly(layer, rows), rtol=1e-4, atol=1e-4
            )
            with pytest.raises(ValueError, match=r"float32, bfloat16 or float16.*float64"):
                packed(rows.to(gpu).double())
