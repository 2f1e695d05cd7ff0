"""Merging of shards into the run that one process would have measured."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from entangle.model import folders
from entangle.model.ranks import Shard
from entangle.runs import labelling, own_text, store
from entangle.runs.dataset import runs_of
from entangle.runs.setup import Stopwatch

NEURONS = 2**16  # merged at a time, to bound memory


def merge(
    shards: Sequence[str | Path],
    *,
    out: str | Path,
    overwrite: bool = False,
) -> xr.DataTree:
    """Merge the shards of a run that ``measure(..., shard="3/8")`` wrote, in any order.

    Write the run to ``out`` and return it. It has the same bits as the run that one process would
    have measured, except for skewness and kurtosis, which agree to 1e-9.

    Raises:
        FileExistsError: ``out`` exists, and ``overwrite`` is false.
        FileNotFoundError: a folder holds no run.
        ValueError: there are no shards, a run is not a shard, the shards are of different runs, one
            is missing or given twice, or ``out`` is one of them.
    """
    if not shards:
        raise ValueError("expected the folders of all shards of a run, got none")
    resolved = [os.path.realpath(shard) for shard in shards]
    if os.path.realpath(out) in resolved:
        raise ValueError(f"{out} is one of the shards: choose another folder for the merged run")
    twice = [
        shard for shard, path in zip(shards, resolved, strict=True) if resolved.count(path) > 1
    ]
    if twice:
        raise ValueError(f"{twice[0]} is given twice: give each shard once")
    found: dict[Path, xr.DataTree] = {}
    for shard in shards:
        tree = store.open_run(shard)
        if found:  # names take memory, and those of the first shard suffice
            tree.dataset = tree.to_dataset().drop_vars("neuron")
        found[Path(shard)] = tree
    attributes = _attributes({folder: store.read_json(folder / "run.json") for folder in found})
    trees = list(found.values())
    stopwatch = Stopwatch()
    with folders.new_folder(out, overwrite=overwrite) as folder:
        size = trees[0].sizes["neuron"]
        spans = [slice(start, start + NEURONS) for start in range(0, size, NEURONS)]
        merged = (_merged(trees, span, attributes) for span in spans)
        own_text.copy(found, folder)
        store.write_run(folder, merged, attributes, stopwatch.log, runs_of(trees[0]))
    return store.open_run(out)


def _attributes(shards: Mapping[Path, Mapping[Any, Any]]) -> dict[str, Any]:
    """Check that the shards are complete and of one run; return the run.json of the whole run.

    Raises:
        ValueError: a run is not a shard, or the shards are not exactly all those of one run.
    """
    first, about = next(iter(shards.items()))
    parts: dict[Shard, Path] = {}
    for folder, attributes in shards.items():
        if "shard" not in attributes:
            raise ValueError(f"{folder} is a whole run, not a shard: leave it out")
        names = {*about, *attributes} - {"shard", "tokens"}
        other = [n for n in sorted(names) if about.get(n) != attributes.get(n)]
        other.sort(key=lambda n: n == "command")  # name it last: it repeats the other settings
        if other:
            raise ValueError(
                f"{folder} and {first} are shards of different runs: {other[0]} is "
                f"{attributes.get(other[0])!r} in the first folder and {about.get(other[0])!r} in "
                "the second"
            )
        shard = Shard.parse(attributes["shard"])
        if shard in parts:
            raise ValueError(
                f"{parts[shard]} and {folder} are the same shard {shard}: give it once"
            )
        parts[shard] = folder
    of = {shard.of for shard in parts}
    if len(of) > 1:
        raise ValueError(
            "the shards are of runs with different numbers of shards: "
            f"{' and '.join(map(str, parts))}"
        )
    missing = [str(s) for s in (Shard(n, *of) for n in range(*of)) if s not in parts]
    if missing:
        raise ValueError(
            f"the run has {len(parts) + len(missing)} shards, of which {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: give all of them"
        )
    tokens = sum(attributes["tokens"] for attributes in shards.values())
    whole = {name: value for name, value in about.items() if name != "shard"}
    return whole | {"tokens": tokens}


def _merged(trees: Sequence[xr.DataTree], span: slice, attributes: dict[str, Any]) -> xr.DataTree:
    """Return the merged run of a span of the neurons."""
    states = (labelling.from_tree(tree, span) for tree in trees)
    state = functools.reduce(lambda one, other: one.merged(other), states)
    labels = trees[0].to_dataset()[["weight_norm"]].isel(neuron=span)
    return labelling.tree_of(state, labels.load(), attributes)
