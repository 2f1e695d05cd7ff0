"""What pruning needs to know of a text: the moments of each layer's inputs, block by block."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from entangle.model.blocks import BlockWalk
from entangle.model.layers import LinearLayer, weight_of
from entangle.model.text import TokenWindows
from entangle.numerics.moments import InputMoments, output_energy
from entangle.study import runs


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """What pruning one layer needs to know of a text."""

    moments: InputMoments  # of its inputs; the same object for layers that have the same inputs
    energy: float  # ‖WX‖² of its dense weights W: what an error is relative to


def walk_blocks(
    model: PreTrainedModel, windows: TokenWindows, batch_size: int, skip_first: int
) -> BlockWalk:
    """Return the windows on their way through the model's blocks."""
    batches = ({"input_ids": batch} for batch in windows.batches(batch_size))
    return BlockWalk(model, batches, skip_first=skip_first)


def calibrate(
    walk: BlockWalk, layers: Sequence[LinearLayer], *, advance: bool
) -> dict[str, Calibration]:
    """Run the block once and return the calibration of these layers of it, by name.

    With ``advance`` the walk goes on behind the block, with the weights as they are.
    """
    moments: dict[str, InputMoments] = {}

    def on_inputs(layer: LinearLayer, rows: torch.Tensor) -> None:
        if layer.name not in moments:
            moments[layer.name] = InputMoments.zeros(layer.inputs, device=rows.device)
        moments[layer.name].add(rows)

    first = walk.listen(layers, on_inputs, advance=advance)
    shared = {layer: moments[first[layer.name]] for layer in layers}
    return {
        layer.name: Calibration(inputs, float(output_energy(weight_of(layer), inputs).sum()))
        for layer, inputs in shared.items()
    }


def save_calibrations(file: Path, calibrations: dict[str, Calibration]) -> None:
    """Write calibrations, moments that several layers share only once."""
    tensors: dict[str, torch.Tensor] = {}
    owners: dict[int, str] = {}
    for name, calibration in calibrations.items():
        owner = owners.setdefault(id(calibration.moments), name)
        tensors[f"{owner} lower"] = calibration.moments.lower
        tensors[f"{owner} count"] = calibration.moments.count
        tensors[f"{name} {owner}"] = torch.tensor(calibration.energy, dtype=torch.float64)
    runs.save_tensors(file, tensors)


def load_calibrations(file: Path, device: torch.device) -> dict[str, Calibration]:
    """Read what `save_calibrations` wrote."""
    tensors = runs.load_tensors(file, device)
    parts = [(key, *key.split(" ")) for key in tensors]
    moments = {
        owner: InputMoments(tensors[key], tensors[f"{owner} count"])
        for key, owner, what in parts
        if what == "lower"
    }
    return {
        name: Calibration(moments[owner], float(tensors[key]))
        for key, name, owner in parts
        if owner in moments
    }
