"""Record the distributions of a model's neurons while it runs, or measure them over a text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from entangle.model import folders
from entangle.model.hooks import Listener, backbone_of, listening
from entangle.model.layers import LinearLayer, find_layers, skipped_parameters
from entangle.model.loading import weights_hash
from entangle.model.text import TokenWindows, check_windows, some_windows
from entangle.numerics.difficulty import Difficulty, mapping_difficulty
from entangle.numerics.histograms import Histograms
from entangle.study import dataset, runs
from entangle.study.calibration import sample_inputs, walk_blocks
from entangle.study.ranking import rank_correlations

DIFFICULTY_WINDOWS = (
    64  # of which the pairs of tokens are drawn: what they hold of memory is bounded
)


class Recorder:
    """The histograms of some layers' neurons, filled while their model runs."""

    def __init__(self, layers: Sequence[LinearLayer], bins: int) -> None:
        self.layers = list(layers)
        self.attributes: dict[str, Any] = {}
        self.listener: Listener | None = None
        sizes = [layer.neurons for layer in layers]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        # All on the host, where pages cost memory once they are written to; a layer on the
        # host adds to its slice directly, one on a device to its own and is copied at the end.
        self._all = Histograms.zeros(sum(sizes), bins=bins)
        self._slices = {
            layer.name: slice(end - size, end)
            for layer, size, end in zip(layers, sizes, ends, strict=True)
        }
        self._histograms: dict[str, Histograms] = {}

    def add(self, layer: LinearLayer, rows: torch.Tensor) -> None:
        """Add a batch's counted rows (tokens, neurons) of a layer; its first is the pilot."""
        histograms = self._histograms.get(layer.name)
        if histograms is None:
            if rows.device.type == "cpu":
                histograms = self._all[self._slices[layer.name]]
            else:
                histograms = Histograms.zeros(
                    layer.neurons, bins=self._all.bins, device=rows.device
                )
            histograms.start(rows)
            self._histograms[layer.name] = histograms
        histograms.add(rows)

    def tree(self) -> xr.DataTree:
        """Return what is recorded so far: the dataset, and as its child the mergeable state.

        Raises:
            RuntimeError: the model has not run, a layer did not run in each batch, or the last
                forward pass did not come to its end.
        """
        if self.listener is None or self.listener.batches == 0:
            raise RuntimeError("nothing is recorded: call the model inside the with block")
        self.listener.check()
        for name, histograms in self._histograms.items():
            if histograms.count.device.type != "cpu":
                self._all[self._slices[name]].copy_(histograms)
        counted = {"tokens": self.listener.tokens, "bins": self._all.bins}
        return dataset.to_tree(self._all, self.layers, counted | self.attributes)

    def dataset(self) -> xr.Dataset:
        """Return the dataset alone: one row per neuron."""
        return self.tree().to_dataset()


@contextmanager
def record(
    model: PreTrainedModel,
    layers: str | Sequence[str] = ("*",),
    *,
    bins: int = 1024,
    skip_first: int = 0,
) -> Iterator[Recorder]:
    """Record the layers that match any pattern or name while ``model`` runs in the with block.

    The first batch is the pilot that places the histograms' bins: make it a typical one. Padding
    is left out by the ``attention_mask`` that the model is called with, and so are the first
    ``skip_first`` tokens of each window.

    Raises:
        LookupError: a pattern matches no layer.
        RuntimeError: at the end, a layer did not run once in each batch.
        ValueError: a compiled model, or ``bins`` or ``skip_first`` out of range.
    """
    recorder = Recorder(find_layers(model, layers), bins)
    with listening(model, recorder.layers, recorder.add, skip_first=skip_first) as listener:
        recorder.listener = listener
        yield recorder


def measure(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    layers: str | Sequence[str] = ("*",),
    bins: int = 1024,
    difficulty: int = 0,
    batch_size: int = 4,
    skip_first: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    command: str | None = None,
) -> xr.DataTree:
    """Measure the distribution of every neuron in the matching layers over windows of a text.

    Returns the run: its root has a row per neuron, its child ``histogram`` the whole state. With
    ``out`` it is also written to that folder, whole or not at all. ``command`` is noted in it.

    With ``difficulty`` the mapping difficulty is measured too, over so many pairs of tokens of at
    most 64 of the windows, which run through the model once more, block by block, and its rank
    correlation with the distance is in tables/difficulty.csv.

    Raises:
        FileExistsError: ``out`` exists, and ``overwrite`` is false.
        LookupError: a pattern matches no layer.
        RuntimeError: ``difficulty`` of a model that cannot be run block by block.
        ValueError: windows longer than the model's context, a model in training mode or
            compiled, or a number out of range.
    """
    arguments = (layers, bins, difficulty, batch_size, skip_first, progress, command)
    if out is None:
        return _measure(model, windows, *arguments)
    stopwatch = runs.Stopwatch()
    with folders.new_folder(out, overwrite=overwrite) as folder:  # first: it may be impossible
        tree = _measure(model, windows, *arguments)
        if difficulty:
            table = rank_correlations(tree, "wasserstein", ["difficulty"])
            runs.save_table(table, folder / "tables" / "difficulty.csv")
        runs.write_run(folder, tree, stopwatch.log())
    return tree


