"""Prune a model block by block, from the inputs that its layers have over a text."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.model import folders
from entangle.model.blocks import BlockWalk
from entangle.model.hooks import check_hooks
from entangle.model.layers import (
    LinearLayer,
    check_prunable,
    find_layers,
    weight_of,
    write_weight,
)
from entangle.model.loading import save_model
from entangle.model.text import TokenWindows, check_windows
from entangle.numerics.moments import output_energy
from entangle.numerics.pruning import Mask, Method, Sparsity, check_group, prune
from entangle.study import runs
from entangle.study.calibration import Calibration, calibrate, walk_blocks
from entangle.study.recording import provenance

Propagate = Literal["sparse", "dense"]

CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("sparsegpt", "wanda", "magnitude"),
    "mask": ("row", "block"),
    "propagate": ("sparse", "dense"),
}


@dataclasses.dataclass(frozen=True)
class Pruning:
    """How the layers of a model are pruned."""

    sparsity: Sparsity
    method: Method = "sparsegpt"
    mask: Mask = "row"
    propagate: Propagate = "sparse"

    @classmethod
    def of(cls, sparsity: str | float | Sparsity, method: str, mask: str, propagate: str) -> Self:
        """Read one from words.

        Raises:
            ValueError: a word that is none of its choices, or no sparsity.
        """
        words: dict[str, Any] = {"method": method, "mask": mask, "propagate": propagate}
        for name, word in words.items():
            if word not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {word!r}")
        if not isinstance(sparsity, Sparsity):
            sparsity = Sparsity.parse(sparsity)
        return cls(sparsity, **words)

    def words(self) -> dict[str, str]:
        """Return it as it was written."""
        named = {name: getattr(self, name) for name in CHOICES}
        return named | {"sparsity": str(self.sparsity)}


@dataclasses.dataclass(frozen=True, eq=False)
class Sparsified:
    """What pruning made of each layer: a row per layer, and what it was made of (run.json)."""

    layers: pd.DataFrame
    attributes: dict[str, Any]

    @property
    def sparsity(self) -> float:
        """The share of the layers' weights that are zero."""
        return float(self.layers["zeros"].sum() / self.layers["weights"].sum())

    @property
    def error(self) -> float:
        """The mean over layers of the relative squared error of their outputs."""
        return float(self.layers["error"].mean())


def sparsify(
    model: PreTrainedModel,
    windows: TokenWindows,
    sparsity: str | float,
    *,
    method: str = "sparsegpt",
    mask: str = "row",
    propagate: str = "sparse",
    layers: str | Sequence[str] = ("*",),
    batch_size: int = 4,
    skip_first: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    command: str | None = None,
) -> Sparsified:
    """Prune the matching layers of a model in place, block by block, from windows of a text.

    ``sparsity`` is a share of zeros or ``n:m``, n kept of every m. With ``propagate="sparse"`` a
    block is pruned for the inputs that the pruned blocks before it give, with ``"dense"`` for
    those of the dense model. With ``out`` the model, and the tokenizer, are also written to that
    folder as an ordinary Hugging Face one, with run.json, log.json and sparsity.json. After an
    error the model may be pruned in part.

    Raises:
        FileExistsError: ``out`` exists, and ``overwrite`` is false.
        LookupError: a pattern matches no layer.
        RuntimeError: a model that cannot be run block by block, or a layer that did not run once
            in each batch.
        ValueError: windows longer than the model's context, a model in training mode, compiled or
            quantised, a number or word out of range, or inputs that no pruning can be made of;
            the message names the layer.
    """
    pruning = Pruning.of(sparsity, method, mask, propagate)
    chosen = prunable_layers(model, windows, layers, [pruning], skip_first)

    def run() -> Sparsified:
        attributes = provenance(
            model,
            windows,
            layers=layers,
            batch_size=batch_size,
            skip_first=skip_first,
            command=command,
        )
        attributes |= pruning.words()
        walk = walk_blocks(model, windows, batch_size, skip_first)
        rows = prune_model(walk, chosen, pruning, progress=progress)
        return Sparsified(pd.DataFrame(rows), attributes | {"tokens": walk.tokens})

    if out is None:
        return run()
    stopwatch = runs.Stopwatch()
    with folders.new_folder(out, overwrite=overwrite) as folder:
        found = run()
        save_model(model, tokenizer, folder)
        rows: list[Any] = found.layers.to_dict(orient="records")
        whole = {"sparsity": found.sparsity, "error": found.error}
        runs.write_json(folder / "sparsity.json", whole | {"layers": rows})
        runs.write_json(folder / "run.json", found.attributes)
        runs.write_json(folder / "log.json", stopwatch.log())
    return found


def prunable_layers(
    model: PreTrainedModel,
    windows: TokenWindows,
    patterns: str | Sequence[str],
    prunings: Sequence[Pruning],
    skip_first: int,
) -> list[LinearLayer]:
    """Return the layers to prune, after all has been checked that can be before minutes are spent.

    Raises:
        LookupError: a pattern matches no layer.
        ValueError: as `sparsify` says.
    """
    check_windows(model, windows, skip_first)
    check_hooks(model, skip_first)
    chosen = find_layers(model, [patterns] if isinstance(patterns, str) else patterns)
    check_prunable(chosen, find_layers(model))
    for layer in chosen:
        for pruning in prunings:
            with naming(layer):
                check_group(layer.inputs, pruning.sparsity)
    return chosen


def prune_model(
    walk: BlockWalk,
    layers: Sequence[LinearLayer],
    pruning: Pruning,
    *,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Prune layers in place, block by block; return a row about each (see `prune_layer`).

    Raises:
        ValueError: the inputs of a layer cannot be pruned by; the message names it.
    """
    rows = []
    dense = pruning.propagate == "dense"
    last = max(layer.block for layer in layers)
    with tqdm(total=last + 1, unit="block", desc="prune", disable=not progress) as bar:
        for block in range(last + 1):
            here = [layer for layer in layers if layer.block == block]
            calibrations = calibrate(walk, here, advance=dense) if here else {}
            rows += [prune_layer(layer, calibrations[layer.name], pruning) for layer in here]
            if walk.block == block < last:
                walk.advance()
            bar.update()
    return rows


def prune_layer(layer: LinearLayer, calibration: Calibration, pruning: Pruning) -> dict[str, Any]:
    """Prune a layer in place and return what became of it.

    ``error`` is ‖(W - Ŵ)X‖² / ‖WX‖² over the calibration's inputs X; NaN for a layer without
    output. ``zeros`` are counted in the weights themselves.

    Raises:
        ValueError: as `prune` says; the message names the layer.
    """
    weight = weight_of(layer)
    with naming(layer):
        pruned = prune(
            weight,
            calibration.moments,
            pruning.sparsity,
            method=pruning.method,
            mask=pruning.mask,
        )
    lost = float(output_energy(weight.double() - pruned.weight.double(), calibration.moments).sum())
    write_weight(layer, pruned.weight)
    zeros = int((weight == 0).sum())
    return {
        "layer": layer.name,
        "block": layer.block,
        "role": layer.role,
        "neurons": layer.neurons,
        "inputs": layer.inputs,
        "weights": weight.numel(),
        "zeros": zeros,
        "realised": zeros / weight.numel(),
        "error": lost / calibration.energy if calibration.energy else math.nan,
        "damping": max(pruned.damping),
        "tokens": int(calibration.moments.count),
    }


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
