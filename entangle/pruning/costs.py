"""Costs of a pruned layer: multiply-adds per token, and bytes on disk and in memory.

A token that is written alone reads a weight for each multiply-add, so multiply-adds are the weights
read per token too. A matrix of a trained expert counts for the share of the experts that a token is
sent to. In pruned layers only non-zero weights count, and with sparse inputs only those of inputs
that are not zero, although layers run here as dense products. The products within attention have no
weights and do not count.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from entangle.model.experts import ExpertLinear, packed_bytes
from entangle.model.fused import FusedMatrix
from entangle.model.layers import LinearLayer, find_layers, weight_of
from entangle.numerics.rounding import rounded_bytes
from entangle.numerics.routing import Router

SUMS = (
    "multiply_adds",
    "router_multiply_adds",
    "stored",
    "dense_weights",
    "disk_bytes",
    "memory_bytes",
)


def costs_of(layer: LinearLayer) -> dict[str, Any]:
    """Return the costs of a pruned layer, by name; a router counts at the layer that owns it.

    ``multiply_adds`` is the number of non-zero weights of a token's expert, mean over the
    calibration tokens; ``stored`` that of all experts. ``disk_bytes`` is the size of the written
    files: several experts are packed, one expert is a dense matrix.
    """
    weight, module = weight_of(layer), layer.module
    nonzeros = (weight != 0).sum(dim=(-2, -1)).double().reshape(-1).cpu()
    router, shares = None, torch.ones(1)
    disk = memory = weight.numel() * weight.element_size()
    if isinstance(module, ExpertLinear):
        router = module.router if module.owns_router else None
        shares = torch.tensor(module.counts).double() / max(sum(module.counts), 1)
        disk = packed_bytes(weight)
    routing = 0 if router is None else _bytes_of(router)
    if isinstance(module, FusedMatrix):
        shares = torch.tensor([module.share])
    return {
        "multiply_adds": float((nonzeros * shares).sum()),
        "router_multiply_adds": 0 if router is None else router.multiply_adds,
        "dense_multiply_adds": _dense(layer),
        "dense_weights": layer.neurons * layer.inputs,
        "stored": int(nonzeros.sum()),
        "disk_bytes": disk + routing,
        "memory_bytes": memory + routing,
    }


def _dense(layer: LinearLayer) -> float:
    """Return the multiply-adds of a token in a dense layer; a trained expert has some of the tokens."""
    size = layer.neurons * layer.inputs
    return size * layer.module.share if isinstance(layer.module, FusedMatrix) else size


def multiply_adds_of_inputs(layer: LinearLayer, kept: torch.Tensor) -> float:
    """Return a token's multiply-adds with non-zero weights, where inputs are zero too.

    ``kept`` (inputs,) is the share of the tokens for which an input is not zero. Of several experts
    an input's non-zero weights are their mean over the calibration tokens.
    """
    weight, module = weight_of(layer), layer.module
    nonzeros = (weight != 0).sum(dim=-2).double().cpu().reshape(-1, layer.inputs)
    shares = torch.ones(1, dtype=torch.float64)
    if isinstance(module, ExpertLinear):
        shares = torch.tensor(module.counts).double() / max(sum(module.counts), 1)
    return float((shares @ nonzeros) @ kept.cpu())


def dense_costs_of(layer: LinearLayer) -> dict[str, Any]:
    """Return the same costs for a layer that is not pruned; its zeros count as weights."""
    weight = weight_of(layer)
    size = weight.numel() * weight.element_size()
    return {
        "multiply_adds": _dense(layer),
        "router_multiply_adds": 0,
        "dense_multiply_adds": _dense(layer),
        "dense_weights": layer.neurons * layer.inputs,
        "stored": weight.numel(),
        "disk_bytes": size,
        "memory_bytes": size,
    }


def rounded_costs_of(layer: LinearLayer, bits: int) -> dict[str, Any]:
    """Return the costs of a dense layer whose weights have so many bits (see `round_to_nearest`)."""
    size = rounded_bytes(layer.neurons, layer.inputs, bits)
    return dense_costs_of(layer) | {"disk_bytes": size, "memory_bytes": size}


def _bytes_of(router: Router) -> int:
    return sum(value.numel() * value.element_size() for value in router.parameters())


def model_multiply_adds(model: PreTrainedModel) -> float:
    """Return the multiply-adds per token of a model's linear layers and its output embedding.

    Layers that are not expanded count as dense.
    """
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    total = 0.0 if head is None else sum(p.numel() for p in head.parameters() if p.ndim > 1)
    for layer in find_layers(model):
        if isinstance(layer.module, ExpertLinear):
            found = costs_of(layer)
            total += found["multiply_adds"] + found["router_multiply_adds"]
        else:
            total += _dense(layer)
    return total


def totals(rows: Sequence[Mapping[str, Any]], dense_model: float) -> dict[str, float]:
    """Return the costs summed over the pruned layers, and the multiply-adds of the whole model.

    ``dense_model`` are those of the dense model (`model_multiply_adds`). ``density`` is the
    multiply-adds of the pruned layers and routers over those of the dense layers.
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


def size_of(folder: Path, without: Path) -> int:
    """Return the size of all weights in a model's folder, bytes; ``without`` a folder in it."""
    files = [file for file in folder.rglob("*.safetensors") if without not in file.parents]
    return sum(file.stat().st_size for file in files)
