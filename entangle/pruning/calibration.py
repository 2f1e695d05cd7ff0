"""Calibration: clusters of each layer's inputs and their second moments."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from entangle.model import ranks
from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer, naming, weight_of
from entangle.model.packing import load_tensors, router_from, router_tensors, save_tensors
from entangle.model.sampling import sample_inputs
from entangle.model.sides import stack_of
from entangle.numerics.moments import ExpertMoments, InputMoments, output_energy
from entangle.numerics.routing import CentroidRouter, Router, fit_router, random_router
from entangle.pruning.options import ONE, SHRINKAGE, Clustering

SAMPLE = 16_384  # tokens that a router is fitted on
HELD_OUT = 8_192  # held-out tokens that the outputs' error is measured on
HELD_OUT_WINDOWS = 32  # at most so many, to draw these tokens from


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """The second moments, router and output energy of one layer on a text.

    Layers with the same inputs have the same moments and router objects.
    """

    moments: InputMoments  # of the inputs; with a router one per expert
    router: Router | None  # None: one expert
    energy: float  # ‖WX‖² of the dense weights W, the denominator of relative errors
    owner: str  # name of the first layer that receives these inputs; it owns the router
    pooled: InputMoments | None = None  # of a trained expert: those of all experts of the block

    @property
    def used(self) -> InputMoments:
        """The moments that weights are pruned by.

        A trained expert has few tokens, as a cluster has. So its moments are shrunk towards the
        pooled ones of the block's experts.
        """
        if self.pooled is None or not self.pooled.count:
            return self.moments
        alone = InputMoments(self.moments.lower[None], self.moments.count[None])
        return alone.shrunk(SHRINKAGE, self.pooled).expert(0)


Calibrations = dict[str, Calibration]  # by the layer's name


def calibrate(
    walk: BlockWalk,
    layers: Sequence[LinearLayer],
    clusterings: Sequence[Clustering] = (ONE,),
    *,
    seed: int = 0,
    advance: bool,
) -> dict[Clustering, Calibrations]:
    """Run a block and return the calibrations of some of its layers, for each clustering.

    Several experts need a second run of the block, which samples the inputs for the routers. With
    ``advance`` the walk moves past the block, with its current weights.

    Raises:
        ValueError: the inputs of a layer cannot be clustered; the message names the layer.
    """
    routers: dict[tuple[Clustering, str], Router | None] = {}
    several = [clustering for clustering in clusterings if clustering.experts > 1]
    if several:
        samples = sample_inputs(walk, layers, SAMPLE, seed)
        fitted: dict[int, dict[Clustering, Router]] = {}
        distinct: dict[int, LinearLayer] = {}  # one layer per distinct input
        for layer in layers:
            distinct.setdefault(id(samples[layer.name]), layer)
        assigned = dict(
            zip(
                distinct,
                ranks.assign_ranks([layer.inputs for layer in distinct.values()]),
                strict=True,
            )
        )
        with ranks.raise_on_all_ranks():
            for key, layer in distinct.items():
                if assigned[key] == ranks.rank():
                    with naming(layer):
                        found = _fit(samples[layer.name], several, seed)
                        fitted[key] = {clustering: one.cpu() for clustering, one in found.items()}
        for key, layer in distinct.items():
            found = ranks.from_rank(assigned[key], fitted.get(key))
            device = samples[layer.name].device
            fitted[key] = {clustering: one.to(device) for clustering, one in found.items()}
        routers = {(c, x.name): r for x in layers for c, r in fitted[id(samples[x.name])].items()}
    sums: dict[tuple[Clustering, str], ExpertMoments | InputMoments] = {}

    def on_inputs(layer: LinearLayer, rows: torch.Tensor) -> None:
        for clustering in clusterings:
            key = clustering, layer.name
            if key not in sums:
                sums[key] = _no_moments(layer, routers.get(key), rows.device)
            sums[key].add(rows)

    owners = walk.record_inputs(layers, on_inputs, advance=advance)
    # In the order of layers, which all ranks share: the experts of a mixture may run in another.
    keys = [(c, layer.name) for c in clusterings for layer in layers if (c, layer.name) in sums]
    moments = {
        key: found.moments() if isinstance(found, ExpertMoments) else found
        for key, found in ((key, sums[key]) for key in keys)
    }
    for one in moments.values():
        ranks.all_reduce_sum_(one.lower)
        ranks.all_reduce_sum_(one.count)
    calibrations = {
        clustering: {
            layer.name: Calibration(
                moments[clustering, owners[layer.name]],
                routers.get((clustering, owners[layer.name])),
                _energy(layer, moments[clustering, owners[layer.name]]),
                owners[layer.name],
            )
            for layer in layers
        }
        for clustering in clusterings
    }
    return {clustering: with_pooled(layers, one) for clustering, one in calibrations.items()}


def with_pooled(layers: Sequence[LinearLayer], calibrations: Calibrations) -> Calibrations:
    """Return calibrations in which trained experts have the pooled moments of their block's."""
    stacks: dict[object, list[str]] = {}
    for layer in layers:
        if stack_of(layer) is not None:
            stacks.setdefault(stack_of(layer), []).append(layer.name)
    found = dict(calibrations)
    for names in stacks.values():
        first = calibrations[names[0]].moments
        pooled = InputMoments(first.lower.clone(), first.count.clone())
        for name in names[1:]:  # in place: a Gram is large
            pooled.lower.add_(calibrations[name].moments.lower)
            pooled.count.add_(calibrations[name].moments.count)
        found |= {n: dataclasses.replace(calibrations[n], pooled=pooled) for n in names}
    return found


