"""Parts of `benchmarks/gpu.py`: packed layers and experts, beside cuBLAS and the dense layer.

All are recorded as CUDA graphs, which start without the host. The weights of a case are together
larger than the card's cache, since a model reads all its weights before it reads one again. Experts
differ by a factor, and tokens are drawn at the router's columns, so that each one's expert is known.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, StaticCache

from benchmarks.decode import sparse
from benchmarks.gpu_results import Result, Shape, built, compared
from benchmarks.timing import side_by_side
from entangle.model.experts import ExpertLinear, PackedLinear
from entangle.model.layers import find_layers, replace_layer, weight_of
from entangle.numerics.device_weights import DeviceSliced, multiply_few
from entangle.numerics.routing import CentroidRouter

BEYOND_CACHE = 400e6  # bytes of dense weights that are read between two uses of the same weight
TOKEN = {0.7: (0.5, 0.7), 0.8: (0.4, 0.55), 0.9: (0.25, 0.35)}  # sparsity: goal and least value
SPARSITY = 0.8  # of experts
ROUNDED = 0.01  # largest difference of outputs from the CPU's, by their norm: bfloat16 has 8 bits
COMPARED = 64  # tokens that the CPU multiplies too

Deed = Callable[[], Any]


def recorded(deed: Deed) -> Deed:
    """Return a deed as a CUDA graph, after it ran once to compile; without a card, the deed."""
    deed()
    if not torch.cuda.is_available():
        return deed
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        deed()
    return graph.replay


def check_outputs(what: str, outputs: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare outputs of the card with those of the CPU in float32, both (tokens, neurons)."""
    away = float((outputs.cpu().float() - expected).norm() / expected.norm())
    assert away <= ROUNDED, (
        f"{what}: outputs differ by {away:.2g} of their norm from the CPU's, limit {ROUNDED:g}"
    )


@torch.inference_mode()
def packed_token(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Result]:
    """Compare packed products of one token with cuBLAS's, summed over matrices of these shapes."""
    results = []
    for sparsity, (goal, least) in TOKEN.items():
        total, details = {"cuBLAS": 0.0, "packed": 0.0}, []
        for neurons, inputs in shapes:
            weight = sparse(torch.randn(neurons, inputs, device=device), sparsity).bfloat16()
            packed = PackedLinear(weight[None], None, None).sliced
            assert isinstance(packed, DeviceSliced)
            row = torch.randn(1, inputs, device=device).bfloat16()
            expected = row.cpu().float() @ weight.cpu().float().T
            check_outputs(f"{neurons} x {inputs}", multiply_few(packed, row, None, None), expected)
            count = max(int(BEYOND_CACHE / weight.nbytes), 2)
            dense = [weight.clone() for _ in range(count)]
            copies = [on_its_own(packed) for _ in range(count)]
            seconds = side_by_side(
                {
                    "cuBLAS": recorded(lambda: [functional.linear(row, x) for x in dense]),  # noqa: B023
                    "packed": recorded(lambda: [multiply_few(x, row, None, None) for x in copies]),  # noqa: B023
                }
            )
            each = {case: value / count for case, value in seconds.items()}
            total = {case: total[case] + value for case, value in each.items()}
            details.append(f"{neurons} x {inputs}: {compared(each)}")
        title = f"one token, packed at {sparsity:.0%}, sum over matrices, times cuBLAS"
        ratio = total["packed"] / total["cuBLAS"]
        results.append(Result(title, ratio, goal, least, "; ".join(details)))
    return results


