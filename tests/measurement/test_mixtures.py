"""Measuring a mixture: each expert's neurons, by the tokens that were sent to it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.measurement.comparing import diff
from entangle.measurement.context_search import contexts
from entangle.measurement.measuring import measure
from entangle.measurement.merging import merge
from entangle.measurement.ranking import rank
from entangle.measurement.recording import FEW, record
from entangle.model.hooks import recording_rows
from entangle.model.layers import find_layers
from entangle.model.loading import load_model
from entangle.model.sides import Recordable
from entangle.model.text import TokenWindows
from entangle.numerics.contributions import bootstrap
from entangle.numerics.gaussian import from_samples
from entangle.runs.dataset import NOISY_TOKENS, summary
from tests.tiny_mixtures import tiny_mixture, without_tokens
from tests.tiny_models import VOCABULARY, tiny_tokenizer

EXPERTS = "*.experts.*"
UNUSED = 2


def windows_of(count: int = 12, length: int = 24, seed: int = 1) -> TokenWindows:
    ids = torch.randint(3, VOCABULARY - 2, (count, length), generator=torch.manual_seed(seed))
    return TokenWindows(ids, "a text", count, 0, False)  # type: ignore[arg-type]


WINDOWS = windows_of()


def first(count: int) -> TokenWindows:
    return TokenWindows(WINDOWS.tokens[:count], "a text", count, 0, False)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def mixture() -> PreTrainedModel:
    """Return a mixture in which no token is sent to one of the experts."""
    model = tiny_mixture()
    without_tokens(model, UNUSED)
    return model


@pytest.fixture(scope="module")
def run(mixture: PreTrainedModel) -> xr.DataTree:
    return measure(mixture, WINDOWS, layers=[EXPERTS, "*.o_proj"], input_layers="*.3.down_proj")


def rows_of(model: PreTrainedModel, **options: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return the outputs of all experts' matrices, and their tokens, in the order of the text."""
    layers = find_layers(model, EXPERTS)
    heard: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}

    def on_rows(layer: Recordable, rows: torch.Tensor, places: torch.Tensor | None) -> None:
        heard[layer.name].append(rows.clone() if places is None else rows[places])

    with recording_rows(model, layers, on_rows, **options), torch.no_grad():
        model(WINDOWS.tokens, use_cache=False)
    return {name: torch.cat(rows).numpy() for name, rows in heard.items()}


@pytest.mark.parametrize("skip_first", [0, 3])
def test_each_neuron_has_the_moments_and_distance_of_its_experts_tokens(
    mixture: PreTrainedModel, run: xr.DataTree, skip_first: int
) -> None:
    if skip_first:
        run = measure(mixture, WINDOWS, layers=EXPERTS, skip_first=skip_first)
    data = run.to_dataset()
    for name, rows in rows_of(mixture, skip_first=skip_first).items():
        own = data.isel(neuron=(data["layer"] == name).to_numpy())
        assert (own["count"] == len(rows)).all()
        if f".{UNUSED}." in name:
            assert len(rows) == 0
            for variable in ("wasserstein", "mean", "std", "min", "max"):
                assert own[variable].isnull().all()
            continue
        np.testing.assert_allclose(own["mean"], rows.mean(0), atol=5e-3 * rows.std(), rtol=1e-3)
        np.testing.assert_allclose(own["min"], rows.min(0), rtol=1e-5)
        distance = from_samples(rows)
        assert (abs(own["wasserstein"] - distance) <= own["wasserstein_error"] + 1e-6).all()
        assert (own["wasserstein_error"] < 0.1).all()  # whatever few tokens the pilot had


def test_the_share_of_tokens_and_the_experts_without_any_are_told(run: xr.DataTree) -> None:
    data = run.to_dataset()
    tokens = WINDOWS.tokens.numel()
    of_block = data.isel(neuron=((data["block"] == 0) & (data["index"] == 0)).to_numpy())
    up = [str(name) for name in of_block["layer"].to_numpy()]
    counts = of_block["count"].to_numpy()[["gate_up" in name for name in up]]
    assert counts.sum() == 2 * tokens  # two experts for each token
    found = summary(run)
    assert found["tokens"] == tokens
    assert found["experts"]["without_tokens"] == 4  # gate_up and down, in two blocks
    assert found["experts"]["least_tokens"] == 0
    assert found["experts"]["most_tokens"] == data["count"].to_numpy()[data["count"] < tokens].max()
    warnings = " ".join(found["warnings"])
    assert "of experts that had no token, or only one" in warnings
    assert f"fewer than {NOISY_TOKENS} tokens" in warnings
    assert "dead" not in warnings
    ranked = rank(run, 10_000)
    assert not ranked["neuron"].str.contains(f"experts.{UNUSED}.").any()


