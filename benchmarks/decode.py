"""Cost of running sparse experts, token by token and for a prompt. Run `make bench`.

Matrices alone, MLPs with their router, and the whole SmolLM2-135M are compared with dense float32,
dense bfloat16 and torch's CSR, on one thread and on two. Weights are pruned by magnitude with masks
by row. All experts of a layer are equal, but each has its own memory. Routers are fitted to the
model's own inputs. So the times depend on the bytes that are read, and not on the outputs.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

import entangle
from benchmarks.timing import machine, side_by_side
from entangle.model.experts import PackedLinear
from entangle.model.layers import LinearLayer, find_layers, replace_layer, weight_of
from entangle.model.packing import weight_bytes
from entangle.model.sampling import sample_inputs, walk_blocks
from entangle.numerics.routing import Router, fit_router
from entangle.numerics.sparse import Sliced, slice_rows
from entangle.pruning.calibration import SAMPLE

DATA = Path(__file__).parents[1] / "data"
SHAPES = [(1536, 576), (576, 1536), (576, 576), (4096, 4096)]  # neurons, inputs
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
THREADS = (1, 2)
BEYOND_CACHE = 200e6  # bytes of dense weights that are read between two uses of the same weight
TOKENS = (1, 2, 8, 32, 128, 512)
PROMPT, WRITTEN = 512, 24
EXPERTS = 16

Cases = dict[str, Callable[[], Any]]


@torch.inference_mode()
def main() -> None:
    """Run the benchmark and print its tables."""
    print(machine(), end="\n\n")
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
    for threads in THREADS:
        torch.set_num_threads(threads)
        for neurons, inputs in SHAPES:
            products(neurons, inputs, threads)
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_num_threads(1)
        switch(dtype)
    model = entangle.load_model(DATA / "smollm2-135m")
    routers = routers_of(model)
    for sparsity in SPARSITIES:
        whole(model, routers, sparsity)


def sparse(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Return a weight (..., inputs) without the smallest of each row."""
    keep = weight.abs().topk(round((1 - sparsity) * weight.shape[-1]), dim=-1).indices
    return torch.zeros_like(weight).scatter(-1, keep, weight.gather(-1, keep))


def products(neurons: int, inputs: int, threads: int) -> None:
    """Compare products with one token; there are so many matrices that none stays in the cache."""
    count = max(8, int(BEYOND_CACHE / (4 * neurons * inputs)))
    dense = torch.randn(count, neurons, inputs)
    x = torch.randn(1, inputs)
    half, x_half = dense.bfloat16(), x.bfloat16()
    print(f"| {neurons} x {inputs}, {threads} threads: us | sparsity | times dense float32 |")
    print("|---|---|---|")
    cases: Cases = {
        "dense float32": lambda: [functional.linear(x, one) for one in dense],
        "dense bfloat16": lambda: [functional.linear(x_half, one) for one in half],
    }
    for sparsity in SPARSITIES:
        weight = sparse(dense[:2], sparsity)
        packed = [slice_rows(weight[i % 2 : i % 2 + 1]) for i in range(count)]
        short = [slice_rows(weight[i % 2 : i % 2 + 1].bfloat16()) for i in range(count)]
        rows = [weight[i % 2].to_sparse_csr() for i in range(count)]
        rounds = side_by_side(
            cases
            | {
                "torch CSR": lambda: [one @ x[0] for one in rows],  # noqa: B023
                "packed float32": lambda: [one.product(x, 0) for one in packed],  # noqa: B023
                "packed bfloat16": lambda: [one.product(x_half, 0) for one in short],  # noqa: B023
            }
        )
        for name, seconds in rounds.items():
            ratio = seconds / rounds["dense float32"]
            print(f"| {name}: {1e6 * seconds / count:.4g} | {sparsity:.0%} | {ratio:.2f} |")
    print(flush=True)


def switch(dtype: torch.dtype, neurons: int = 1536, inputs: int = 576) -> None:
    """Compare the two ways to multiply many tokens, and print which one is chosen."""
    print(
        f"| {neurons} x {inputs}, {dtype}, 1 thread | tokens | packed | unpacked | dense | takes |"
    )
    print("|---|---|---|---|---|---|")
    dense = torch.randn(16, neurons, inputs).to(dtype)
    for sparsity in SPARSITIES:
        packed = [slice_rows(sparse(one, sparsity)[None]) for one in dense]
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs).to(dtype)
            cases: Cases = {
                "packed": lambda: [one.product(x, 0) for one in packed],  # noqa: B023
                "unpacked": lambda: [functional.linear(x, one.dense(0)) for one in packed],  # noqa: B023
                "dense": lambda: [functional.linear(x, one) for one in dense],  # noqa: B023
            }
            times = {k: 1e6 * v / len(dense) for k, v in side_by_side(cases, rounds=3).items()}
            taken = "packed" if packed[0].is_faster(tokens, 0) else "unpacked"
            numbers = " | ".join(f"{value:.4g}" for value in times.values())
            print(f"| us at {sparsity:.0%} | {tokens} | {numbers} | {taken} |")
    print(flush=True)


