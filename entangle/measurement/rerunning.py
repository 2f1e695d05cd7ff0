"""Layers of a run, run once more on the windows that it was measured on, or on others."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.model.hooks import backbone_of, recording_rows
from entangle.model.patterns import INPUT
from entangle.model.placing import input_device
from entangle.model.sides import Recordable, stack_of
from entangle.model.text import TokenWindows
from entangle.runs.dataset import dataset_of
from entangle.runs.setup import Setup

Floats = npt.NDArray[np.float32]


def setup_again(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset,
    neurons: Sequence[str],
    progress: bool | None,
) -> Setup:
    """Return the setup with which a run was measured, for the layers of some neurons alone.

    Raises:
        ValueError: the run was measured on other weights or other windows, or the model is in
            training mode.
    """
    data = dataset_of(run)
    setup = Setup.of(
        model,
        windows,
        run=run,
        **layers_of(data, neurons),
        batch_size=int(data.attrs["batch_size"]),
        skip_first=int(data.attrs["skip_first"]),
        progress=progress,
    )
    if data.attrs.get("fingerprint") != windows.fingerprint:
        raise ValueError(
            f"the run was measured on other windows than these of {windows.text}: expected "
            f"{data.attrs.get('windows')} windows of {data.attrs.get('length')} tokens from "
            f"{data.attrs.get('text')}, as it was when measured, drawn with seed "
            f"{data.attrs.get('seed')}"
        )
    return setup


def layers_of(run: xr.Dataset, neurons: Sequence[str]) -> dict[str, Any]:
    """Return the layers of neurons and of input channels, as keywords of `Setup.of`."""
    names = sorted({neuron.rpartition(":")[0] for neuron in neurons})
    sides = dict(zip(run["layer"].to_numpy().astype(str), run["side"].to_numpy(), strict=True))
    inputs = [
        name for name in names if sides.get(name, "input") == "input" and name.endswith(INPUT)
    ]
    return {
        "layers": [name for name in names if name not in inputs],
        "input_layers": [name.removesuffix(INPUT) for name in inputs],
    }


def neuron_outputs(setup: Setup, neurons: Sequence[str], batches: Sequence[torch.Tensor]) -> Floats:
    """Run the model on batches; return the outputs (or inputs) of ``neurons`` (tokens, neurons).

    A neuron of a trained expert has NaN at the tokens that were not sent to the expert.
    """
    wanted: dict[str, list[int]] = {}
    for neuron in neurons:
        layer, _, index = neuron.rpartition(":")
        wanted.setdefault(layer, []).append(int(index))
    layers = [layer for layer in setup.recorded if layer.name in wanted]
    kept: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    which: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}

    def on_rows(layer: Recordable, rows: torch.Tensor, places: torch.Tensor | None) -> None:
        rows = rows[:, wanted[layer.name]]
        rows = rows if places is None else rows.index_select(0, places)
        kept[layer.name].append(rows.float().cpu())
        if stack_of(layer) is not None:
            which[layer.name].append(counter.of_layer(layer))

    model, device, skip_first = setup.model, input_device(setup.model), setup.skip_first
    with (
        torch.inference_mode(),
        recording_rows(model, layers, on_rows, skip_first=skip_first) as counter,
    ):
        for batch in batches:
            backbone_of(model)(input_ids=batch.to(device), use_cache=False)
    tokens = sum(batch[:, skip_first:].numel() for batch in batches)
    found = np.full((tokens, len(neurons)), np.nan, np.float32)
    column = {neuron: place for place, neuron in enumerate(neurons)}
    for name, parts in kept.items():
        places = [column[f"{name}:{index}"] for index in wanted[name]]
        rows = torch.cat(which[name]).numpy() if which[name] else np.arange(tokens)
        found[rows[:, None], places] = torch.cat(parts).numpy()
    return found
