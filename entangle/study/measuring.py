"""Measure the distribution of every neuron over a text: at once, in shards, or block by block."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from entangle.model import ranks
from entangle.model.hooks import backbone_of, listening
from entangle.model.layers import LinearLayer, find_layers
from entangle.model.packing import load_tensors, save_tensors
from entangle.model.ranks import Shard
from entangle.model.text import TokenWindows, check_windows, some_windows
from entangle.numerics.difficulty import Difficulty, mapping_difficulty
from entangle.numerics.histograms import Histograms
from entangle.study import dataset, runs
from entangle.study.calibration import sample_inputs, walk_blocks
from entangle.study.ranking import rank_correlations
from entangle.study.recording import Recorder, provenance

# Of which the pairs of tokens are drawn: what they hold of memory is bounded.
DIFFICULTY_WINDOWS = 64

SECONDS = 30.0  # at most, and a twentieth of the time: what a killed process loses


def measure(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    layers: str | Sequence[str] = ("*",),
    bins: int = 1024,
    difficulty: int = 0,
    batch_size: int = 4,
    skip_first: int = 0,
    shard: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    command: str | None = None,
) -> xr.DataTree:
    """Measure the distribution of every neuron in the matching layers over windows of a text.

    Returns the run: its root has a row per neuron, its child ``histogram`` the whole state. With
    ``out`` it is also written to that folder, whole or not at all; one that was killed goes on when
    it is called again with the same arguments. ``command`` is noted in it.

    With ``difficulty`` the mapping difficulty is measured too, over so many pairs of tokens of at
    most 64 of the windows, which run through the model once more, block by block, and its rank
    correlation with the distance is in tables/difficulty.csv.

    A ``shard`` such as ``3/8`` counts every eighth batch from the third on: `merge_runs` makes of
    all eight what one process would have measured. Under torchrun each process counts its own
    batches, and all return the whole.

    Raises:
        FileExistsError: ``out`` exists, or holds an unfinished run of other arguments, and
            ``overwrite`` is false.
        LookupError: a pattern matches no layer.
        RuntimeError: ``difficulty`` of a model that cannot be run block by block.
        ValueError: windows longer than the model's context, a model in training mode or
            compiled, a number out of range, or a shard that has no batch.
    """
    if difficulty < 0:
        raise ValueError(f"a difficulty needs at least one pair of tokens, got {difficulty}")
    check_windows(model, windows, skip_first)
    chosen = find_layers(model, layers)
    part, batches = _shard(shard, difficulty), windows.batches(batch_size)
    mine = part.batches(len(batches))
    if shard is not None and not mine:
        raise ValueError(
            f"shard {shard} has no batch: there are {len(batches)}, of {batch_size} windows each"
        )
    counted = part if shard is not None else Shard()
    counts = sum(len(batches[number]) for number in counted.batches(len(batches)))
    attributes: dict[str, Any] = {"tokens": counts * (windows.length - skip_first), "bins": bins}
    attributes |= provenance(
        model,
        windows,
        layers=layers,
        batch_size=batch_size,
        skip_first=skip_first,
        command=command,
    )
    attributes |= {"difficulty": difficulty} if difficulty else {}
    attributes |= {"window_hashes": windows.hashes}
    attributes |= {"shard": shard} if shard is not None else {}
    stopwatch = runs.Stopwatch()
    kept = nullcontext() if out is None else runs.resumed_run(out, attributes, overwrite=overwrite)
    with kept as folder:
        difficulties: dict[str, Difficulty] = {}
        if difficulty and ranks.rank() == 0:  # first: it is what may be impossible
            some = some_windows(windows, DIFFICULTY_WINDOWS)
            arguments = (chosen, difficulty, batch_size, skip_first, progress)
            difficulties = _difficulties(model, some, *arguments)
        recorder = Recorder(chosen, bins, first_counts=part.number == 0)
        file = None if folder is None else folder / "state" / f"{part.number}.safetensors"
        _run(model, batches, mine, recorder, skip_first, file, progress)
        state = recorder.state()
        if ranks.count() > 1:
            state.reduce_(ranks.add_, ranks.least_, ranks.most_)
        labels = dataset.labels_of(chosen).assign(
            weight_norm=("neuron", dataset.weight_norms(chosen))
        )
        tree = dataset.tree_of(state, labels, attributes)
        tree = dataset.with_difficulty(tree, difficulties) if difficulties else tree
        if folder is not None and ranks.rank() == 0:
            if difficulty:
                table = rank_correlations(tree, "wasserstein", ["difficulty"])
                runs.save_table(table, folder / "tables" / "difficulty.csv")
            runs.remove_folder(folder / "state")
            runs.write_run(folder, [tree], stopwatch.log)
    return tree


def _shard(words: str | None, difficulty: int) -> Shard:
    """Return which batches this process counts.

    Raises:
        ValueError: a shard where there are several processes, or of a difficulty.
    """
    if words is None:
        return ranks.shard()
    if ranks.count() > 1:
        raise ValueError(f"under torchrun each process has its own share, got shard {words} too")
    if difficulty:
        raise ValueError(
            f"the difficulty of a shard cannot be merged, got shard {words} and {difficulty} pairs "
            "of tokens: measure it without shards"
        )
    return Shard.parse(words)


def _run(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    mine: range,
    recorder: Recorder,
    skip_first: int,
    file: Path | None,
    progress: bool,
) -> None:
    """Run the batches of these numbers through the model, once the first of all has placed the bins.

    What is recorded is saved in the file now and then, and gone on from if it is there.
    """
    backbone, device = backbone_of(model), next(model.parameters()).device
    done = 0
    if file is not None and file.is_file():
        tensors = load_tensors(file)
        done = int(tensors.pop("done"))
        recorder.restore(Histograms(**tensors), device)
    left = mine[done:] if done or 0 in mine else [0, *mine]
    saved, cost = time.monotonic(), 0.0
    with (
        listening(model, recorder.layers, recorder.add, skip_first=skip_first),
        torch.inference_mode(),
        tqdm(total=len(mine), initial=done, unit="batch", disable=not progress) as bar,
    ):
        for number in left:
            backbone(input_ids=batches[number].to(device), use_cache=False)
            if number not in mine:
                continue
            done += 1
            bar.update()
            begin = time.monotonic()
            if file is not None and done < len(mine) and begin - saved > max(SECONDS, 20 * cost):
                state = recorder.state().tensors() | {"done": torch.tensor(done)}
                save_tensors(file, state)
                saved = time.monotonic()
                cost = saved - begin


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
