"""Checkpoint of pruned blocks, from which a killed command resumes."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from entangle.model import folders, ranks
from entangle.model.blocks import BlockWalk
from entangle.model.experts import ExpertLinear
from entangle.model.fused import FusedMatrix
from entangle.model.layers import LinearLayer, find_layers, parameter_of, weight_of
from entangle.model.loading import load_rules
from entangle.model.packing import load_experts, load_tensors, save_experts, save_tensors
from entangle.model.placing import input_device, is_offloaded, read_weight_from, release_block
from entangle.model.sparse_inputs import rule_tensors
from entangle.pruning.block import PrunedLayer
from entangle.runs import store


class FinishedBlocks:
    """The checkpoint of a model's pruned blocks: files for each block.

    Under torchrun rank 0 writes them, into a folder that all processes can read.
    """

    name = "blocks"  # of the checkpoint in the folder

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.folder = folder
        self._model = model
        self.blocks = folder / self.name
        self.finished: set[int] = set(ranks.from_rank(0, self._written()))

    def save(
        self,
        layers: Sequence[LinearLayer],
        pruned: Sequence[PrunedLayer],
        dense: BlockWalk | None = None,
    ) -> None:
        """Write the pruned layers of a block and their results.

        The hidden states of the ``dense`` walk, which is behind the block, are written too. Each
        process writes those of its batches.
        """
        block = layers[0].block
        if dense is not None:
            for number, hidden in zip(_numbers(dense), dense.hidden, strict=True):
                save_tensors(self._hidden_file(block, number), {"hidden": hidden})
            ranks.all_gather(block)  # waits until all files are written
        about: dict[str, Any] = {"rows": [one.row for one in pruned]}
        here = {x.name: x for x in find_layers(self._model, [layer.name for layer in layers])}
        expanded = [x for x in here.values() if isinstance(x.module, ExpertLinear)]
        file = self.blocks / f"{block}.safetensors"
        if ranks.rank() == 0:
            if expanded:
                about["described"] = save_experts(self.folder, expanded)
            else:
                save_tensors(file, dict(map(_stored, here.values())))
            rules = {k: v for k, v in rule_tensors(self._model).items() if k.split(" ")[0] in here}
            if rules:
                save_tensors(self._rules_file(block), rules)
            store.write_json(self.blocks / f"{block}.json", about)
            if dense is not None and self.finished:
                folders.remove_folder(self._hidden_file(max(self.finished), 0).parent)
        self.finished.add(block)
        if not expanded:
            ranks.all_gather(block)  # waits until the file is written
            self._read_from(here.values(), file)

    def load(self, layers: Sequence[LinearLayer]) -> list[PrunedLayer]:
        """Restore the layers of a block; their results have no errors by neuron."""
        block = layers[0].block
        about = store.read_json(self.blocks / f"{block}.json")
        file = self.blocks / f"{block}.safetensors"
        if "described" in about:
            model, weight = self._model, weight_of(layers[0])
            where = input_device(model) if is_offloaded(model) else weight.device
            load_experts(self._model, self.folder, layers, about["described"], device=where)
        elif self._read_from(layers, file):
            for layer in layers:
                release_block(parameter_of(layer)[0])  # the next use reads the file
        else:
            tensors = load_tensors(file)
            for name, weight in dict(map(_stored, layers)).items():
                weight.copy_(tensors[name])
        load_rules(self._model, self._rules_file(block))
        nothing = torch.empty(0, dtype=torch.float64)
        rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in about["rows"]]
        return [PrunedLayer(row, nothing, nothing) for row in rows]

    def restore_hidden(self, dense: BlockWalk) -> None:
        """Let the dense model's walk go on behind the last finished block, if there is one."""
        if self.finished:
            block = max(self.finished)
            files = [self._hidden_file(block, number) for number in _numbers(dense)]
            dense.go_on(block + 1, [load_tensors(file)["hidden"] for file in files])

    def _rules_file(self, block: int) -> Path:
        return self.blocks / f"{block}-inputs.safetensors"

    def _hidden_file(self, block: int, batch: int) -> Path:
        return self.blocks / f"{block}-hidden" / f"{batch}.safetensors"

    def _read_from(self, layers: Iterable[LinearLayer], file: Path) -> bool:
        """Read these weights from ``file`` from now on, if the model is offloaded.

        Return whether it is.
        """
        if not is_offloaded(self._model):
            return False
        for layer in layers:
            read_weight_from(layer, file, _stored(layer)[0])
        return True

    def release_experts(self, block: int) -> None:
        """Release the experts of a finished block from memory, if the model is offloaded."""
        if is_offloaded(self._model):
            for layer in find_layers(self._model):
                if layer.block == block and isinstance(layer.module, ExpertLinear):
                    layer.module.weight = torch.nn.Parameter(
                        layer.module.weight.to("meta"), requires_grad=False
                    )

    def described(self) -> dict[str, Any]:
        """Return the descriptions of the expanded layers of all blocks, by name."""
        files = [self.blocks / f"{block}.json" for block in self._written()]
        parts = [store.read_json(file).get("described", {}) for file in files]
        return {name: about for part in parts for name, about in part.items()}

    def _written(self) -> list[int]:
        files = self.blocks.glob("*.json")
        return sorted(int(file.stem) for file in files if file.stem.isdecimal())

    def remove(self) -> None:
        """Remove the checkpoint."""
        folders.remove_folder(self.blocks)


def _numbers(walk: BlockWalk) -> range:
    """Return the numbers of the walk's batches among those of all processes."""
    return ranks.shard().batches(sum(ranks.all_gather(len(walk.hidden))))


def _stored(layer: LinearLayer) -> tuple[str, torch.Tensor]:
    """Return the tensor that is written for a layer and its name; experts of a block share theirs."""
    module, parameter = parameter_of(layer)
    weight = getattr(module, parameter)
    assert isinstance(weight, torch.Tensor)
    fused = isinstance(layer.module, FusedMatrix)
    return layer.name.rsplit(".", 2)[0] + f".{parameter}" if fused else layer.name, weight.detach()
