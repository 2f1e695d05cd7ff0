"""Ablate: treat the most entangled neurons, and others of the same number, and score each."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xarray as xr
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from entangle.experiments.ablation_table import effects_of, markdown, table_of
from entangle.experiments.interventions import SETS, Arm, arms_of, missing_sets, neurons_of
from entangle.measurement.ranking import Neurons
from entangle.model import folders, ranks
from entangle.model.blocks import BlockWalk
from entangle.model.hooks import check_fired, check_hooks, intervening
from entangle.model.layers import LinearLayer, weight_of
from entangle.model.placing import check_in_memory
from entangle.model.sampling import walk_blocks
from entangle.model.scoring import NotFiniteError, perplexity
from entangle.model.text import TokenWindows, check_disjoint, check_windows
from entangle.pruning.rows import Kind, Outputs, SparseRows, load_rows, prune_rows
from entangle.pruning.sparsifying import check_layers
from entangle.runs import resuming, setup, store
from entangle.runs.dataset import dataset_of
from entangle.runs.setup import check_run, layers_of, provenance

Row = dict[str, Any]


def ablate(
    model: PreTrainedModel,
    run: xr.DataTree | xr.Dataset,
    windows: TokenWindows | None,
    evaluation: TokenWindows,
    *,
    shares: Sequence[float] = (0.03,),
    sparsities: Sequence[str | float] = (0.9,),
    experts: Sequence[int] = (1,),
    interventions: Sequence[str] = ("sparsify",),
    sets: Sequence[str] = SETS,
    seeds: int = 5,
    per_block: bool = False,
    layers: str | Sequence[str] = ("*",),
    batch_size: int = 4,
    skip_first: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    command: str | None = None,
) -> pd.DataFrame:
    """Treat a share of each layer's neurons, keep the rest dense, and score; for several sets.

    ``run`` is what `measure` returned for this model. The sets are the neurons with the largest
    ``wasserstein``, the ``bottom`` ones, ``random`` ones with so many ``seeds``, and those with the
    largest ``kurtosis``, ``weight_norm``, ``std`` and ``difficulty`` (if the run has it). All
    together, or with ``per_block`` one block at a time.

    ``sparsify`` prunes a neuron's weights by SparseGPT to exactly the sparsity, by what the dense
    model's inputs over ``windows`` are, and with several ``experts`` once for each cluster of them;
    each layer is pruned once for all arms. The other interventions act on outputs, and need no
    windows: ``zero``, ``mean`` (over the tokens of the run) and ``negative``, which makes those
    below zero zero.

    Returns a row per set, random ones merged, the dense model first: see `effects.effects_of`; what
    it was made of is in ``attrs``. The model is not changed. With ``out`` tables are written to that
    folder; an ablation that was killed goes on where it was.

    Raises:
        FileExistsError: ``out`` exists, or an unfinished run of other settings is there, and
            ``overwrite`` is false.
        LookupError: a pattern matches no layer of the run.
        RuntimeError: a layer did not run once in each batch, a model that cannot be run block by
            block, or whose dense score is not finite.
        ValueError: the run is of other weights, or measured on windows of the evaluation; some of
            these are among ``windows``; or a number or word out of range.
    """
    chosen = layers_of(model, run, layers)
    blocks = sorted({layer.block for layer in chosen}) if per_block else [None]
    arms = arms_of(
        run,
        interventions=interventions,
        sparsities=sparsities,
        experts=experts,
        sets=sets,
        shares=shares,
        seeds=seeds,
        blocks=blocks,
    )
    sparsified = any(arm.intervention == "sparsify" for arm in arms)
    check_run(model, run, evaluation)
    check_windows(model, evaluation, skip_first)
    check_hooks(model, skip_first)
    check_in_memory(model, "an ablation")
    if sparsified:
        if windows is None:
            raise ValueError("sparsifying neurons needs windows of a text to prune by")
        check_windows(model, windows, skip_first)
        check_disjoint(windows, evaluation)
        check_layers(model, chosen, [arm.sparsity for arm in arms if arm.sparsity])
    attributes = provenance(
        model,
        evaluation if windows is None else windows,
        layers=layers,
        batch_size=batch_size,
        skip_first=skip_first,
        command=command,
        evaluation=evaluation,
    )
    if windows is None:
        attributes |= {"text": None, "fingerprint": None, "windows": 0, "tokens": 0}
    attributes |= {"pruned": sparsified, "run": dict(dataset_of(run).attrs)}
    attributes |= {"missing_sets": missing_sets(run, sets), "arms": [arm.words() for arm in arms]}
    bench = _Bench(model, run, windows, evaluation, chosen, batch_size, skip_first, progress)
    stopwatch = setup.Stopwatch()
    with resuming.resumed_run(out, attributes, overwrite=overwrite) as folder:
        files = {folder / "arms" / f"{_name(arm)}.json": arm for arm in (None, *arms)}
        left = resuming.unwritten(files)
        rows = folder / "rows"
        prune = _pruner(bench, [arm for arm in left.values() if arm], rows)
        for file, arm in tqdm(left.items(), unit="arm", disable=not progress):
            problem = prune() if arm and arm.sparsity else ""
            ranks.once(store.write_json, file, _run_arm(bench, arm, rows, problem))
        results = [store.read_json(file) for file in files]
        table = effects_of(results)
        table.attrs.update(attributes)
        if ranks.rank() == 0:
            store.save_table(table_of(results), folder / "tables" / "arms.csv")
            store.save_table(table, folder / "tables" / "ablation.csv")
            store.save_text(markdown(table), folder / "tables" / "ablation.md")
            store.write_json(folder / "log.json", stopwatch.log() | {"arms_run": len(left)})
            folders.remove_folder(rows)
    return table


@dataclasses.dataclass(frozen=True, eq=False)
class _Bench:
    """What every arm is run on."""

    model: PreTrainedModel
    run: xr.DataTree | xr.Dataset
    windows: TokenWindows | None
    evaluation: TokenWindows
    layers: Sequence[LinearLayer]
    batch_size: int
    skip_first: int
    progress: bool

    @functools.cached_property
    def zeros(self) -> tuple[int, int]:
        """How many of the dense model's weights are zero, and how many there are."""
        weights = list(self.model.parameters())
        return sum(int((one == 0).sum()) for one in weights), sum(one.numel() for one in weights)

    @functools.cached_property
    def _chosen(self) -> dict[Arm, Neurons]:
        return {}

    def neurons(self, arm: Arm) -> Neurons:
        """Return which neurons an arm treats, chosen once for all that is done to them."""
        key = dataclasses.replace(arm, intervention="", sparsity=None, experts=1)
        if key not in self._chosen:
            self._chosen[key] = neurons_of(self.run, arm, self.layers)
        return self._chosen[key]

    def walk(self) -> BlockWalk:
        """Return the calibration's windows before the first block."""
        assert self.windows is not None
        return walk_blocks(self.model, self.windows, self.batch_size, self.skip_first)


