"""Measure the distribution of every neuron over a text: at once, in shards, or block by block."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from entangle.measurement.ranking import rank_correlations
from entangle.measurement.recording import Recorder
from entangle.model import folders, ranks
from entangle.model.blocks import BlockWalk
from entangle.model.hooks import backbone_of, listening
from entangle.model.layers import LinearLayer, find_layers
from entangle.model.packing import load_tensors, save_tensors
from entangle.model.placing import home_of, is_offloaded
from entangle.model.ranks import Shard
from entangle.model.sampling import sample_inputs, walk_blocks
from entangle.model.text import TokenWindows, check_windows, some_windows
from entangle.numerics.difficulty import Difficulty, mapping_difficulty
from entangle.numerics.histograms import Histograms
from entangle.runs import labelling, resuming, setup, store
from entangle.runs.setup import provenance

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

    A ``shard`` such as ``3/8`` counts every eighth batch from the third on: `merge` makes of
    all eight what one process would have measured. Under torchrun each process counts its own
    batches, and all return the whole; but if a model that is run block by block is written, only
    rank 0 does.

    A model whose blocks are in files (``load_model(..., offload=...)``) is run block by block.

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
    counted = mine if shard is not None else range(len(batches))
    tokens = sum(len(batches[number]) for number in counted) * (windows.length - skip_first)
    attributes: dict[str, Any] = {"tokens": tokens, "bins": bins}
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
    first_counts = 0 in mine
    ours = [batches[number] for number in (mine if first_counts else [0, *mine])]
    recording = _Recording(model, chosen, bins, ours, first_counts, skip_first, progress)
    streamed = out is not None and is_offloaded(model)  # block after block, and never all of it
    stopwatch = setup.Stopwatch()
    kept = (
        nullcontext() if out is None else resuming.resumed_run(out, attributes, overwrite=overwrite)
    )
    with kept as folder:
        difficulties: dict[str, Difficulty] = {}
        if difficulty:  # first: it is what may be impossible
            some = some_windows(windows, DIFFICULTY_WINDOWS)
            arguments = (chosen, difficulty, batch_size, skip_first, progress)
            difficulties = _difficulties(model, some, *arguments)
        name = f"{part.number}-of-{part.of}"
        state = None if folder is None else folder / "state"
        parts = recording.blocks(state) if is_offloaded(model) else recording.whole(state, name)
        trees = (_tree(chosen, *one, attributes, difficulties) for one in parts)
        if not streamed:
            tree = _joined(list(trees))
            trees = (one for one in [tree])
        if folder is not None and ranks.rank() == 0:
            store.write_run(folder, trees, stopwatch.log)
            folders.remove_folder(folder / "state")
            if difficulty:
                table = rank_correlations(store.open_run(folder), "wasserstein", ["difficulty"])
                store.save_table(table, folder / "tables" / "difficulty.csv")
        else:
            for _ in trees:  # of which all share the work
                pass
    if out is None or not streamed:
        return tree
    return store.open_run(out) if ranks.rank() == 0 else xr.DataTree()


def _tree(
    every: Sequence[LinearLayer],
    layers: Sequence[LinearLayer],
    state: Histograms,
    norms: npt.NDArray[np.float64],
    attributes: Mapping[str, Any],
    difficulties: Mapping[str, Difficulty],
) -> xr.DataTree:
    """Return the run of some of its layers."""
    labels = labelling.labels_of(layers, every).assign(weight_norm=("neuron", norms))
    tree = labelling.tree_of(state, labels, attributes)
    return labelling.with_difficulty(tree, difficulties) if difficulties else tree


def _joined(trees: Sequence[xr.DataTree]) -> xr.DataTree:
    """Return one run of the runs of some of its layers each."""
    if len(trees) == 1:
        return trees[0]
    whole = {}
    for nodes in zip(*(tree.subtree for tree in trees), strict=True):
        datasets = [node.to_dataset(inherit=False) for node in nodes]
        whole[nodes[0].path] = xr.concat(datasets, "neuron", combine_attrs="override")
    return xr.DataTree.from_dict(whole)


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


Part = tuple[Sequence[LinearLayer], Histograms, npt.NDArray[np.float64]]  # and weights' norms


@dataclasses.dataclass(frozen=True, eq=False)
class _Recording:
    """Layers, and the batches whose outputs this process records."""

    model: PreTrainedModel
    layers: Sequence[LinearLayer]
    bins: int
    batches: Sequence[torch.Tensor]
    first_counts: bool  # or it only places the bins, and another process counts it
    skip_first: int
    progress: bool

    def whole(self, folder: Path | None, name: str) -> Iterator[Part]:
        """Run the model batch after batch, and save now and then what to go on from."""
        file = None if folder is None else folder / f"{name}.safetensors"
        recorder = Recorder(self.layers, self.bins, first_counts=self.first_counts)
        done = 0
        if file is not None and file.is_file():
            tensors = load_tensors(file)
            done = int(tensors.pop("done"))
            recorder.restore(Histograms(**tensors))
            del tensors
        backbone, device = backbone_of(self.model), home_of(self.model)
        saved, cost = time.monotonic(), 0.0
        with (
            listening(self.model, self.layers, recorder.add, skip_first=self.skip_first),
            torch.inference_mode(),
            self._bar(sum(map(torch.numel, self.batches)), "token") as bar,
        ):
            bar.update(sum(map(torch.numel, self.batches[:done])))
            for batch in self.batches[done:]:
                begin = time.monotonic()
                if file is not None and done and begin - saved > max(SECONDS, 20 * cost):
                    save_tensors(file, recorder.state().tensors() | {"done": torch.tensor(done)})
                    saved = time.monotonic()
                    cost = saved - begin
                backbone(input_ids=batch.to(device), use_cache=False)
                done += 1
                bar.update(batch.numel())
        state = _over_ranks(recorder.state())
        yield self.layers, state, labelling.weight_norms(self.layers)

    def blocks(self, folder: Path | None) -> Iterator[Part]:
        """Run the batches through block after block, and save each one's histograms."""
        layers = {
            b: [x for x in self.layers if x.block == b] for b in {x.block for x in self.layers}
        }
        files = {} if folder is None else {b: folder / f"block-{b}.safetensors" for b in layers}
        done = ranks.everyone([block for block, file in files.items() if file.is_file()])[0]
        for block, part in self._recorded(layers, {*layers} - {*done}):
            if folder is None:
                yield layers[block], *part
            elif ranks.rank() == 0:
                norms = {"weight_norm": torch.from_numpy(part[1])}
                save_tensors(files[block], part[0].tensors() | norms)
            del part  # of one block, while the next is recorded
        for block, file in files.items() if ranks.rank() == 0 else ():
            tensors = load_tensors(file)
            known = tensors.pop("weight_norm").numpy()
            yield layers[block], Histograms(**tensors), known

    def _recorded(
        self, layers: Mapping[int, list[LinearLayer]], left: set[int]
    ) -> Iterator[tuple[int, tuple[Histograms, npt.NDArray[np.float64]]]]:
        if not left:
            return
        batches = ({"input_ids": batch} for batch in self.batches)
        walk = BlockWalk(self.model, batches, skip_first=self.skip_first)
        with self._bar(max(left) + 1, "block") as bar:
            for block in range(max(left) + 1):
                if block in left:
                    recorder = Recorder(layers[block], self.bins, first_counts=self.first_counts)
                    walk.record(layers[block], recorder.add)
                    state = _over_ranks(recorder.state())
                    yield block, (state, labelling.weight_norms(layers[block]))
                    del recorder, state
                else:
                    walk.advance()
                bar.update()

    def _bar(self, total: int, unit: str) -> Any:
        return tqdm(total=total, unit=unit, disable=not self.progress)


def _over_ranks(state: Histograms) -> Histograms:
    """Make of a state that of all processes."""
    if ranks.count() > 1:
        state.reduce_(ranks.add_, ranks.least_, ranks.most_)
    return state


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
