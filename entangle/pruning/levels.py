"""Blocks of a model that are pruned to any number of zeros, each of them once."""

from collections.abc import Mapping
from pathlib import Path

from entangle.model import ranks
from entangle.model.layers import weight_of, write_weight
from entangle.model.packing import load_tensors, save_tensors
from entangle.model.progress import progress_bar
from entangle.pruning.block import prune_layers
from entangle.pruning.budgets import zeros_of_block
from entangle.pruning.calibration import calibrate, load_calibrations, save_calibrations
from entangle.pruning.options import ONE, Pruning
from entangle.runs.setup import Setup


class PrunedBlocks:
    """The blocks of a setup's model with any numbers of zeros, by the inputs of the dense model.

    Calibrations and pruned weights are kept in a folder, since a search wants the same weights again
    and again.
    """

    def __init__(self, setup: Setup, pruning: Pruning, folder: Path) -> None:
        """Run the dense model, and save the calibration of each block."""
        self._setup, self._pruning, self._folder = setup, pruning, folder
        self._dense = {layer.name: weight_of(layer).clone() for layer in setup.layers}
        self._saved: set[tuple[int, int]] = set()
        self._zeros: dict[int, int] = {}  # of the blocks as they are in the model
        walk = setup.walk()
        blocks = range(setup.last_block + 1)
        for block in progress_bar(blocks, unit="block", desc="calibrate", shown=setup.progress):
            if block in setup.blocks:
                found = calibrate(walk, setup.blocks[block], seed=setup.seed, advance=True)[ONE]
                ranks.on_rank_zero(save_calibrations, self._calibration(block), found)
            else:
                walk.advance()

    def put(self, zeros: Mapping[int, int]) -> None:
        """Give the blocks of the model these numbers of zeros.

        Raises:
            ValueError: the inputs of a layer cannot be used; the message names the layer.
        """
        for block, count in zeros.items():
            if self._zeros.get(block) != count:
                self._put(block, count)
                self._zeros[block] = count

    def restore(self) -> None:
        """Give all blocks their dense weights."""
        for block in self._setup.blocks:
            self._restore(block)
        self._zeros.clear()

    def _restore(self, block: int) -> None:
        for layer in self._setup.blocks[block]:
            write_weight(layer, self._dense[layer.name])

    def _put(self, block: int, count: int) -> None:
        layers = self._setup.blocks[block]
        file, device = self._folder / f"{block}-{count}.safetensors", weight_of(layers[0]).device
        if (block, count) in self._saved:
            weights = load_tensors(file, device)
            for layer in layers:
                write_weight(layer, weights[layer.name])
            return
        self._restore(block)
        calibrations = load_calibrations(self._calibration(block), layers, device)
        zeros = zeros_of_block(layers, count, self._pruning, self._setup.run)
        prune_layers(self._setup.model, layers, calibrations, self._pruning, zeros=zeros)
        ranks.on_rank_zero(save_tensors, file, {x.name: weight_of(x) for x in layers})
        self._saved.add((block, count))

    def _calibration(self, block: int) -> Path:
        return self._folder / f"{block}.safetensors"
