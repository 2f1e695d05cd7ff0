"""Budgets: who has the weights follows the run, and how many there are does not."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import entangle
from entangle.model.layers import LinearLayer, find_layers, weight_of
from entangle.model.sampling import walk_blocks
from entangle.pruning.budgets import Zeros, block_importance, zeros_of
from entangle.pruning.options import OPTIONS, Pruning
from entangle.runs.dataset import dataset_of
from tests.measurement.test_recording import captured
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model

MODEL = tiny_model("llama")
LAYERS = find_layers(MODEL, ["*.mlp.*"])
OUTLIERS = {0: 0.02, 1: 0.0, 2: 0.05}


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    return entangle.measure(MODEL, random_windows(20))


def values(run: xr.DataTree, layer: LinearLayer, name: str) -> Any:
    data = run.to_dataset()
    return data[name].to_numpy()[data["layer"].to_numpy() == layer.name]


def made(
    layers: Sequence[LinearLayer] = LAYERS,
    *,
    run: xr.DataTree | xr.Dataset | None = None,
    importance: dict[int, float] | None = None,
    blocks: dict[int, int] | None = None,
    seed: int = 0,
    **options: Any,
) -> Zeros:
    pruning = Pruning.of(**{"sparsity": 0.7} | options)
    data = None if run is None else dataset_of(run)
    return zeros_of(layers, pruning, run=data, importance=importance, blocks=blocks, seed=seed)


def counts(**options: Any) -> dict[str, torch.Tensor]:
    found = made(**options)
    assert all(isinstance(zeros, torch.Tensor) for zeros in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("across", OPTIONS["across"].choices)
@pytest.mark.parametrize("budget", OPTIONS["budget"].choices)
def test_all_budgets_prune_as_many_weights_as_uniform_rows(
    run: xr.DataTree, budget: str, across: str
) -> None:
    uniform = sum(layer.neurons * round(0.7 * layer.inputs) for layer in LAYERS)
    blocks = {0: uniform // 4, 1: uniform // 3, 2: uniform - uniform // 4 - uniform // 3}
    words: dict[str, Any] = {"run": run, "importance": OUTLIERS, "blocks": blocks, "seed": 1}
    found = made(budget=budget, across=across, **words)
    if across == "search":
        for block, total in blocks.items():
            here = [layer.name for layer in LAYERS if layer.block == block]
            assert sum(int(torch.as_tensor(found[name]).sum()) for name in here) == total
    if budget == across == "uniform":
        assert found == {}
    else:
        assert sum(int(torch.as_tensor(zeros).sum()) for zeros in found.values()) == uniform
        assert [*found] == [layer.name for layer in LAYERS]
    if across == "uniform" and found:
        for layer in LAYERS:
            zeros = int(torch.as_tensor(found[layer.name]).sum())
            assert zeros == layer.neurons * round(0.7 * layer.inputs)


@pytest.mark.parametrize(
    ("budget", "truth"),
    [
        ("wasserstein", lambda w, s: w),
        ("std", lambda w, s: s),
        ("wasserstein*std", lambda w, s: w * s),
        ("ranks", lambda w, s: w.argsort().argsort() + s.argsort().argsort()),
    ],
)
def test_rows_with_more_of_the_variable_keep_more(
    run: xr.DataTree, budget: str, truth: Any
) -> None:
    found = counts(budget=budget, run=run, strength=0.5)
    for layer in LAYERS:
        of = truth(values(run, layer, "wasserstein"), values(run, layer, "std"))
        zeros = found[layer.name].numpy()
        assert (np.diff(zeros[np.argsort(of, kind="stable")]) <= 1).all()  # but for remainders
        rank = np.argsort(np.argsort(of, kind="stable"), kind="stable") / (layer.neurons - 1)
        sparsity = round(0.7 * layer.inputs) / layer.inputs
        wanted = layer.inputs * (sparsity + 0.5 * (1 - 2 * rank) * (1 - sparsity))
        assert np.abs(zeros - wanted).max() <= 1
        assert np.ptp(zeros) > 3


def test_a_shuffled_budget_has_the_same_counts_for_other_rows(run: xr.DataTree) -> None:
    graded, shuffled, other = (
        counts(budget=budget, run=run, seed=seed)
        for budget, seed in (("wasserstein*std", 0), ("shuffled", 0), ("shuffled", 1))
    )
    for layer in LAYERS:
        first, second, third = (one[layer.name] for one in (graded, shuffled, other))
        spread = first.sort().values - second.sort().values
        assert spread.abs().max() <= 1
        assert (first != second).float().mean() > 0.3
        assert (second != third).float().mean() > 0.3


def test_blocks_are_denser_by_their_share_of_entangled_neurons(run: xr.DataTree) -> None:
    found = counts(across="entanglement", run=run)
    shares, densities = [], []
    for block in range(3):
        here = [layer for layer in LAYERS if layer.block == block]
        distances = np.concatenate([values(run, layer, "wasserstein") for layer in here])
        shares.append(float((distances > 0.15).mean()))
        weights = sum(layer.neurons * layer.inputs for layer in here)
        densities.append(1 - sum(int(found[layer.name].sum()) for layer in here) / weights)
    assert len({*shares}) == 3
    slope = 0.32 / (max(shares) - min(shares))
    truth = np.mean(densities) + slope * (np.array(shares) - np.mean(shares))
    np.testing.assert_allclose(densities, truth, atol=2e-3)
    for layer in LAYERS:
        assert np.ptp(found[layer.name].numpy()) <= 1  # rows stay alike


def test_depth_and_owl_are_linear_in_their_scores(run: xr.DataTree) -> None:
    def densities(across: str) -> Any:
        found = counts(across=across, importance=OUTLIERS)
        parts = [[x for x in LAYERS if x.block == block] for block in range(3)]
        return np.array(
            [
                1 - sum(int(found[x.name].sum()) for x in p) / sum(x.neurons * x.inputs for x in p)
                for p in parts
            ]
        )

    depth, owl = densities("depth"), densities("owl")
    np.testing.assert_allclose(np.diff(depth), [-0.08, -0.08], atol=2e-3)
    np.testing.assert_allclose(owl - owl[1], np.array([0.4, 0, 1]) * 0.16, atol=2e-3)


def inputs_of(windows: Any) -> dict[str, Any]:
    """Return the inputs (tokens, inputs) of each layer, caught by hooks."""
    inputs: dict[str, list[Any]] = {layer.name: [] for layer in LAYERS}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _, args, name=layer.name: inputs[name].append(args[0].flatten(0, 1))
        )
        for layer in LAYERS
    ]
    with torch.inference_mode(), captured(MODEL):
        MODEL(windows.tokens)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double().numpy() for name, rows in inputs.items()}


def test_outlier_ratios_are_those_of_the_scores_of_all_weights_of_a_block() -> None:
    windows = random_windows(12)
    found = block_importance("owl", walk_blocks(MODEL, windows, 4, 0), LAYERS)
    assert [*found] == [0, 1, 2]
    inputs = inputs_of(windows)
    for block, ratio in found.items():
        scores = []
        for layer in (layer for layer in LAYERS if layer.block == block):
            weight = weight_of(layer).double().numpy()
            scores.append((np.abs(weight) * np.linalg.norm(inputs[layer.name], axis=0)).ravel())
        joined = np.concatenate(scores)
        assert ratio == pytest.approx((joined > 5 * joined.mean()).mean(), abs=1e-9)


def test_lsa_scores_blocks_by_their_least_errors_at_a_half() -> None:
    windows = random_windows(12)
    found = block_importance("lsa", walk_blocks(MODEL, windows, 4, 0), LAYERS)
    inputs, errors = inputs_of(windows), dict.fromkeys(found, 0.0)
    for layer in LAYERS:
        rows, weight = inputs[layer.name], weight_of(layer).double().numpy()
        scores = np.abs(weight) * np.linalg.norm(rows, axis=0)
        lost = 0.0
        for row, score in zip(weight, scores, strict=True):
            kept = np.argsort(score)[round(layer.inputs / 2) :]
            solved = np.linalg.lstsq(rows[:, kept], rows @ row, rcond=None)[0]
            lost += float(np.square(rows[:, kept] @ solved - rows @ row).sum())
        in_block = sum(other.block == layer.block for other in LAYERS)
        errors[layer.block] += lost / float(np.square(rows @ weight.T).sum()) / in_block
    total = sum(errors.values())
    assert [*found] == [0, 1, 2]
    for block, error in errors.items():
        assert 1 - found[block] == pytest.approx(error / total, rel=0.01)


def test_a_dead_neuron_is_in_the_middle_and_a_missing_one_an_error(run: xr.DataTree) -> None:
    data = run.to_dataset().load().copy(deep=True)
    place = int(np.flatnonzero(data["layer"].to_numpy() == LAYERS[0].name)[4])
    data["wasserstein"][place] = np.nan
    found = counts(budget="wasserstein", run=data, strength=1.0)
    middle = round(0.7 * LAYERS[0].inputs)
    assert abs(int(found[LAYERS[0].name][4]) - middle) <= 1
    part = data.isel(neuron=data["layer"].to_numpy() != LAYERS[1].name)
    with pytest.raises(LookupError, match=rf"\b0 of .*\b{LAYERS[1].neurons} neurons"):
        counts(budget="std", run=part)
    with pytest.raises(LookupError, match=r"run.*kurtosis"):
        counts(budget="kurtosis", run=data.drop_vars("kurtosis"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "beauty"}, "budget.*uniform, .*'beauty'"),
        ({"across": "width"}, "across.*uniform, .*'width'"),
        ({"budget": "std"}, "std.*measured run"),
        ({"across": "entanglement"}, "entanglement.*measured run"),
        ({"across": "owl"}, "owl.*importance"),
        ({"across": "lsa"}, "lsa.*importance"),
        ({"across": "search"}, "search.*blocks"),
    ],
)
def test_what_makes_no_budget_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_groups_fix_the_zeros_of_every_row(run: xr.DataTree) -> None:
    with pytest.raises(ValueError, match=r"budget std.*\b2:4\b"):
        made(sparsity="2:4", budget="std", run=run)


def test_one_block_has_none_to_trade_with() -> None:
    here = [layer for layer in LAYERS if layer.block == 1]
    with pytest.raises(ValueError, match=r"depth.*\bblock 1\b"):
        made(here, across="depth")


# --- in sparsify and sweep


def rows_of_zeros(model: Any) -> dict[str, list[int]]:
    return {
        layer.name: (weight_of(layer) == 0).sum(dim=1).tolist()
        for layer in find_layers(model, ["*.mlp.*"])
    }


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_sparsify_leaves_each_row_what_the_budget_says(run: xr.DataTree, method: Any) -> None:
    model = tiny_model("llama")
    words: Any = {"budget": "ranks", "strength": 0.4, "across": "entanglement", "run": run}
    found = entangle.sparsify(
        model, random_windows(20), sparsity=0.7, method=method, layers="*.mlp.*", **words
    )
    truth = counts(**words)
    assert rows_of_zeros(model) == {name: zeros.tolist() for name, zeros in truth.items()}
    assert found.attributes["budget"] == "ranks"
    assert found.attributes["budget_run"]["fingerprint"] == run.attrs["fingerprint"]
    for row in found.layers.to_dict(orient="records"):
        shares = truth[row["layer"]].numpy() / row["inputs"]
        assert (row["least"], row["most"]) == pytest.approx((shares.min(), shares.max()))


def test_each_expert_has_the_zeros_of_the_budget(run: xr.DataTree) -> None:
    model = tiny_model("llama")
    words: Any = {"budget": "wasserstein*std", "across": "depth", "run": run}
    entangle.sparsify(model, random_windows(40), sparsity=0.7, experts=3, layers="*.mlp.*", **words)
    truth = counts(**words)
    for layer in find_layers(model, ["*.mlp.*"]):
        weight: Any = layer.module.weight
        assert weight.ndim == 3
        assert len(weight) > 1
        for expert in weight:
            assert (expert == 0).sum(dim=1).tolist() == truth[layer.name].tolist()


def test_trims_rule_keeps_each_layers_total(run: xr.DataTree) -> None:
    model = tiny_model("llama")
    entangle.sparsify(model, random_windows(20), sparsity=0.7, budget="trim", layers="*.mlp.*")
    found = rows_of_zeros(model)
    for layer in LAYERS:
        assert sum(found[layer.name]) == layer.neurons * round(0.7 * layer.inputs)
    assert any(max(zeros) > min(zeros) + 1 for zeros in found.values())


def test_a_run_of_other_weights_is_refused(run: xr.DataTree) -> None:
    other = tiny_model("llama", seed=1)
    with pytest.raises(ValueError, match=rf"weights.*{run.attrs['weights'][:17]}"):
        entangle.sparsify(other, random_windows(20), sparsity=0.7, budget="std", run=run)
    with pytest.raises(ValueError, match=r"std.*measured run"):
        entangle.sparsify(other, random_windows(20), sparsity=0.7, budget="std")
    with pytest.raises(ValueError, match=r"budget std.*mask.*\bblock\b"):
        entangle.sparsify(
            other, random_windows(20), sparsity=0.7, budget="std", mask="block", run=run
        )


def test_a_sweep_of_budgets_is_one_table_of_equal_totals(run: xr.DataTree) -> None:
    table = entangle.sweep(
        tiny_model("llama"),
        random_windows(20),
        random_windows(8, seed=9),
        sparsity=[0.5, "2:4"],
        method=["sparsegpt"],
        mask=["row", "block"],
        propagate=["dense"],
        budget=["uniform", "std", "trim"],
        strength=[0.1, 0.4],
        across=["uniform", "owl", "lsa"],
        run=run,
        layers="*.mlp.up_proj",
    )
    arms = table[table["method"] != "dense"]
    words = ["mask", "budget", "strength", "across", "sparsity"]
    kinds = [tuple(row) for row in arms[words].astype(str).itertuples(index=False)]
    assert len({*kinds}) == len(kinds) == 14
    assert [kind for kind in kinds if kind[0] == "block"] == [
        ("block", "uniform", "", "uniform", "0.5")
    ]
    assert [kind for kind in kinds if kind[4] == "2:4"] == [
        ("row", "uniform", "", "uniform", "2:4")
    ]
    assert {k[1:4] for k in kinds if k[0] == "row" and k[4] == "0.5"} == {
        *(("uniform", "", across) for across in ("uniform", "owl", "lsa")),
        *(("trim", "", across) for across in ("uniform", "owl", "lsa")),
        *(
            ("std", strength, across)
            for strength in ("0.1", "0.4")
            for across in ("uniform", "owl", "lsa")
        ),
    }
    rows = arms[(arms["mask"] == "row") & (arms["sparsity"] == "0.5")]
    assert rows["realised"].nunique() == 1
    spread = rows["most"] - rows["least"]
    assert spread[(rows["budget"] == "uniform") & (rows["across"] == "uniform")].item() == 0
    assert (spread[rows["budget"] == "std"] > 0.05).all()
    assert rows["perplexity"].nunique() == len(rows)


def test_the_order_of_a_runs_neurons_does_not_matter(run: xr.DataTree) -> None:
    data = run.to_dataset()
    mixed = data.isel(neuron=np.random.default_rng(0).permutation(data.sizes["neuron"]))
    for budget in ("wasserstein*std", "ranks", "shuffled"):
        found, again = counts(budget=budget, run=run), counts(budget=budget, run=mixed)
        assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("budget", ["wasserstein*std", "ranks", "std", "weight_norm"])
def test_a_neuron_without_a_distance_has_the_middle_rank(run: xr.DataTree, budget: str) -> None:
    data = run.to_dataset().copy(deep=True)
    layer = LAYERS[0]
    dead = np.flatnonzero(data["layer"].to_numpy() == layer.name)[[3, 7]]
    data["wasserstein"][dead] = np.nan
    data["std"][dead] = 0.0
    data["weight_norm"][dead] = 1e9
    zeros = counts(budget=budget, run=data, strength=0.5)[layer.name].numpy()
    assert np.abs(zeros[[3, 7]] - 0.7 * layer.inputs).max() <= 1


def test_shuffled_blocks_have_the_same_densities_elsewhere(run: xr.DataTree) -> None:
    def of(across: str, seed: int) -> list[float]:
        found = counts(across=across, run=run, seed=seed)
        return [
            round(sum(int(found[x.name].sum()) for x in LAYERS if x.block == block), -2)
            for block in range(3)
        ]

    truth = of("entanglement", 0)
    for seed in range(6):  # of six orders one is the same
        drawn = of("shuffled", seed)
        assert drawn != truth
        assert sorted(drawn) == sorted(truth)


def test_blocks_that_are_all_alike_are_no_budget(run: xr.DataTree) -> None:
    data = run.to_dataset().copy(deep=True)
    data["wasserstein"][:] = 0.01
    for across in ("entanglement", "shuffled"):
        with pytest.raises(ValueError, match=rf"{across}.*blocks.*same share"):
            counts(across=across, run=data)


def test_a_sweep_says_what_cannot_be_made_before_it_runs_anything(
    run: xr.DataTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an arm was run")

    monkeypatch.setattr("entangle.experiments.sweeping._run_arm", never)
    texts = random_windows(20), random_windows(8, seed=9)
    words: Any = {"sparsity": 0.7, "method": ["sparsegpt"], "budget": ["uniform", "std"]}
    words |= {"run": run}
    data = run.to_dataset()
    partial = data.isel(neuron=data["block"].to_numpy() < 2)
    with pytest.raises(LookupError, match=r"\b0 of .*neurons.*layers\.2\."):
        entangle.sweep(tiny_model("llama"), *texts, **words | {"run": partial})
    with pytest.raises(ValueError, match=rf"weights.*{run.attrs['weights'][:17]}"):
        entangle.sweep(tiny_model("llama", seed=1), *texts, **words)
    for across in ("owl", "depth"):
        with pytest.raises(ValueError, match=rf"{across}.*\bblock 1\b"):
            entangle.sweep(
                tiny_model("llama"), *texts, layers="*.1.mlp.*", across=[across], **words
            )


@pytest.mark.parametrize("propagate", ["sparse", "dense"])
def test_an_arm_of_a_sweep_is_what_sparsify_makes(run: xr.DataTree, propagate: Any) -> None:
    windows, evaluation = random_windows(20), random_windows(8, seed=9)
    words: Any = {"layers": "*.mlp.*", "run": run}
    table = entangle.sweep(
        tiny_model("llama"),
        windows,
        evaluation,
        sparsity=[0.7],
        method=["sparsegpt"],
        propagate=[propagate],
        budget=["uniform", "std"],
        across=["uniform", "owl", "lsa"],
        **words,
    )
    nats, arms = {}, table[1:].to_dict(orient="records")
    for arm in arms:
        model = tiny_model("llama")
        kind = {name: arm[name] for name in ("budget", "across", "propagate")}
        entangle.sparsify(model, windows, sparsity=0.7, **kind, **words)
        nats[arm["budget"], arm["across"]] = entangle.perplexity(model, evaluation)
    assert len({score.nats for score in nats.values()}) == 6
    base = nats["uniform", "uniform"].window_nats
    for arm in arms:
        score = nats[arm["budget"], arm["across"]]
        assert arm["nats"] == pytest.approx(score.nats, rel=1e-6)
        change = score.window_nats - base
        if np.abs(change).max() > 0:
            assert arm["against_uniform"] == pytest.approx(change.mean(), abs=1e-6)
            error = change.std(ddof=1) / np.sqrt(len(change))
            assert arm["against_uniform_error"] == pytest.approx(error, rel=1e-3)
        else:
            assert np.isnan(arm["against_uniform"])


def test_a_sweep_notes_which_run_its_budgets_are_of(run: xr.DataTree) -> None:
    texts = random_windows(20), random_windows(8, seed=9)
    words: Any = {"method": ["magnitude"], "budget": ["std"], "layers": "*.0.mlp.up_proj"}
    table = entangle.sweep(tiny_model("llama"), *texts, sparsity=[0.7], run=run, **words)
    noted = table.attrs["budget_run"]
    assert noted["fingerprint"] == run.attrs["fingerprint"]
    assert (noted["windows"], noted["length"]) == (20, run.attrs["length"])
