"""Windows on their way through a model's blocks, and samples of the inputs of its layers."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from entangle.model import ranks
from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer
from entangle.model.text import TokenWindows


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
