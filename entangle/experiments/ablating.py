"""Ablation: treat the most entangled neurons, or as many others, and score the model."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.experiments.ablation_table import effects_of, markdown, table_of
from entangle.experiments.interventions import BOTTOM, RANDOM, SETS, Ablation, Arm
from entangle.measurement.ranking import Neurons, matched_random, top_by_layer
from entangle.model import folders, ranks
from entangle.model.hooks import check_fired, replacing_outputs
from entangle.model.kept_logits import KeptLogits
from entangle.model.layers import LinearLayer, device_of, weight_of
from entangle.model.placing import check_in_memory
from entangle.model.progress import progress_bar
from entangle.model.scoring import NotFiniteError
from entangle.model.text import TokenWindows, check_one_text
from entangle.numerics.sparsity import Solve
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.pruning.neurons import Kind, Outputs, SparseNeurons, load_neurons, prune_neurons
from entangle.pruning.options import SOLVE, Several
from entangle.pruning.sparsifying import check_experts, check_layers
from entangle.runs import store
from entangle.runs.dataset import about, dataset_of, values_of
from entangle.runs.resuming import resumed_run, unwritten
from entangle.runs.setup import Setup, Stopwatch

Row = dict[str, Any]


@with_torch_defaults
def ablate(
    model: PreTrainedModel,
    windows: TokenWindows | None,
    evaluation: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset,
    share: Several[float] = 0.03,
    sparsity: Several[str | float] = 0.9,
    experts: Several[int] = 1,
    intervention: Several[str] = "sparsify",
    sets: Several[str] = SETS,
    seeds: int = 5,
    solve: Solve = SOLVE,
    per_block: bool = False,
    layers: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    batch_size: int = 4,
    skip_first: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Score the model with a share of each layer's neurons treated, for several sets of neurons.

    ``run`` is the result of `measure` for this model. ``sets`` are any of:

    * ``wasserstein``: the neurons with the largest distance to a Gaussian.
    * ``bottom``: those with the smallest distance.
    * ``random``: random neurons, drawn once for each of ``seeds`` seeds.
    * ``kurtosis``, ``weight_norm``, ``std``, ``difficulty``, ``wasserstein_bulk``: those with the
      largest value; a set is left out if the run lacks its variable.

    ``intervention`` is one or several of:

    * ``sparsify``: prune the neurons' weights by SparseGPT to exactly ``sparsity``, calibrated on
      the dense model's inputs over ``windows``; with several ``experts`` once per cluster of these
      inputs. ``solve`` is ``greedy``, ``exact`` or ``admm`` (see `sparsify`). Each layer is pruned once for all arms.
    * ``zero``: set the outputs to zero.
    * ``mean``: set the outputs to their mean over the tokens of the run.
    * ``negative``: set the negative outputs to zero.

    All but ``sparsify`` need no ``windows``. All blocks are treated together, or with
    ``per_block`` one block at a time. The model is not changed. With ``out`` the tables are
    written to that folder; a killed ablation resumes when it is called again with the same
    arguments.

    Returns a table with a row per set, the dense model first; ``attrs`` holds run.json. Random
    sets of all seeds share a row, which has means over the seeds. Errors are standard errors over
    the evaluation windows; those of ratios and differences are paired by window. A number that a
    row does not have is NaN. Columns:

    * ``intervention``: the intervention; ``dense`` is the untreated model.
    * ``sparsity``, ``experts``: options of ``sparsify``; else empty and 1.
    * ``block``: the treated block; empty if all blocks are treated.
    * ``set``: the set of neurons.
    * ``share``: the treated share of each layer's neurons.
    * ``neurons``: number of treated neurons.
    * ``realised``: share of zeros in the treated rows, mean over experts.
    * ``model_sparsity``: share of zeros in all weights of the model.
    * ``seeds``: number of random sets; 0 for other sets.
    * ``perplexity``, ``perplexity_error``: perplexity on the evaluation windows.
    * ``perplexity_low``, ``perplexity_high``: its 95% t-interval over seeds.
    * ``ratio``, ``ratio_error``: perplexity over that of the dense model.
    * ``difference``, ``difference_error``: difference to the dense model, nats per token.
    * ``difference_low``, ``difference_high``: its 95% t-interval over seeds, nats per token.
    * ``kl``, ``kl_tail``, ``agreement``, ``lost``, ``gained``, each with its ``_error``: as the
      columns of `sweep`.
    * ``windows``: evaluation windows.
    * ``tokens``: scored tokens.
    * ``problem``: why the row has no score; empty if it has one.
    * ``over_random``, ``over_random_error``: difference to random neurons of the same share, nats
      per token; the error combines windows and seeds.
    * ``times_random``: increase of perplexity over that with random neurons of the same share.
    * ``times_low``, ``times_high``: its 95% bootstrap interval over windows and seeds.
    * ``equivalent_share``: share of random neurons that causes the same difference (see
      `equivalent_share`); infinite if no share that was run does.
    * ``equivalent_low``, ``equivalent_high``: its 95% bootstrap interval over windows and seeds.

    Raises:
        FileExistsError: ``out`` exists or holds an unfinished run with other settings, and
            ``overwrite`` is false.
        LookupError: a pattern matches no layer of the run.
        RuntimeError: a layer did not run once in each batch, the model cannot be run block by
            block.
        ValueError: the run was measured on other weights; the calibration windows or the run's text
            have 4% or more of the evaluation's tokens; or a number or word is out of range.
    """
    ablation = Ablation.of(
        intervention=intervention,
        sparsity=sparsity,
        experts=experts,
        sets=sets,
        share=share,
        seeds=seeds,
        solve=solve,
    )
    pruned = "sparsify" in ablation.intervention
    if pruned and windows is None:
        raise ValueError("intervention sparsify needs calibration windows: pass them as windows")
    check_one_text(evaluation)
    setup = Setup.of(
        model,
        windows if pruned else None,
        evaluation,
        run=run,
        layers=layers,
        exclude=exclude,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
        ranked=True,
        pruned=pruned,
    )
    check_in_memory(model, "an ablation")
    missing = missing_sets(run, ablation.sets)
    known = [name for name in ablation.sets if name not in missing]
    arms = ablation.arms(known, [*setup.blocks] if per_block else [None])
    if pruned:
        check_layers(setup, [arm.sparsity for arm in arms if arm.sparsity])
        check_experts(setup, [arm.experts for arm in arms])
    attributes = setup.provenance() | {"pruned": pruned, "run": about(run)}
    attributes |= {"solve": solve} if pruned else {}
    attributes |= {"missing_sets": missing, "arms": [arm.settings() for arm in arms]}
    treated = _treated(setup, arms)
    weights = list(model.parameters())
    zeros = sum(int((one == 0).sum()) for one in weights), sum(one.numel() for one in weights)
    stopwatch = Stopwatch(setup.windows)
    with resumed_run(out, attributes, setup.windows, overwrite=overwrite) as folder:
        files = {folder / "arms" / f"{_name(arm)}.json": arm for arm in (None, *arms)}
        left = unwritten(files)
        rows = folder / "rows"
        wanted = _wanted([arm for arm in left.values() if arm], treated)
        prune = functools.cache(lambda: _prune(setup, wanted, rows, solve))
        dense = setup.keep_logits() if left else None
        for file, arm in progress_bar(left.items(), unit="arm", shown=progress):
            if arm is None:
                found = {"intervention": "dense", "model_sparsity": zeros[0] / zeros[1]}
                found |= _score(setup, [], None, dense)
            else:
                problem = prune() if arm.sparsity else ""
                found = _run_arm(setup, arm, treated[arm], rows, problem, zeros, dense)
            ranks.on_rank_zero(store.write_json, file, found)
        results = [store.read_json(file) for file in files]
        table = effects_of(results)
        table.attrs.update(attributes)
        if ranks.rank() == 0:
            store.save_table(table_of(results), folder / "tables" / "arms.csv")
            store.save_table(table, folder / "tables" / "ablation.csv")
            store.save_text(markdown(table), folder / "tables" / "ablation.md")
            store.write_log(folder, stopwatch.log() | {"arms_run": len(left)}, "ablation")
            folders.remove_folder(rows)
    return table