def _pruner(bench: _Bench, arms: Sequence[Arm], folder: Path) -> Callable[[], str]:
    """Return what prunes the rows of all arms once it is needed, and says why if it cannot."""

    @functools.cache
    def prune() -> str:
        try:
            prune_rows(
                bench.layers,
                _wanted(bench, arms),
                folder,
                walk=bench.walk,
                seed=0 if bench.windows is None else bench.windows.seed,
                progress=bench.progress,
            )
        except ValueError as error:
            return str(error)
        return ""

    return prune


def _wanted(bench: _Bench, arms: Sequence[Arm]) -> dict[Kind, dict[str, set[int]]]:
    """Return the neurons of each layer that any arm sparsifies, for each kind of pruning."""
    wanted: dict[Kind, dict[str, set[int]]] = {}
    for arm in arms:
        if arm.sparsity is not None:
            rows = wanted.setdefault((arm.clustering, arm.sparsity), {})
            for name, neurons in bench.neurons(arm).items():
                rows.setdefault(name, set()).update(neurons.tolist())
    return wanted


def _name(arm: Arm | None) -> str:
    if arm is None:
        return "dense"
    return "-".join(str(v).replace(":", "of") for v in arm.words().values() if v not in {None, ""})


def _run_arm(bench: _Bench, arm: Arm | None, folder: Path, problem: str) -> Row:
    """Score the model with an arm's neurons treated.

    No neurons to treat, a problem with pruning them, or a score that is not finite, is the arm's
    result; the dense model's is an error.

    Raises:
        NotFiniteError: the dense model's score is not finite.
    """
    if arm is None:
        zeros, size = bench.zeros
        dense = {"intervention": "dense", "model_sparsity": zeros / size}
        return dense | _score(bench, [], None)
    chosen = bench.neurons(arm)
    layers = [layer for layer in bench.layers if layer.name in chosen]
    neurons = {x.name: torch.from_numpy(chosen[x.name]).to(weight_of(x).device) for x in layers}
    result = arm.words() | {"neurons_treated": sum(map(len, neurons.values()))}
    nothing = {"window_nats": [None] * len(bench.evaluation), "tokens": 0}
    if not layers:
        problem = f"no neuron has a {arm.neurons} to be chosen by"
    if problem:
        return result | nothing | {"problem": problem}
    sparse: dict[str, Outputs] = {}
    if arm.sparsity is not None:
        rows = load_rows(folder, layers, (arm.clustering, arm.sparsity), neurons)
        sparse = {layer.name: rows[layer.name].outputs(layer) for layer in layers}
        result |= _sparsities(bench, layers, rows)
    means = _means(bench.run, chosen) if arm.intervention == "mean" else {}
    change = changed_outputs(arm.intervention, neurons, means=means, sparse=sparse)
    try:
        return result | _score(bench, layers, change)
    except NotFiniteError as error:
        return result | nothing | {"problem": str(error)}


