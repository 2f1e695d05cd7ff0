"""What pruning needs to know of a text: clusters of each layer's inputs and their moments."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from entangle.model import ranks
from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer, weight_of
from entangle.model.packing import load_tensors, router_from, router_tensors, save_tensors
from entangle.model.text import TokenWindows
from entangle.numerics.moments import ExpertMoments, InputMoments, output_energy
from entangle.numerics.routing import (
    CentroidRouter,
    Router,
    fit_router,
    random_router,
)

Assign = Literal["kmeans", "random"]

SAMPLE = 16_384  # tokens that a router is fitted on
HELD_OUT = 8_192  # tokens of other text that the outputs' error is measured on


@dataclasses.dataclass(frozen=True)
class Clustering:
    """How a layer's inputs are split among experts."""

    experts: int = 1
    assign: Assign = "kmeans"
    components: int | None = None  # of PCA; None is inputs // 32


ONE = Clustering()


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """What pruning one layer needs to know of a text.

    Layers that have the same inputs share moments and router, as the same objects.
    """

    moments: InputMoments  # of its inputs, stacked where there is a router
    router: Router | None  # None: one expert
    energy: float  # ‖WX‖² of its dense weights W: what an error is relative to


@contextmanager
def naming(layer: LinearLayer) -> Iterator[None]:
    """Name the layer in an error's message.

    Raises:
        ValueError: the error.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from error


Calibrations = dict[str, Calibration]  # by the layer's name


def walk_blocks(
    model: PreTrainedModel, windows: TokenWindows, batch_size: int, skip_first: int
) -> BlockWalk:
    """Return the windows on their way through the model's blocks, under torchrun this process's.

    Raises:
        RuntimeError: as `BlockWalk` says, or fewer batches than processes.
        ValueError: as `BlockWalk` says.
    """
    batches = windows.batches(batch_size)
    mine = ranks.shard().batches(len(batches))
    if len(batches) < ranks.count():
        raise RuntimeError(  # of no arm: fewer processes can go on
            f"{len(batches)} batches of {batch_size} windows are too few for {ranks.count()} "
            "processes: use a smaller batch size, more windows or fewer processes"
        )
    places = [number * batch_size * windows.length for number in mine]
    inputs = ({"input_ids": batches[number]} for number in mine)
    return BlockWalk(model, inputs, skip_first=skip_first, places=places)


def sample_inputs(
    walk: BlockWalk, layers: Sequence[LinearLayer], size: int, seed: int, *, advance: bool = False
) -> dict[str, torch.Tensor]:
    """Run the block once and return inputs (tokens, inputs) of these layers of it, by name.

    Which of the counted tokens is decided by a hash of the seed and the token's place, so that
    another batch size chooses the same. Layers that have the same inputs share the tensor.
    """
    chosen = _choose(walk, size, seed)
    heard: dict[str, list[torch.Tensor]] = {}

    def on_inputs(layer: LinearLayer, rows: torch.Tensor) -> None:
        parts = heard.setdefault(layer.name, [])
        parts.append(rows[chosen[len(parts)].to(rows.device)])

    first = walk.listen(layers, on_inputs, advance=advance)
    places = _places(walk, chosen)
    rows = {name: ranks.gather(torch.cat(parts), places) for name, parts in heard.items()}
    return {layer.name: rows[first[layer.name]] for layer in layers}


def sampled_places(walk: BlockWalk, size: int, seed: int) -> torch.Tensor:
    """Return the place in the text of each token that `sample_inputs` chooses (tokens,)."""
    places = _places(walk, _choose(walk, size, seed))
    return ranks.gather(places, places)


def _places(walk: BlockWalk, chosen: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the places of this process's tokens that were chosen."""
    return torch.cat([place[which] for place, which in zip(walk.places, chosen, strict=True)])


def _choose(walk: BlockWalk, size: int, seed: int) -> list[torch.Tensor]:
    """Return for each batch which of its counted tokens are among the ``size`` chosen of all."""
    hashes = _hash(torch.cat(walk.places).numpy().astype(np.uint64), seed)
    every = np.sort(np.concatenate(ranks.everyone(hashes)))
    chosen = torch.from_numpy(hashes <= every[min(size, len(every)) - 1])
    return list(chosen.split([len(part) for part in walk.places]))