def _measure(
    model: PreTrainedModel,
    windows: TokenWindows,
    layers: str | Sequence[str],
    bins: int,
    difficulty: int,
    batch_size: int,
    skip_first: int,
    progress: bool,
    command: str | None,
) -> xr.DataTree:
    if difficulty < 0:
        raise ValueError(f"a difficulty needs at least one pair of tokens, got {difficulty}")
    check_windows(model, windows, skip_first)
    difficulties: dict[str, Difficulty] = {}
    if difficulty:  # first: it is what may be impossible
        chosen = find_layers(model, layers)
        arguments = (chosen, difficulty, batch_size, skip_first, progress)
        difficulties = _difficulties(model, some_windows(windows, DIFFICULTY_WINDOWS), *arguments)
    backbone, device = backbone_of(model), next(model.parameters()).device
    batches = windows.batches(batch_size)
    with (
        record(model, layers, bins=bins, skip_first=skip_first) as recorder,
        torch.inference_mode(),
        tqdm(total=windows.tokens.numel(), unit="token", disable=not progress) as bar,
    ):
        for batch in batches:
            backbone(input_ids=batch.to(device), use_cache=False)
            bar.update(batch.numel())
    recorder.attributes = provenance(
        model,
        windows,
        layers=layers,
        batch_size=batch_size,
        skip_first=skip_first,
        command=command,
    )
    recorder.attributes |= {"difficulty": difficulty} if difficulty else {}
    recorder.attributes |= {"window_hashes": windows.hashes}
    tree = recorder.tree()
    return dataset.with_difficulty(tree, difficulties) if difficulties else tree


def _difficulties(
    model: PreTrainedModel,
    windows: TokenWindows,
    layers: Sequence[LinearLayer],
    pairs: int,
    batch_size: int,
    skip_first: int,
    progress: bool,
) -> dict[str, Difficulty]:
    """Return the mapping difficulty of each layer's neurons, by the layer's name."""
    walk = walk_blocks(model, windows, batch_size, skip_first)
    found = {}
    last = max(layer.block for layer in layers)
    for block in tqdm(range(last + 1), unit="block", desc="difficulty", disable=not progress):
        here = [layer for layer in layers if layer.block == block]
        if not here:
            walk.advance()
            continue
        rows = sample_inputs(walk, here, 2 * pairs, windows.seed, advance=block < last)
        for layer in here:
            inputs = rows[layer.name]
            with torch.inference_mode():
                outputs = layer.module(inputs)
            found[layer.name] = mapping_difficulty(inputs, outputs, pairs, seed=windows.seed)
    return found


def check_weights(model: PreTrainedModel, run: xr.DataTree | xr.Dataset) -> None:
    """See that a run is of this model.

    Raises:
        ValueError: it was measured on other weights.
    """
    attributes, weights = dataset.dataset_of(run).attrs, weights_hash(model)
    if attributes.get("weights") != weights:
        raise ValueError(
            f"the run was measured on other weights ({attributes.get('model', '?')}, "
            f"{str(attributes.get('weights'))[:12]}) than this model has ({model.name_or_path}, "
            f"{weights[:12]}): measure this model, or load the one that was measured"
        )


def provenance(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    layers: str | Sequence[str],
    batch_size: int,
    skip_first: int,
    command: str | None,
    evaluation: TokenWindows | None = None,
) -> dict[str, Any]:
    """Return what a run of a model on windows is made of: the beginning of its run.json."""
    scored: dict[str, Any] = {}
    if evaluation is not None:
        scored = {
            "tokens": len(windows) * (windows.length - skip_first),
            "evaluation": evaluation.text,
            "evaluation_fingerprint": evaluation.fingerprint,
            "evaluation_windows": len(evaluation),
            "evaluation_length": evaluation.length,
        }
    return {
        "command": command,
        "model": model.name_or_path,
        "class": type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": weights_hash(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "text": windows.text,
        "fingerprint": windows.fingerprint,
        "windows": len(windows),
        "length": windows.length,
        "available_windows": windows.available,
        "seed": windows.seed,
        "bos": windows.bos,
        "skip_first": skip_first,
        "batch_size": batch_size,
        "layers": [layers] if isinstance(layers, str) else list(layers),
        "skipped_parameters": skipped_parameters(model),
        "versions": runs.versions(),
        **scored,
    }
