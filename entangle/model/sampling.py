"""Walks of windows through a model's blocks, and samples of the inputs of its layers."""

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
    """Return a walk of the windows through the model's blocks, before the first block.

    Under torchrun each process walks with its share of the batches.

    Raises:
        RuntimeError: as in `BlockWalk`, or there are fewer batches than processes.
        ValueError: as in `BlockWalk`.
    """
    batches = windows.batches(batch_size)
    own = ranks.shard().batches(len(batches))
    if len(batches) < ranks.count():
        # A ValueError would be recorded as an arm's problem, but fewer processes can resume the run.
        raise RuntimeError(
            f"{len(batches)} batches of {batch_size} windows are too few for {ranks.count()} "
            "processes: use a smaller batch size, more windows or fewer processes"
        )
    places = [number * batch_size * windows.length for number in own]
    inputs = ({"input_ids": batches[number]} for number in own)
    return BlockWalk(model, inputs, skip_first=skip_first, places=places)


def sample_inputs(
    walk: BlockWalk, layers: Sequence[LinearLayer], size: int, seed: int, *, advance: bool = False
) -> dict[str, torch.Tensor]:
    """Run the block once; return a sample (tokens, inputs) of the inputs of its layers, by name.

    At most ``size`` counted tokens are chosen, those with the smallest hashes of the seed and of the
    token's place in the text, so the choice does not depend on the batch size. Layers with the same
    inputs share the tensor. A trained expert has those of the chosen tokens that were sent to it.
    """
    chosen = _choose(walk, size, seed)
    recorded: dict[str, list[torch.Tensor]] = {}
    found: dict[str, list[torch.Tensor]] = {}  # their places in the text

    def on_inputs(layer: LinearLayer, rows: torch.Tensor) -> None:
        parts = recorded.setdefault(layer.name, [])
        batch, which = len(parts), walk.running.of_layer(layer)
        keep = chosen[batch][which]
        parts.append(rows[keep.to(rows.device)])
        found.setdefault(layer.name, []).append(walk.places[batch][which][keep])

    owners = walk.record_inputs(layers, on_inputs, advance=advance)
    rows = {
        name: ranks.gather(torch.cat(recorded[name]), torch.cat(found[name]))
        for name in (layer.name for layer in layers)  # all ranks have this order
        if name in recorded
    }
    return {layer.name: rows[owners[layer.name]] for layer in layers}


def sampled_places(walk: BlockWalk, size: int, seed: int) -> torch.Tensor:
    """Return the places in the text (tokens,) of the tokens that `sample_inputs` chooses."""
    places = _places(walk, _choose(walk, size, seed))
    return ranks.gather(places, places)


def _places(walk: BlockWalk, chosen: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the places in the text of the chosen tokens of this process."""
    return torch.cat([place[which] for place, which in zip(walk.places, chosen, strict=True)])


def _choose(walk: BlockWalk, size: int, seed: int) -> list[torch.Tensor]:
    """Return, per batch, which of its counted tokens (tokens,) are among the ``size`` chosen ones."""
    hashes = _hash(torch.cat(walk.places).numpy().astype(np.uint64), seed)
    every = np.sort(np.concatenate(ranks.all_gather(hashes)))
    chosen = torch.from_numpy(hashes <= every[min(size, len(every)) - 1])
    return list(chosen.split([len(part) for part in walk.places]))


def _hash(numbers: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Return the SplitMix64 hashes of numbers; with one seed, different numbers differ."""
    mixed = numbers + np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    mixed = (mixed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