def _hash(numbers: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Return the SplitMix64 of numbers: of one seed no two are equal."""
    mixed = numbers + np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    mixed = (mixed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def calibrate(
    walk: BlockWalk,
    layers: Sequence[LinearLayer],
    clusterings: Sequence[Clustering] = (ONE,),
    *,
    seed: int = 0,
    advance: bool,
) -> dict[Clustering, Calibrations]:
    """Run the block and return calibrations of these layers of it, for each clustering.

    Clusters cost one run more, in which a sample of the inputs is heard. With ``advance`` the walk
    goes on behind the block, with the weights as they are.

    Raises:
        ValueError: inputs of which no clusters can be made; the message names the layer.
    """
    routers: dict[tuple[Clustering, str], Router | None] = {}
    several = [clustering for clustering in clusterings if clustering.experts > 1]
    if several:
        samples = sample_inputs(walk, layers, SAMPLE, seed)
        fitted: dict[int, dict[Clustering, Router]] = {}
        apart: dict[int, LinearLayer] = {}  # one of those that have the same inputs
        for layer in layers:
            apart.setdefault(id(samples[layer.name]), layer)
        owners = dict(
            zip(apart, ranks.spread([layer.inputs for layer in apart.values()]), strict=True)
        )
        with ranks.together():
            for key, layer in apart.items():
                if owners[key] == ranks.rank():
                    with naming(layer):
                        found = _fit(samples[layer.name], several, seed)
                        fitted[key] = {clustering: one.cpu() for clustering, one in found.items()}
        for key, layer in apart.items():
            found = ranks.from_rank(owners[key], fitted.get(key))
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

    first = walk.listen(layers, on_inputs, advance=advance)
    moments = {
        key: found.moments() if isinstance(found, ExpertMoments) else found
        for key, found in sums.items()
    }
    for one in moments.values():
        ranks.add_(one.lower)
        ranks.add_(one.count)
    return {
        clustering: {
            layer.name: Calibration(
                moments[clustering, first[layer.name]],
                routers.get((clustering, first[layer.name])),
                _energy(layer, moments[clustering, first[layer.name]]),
            )
            for layer in layers
        }
        for clustering in clusterings
    }


def _fit(
    rows: torch.Tensor, clusterings: Sequence[Clustering], seed: int
) -> dict[Clustering, Router]:
    """Fit a router for each clustering; a random one has the sizes of k-means' clusters."""
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
    with torch.inference_mode(False):  # the block runs in it, but these are added to later too
        if router is None:
            return InputMoments.zeros(layer.inputs, device=device)
        moments = InputMoments.zeros(layer.inputs, experts=router.experts, device=device)
    return ExpertMoments(moments, router.assign)


def _energy(layer: LinearLayer, moments: InputMoments) -> float:
    pooled = moments.pooled() if moments.count.ndim else moments
    return float(output_energy(weight_of(layer), pooled).sum())


def save_calibrations(file: Path, calibrations: Calibrations) -> None:
    """Write calibrations, what several layers share only once."""
    tensors: dict[str, torch.Tensor] = {}
    owners: dict[int, str] = {}
    for name, calibration in calibrations.items():
        owner = owners.setdefault(id(calibration.moments), name)
        tensors[f"{owner} lower"] = calibration.moments.lower
        tensors[f"{owner} count"] = calibration.moments.count
        if calibration.router is not None:
            tensors |= router_tensors(owner, calibration.router)
        tensors[f"{name} {owner}"] = torch.tensor(calibration.energy, dtype=torch.float64)
    save_tensors(file, tensors)


def load_calibrations(file: Path, device: torch.device) -> Calibrations:
    """Read what `save_calibrations` wrote."""
    tensors = load_tensors(file, device)
    shared: dict[str, tuple[InputMoments, Router | None]] = {}
    for key in tensors:
        owner, what = key.split(" ", 1)
        if what == "lower":
            moments = InputMoments(tensors[key], tensors[f"{owner} count"])
            several = moments.count.ndim > 0
            shared[owner] = moments, router_from(owner, tensors) if several else None
    return {
        name: Calibration(*shared[owner], float(tensors[key]))
        for key in tensors
        for name, owner in [key.split(" ", 1)]
        if owner in shared
    }


def save_rows(file: Path, rows: Mapping[str, torch.Tensor]) -> None:
    """Write inputs by layer (see `sample_inputs`), what several layers share only once."""
    owners: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, values in rows.items():
        owner = owners.setdefault(id(values), name)
        tensors[owner] = rows[owner]
        tensors[f"{name} {owner}"] = torch.zeros(0)
    save_tensors(file, tensors)


def load_rows(file: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Read what `save_rows` wrote."""
    tensors = load_tensors(file, device)
    pairs = [key.split(" ") for key in tensors if " " in key]
    return {name: tensors[owner] for name, owner in pairs}
