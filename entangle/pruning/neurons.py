"""Pruned rows of the neurons that an ablation treats, each pruned once for all arms.

With a mask by row SparseGPT solves each row alone: a row has the same bits whichever rows are
pruned with it. So all arms share the pruned rows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from entangle.model import ranks
from entangle.model.experts import ExpertLinear
from entangle.model.layers import LinearLayer, naming, weight_of
from entangle.model.packing import load_tensors, router_from, router_tensors, save_tensors
from entangle.model.progress import progress_bar
from entangle.numerics.masks import prune
from entangle.numerics.routing import Router
from entangle.numerics.sparsity import Solve, Sparsity
from entangle.pruning.calibration import Calibration, calibrate
from entangle.pruning.options import SHRINKAGE, SOLVE, Clustering
from entangle.runs.setup import Setup

_OWNER = " is routed by "  # between the names of a layer and of its router's owner, in a file
Kind = tuple[Clustering, Sparsity]
Outputs = Callable[
    [torch.Tensor], torch.Tensor
]  # from a layer's inputs to the outputs of chosen neurons


@dataclasses.dataclass(frozen=True, eq=False)
class SparseNeurons:
    """The pruned weights of some neurons of a layer, for one expert or several."""

    neurons: torch.Tensor  # (chosen,) int64, ascending
    weight: torch.Tensor  # ([experts,] chosen, inputs)
    router: Router | None
    counts: list[int]  # calibration tokens of each expert
    owns_router: bool = True  # False if another layer with the same inputs owns it

    def among(self, neurons: torch.Tensor) -> "SparseNeurons":
        """Return the rows of some of these neurons, whose indices are ascending."""
        places = torch.searchsorted(self.neurons, neurons)
        weight = self.weight.index_select(-2, places)
        return dataclasses.replace(self, neurons=neurons, weight=weight)

    def outputs(self, layer: LinearLayer) -> Outputs:
        """Return a function from the layer's inputs to the outputs (..., chosen), bias included."""
        bias = getattr(layer.module, "bias", None)
        bias = None if bias is None else bias.detach()[self.neurons]
        if self.router is not None:
            owns = self.owns_router
            return ExpertLinear(self.weight, bias, self.router, self.counts, owns_router=owns)
        return lambda inputs: functional.linear(inputs, self.weight, bias)


def prune_neurons(
    setup: Setup,
    wanted: Mapping[Kind, Mapping[str, set[int]]],
    folder: Path,
    *,
    solve: Solve = SOLVE,
) -> None:
    """Prune the wanted rows of each layer, for each clustering and sparsity, and save them.

    Blocks that are already saved are skipped.

    Raises:
        ValueError: the inputs of a layer cannot be used; the message names the layer.
    """
    layers = setup.blocks
    left = [b for b in layers if not all(_file(folder, b, kind).exists() for kind in wanted)]
    left = ranks.from_rank(0, left)
    if not left:
        return
    inputs = setup.walk()
    clusterings = list(dict.fromkeys(clustering for clustering, _ in wanted))
    last = left[-1]
    for block in progress_bar(range(last + 1), unit="block", desc="prune", shown=setup.progress):
        if block not in left:
            inputs.advance()
            continue
        here = layers[block]
        found = calibrate(inputs, here, clusterings, seed=setup.seed, advance=block < last)
        own = ranks.shard().batches(len(wanted))
        with ranks.raise_on_all_ranks():  # each process prunes a part of them
            for clustering, sparsity in itertools.islice(wanted, own.start, None, own.step):
                rows = wanted[clustering, sparsity]
                tensors: dict[str, torch.Tensor] = {}
                for layer in here:
                    if layer.name in rows:
                        neurons = torch.tensor(sorted(rows[layer.name]), dtype=torch.int64)
                        with naming(layer):
                            calibration = found[clustering][layer.name]
                            pruned = sparse_neurons(
                                layer, calibration, sparsity, neurons, solve=solve
                            )
                        tensors |= _tensors(layer.name, pruned, calibration.owner)
                save_tensors(_file(folder, block, (clustering, sparsity)), tensors)


def sparse_neurons(
    layer: LinearLayer,
    calibration: Calibration,
    sparsity: Sparsity,
    neurons: torch.Tensor,
    *,
    solve: Solve = SOLVE,
) -> SparseNeurons:
    """Prune some rows of a layer's weight by SparseGPT, with a mask by row."""
    weight, moments = weight_of(layer), calibration.used
    neurons = neurons.to(weight.device)
    pruned = prune(weight[neurons], moments, sparsity, solve=solve, shrinkage=SHRINKAGE)
    counts = calibration.moments.count.reshape(-1).tolist()
    owns = calibration.owner == layer.name
    return SparseNeurons(neurons, pruned.weight, calibration.router, counts, owns)


def _file(folder: Path, block: int, kind: Kind) -> Path:
    clustering, sparsity = kind
    return folder / f"{block}-{clustering.experts}-{sparsity}.safetensors".replace(":", "of")


def _tensors(name: str, rows: SparseNeurons, owner: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer's rows; its router is named after the layer that owns it."""
    tensors = {f"{name} neurons": rows.neurons, f"{name} weight": rows.weight}
    tensors[f"{name} counts"] = torch.tensor(rows.counts)
    if rows.router is not None:
        tensors[f"{name}{_OWNER}{owner}"] = torch.zeros(0)
        tensors |= router_tensors(owner, rows.router)
    return tensors


def load_neurons(
    folder: Path, layers: Sequence[LinearLayer], kind: Kind, neurons: Mapping[str, torch.Tensor]
) -> dict[str, SparseNeurons]:
    """Read the pruned rows of some neurons of each layer."""
    found = {}
    for block in sorted({layer.block for layer in layers}):
        here = [layer for layer in layers if layer.block == block]
        device = weight_of(here[0]).device
        tensors = load_tensors(_file(folder, block, kind), device)
        owners = dict(key.split(_OWNER) for key in tensors if _OWNER in key)
        routers = {owner: router_from(owner, tensors) for owner in dict.fromkeys(owners.values())}
        for name in (layer.name for layer in here):
            owner = owners.get(name)
            router = None if owner is None else routers[owner]
            parts = (tensors[f"{name} neurons"], tensors[f"{name} weight"])
            counts = tensors[f"{name} counts"].tolist()
            rows = SparseNeurons(*parts, router, counts, owns_router=owner in {None, name})
            found[name] = rows.among(neurons[name])
    return found