def test_an_unused_expert_alone_is_measured_without_tokens(mixture: PreTrainedModel) -> None:
    run = measure(mixture, WINDOWS, layers=f"*.experts.{UNUSED}.*")
    assert (run["count"] == 0).all()
    neuron = f"model.layers.0.mlp.experts.{UNUSED}.down_proj:0"
    with pytest.raises(ValueError, match="no token was sent"):
        contexts(mixture, WINDOWS, run=run, neurons=neuron, tokenizer=tiny_tokenizer())


def test_a_ranking_shows_counts_where_they_differ(run: xr.DataTree) -> None:
    table, counts = rank(run), run["count"]
    for row in table.to_dict(orient="records"):
        assert row["count"] == int(counts.sel(neuron=row["neuron"]))
        assert row["noise_floor"] == pytest.approx(0.833 / row["count"] ** 0.5, rel=1e-3)
    assert "count" not in rank(run, layers="*.o_proj")
    moved = diff(run, run).neurons
    assert (moved["first_count"] == counts.sel(neuron=moved["neuron"].to_list()).to_numpy()).all()
    assert "first_count" not in diff(run, run, layers="*.o_proj").neurons


def test_histograms_that_do_not_fit_into_memory_are_refused_before_the_pass(
    mixture: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entangle.measurement.measuring.free_memory", lambda: 4 * 64 * 99)
    assert len(measure(mixture, WINDOWS, layers="*.0.*.q_proj", bins=64)["neuron"]) == 32
    with pytest.raises(ValueError, match=r"--exclude '\*\.experts"):
        measure(mixture, WINDOWS, bins=64)


def test_a_measurement_inside_a_recording_is_heard_by_both_and_its_trials_by_none(
    mixture: PreTrainedModel,
) -> None:
    with record(mixture, EXPERTS) as recorder:
        inner = measure(mixture, first(2), layers=EXPERTS)
    assert (recorder.dataset()["count"] == inner["count"]).all()
    assert inner["count"].to_numpy().max() > 0


def test_a_block_that_is_in_files_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_mixture("qwen3_moe")
    model.save_pretrained(tmp_path / "model")
    whole = measure(load_model(tmp_path / "model"), WINDOWS, layers=EXPERTS)
    offloaded = load_model(tmp_path / "model", offload=tmp_path / "blocks")
    found = measure(offloaded, WINDOWS, layers=EXPERTS).to_dataset()
    assert (found["count"] == whole["count"]).all()
    np.testing.assert_allclose(found["wasserstein"], whole["wasserstein"], atol=1e-3)
    np.testing.assert_allclose(found["weight_norm"], whole["weight_norm"], rtol=1e-6)


def same(one: xr.DataTree, other: xr.DataTree) -> bool:
    a, b = one["histogram"].to_dataset(), other["histogram"].to_dataset()
    powers = np.allclose(a["powers"], b["powers"], rtol=1e-9)
    return powers and bool(a.drop_vars("powers").identical(b.drop_vars("powers")))


@pytest.mark.parametrize("batch_size", [1, 3])  # tokens in the pilot: few of all, few of some
def test_shards_merge_to_the_bits_of_one_run(
    mixture: PreTrainedModel, tmp_path: Path, batch_size: int
) -> None:
    whole = measure(mixture, WINDOWS, layers=EXPERTS, batch_size=batch_size)
    pilot = measure(mixture, first(batch_size), layers=EXPERTS)["count"].to_numpy()
    assert pilot.min() < FEW
    assert (pilot.max() >= FEW) == (batch_size == 3)
    folders = [tmp_path / str(number) for number in range(3)]
    for number, folder in enumerate(folders, start=1):
        share: dict[str, Any] = {"batch_size": batch_size, "shard": f"{number}/3", "out": folder}
        measure(mixture, WINDOWS, layers=EXPERTS, **share)
    merged = merge(folders, out=tmp_path / "merged")
    assert same(merged, whole)
    left, right = (one.to_dataset().drop_attrs() for one in (merged, whole))
    names = ["skewness", "kurtosis"]
    xr.testing.assert_identical(left.drop_vars(names).load(), right.drop_vars(names))


def test_a_killed_measurement_goes_on_to_the_same_bits(
    mixture: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(mixture, WINDOWS, layers=EXPERTS, batch_size=2)
    monkeypatch.setattr("entangle.measurement.measuring.SECONDS", 0.0)
    calls = iter(range(10**6))
    gate: Any = mixture.get_submodule("model.layers.1.mlp.gate")

    def killed(*_: Any) -> None:
        if next(calls) == 4:  # the fifth batch: the hooks do not run in trials
            raise KeyboardInterrupt

    handle = gate.register_forward_pre_hook(killed)
    with pytest.raises(KeyboardInterrupt):
        measure(mixture, WINDOWS, layers=EXPERTS, batch_size=2, out=tmp_path / "run")
    handle.remove()
    assert (tmp_path / "run.partial" / "state").is_dir()
    found = measure(mixture, WINDOWS, layers=EXPERTS, batch_size=2, out=tmp_path / "run")
    assert same(found, whole)


def test_bins_of_experts_that_the_pilot_hardly_saw_are_placed_by_the_others(
    mixture: PreTrainedModel,
) -> None:
    """A pilot of 5 tokens, which some experts never see, and a text of hundreds."""
    with record(mixture, EXPERTS) as recorder, torch.no_grad():
        mixture(WINDOWS.tokens[:1, :5])
        for part in WINDOWS.tokens.split(3):
            mixture(part)
    data = recorder.dataset()
    used = (data["count"] > 0).to_numpy()
    assert (data["wasserstein_error"].to_numpy()[used] < 0.1).mean() > 0.9
    histogram = recorder.tree()["histogram"]
    assert np.isfinite(histogram["scale"]).all()


def test_contexts_are_the_tokens_that_were_sent_to_the_expert(
    mixture: PreTrainedModel, run: xr.DataTree
) -> None:
    names = ["model.layers.1.mlp.experts.3.gate_up_proj:5", "model.layers.0.self_attn.o_proj:3"]
    found = contexts(mixture, WINDOWS, run=run, neurons=names, tokenizer=tiny_tokenizer())
    assert [one.neuron for one in found] == names
    expert, dense = found
    rows = rows_of(mixture)[names[0].rpartition(":")[0]][:, 5]
    assert expert.tokens == len(rows) < dense.tokens == WINDOWS.tokens.numel()
    assert expert.wasserstein == pytest.approx(float(from_samples(rows[:, None])[0]), rel=1e-5)
    assert sum(expert.positions) == pytest.approx(1)
    layer = find_layers(mixture, names[0].rpartition(":")[0])[0]
    values: dict[tuple[int, int], float] = {}

    def on_rows(_: Recordable, heard: torch.Tensor, __: torch.Tensor | None) -> None:
        for token, row in zip(layer.module.tokens, heard, strict=True):  # type: ignore[arg-type]
            values[divmod(int(token), WINDOWS.length)] = float(row[5])

    with recording_rows(mixture, [layer], on_rows), torch.no_grad():
        mixture(WINDOWS.tokens)
    for one in expert.contexts:
        assert values[one.window, one.position] == pytest.approx(one.output, abs=1e-5)


def test_the_bootstrap_of_windows_of_different_sizes_draws_whole_windows() -> None:
    rows = torch.randn(30, 2, generator=torch.manual_seed(0)).numpy()
    owner = np.repeat([0, 1, 3], [5, 10, 15])  # window 2 has no token
    found = bootstrap(rows, owner, 4, draws=50, seed=3)
    drawn = np.random.default_rng(3).integers(4, size=(50, 4))
    for one, distance in zip(drawn, found, strict=True):
        index = np.concatenate([np.flatnonzero(owner == window) for window in one])
        truth = from_samples(rows[index]) if len(index) else [np.nan] * 2
        np.testing.assert_allclose(distance, truth)
    equal = np.repeat(np.arange(3), 10)
    np.testing.assert_array_equal(bootstrap(rows, equal, 3), bootstrap(rows, 10))


def test_an_expert_with_tokens_in_one_window_has_contexts_and_no_interval() -> None:
    """Expert 3 has the tokens of window 5 alone, so one batch of three."""
    model, rare = tiny_mixture(), 3
    held: list[torch.Tensor] = []

    def remember(_: Any, args: Any, kwargs: Any) -> None:
        held[:] = [kwargs["input_ids"]]

    def route(_: Any, args: Any, output: Any) -> Any:
        logits, weights, index = output
        there = (held[0] == WINDOWS.tokens[5]).all(dim=1).repeat_interleave(WINDOWS.length)
        index = torch.where(there[:, None], torch.tensor([rare, 0]), torch.tensor([1, 2]))
        return logits, weights, index

    model.get_submodule("model").register_forward_pre_hook(remember, with_kwargs=True)
    for block in range(2):
        model.get_submodule(f"model.layers.{block}.mlp.gate").register_forward_hook(route)
    run = measure(model, WINDOWS, layers=EXPERTS)
    name = f"model.layers.1.mlp.experts.{rare}.gate_up_proj:5"
    (found,) = contexts(model, WINDOWS, run=run, neurons=name, tokenizer=tiny_tokenizer())
    assert found.tokens == WINDOWS.length
    assert {one.window for one in found.contexts} == {5}
    assert np.isnan([found.low, found.high]).all()


def test_the_difficulty_is_of_the_experts_tokens(mixture: PreTrainedModel) -> None:
    run = measure(mixture, WINDOWS, layers=EXPERTS, difficulty=20).to_dataset()
    # Of the 40 sampled tokens an expert has those that were sent to it: half of them on average.
    pairs = run["difficulty_pairs"].to_numpy()
    assert (np.isfinite(run["difficulty"].to_numpy()) == (pairs > 0)).all()
    assert 5 < pairs[run["count"].to_numpy() > 0].mean() < 20
    assert (pairs[run["count"].to_numpy() == 0] == 0).all()