def _fit(
    rows: torch.Tensor, clusterings: Sequence[Clustering], seed: int
) -> dict[Clustering, Router]:
    """Fit a router for each clustering; random clusters have the sizes of the k-means clusters."""
    fitted: dict[Clustering, CentroidRouter] = {}
    found: dict[Clustering, Router] = {}
    for clustering in clusterings:
        key = dataclasses.replace(clustering, assign="kmeans")
        if key not in fitted:
            router = fit_router(rows, key.experts, components=key.components, seed=seed)
            fitted[key] = router.to(rows.device)
        found[clustering] = fitted[key]
        if clustering.assign == "random":
            sizes = fitted[key].assign(rows).bincount(minlength=fitted[key].experts)
            found[clustering] = random_router(rows.shape[1], sizes, seed=seed).to(rows.device)
    return found


def _no_moments(
    layer: LinearLayer, router: Router | None, device: torch.device
) -> ExpertMoments | InputMoments:
    if router is None:
        return InputMoments.zeros(layer.inputs, device=device)
    moments = InputMoments.zeros(layer.inputs, experts=router.experts, device=device)
    return ExpertMoments(moments, router.assign)


def _energy(layer: LinearLayer, moments: InputMoments) -> float:
    pooled = moments.pooled() if moments.count.ndim else moments
    return float(output_energy(weight_of(layer), pooled).sum())


def save_calibrations(file: Path, calibrations: Calibrations) -> None:
    """Write calibrations; moments and routers that layers share are written once."""
    tensors: dict[str, torch.Tensor] = {}
    for name, calibration in calibrations.items():
        owner = calibration.owner
        tensors[f"{owner} lower"] = calibration.moments.lower
        tensors[f"{owner} count"] = calibration.moments.count
        if calibration.router is not None:
            tensors |= router_tensors(owner, calibration.router)
        tensors[f"{name} {owner}"] = torch.tensor(calibration.energy, dtype=torch.float64)
    save_tensors(file, tensors)


def load_calibrations(
    file: Path, layers: Sequence[LinearLayer], device: torch.device
) -> Calibrations:
    """Read the calibrations of a block's layers that `save_calibrations` wrote."""
    tensors = load_tensors(file, device)
    shared: dict[str, tuple[InputMoments, Router | None]] = {}
    for key in tensors:
        owner, what = key.split(" ", 1)
        if what == "lower":
            moments = InputMoments(tensors[key], tensors[f"{owner} count"])
            several = moments.count.ndim > 0
            shared[owner] = moments, router_from(owner, tensors) if several else None
    found = {
        name: Calibration(*shared[owner], float(tensors[key]), owner)
        for key in tensors
        for name, owner in [key.split(" ", 1)]
        if owner in shared
    }
    return with_pooled(layers, found)


def save_inputs(file: Path, rows: Mapping[str, torch.Tensor]) -> None:
    """Write inputs by layer (see `sample_inputs`); inputs that layers share are written once."""
    owners: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, values in rows.items():
        owner = owners.setdefault(id(values), name)
        tensors[owner] = rows[owner]
        tensors[f"{name} {owner}"] = torch.zeros(0)
    save_tensors(file, tensors)


def load_inputs(file: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Read the inputs by layer that `save_inputs` wrote."""
    tensors = load_tensors(file, device)
    pairs = [key.split(" ") for key in tensors if " " in key]
    return {name: tensors[owner] for name, owner in pairs}