def missing_sets(run: xr.DataTree | xr.Dataset, sets: Sequence[str]) -> list[str]:
    """Return the sets whose variable the run lacks."""
    data = dataset_of(run)
    return [n for n in dict.fromkeys(sets) if n not in {RANDOM, BOTTOM} and n not in data]


def neurons_of(run: xr.DataTree | xr.Dataset, arm: Arm, layers: Sequence[LinearLayer]) -> Neurons:
    """Return the neurons of each layer that an arm treats; of its block only, if it has one.

    Layers without any, whose neurons are all dead, are left out.
    """
    names = [layer.name for layer in layers if arm.block in {None, layer.block}]
    by = "wasserstein" if arm.neurons in {RANDOM, BOTTOM} else arm.neurons
    chosen = top_by_layer(run, arm.share, by=by, lowest=arm.neurons == BOTTOM, layers=names)
    if arm.neurons == RANDOM:
        chosen = matched_random(run, chosen, seed=arm.seed or 0)
    return {name: neurons for name, neurons in chosen.items() if len(neurons)}


def _treated(setup: Setup, arms: Sequence[Arm]) -> dict[Arm, Neurons]:
    """Return the neurons that each arm treats, chosen once for all interventions."""
    assert setup.run is not None
    chosen: dict[Arm, Neurons] = {}
    treated: dict[Arm, Neurons] = {}
    for arm in arms:
        key = dataclasses.replace(arm, intervention="", sparsity=None, experts=1)
        if key not in chosen:
            chosen[key] = neurons_of(setup.run, arm, setup.layers)
        treated[arm] = chosen[key]
    return treated