def routers_of(model: PreTrainedModel) -> dict[str, Router]:
    """Fit a router of 16 experts to each layer's inputs; layers with the same inputs share it."""
    tokenizer = entangle.load_tokenizer(DATA / "smollm2-135m")
    windows = entangle.token_windows(DATA / "python-docs", tokenizer, windows=8)
    walk, layers = walk_blocks(model, windows, 4, 0), find_layers(model)
    found: dict[str, Router] = {}
    for block in range(layers[-1].block + 1):
        here = [layer for layer in layers if layer.block == block]
        fitted: dict[int, Router] = {}
        for name, rows in sample_inputs(walk, here, SAMPLE, 0, advance=True).items():
            if id(rows) not in fitted:
                fitted[id(rows)] = fit_router(rows, EXPERTS)
            found[name] = fitted[id(rows)]
    return found


def packed_layer(
    layer: LinearLayer, routers: Mapping[str, Router], sparsity: float
) -> PackedLinear:
    """Return a layer's experts, packed; a layer without a router has one expert."""
    packed = PackedLinear(sparse(weight_of(layer), sparsity)[None], None, routers.get(layer.name))
    if packed.router is not None:
        one, count = packed.sliced, packed.router.experts
        assert isinstance(one, Sliced)
        steps = np.arange(count)[:, None] * one.starts[0, -1]
        packed.sliced = dataclasses.replace(
            one,
            values=np.tile(one.values, count),
            columns=np.tile(one.columns, count),
            starts=one.starts + steps,
            order=one.order.repeat(count, axis=0),
        )
    return packed


def expanded(
    model: PreTrainedModel, pattern: str, routers: Mapping[str, Router], sparsity: float
) -> PreTrainedModel:
    """Return the model with the matching layers packed; the other layers are shared with the model."""
    memo = {id(parameter): parameter for parameter in model.parameters()}
    other = copy.deepcopy(model, memo)
    used = copy.deepcopy(routers)
    for layer in find_layers(model, [pattern]):
        replace_layer(other, layer, packed_layer(layer, used, sparsity))
    return other


def layers_alone(models: dict[str, PreTrainedModel], sparsity: float, threads: int) -> None:
    """Compare the MLPs of all blocks, one after another with their routers, token by token."""
    mlps = {
        name: [module for path, module in model.named_modules() if path.endswith(".mlp")]
        for name, model in models.items()
    }
    wide = models["dense float32"].config.hidden_size
    rows = torch.randn(32, 1, wide)

    def run(modules: list[nn.Module]) -> None:
        for row in rows:
            for module in modules:
                module(row)

    cases: Cases = {name: functools.partial(run, modules) for name, modules in mlps.items()}
    for name, seconds in (times := side_by_side(cases, rounds=3)).items():
        micro, ratio = 1e6 * seconds / len(rows) / len(mlps[name]), seconds / times["dense float32"]
        print(f"| an MLP: {name} | {threads} | {sparsity:.0%} | {micro:.4g} us | {ratio:.2f} |")


def whole(model: PreTrainedModel, routers: dict[str, Router], sparsity: float) -> None:
    """Compare whole models: their MLPs alone, one more token, and a prompt."""
    models = {"dense float32": model, "dense bfloat16": copy.deepcopy(model).bfloat16()}
    for pattern in ("*.mlp.*", "*"):
        for name, used in (("1 expert", {}), ("16 experts", routers)):
            models[f"{pattern}, {name}"] = expanded(model, pattern, used, sparsity)
    sizes = {name: weight_bytes(one) / 1e6 for name, one in models.items()}
    for threads in THREADS:
        torch.set_num_threads(threads)
        print("| what | threads | sparsity | time | times dense float32 | MB |")
        print("|---|---|---|---|---|---|")
        few = {name: one for name, one in models.items() if "bfloat16" not in name}
        layers_alone(
            {name: one for name, one in few.items() if name[:3] != "*, "}, sparsity, threads
        )
        for what, act in (("a token", write), (f"{PROMPT} tokens", read)):
            cases: Cases = {name: functools.partial(act, one) for name, one in models.items()}
            times = side_by_side(cases, rounds=3)
            for name, seconds in times.items():
                ratio = seconds / times["dense float32"]
                each = seconds / (WRITTEN if act is write else 1)
                print(
                    f"| {what}: {name} | {threads} | {sparsity:.0%} | {1e3 * each:.1f} ms | "
                    f"{ratio:.2f} | {sizes[name]:.0f} |"
                )
        print(flush=True)


@functools.cache
def prompt() -> torch.Tensor:
    """Return the prompt (1, tokens)."""
    tokenizer = entangle.load_tokenizer(DATA / "smollm2-135m")
    return entangle.token_windows(DATA / "python-docs", tokenizer, windows=1, length=PROMPT).tokens


def read(model: PreTrainedModel) -> Any:
    """Read a prompt."""
    return model(input_ids=prompt(), use_cache=True, logits_to_keep=1)


def write(model: PreTrainedModel) -> None:
    """Run the model token by token on a given text, as in generation but without sampling."""
    cache = None
    for step in range(WRITTEN):
        found = model(input_ids=prompt()[:, step : step + 1], past_key_values=cache, use_cache=True)
        cache = found.past_key_values


if __name__ == "__main__":
    main()
