"""Disentangling: each neuron within clusters of its layer's inputs, and with experts for them.

Everything is measured on held-out tokens, and also for random clusters of the same sizes. A cluster
has fewer tokens and so a higher noise floor: only random clusters make its numbers comparable.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.experiments.disentangle_table import layers_table, markdown, quantiles_table
from entangle.experiments.held_out import measure_layer
from entangle.measurement.ranking import top_by_layer
from entangle.model import folders
from entangle.model.layers import naming
from entangle.model.packing import load_tensors, save_tensors
from entangle.model.placing import check_in_memory
from entangle.model.progress import progress_bar
from entangle.model.sampling import sample_inputs, sampled_places
from entangle.model.text import TokenWindows, evenly_spaced
from entangle.numerics.sparsity import Solve, Sparsity
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.pruning.calibration import HELD_OUT, calibrate
from entangle.pruning.options import ONE, SOLVE, Clustering, Several, check_solve, several
from entangle.pruning.sparsifying import check_experts, check_layers
from entangle.runs import store
from entangle.runs.dataset import about, attributes_of, labelled, runs_of, with_text
from entangle.runs.resuming import resumed_run
from entangle.runs.setup import Setup, Stopwatch

Array = npt.NDArray[np.float64]
HELD_OUT_WINDOWS = 64  # at most so many, to draw the held-out tokens from

Tensors = dict[str, torch.Tensor]

ARMS = {  # variables with a value per arm; True: also per sparsity
    "wasserstein_within": False,
    "difficulty_within": False,
    "wasserstein_share": False,
    "difficulty_share": False,
    "distance_to_dense": True,
    "improvement": True,
    "improvement_halves": True,
}


@with_torch_defaults
def disentangle(
    model: PreTrainedModel,
    windows: TokenWindows,
    evaluation: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset,
    experts: Several[int] = (4, 16),
    sparsity: Several[str | float] = 0.8,
    solve: Solve = SOLVE,
    neurons: Sequence[str] = (),
    layers: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    batch_size: int = 4,
    skip_first: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> xr.DataTree:
    """Measure each neuron within clusters and with sparse experts, on up to 8,192 held-out tokens.

    ``run`` is the result of `measure` for this model. Routers and Grams are computed from
    ``windows``, the held-out tokens are drawn from at most 64 windows of ``evaluation``, both with
    the dense model. The arms are one expert, and for each number of ``experts`` k-means clusters
    and random clusters. Weights are pruned by SparseGPT; ``solve`` is ``greedy``, ``exact`` or
    ``admm`` (see `sparsify`).

    Returns the run's dataset with the variables below. Its child ``outputs`` has the outputs of
    each layer's most entangled neuron and of ``neurons``, written LAYER:INDEX.

    * ``held_out_wasserstein`` (neuron): distance of the dense outputs to a Gaussian, in std.
    * ``held_out_difficulty`` (neuron): mapping difficulty, a ratio.
    * ``wasserstein_within``, ``difficulty_within`` (neuron, arm): the same within clusters, mean
      over clusters weighted by tokens, the distance in std within the cluster. The random clusters
      are the k-means clusters with the tokens shuffled.
    * ``wasserstein_share``, ``difficulty_share`` (neuron, arm): share of the tokens in clusters
      that count; a cluster in which a neuron is constant does not.
    * ``distance_to_dense`` (neuron, sparsity, arm): 1-Wasserstein distance between sparse and dense
      outputs, in std of the dense outputs.
    * ``improvement`` (neuron, sparsity, arm): RMSE of the outputs with one expert over that with
      the experts of the arm.
    * ``improvement_halves`` (neuron, sparsity, arm, half): the same on the even and odd windows.

    The model is not changed. With ``out`` the run and its tables (see `layers_table` and
    `quantiles_table`) are written to that folder; a killed command resumes when it is called again
    with the same arguments.

    Raises:
        FileExistsError: ``out`` exists or holds an unfinished run with other settings, and
            ``overwrite`` is false.
        LookupError: a pattern matches no layer of the run, or the run lacks a neuron.
        RuntimeError: the model cannot be run block by block.
        ValueError: as `ablate`.
    """
    parsed, arms = check_settings(experts, sparsity, solve)
    setup = Setup.of(
        model,
        windows,
        evenly_spaced(evaluation, HELD_OUT_WINDOWS),
        run=run,
        layers=layers,
        exclude=exclude,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
        ranked=True,
        pruned=True,
        scored=False,
    )
    assert setup.run is not None
    assert setup.evaluation is not None
    names = [layer.name for layer in setup.layers]
    kept = _kept(setup.run, names, neurons)
    check_in_memory(model, "disentangling")
    check_layers(setup, parsed)
    check_experts(setup, [arm.experts for arm in arms])
    attributes = setup.provenance()
    attributes |= {"experts": several(experts), "sparsity": list(map(str, parsed))}
    attributes |= {"solve": solve}
    attributes |= {"neurons": list(neurons), "run": about(setup.run)}
    tokens = len(setup.evaluation) * (setup.evaluation.length - skip_first)
    attributes |= {"held_out_tokens": min(tokens, HELD_OUT)}
    stopwatch = Stopwatch(windows)
    with resumed_run(out, attributes, windows, overwrite=overwrite) as folder:
        parts = folder / "blocks"
        _measure_blocks(setup, kept, arms, parsed, parts, solve)
        found: Tensors = {}
        for block in setup.blocks:
            found |= load_tensors(_file(parts, block))
        tree = with_text(_tree(setup.run, names, kept, arms, parsed, found), runs_of(run))
        # Added to the run's own attributes, which describe the measured text.
        tree.attrs |= attributes_of({"disentangled": attributes})
        per_layer, by_quantile = layers_table(tree), quantiles_table(tree)
        store.save_table(per_layer, folder / "tables" / "layers.csv")
        store.save_table(by_quantile, folder / "tables" / "quantiles.csv")
        text = markdown(attributes, per_layer, by_quantile)
        store.save_text(text, folder / "tables" / "disentangle.md")
        store.write_run(folder, [tree], attributes, stopwatch.log, runs_of(tree))
        folders.remove_folder(parts)
    return tree


def check_settings(
    experts: Several[int], sparsity: Several[str | float], solve: Solve = SOLVE
) -> tuple[list[Sparsity], list[Clustering]]:
    """Return the parsed sparsities and the arms.

    Raises:
        ValueError: there is no sparsity or no number of experts above one, or a value is invalid.
    """
    check_solve(solve)
    counts, given = several(experts), several(sparsity)
    parsed = [Sparsity.parse(one) for one in given]
    mixtures = [count for count in dict.fromkeys(counts) if count > 1]
    if not parsed or not mixtures or min(counts) < 1:
        raise ValueError(
            "expected at least one sparsity and one number of experts above 1, and none below 1, "
            f"got sparsity {', '.join(map(str, given)) or 'none'} and experts "
            f"{', '.join(map(str, counts)) or 'none'}"
        )
    arms = [ONE]
    for count in mixtures:
        arms += [Clustering(count), Clustering(count, "random")]
    return list(dict.fromkeys(parsed)), arms


def _kept(run: xr.Dataset, layers: Sequence[str], neurons: Sequence[str]) -> dict[str, list[int]]:
    """Return the neurons of each layer whose outputs are kept: the most entangled and the named.

    Raises:
        LookupError: a named neuron does not exist.
    """
    kept = {name: top.tolist() for name, top in top_by_layer(run, count=1, layers=layers).items()}
    known = run.indexes["neuron"]
    for neuron in neurons:
        layer, _, index = neuron.rpartition(":")
        if layer not in kept or neuron not in known:
            raise LookupError(
                f"no neuron {neuron!r} in the chosen layers of the run: expected LAYER:INDEX, such as "
                f"{known[run['layer'].to_numpy() == next(iter(kept))][-1]}"
            )
        if int(index) not in kept[layer]:
            kept[layer].append(int(index))
    return kept


def _file(folder: Path, block: int) -> Path:
    return folder / f"{block}.safetensors"


def _measure_blocks(
    setup: Setup,
    kept: Mapping[str, Sequence[int]],
    arms: Sequence[Clustering],
    sparsities: Sequence[Sparsity],
    folder: Path,
    solve: Solve,
) -> None:
    """Measure the blocks that are not saved yet, and save their results."""
    layers = setup.blocks
    left = [block for block in layers if not _file(folder, block).exists()]
    if not left:
        return
    assert setup.evaluation is not None
    walk, held_out, seed = setup.walk(), setup.evaluation_walk(), setup.seed
    places = sampled_places(held_out, HELD_OUT, seed)
    halves = places // setup.evaluation.length % 2  # even and odd windows
    blocks = range(left[-1] + 1)
    for block in progress_bar(blocks, unit="block", desc="disentangle", shown=setup.progress):
        if block not in left:
            walk.advance()
            held_out.advance()
            continue
        here = layers[block]
        rows = sample_inputs(held_out, here, HELD_OUT, seed, advance=True)
        found = calibrate(walk, here, arms, seed=seed, advance=True)
        tensors: Tensors = {}
        for layer in here:
            calibrations = [found[arm][layer.name] for arm in arms]
            with naming(layer), torch.inference_mode():
                inputs = rows[layer.name]
                measured = measure_layer(
                    layer,
                    calibrations,
                    sparsities,
                    inputs,
                    halves.to(inputs.device),
                    kept[layer.name],
                    seed,
                    solve,
                )
            tensors |= {f"{layer.name} {name}": value for name, value in measured.items()}
        save_tensors(_file(folder, block), tensors)


def _tree(
    run: xr.Dataset,
    layers: Sequence[str],
    kept: Mapping[str, Sequence[int]],
    arms: Sequence[Clustering],
    sparsities: Sequence[Sparsity],
    found: Mapping[str, torch.Tensor],
) -> xr.DataTree:
    """Return the run's dataset of these layers with the measured variables."""
    data = run.isel(neuron=run["layer"].isin(layers).to_numpy()).load()

    def joined(name: str) -> Array:
        return np.concatenate([found[f"{layer} {name}"].numpy() for layer in layers])

    lost = joined("lost")
    with np.errstate(divide="ignore", invalid="ignore"):  # a neuron without error
        halves = np.sqrt(lost[:, :, :1] / lost)
        whole = lost.sum(axis=-1)
        improvement = np.sqrt(whole[:, :, :1] / whole)
    values = {name: joined(name) for name, sparse in ARMS.items() if f"{layers[0]} {name}" in found}
    values |= {"improvement": improvement, "improvement_halves": halves}
    variables: dict[str, Any] = {}
    for name, value in values.items():
        dimensions = ("neuron", *(("sparsity",) if ARMS[name] else ()), "arm")
        dimensions += ("half",) if value.ndim > len(dimensions) else ()
        variables[name] = (dimensions, value, labelled(name, value)[2])
    for name in ("wasserstein", "difficulty"):
        variables[f"held_out_{name}"] = labelled(f"held_out_{name}", values[f"{name}_within"][:, 0])
    coordinates = {
        "experts": ("arm", [arm.experts for arm in arms]),
        "assign": ("arm", [arm.assign for arm in arms]),
        "sparsity": list(map(str, sparsities)),
    }
    pairs = [(layer, place, index) for layer in layers for place, index in enumerate(kept[layer])]
    outputs = xr.Dataset(
        {
            "clusters": (
                ("clustered", "arm", "token"),
                np.stack([found[f"{layer} clusters"].numpy() for layer in layers]),
            ),
            "dense": (
                ("kept", "token"),
                np.stack([found[f"{layer} outputs"][:, place] for layer, place, _ in pairs]),
            ),
            "sparse": (
                ("kept", "sparsity", "arm", "token"),
                np.stack([found[f"{layer} sparse"][..., place] for layer, place, _ in pairs]),
            ),
        },
        coords={
            "kept": [f"{layer}:{index}" for layer, _, index in pairs],
            "clustered": list(layers),
        },
    )
    whole_run = data.assign(variables).assign_coords(coordinates)
    return xr.DataTree.from_dict({"/": whole_run, "/outputs": outputs})