def _wanted(arms: Sequence[Arm], treated: Mapping[Arm, Neurons]) -> dict[Kind, dict[str, set[int]]]:
    """Return the neurons of each layer to sparsify, for each clustering and sparsity."""
    wanted: dict[Kind, dict[str, set[int]]] = {}
    for arm in arms:
        if arm.sparsity is not None:
            rows = wanted.setdefault((arm.clustering, arm.sparsity), {})
            for name, neurons in treated[arm].items():
                rows.setdefault(name, set()).update(neurons.tolist())
    return wanted


def _prune(
    setup: Setup, wanted: Mapping[Kind, Mapping[str, set[int]]], folder: Path, solve: Solve
) -> str:
    """Prune the rows of all arms; return the error message, empty if there is none."""
    try:
        prune_neurons(setup, wanted, folder, solve=solve)
    except ValueError as error:
        return str(error)
    return ""


def _name(arm: Arm | None) -> str:
    if arm is None:
        return "dense"
    return "-".join(
        str(v).replace(":", "of") for v in arm.settings().values() if v not in {None, ""}
    )


def _run_arm(
    setup: Setup,
    arm: Arm,
    chosen: Neurons,
    folder: Path,
    problem: str,
    zeros: tuple[int, int],
    logits: KeptLogits | None,
) -> Row:
    """Score the model with an arm's neurons treated.

    If there are no neurons to treat, pruning failed (``problem``) or the score is not finite, the
    result holds the reason. ``zeros`` are the dense model's number of zeros and of weights, and
    ``logits`` its logits.
    """
    layers = [layer for layer in setup.layers if layer.name in chosen]
    neurons = {x.name: torch.from_numpy(chosen[x.name]).to(device_of(x)) for x in layers}
    result = arm.settings() | {"neurons_treated": sum(map(len, neurons.values()))}
    nothing = {"window_nats": [None] * len(setup.evaluation or ()), "tokens": 0}
    if not layers:
        by = "wasserstein" if arm.neurons in {RANDOM, BOTTOM} else arm.neurons
        problem = f"no neuron has a value of {by}"
    if problem:
        return result | nothing | {"problem": problem}
    sparse: dict[str, Outputs] = {}
    if arm.sparsity is not None:
        rows = load_neurons(folder, layers, (arm.clustering, arm.sparsity), neurons)
        sparse = {layer.name: rows[layer.name].outputs(layer) for layer in layers}
        result |= _sparsities(layers, rows, zeros)
    means = _means(setup, chosen) if arm.intervention == "mean" else {}
    change = changed_outputs(arm.intervention, neurons, means=means, sparse=sparse)
    try:
        return result | _score(setup, layers, change, logits)
    except NotFiniteError as error:
        return result | nothing | {"problem": str(error)}


def _score(
    setup: Setup, layers: Sequence[LinearLayer], change: Any, logits: KeptLogits | None
) -> Row:
    """Score the model with the outputs of these layers changed.

    Raises:
        NotFiniteError: the model's outputs are not finite.
    """
    assert setup.evaluation is not None
    with replacing_outputs(layers, change) as fired:
        scored = setup.score(logits)
    batches = len(setup.evaluation.batches(setup.batch_size))
    check_fired(fired, len(ranks.shard().batches(batches)))
    return scored.stored(setup.texts.values())


def _means(setup: Setup, chosen: Neurons) -> dict[str, torch.Tensor]:
    assert setup.run is not None
    return {
        name: torch.from_numpy(values_of(setup.run, "mean", name, neurons))
        for name, neurons in chosen.items()
    }


def _sparsities(
    layers: Sequence[LinearLayer], rows: Mapping[str, SparseNeurons], zeros: tuple[int, int]
) -> Row:
    """Return the share of zeros in the treated rows, and in the model with these rows.

    With several experts it is their mean; all experts have the same number of weights.
    """
    treated = sparse = dense = 0.0
    for layer in layers:
        found = rows[layer.name]
        before = weight_of(layer)[found.neurons]
        treated += before.numel()
        dense += int((before == 0).sum())
        sparse += int((found.weight == 0).sum()) / len(found.counts)
    total = zeros[0] - dense + sparse
    return {"realised": sparse / treated, "model_sparsity": total / zeros[1]}


def changed_outputs(
    intervention: str,
    neurons: Mapping[str, torch.Tensor],
    *,
    means: Mapping[str, torch.Tensor],
    sparse: Mapping[str, Outputs],
) -> Callable[[LinearLayer, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a function that changes the outputs of the neurons (see `hooks.replacing_outputs`).

    ``zero`` sets them to zero, ``mean`` to their ``means``, ``negative`` sets the negative ones to
    zero (arXiv 2509.24198), and ``sparsify`` computes them with the ``sparse`` weights.
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