def on_its_own(packed: DeviceSliced, experts: int = 1) -> DeviceSliced:
    """Return as many experts as asked for of packed weights of one, with memory of their own.

    The weights of expert e are 1 + e / experts times as large.
    """
    entries, ids = len(packed.values), torch.arange(experts, device=packed.values.device)
    bits = packed.columns.view(torch.int16 if packed.columns.itemsize == 2 else torch.int32)
    scales = (1 + ids / experts).to(packed.dtype)
    return dataclasses.replace(
        packed,
        values=(packed.values * scales[:, None]).view(-1),
        columns=bits.repeat(experts).view(packed.columns.dtype),
        starts=packed.starts + ids[:, None] * (entries // 8),
        order=packed.order.repeat(experts, 1),
    )


def random_mixture(
    weight: torch.Tensor, experts: int, router: CentroidRouter, *, owns_router: bool = True
) -> PackedLinear:
    """Return a mixture of experts, packed, of one pruned weight (neurons, inputs)."""
    mixture = PackedLinear(weight[None], None, router, owns_router=owns_router)
    assert isinstance(mixture.sliced, DeviceSliced)
    mixture.sliced = on_its_own(mixture.sliced, experts)
    return mixture


def random_router(inputs: int, experts: int, device: torch.device) -> CentroidRouter:
    """Return a router that sends a token which is its column e to expert e."""
    matrix = functional.normalize(torch.randn(inputs, experts, device=device), dim=0)
    return CentroidRouter(matrix, torch.zeros(experts, device=device))


@torch.inference_mode()
def mixture_token(neurons: int, inputs: int, experts: int, device: torch.device) -> list[Result]:
    """Compare one token's product with its expert, router included, with the dense layer's."""
    router = random_router(inputs, experts, device)
    weight = sparse(torch.randn(neurons, inputs, device=device), SPARSITY).bfloat16()
    mixture = random_mixture(weight, experts, router)
    rows = [row[None].bfloat16() for row in router.matrix.T]  # a token for each expert
    for expert, row in enumerate(rows):
        each = (weight * (1 + expert / experts)).cpu().float()
        check_outputs(f"expert {expert}", mixture(row), row.cpu().float() @ each.T)
    dense = [weight.clone() for _ in rows]
    pairs = [*zip(rows, dense, strict=True)]
    seconds = side_by_side(
        {
            "dense": recorded(lambda: [functional.linear(row, one) for row, one in pairs]),
            "experts": recorded(lambda: [mixture(row) for row in rows]),
        }
    )
    each_token = {case: value / experts for case, value in seconds.items()}
    title = f"one token, {experts} experts of {neurons} x {inputs} at {SPARSITY:.0%}, times dense"
    ratio = seconds["experts"] / seconds["dense"]
    return [Result(title, ratio, 0.5, 0.7, compared(each_token))]


@torch.inference_mode()
def mixture_prompt(
    neurons: int, inputs: int, experts: int, tokens: int, device: torch.device
) -> list[Result]:
    """Compare a prompt through experts, unpacked and packed, with the dense layer."""
    router = random_router(inputs, experts, device)
    weight = sparse(torch.randn(neurons, inputs, device=device), SPARSITY).bfloat16()
    scales = (1 + torch.arange(experts, device=device) / experts).bfloat16()
    counts = [tokens // experts] * experts
    whole = ExpertLinear(weight * scales[:, None, None], None, router, counts)
    packed = random_mixture(weight, experts, router)
    chosen = torch.randint(experts, (tokens,), device=device)
    rows = (router.matrix.T[chosen] + 0.01 * torch.randn(tokens, inputs, device=device)).bfloat16()
    chosen = router.assign(rows)
    some = slice(None, None, max(tokens // COMPARED, 1))
    expected = rows[some].cpu().float() @ weight.cpu().float().T
    expected *= scales[chosen[some]].cpu().float()[:, None]
    for name, mixture in (("experts", whole), ("packed experts", packed)):
        check_outputs(name, mixture(rows)[some], expected)
    seconds = side_by_side(
        {
            "dense": recorded(lambda: functional.linear(rows, weight)),
            "experts": recorded(lambda: whole(rows)),
            "packed": recorded(lambda: packed(rows)),
        }
    )
    title = f"{tokens:,} tokens, {experts} experts of {neurons} x {inputs}, times dense"
    ratio = seconds["experts"] / seconds["dense"]
    return [Result(title, ratio, 1.8, 2.4, compared(seconds))]


@torch.inference_mode()
def writing(shape: Shape, experts: int, steps: int, device: torch.device) -> list[Result]:
    """Compare the tokens per second of a model of packed experts with the dense model's."""
    dense, mixture = built(shape, device), built(shape, device)
    expand(mixture, experts)
    writers = {}
    for name, model in (("dense", dense), ("experts", mixture)):
        writers[name] = writer(model, steps, recorded)
        expected = writer(model, steps, lambda step: step)()  # a step at a time, without a graph
        different = int((writers[name]() != expected).sum())
        assert not different, f"{name}: {different} of {steps} tokens differ without a CUDA graph"
    seconds = side_by_side(writers)
    title = f"tokens per second of {experts} experts at {SPARSITY:.0%}, all layers, times dense"
    ratio = seconds["dense"] / seconds["experts"]
    each = {case: value / steps for case, value in seconds.items()}
    return [Result(title, ratio, 1.3, 1, f"a token: {compared(each)}")]


def expand(model: PreTrainedModel, experts: int) -> None:
    """Replace all layers of a Llama by packed mixtures; those with the same inputs share a router."""
    first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    owners: dict[tuple[int, str], CentroidRouter] = {}
    for layer in find_layers(model):
        role = layer.role.rpartition(".")[2]
        key, weight = (layer.block, first.get(role, role)), weight_of(layer)
        router = owners.get(key) or random_router(layer.inputs, experts, weight.device)
        pruned = sparse(weight.float(), SPARSITY).bfloat16()
        mixture = random_mixture(pruned, experts, router, owns_router=key not in owners)
        replace_layer(model, layer, mixture)
        owners[key] = router


def writer(model: PreTrainedModel, steps: int, record: Callable[[Deed], Deed]) -> Deed:
    """Return a function that writes tokens (steps,) after token 1, with a static cache."""
    cache = StaticCache(model.config, max_cache_len=steps + 2)
    token, place = (torch.zeros(1, 1, dtype=torch.int64, device=model.device) for _ in range(2))

    def step() -> None:
        found = model(input_ids=token, position_ids=place, past_key_values=cache, use_cache=True)
        token.copy_(found.logits[:, -1].argmax(dim=-1, keepdim=True))
        place.add_(1)

    go = record(step)

    def write() -> torch.Tensor:
        cache.reset()  # type: ignore[no-untyped-call]
        token.fill_(1)
        place.zero_()
        tokens = []
        for _ in range(steps):
            go()
            tokens.append(token.clone())
        return torch.cat(tokens).view(-1)

    return write
