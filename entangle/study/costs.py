"""What a pruned layer costs: multiply-adds for a token, and bytes on disk and in memory.

A multiply-add of a weight that is zero is not counted where a layer was pruned, though a dense
product, which is how layers run here, makes it too. Attention's own products are left out: they
have no weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from entangle.model.experts import ExpertLinear, packed_bytes
from entangle.model.layers import LinearLayer, find_layers, weight_of
from entangle.numerics.routing import Router

SUMS = ("multiply_adds", "router_multiply_adds", "stored", "disk_bytes", "memory_bytes")


def costs_of(layer: LinearLayer) -> dict[str, Any]:
    """Return what a pruned layer costs.

    ``multiply_adds`` are the non-zero weights of a token's expert, averaged over the calibration's
    tokens; ``stored`` those of all experts; ``disk_bytes`` are what entangle writes: experts packed,
    one expert as a dense matrix. A router that layers share counts for the first of them.
    """
    weight, module = weight_of(layer), layer.module
    nonzeros = (weight != 0).sum(dim=(-2, -1)).double().reshape(-1).cpu()
    router, shares = None, torch.ones(1)
    disk = memory = weight.numel() * weight.element_size()
    if isinstance(module, ExpertLinear):
        router = module.router if module.router.layers == 1 else None
        shares = torch.tensor(module.counts).double() / max(sum(module.counts), 1)
        disk = packed_bytes(weight)
    routing = 0 if router is None else _bytes_of(router)
    return {
        "multiply_adds": float((nonzeros * shares).sum()),
        "router_multiply_adds": 0 if router is None else router.multiply_adds,
        "dense_multiply_adds": layer.neurons * layer.inputs,
        "stored": int(nonzeros.sum()),
        "disk_bytes": disk + routing,
        "memory_bytes": memory + routing,
    }


def dense_costs_of(layer: LinearLayer) -> dict[str, Any]:
    """Return the same of a layer that is not pruned, zeros that it may have by itself included."""
    weight = weight_of(layer)
    size = weight.numel() * weight.element_size()
    return {
        "multiply_adds": weight.numel(),
        "router_multiply_adds": 0,
        "dense_multiply_adds": weight.numel(),
        "stored": weight.numel(),
        "disk_bytes": size,
        "memory_bytes": size,
    }


def _bytes_of(router: Router) -> int:
    return sum(value.numel() * value.element_size() for value in router.parameters())


def model_multiply_adds(model: PreTrainedModel) -> int:
    """Return a dense model's multiply-adds for a token: its layers', and the output embedding's."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    output = [] if head is None else [p.numel() for p in head.parameters() if p.ndim > 1]
    return sum(output) + sum(layer.neurons * layer.inputs for layer in find_layers(model))


def totals(rows: Sequence[Mapping[str, Any]], dense_model: int) -> dict[str, float]:
    """Return the sums over pruned layers, and the whole model's multiply-adds for a token.

    ``density`` is the layers' multiply-adds, with their routers', over their dense ones.
    """
    sums = {name: sum(row[name] for row in rows) for name in SUMS}
    dense = sum(row["dense_multiply_adds"] for row in rows)
    needed = sums["multiply_adds"] + sums["router_multiply_adds"]
    return sums | {
        "dense_multiply_adds": dense,
        "density": needed / dense if dense else 1.0,
        "model_multiply_adds": dense_model - dense + needed,
        "model_dense_multiply_adds": dense_model,
    }


def size_of(folder: Path) -> int:
    """Return the bytes of all weights in a model's folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
