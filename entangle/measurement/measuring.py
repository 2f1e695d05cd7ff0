"""Measurement of neurons' distributions over a text: in one pass, in shards, or block by block."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.measurement.ranking import rank_correlations
from entangle.measurement.recording import Recorder
from entangle.model import folders, ranks
from entangle.model.blocks import BlockWalk
from entangle.model.hooks import backbone_of, recording_rows
from entangle.model.overlap import run_hashes
from entangle.model.packing import load_tensors, save_tensors
from entangle.model.placing import input_device, is_offloaded
from entangle.model.progress import progress_bar
from entangle.model.ranks import Shard
from entangle.model.reloading import free_memory
from entangle.model.sampling import sample_inputs
from entangle.model.sides import Recordable, by_block
from entangle.model.text import TokenWindows, evenly_spaced
from entangle.numerics.difficulty import Difficulty, mapping_difficulty
from entangle.numerics.histograms import Histograms
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.runs import labelling, store
from entangle.runs.dataset import outputs_of, with_text
from entangle.runs.resuming import resumed_run
from entangle.runs.setup import Setup, Stopwatch

# The pairs of tokens are drawn from this many windows at most, to bound memory.
DIFFICULTY_WINDOWS = 64

SECONDS = 30.0  # least time between saved states, which take at most a twentieth of the time


@with_torch_defaults
def measure(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    layers: str | Sequence[str] = ("*",),
    input_layers: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    bins: int = 1024,
    difficulty: int = 0,
    batch_size: int = 4,
    skip_first: int = 0,
    shard: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> xr.DataTree:
    """Measure the distribution of every neuron in the matching layers over windows of a text.

    Layers that match a pattern in ``exclude`` are left out, and so are those that cannot be heard
    (see `hooks.unheard_layers`). It is an error if ``layers`` has the exact name of one of these.

    Of the layers that match ``input_layers`` the input channels are measured too, in the same pass.
    They are rows of their own, LAYER:input:INDEX, of the layer LAYER:input, which is also the name
    that ``exclude`` is compared with; their coordinate ``side`` is input.

    Return the run: its root has a row per neuron (the variables and units are in
    `runs.dataset.UNITS`), its child ``histogram`` the mergeable state. With ``out`` the run is also
    written to that folder, whole or not at all. A run that was killed is resumed when `measure` is
    called again with the same arguments.

    With ``difficulty`` above 0, also measure the mapping difficulty over that many pairs of tokens.
    They are drawn from at most 64 of the windows, which run through the model a second time, block
    by block. With ``out``, tables/difficulty.csv has its rank correlation with the distance in each
    layer (the columns are those of `rank_correlations`).

    A ``shard`` such as ``3/8`` counts every eighth batch from the third on; `merge` turns all eight
    shards into the run that one process would have measured. Under torchrun each process counts its
    own batches and returns the whole run. The exception is a model that is run block by block with
    ``out``: there only rank 0 returns the run, and the other ranks return an empty tree.

    A model whose blocks are in files (``load_model(..., offload=...)``) is run block by block.

    Raises:
        FileExistsError: ``out`` exists, or holds an unfinished run of other arguments, and
            ``overwrite`` is false.
        LookupError: a pattern matches no layer, or all layers are excluded.
        RuntimeError: ``difficulty`` is above 0 and the model cannot be run block by block.
        ValueError: the windows are longer than the model's context, the model is in training mode
            or compiled, a number is out of range, the histograms do not fit into memory, ``shard``
            has no batch, or it is given under torchrun or with ``difficulty``.
    """
    if difficulty < 0:
        raise ValueError(
            f"difficulty must be a number of pairs of tokens, 0 or more, got {difficulty}"
        )
    setup = Setup.of(
        model,
        windows,
        layers=layers,
        input_layers=input_layers,
        exclude=exclude,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
    )
    if difficulty and not setup.layers:
        raise ValueError(
            f"difficulty {difficulty} is of the neurons of layers, but only inputs are recorded: give "
            "layers, or leave difficulty out"
        )
    if not is_offloaded(model):  # else memory has one block's histograms
        _check_memory(setup.recorded, bins)
    recording = _Recording(setup, bins, _shard(shard, difficulty))
    if shard is not None and not recording.own:
        raise ValueError(
            f"shard {shard} has no batch: the text has {recording.count} batches of {batch_size} "
            "windows. Use fewer shards, or smaller batches"
        )
    hashes = run_hashes(windows)
    attributes = setup.provenance() | {"bins": bins, "window_hashes": windows.hashes}
    attributes |= {"text_hashes": hashlib.sha256(hashes.tobytes()).hexdigest()}
    attributes |= {"difficulty": difficulty} if difficulty else {}
    if shard is not None:
        attributes |= {"shard": shard, "tokens": recording.tokens}
    streamed = out is not None and is_offloaded(model)  # never all in memory
    stopwatch = Stopwatch(windows)
    kept = (
        nullcontext() if out is None else resumed_run(out, attributes, windows, overwrite=overwrite)
    )
    with kept as folder:
        # First: a model that cannot be run block by block fails before the long pass.
        difficulties = _difficulties(setup, difficulty) if difficulty else {}
        state = None if folder is None else folder / "state"
        parts = recording.blocks(state) if is_offloaded(model) else recording.whole(state)
        trees = (_tree(setup.recorded, *one, attributes, difficulties) for one in parts)
        if not streamed:
            tree = with_text(_joined(list(trees)), hashes)
            trees = (one for one in [tree])
        if folder is not None and ranks.rank() == 0:
            store.write_run(folder, trees, attributes, stopwatch.log, hashes)
            folders.remove_folder(folder / "state")
            if difficulty:
                measured = outputs_of(store.open_run(folder))
                table = rank_correlations(measured, "wasserstein", ["difficulty"])
                store.save_table(table, folder / "tables" / "difficulty.csv")
        else:
            for _ in trees:  # reading them makes this rank record its batches
                pass
    if out is None or not streamed:
        return tree
    return store.open_run(out) if ranks.rank() == 0 else xr.DataTree()


def _check_memory(recorded: Sequence[Recordable], bins: int) -> None:
    """Check that the histograms of all neurons fit into the memory that is free.

    Raises:
        ValueError: they do not, as with the experts of a large mixture.
    """
    neurons = sum(one.neurons for one in recorded)
    needed, free = 4 * bins * neurons, free_memory()
    if needed > free:
        raise ValueError(
            f"the histograms of {neurons:,} neurons with {bins} bins need {needed / 1e9:.1f} GB, but "
            f"{free / 1e9:.1f} GB of memory are free: choose fewer layers (--exclude '*.experts.*' "
            "leaves out trained experts), take fewer bins, or run block by block (--offload)"
        )


def _tree(
    all_layers: Sequence[Recordable],
    layers: Sequence[Recordable],
    state: Histograms,
    norms: npt.NDArray[np.float64],
    attributes: Mapping[str, Any],
    difficulties: Mapping[str, Difficulty],
) -> xr.DataTree:
    """Return the part of the run that holds ``layers``, which are some of ``all_layers``."""
    labels = labelling.labels_of(layers, all_layers).assign(weight_norm=("neuron", norms))
    tree = labelling.tree_of(state, labels, attributes)
    return labelling.with_difficulty(tree, difficulties) if difficulties else tree


def _joined(trees: Sequence[xr.DataTree]) -> xr.DataTree:
    """Join parts of a run, each of different layers, into one run."""
    if len(trees) == 1:
        return trees[0]
    whole = {}
    for nodes in zip(*(tree.subtree for tree in trees), strict=True):
        datasets = [node.to_dataset(inherit=False) for node in nodes]
        whole[nodes[0].path] = xr.concat(datasets, "neuron", combine_attrs="override")
    return xr.DataTree.from_dict(whole)


def _shard(text: str | None, difficulty: int) -> Shard:
    """Return the share of the batches that this process counts.

    Raises:
        ValueError: a shard is given under torchrun or together with a difficulty.
    """
    if text is None:
        return ranks.shard()
    if ranks.count() > 1:
        raise ValueError(
            f"torchrun already divides the batches among its processes, got shard {text} too: leave "
            "the shard out"
        )
    if difficulty:
        raise ValueError(
            f"the difficulty of a shard cannot be merged, got shard {text} and {difficulty} pairs "
            "of tokens: measure the difficulty without shards"
        )
    return Shard.parse(text)


# Layers, their histograms, and the norms of their neurons' weights (neurons,).
Part = tuple[Sequence[Recordable], Histograms, npt.NDArray[np.float64]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Recording:
    """The recording of this process's share of the batches, as histograms of ``bins`` bins."""

    setup: Setup
    bins: int
    shard: Shard

    @property
    def count(self) -> int:
        """Return the number of batches of all processes."""
        return len(self._all)

    @property
    def own(self) -> range:
        """Return the indices of the batches that this process counts."""
        return self.shard.batches(self.count)

    @property
    def tokens(self) -> int:
        """Return how many tokens this process counts."""
        counted = self._all[0].shape[1] - self.setup.skip_first
        return sum(len(self._all[number]) for number in self.own) * counted

    @property
    def first_counts(self) -> bool:
        """Return whether this process counts the first batch, which always places the bins."""
        return 0 in self.own

    @property
    def batches(self) -> list[torch.Tensor]:
        """Return the batches to run: the first, which places the bins, and the counted ones."""
        numbers = [*self.own] if self.first_counts else [0, *self.own]
        return [self._all[number] for number in numbers]

    @functools.cached_property
    def _all(self) -> Sequence[torch.Tensor]:
        return self.setup.batches

    def whole(self, folder: Path | None) -> Iterator[Part]:
        """Record all layers, batch by batch; with ``folder``, save states and resume from them."""
        model, layers, batches = self.setup.model, self.setup.recorded, self.batches
        name = f"{self.shard.number}-of-{self.shard.of}.safetensors"
        file = None if folder is None else folder / name
        recorder = Recorder(layers, self.bins, first_counts=self.first_counts)
        done = 0
        if file is not None and file.is_file():
            tensors = load_tensors(file)
            done = int(tensors.pop("done"))
            recorder.restore(Histograms(**tensors))
            del tensors
        backbone, device = backbone_of(model), input_device(model)
        saved, cost = time.monotonic(), 0.0
        with (
            recording_rows(model, layers, recorder.add, skip_first=self.setup.skip_first),
            torch.inference_mode(),
            self._bar(sum(map(torch.numel, batches)), "token") as bar,
        ):
            bar.update(sum(map(torch.numel, batches[:done])))
            for batch in batches[done:]:
                begin = time.monotonic()
                if file is not None and done and begin - saved > max(SECONDS, 20 * cost):
                    save_tensors(file, recorder.state().tensors() | {"done": torch.tensor(done)})
                    saved = time.monotonic()
                    cost = saved - begin
                backbone(input_ids=batch.to(device), use_cache=False)
                done += 1
                bar.update(batch.numel())
        state = _over_ranks(recorder.state())
        yield layers, state, labelling.weight_norms(layers)

    def blocks(self, folder: Path | None) -> Iterator[Part]:
        """Record block by block; with ``folder``, save each block's state and resume from them."""
        layers = by_block(self.setup.recorded)
        files = {} if folder is None else {b: folder / f"block-{b}.safetensors" for b in layers}
        done = ranks.all_gather([block for block, file in files.items() if file.is_file()])[0]
        for block, part in self._recorded(layers, {*layers} - {*done}):
            if folder is None:
                yield layers[block], *part
            elif ranks.rank() == 0:
                norms = {"weight_norm": torch.from_numpy(part[1])}
                save_tensors(files[block], part[0].tensors() | norms)
            del part  # free this block's histograms before the next block is recorded
        for block, file in files.items() if ranks.rank() == 0 else ():
            tensors = load_tensors(file)
            known = tensors.pop("weight_norm").numpy()
            yield layers[block], Histograms(**tensors), known

    def _recorded(
        self, layers: Mapping[int, list[Recordable]], left: set[int]
    ) -> Iterator[tuple[int, tuple[Histograms, npt.NDArray[np.float64]]]]:
        if not left:
            return
        batches = ({"input_ids": batch} for batch in self.batches)
        walk = BlockWalk(self.setup.model, batches, skip_first=self.setup.skip_first)
        with self._bar(max(left) + 1, "block") as bar:
            for block in range(max(left) + 1):
                if block in left:
                    recorder = Recorder(layers[block], self.bins, first_counts=self.first_counts)
                    walk.record_rows(layers[block], recorder.add)
                    state = _over_ranks(recorder.state())
                    yield block, (state, labelling.weight_norms(layers[block]))
                    del recorder, state
                else:
                    walk.advance()
                bar.update()

    def _bar(self, total: int, unit: str) -> Any:
        return progress_bar(total=total, unit=unit, desc="measure", shown=self.setup.progress)


def _over_ranks(state: Histograms) -> Histograms:
    """Replace a state by the merged state of all processes."""
    if ranks.count() > 1:
        state.reduce_(ranks.all_reduce_sum_, ranks.all_reduce_min_, ranks.all_reduce_max_)
    return state


def _difficulties(setup: Setup, pairs: int) -> dict[str, Difficulty]:
    """Measure the mapping difficulty of each layer's neurons; return it by the layer's name."""
    assert setup.windows is not None
    sampled = dataclasses.replace(setup, windows=evenly_spaced(setup.windows, DIFFICULTY_WINDOWS))
    walk, layers, last = sampled.walk(), setup.blocks, setup.last_block
    found = {}
    for block in progress_bar(
        range(last + 1), unit="block", desc="difficulty", shown=setup.progress
    ):
        here = layers.get(block)
        if not here:
            walk.advance()
            continue
        rows = sample_inputs(walk, here, 2 * pairs, setup.seed, advance=block < last)
        for layer in here:
            inputs = rows[layer.name]
            with torch.inference_mode():
                outputs = layer.module(inputs)
            found[layer.name] = mapping_difficulty(inputs, outputs, pairs, seed=setup.seed)
    return found