def _score(bench: _Bench, layers: Sequence[LinearLayer], change: Any) -> Row:
    with intervening(layers, change) as fired:
        scored = perplexity(
            bench.model,
            bench.evaluation,
            batch_size=bench.batch_size,
            skip_first=bench.skip_first,
            progress=bench.progress,
        )
    batches = len(bench.evaluation.batches(bench.batch_size))
    check_fired(fired, len(ranks.shard().batches(batches)))
    return {"window_nats": scored.window_nats.tolist(), "tokens": scored.tokens}


def _means(run: xr.DataTree | xr.Dataset, chosen: Neurons) -> dict[str, torch.Tensor]:
    dataset = dataset_of(run)
    names, means = dataset["layer"].to_numpy(), dataset["mean"].to_numpy()
    return {
        name: torch.from_numpy(means[names == name][neurons]) for name, neurons in chosen.items()
    }


def _sparsities(
    bench: _Bench, layers: Sequence[LinearLayer], rows: Mapping[str, SparseRows]
) -> Row:
    """Return the share of zeros in the treated rows, and in the model with them.

    Of several experts the mean: each has as many.
    """
    zeros, size = bench.zeros
    treated = sparse = dense = 0.0
    for layer in layers:
        found = rows[layer.name]
        before = weight_of(layer)[found.neurons]
        treated += before.numel()
        dense += int((before == 0).sum())
        sparse += int((found.weight == 0).sum()) / len(found.counts)
    return {"realised": sparse / treated, "model_sparsity": (zeros - dense + sparse) / size}


def changed_outputs(
    intervention: str,
    neurons: Mapping[str, torch.Tensor],
    *,
    means: Mapping[str, torch.Tensor],
    sparse: Mapping[str, Outputs],
) -> Callable[[LinearLayer, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return what changes the outputs of the neurons of each layer (see `hooks.intervening`).

    ``zero`` makes them zero, ``mean`` their ``means``, and ``negative`` only those below zero zero
    (arXiv 2509.24198); ``sparsify`` gives those of ``sparse`` weights.
    """

    def change(layer: LinearLayer, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        chosen = neurons[layer.name]
        if intervention == "sparsify":
            new = sparse[layer.name](inputs)
        elif intervention == "negative":
            new = outputs.index_select(-1, chosen).clamp(min=0)
        else:
            new = outputs.new_zeros(*outputs.shape[:-1], len(chosen))
            if intervention == "mean":
                new = new + means[layer.name].to(new)
        return outputs.index_copy(-1, chosen, new)

    return change
