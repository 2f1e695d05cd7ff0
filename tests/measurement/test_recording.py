"""What is recorded is what the layers put out: on every architecture, padded or not, cached or not."""

import contextlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xarray as xr
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import entangle
from entangle.measurement.measuring import measure
from entangle.measurement.ranking import rank
from entangle.measurement.recording import Recorder, record
from entangle.model.hooks import counted_tokens
from entangle.model.layers import find_layers
from entangle.model.text import TokenWindows
from entangle.numerics import gaussian, histograms
from entangle.numerics.difficulty import mapping_difficulty
from entangle.runs.dataset import about, summary
from entangle.runs.labelling import from_tree
from entangle.runs.store import open_run
from tests.model.test_layers import CodesLinear
from tests.pruning.test_sparsifying import inputs_of
from tests.tiny_models import (
    ARCHITECTURES,
    CONTEXT,
    VOCABULARY,
    tiny_llama4,
    tiny_mamba,
    tiny_model,
)

Array = npt.NDArray[np.float64]
LENGTH = 16
LATTICE = 16 / 1024 / 64  # a step of the histograms' lattice, in stds of the pilot


def tokens(windows: int, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (windows, length), generator=torch.manual_seed(seed))


def windows_of(ids: torch.Tensor) -> TokenWindows:
    return TokenWindows(ids, "random tokens", len(ids), 0, "never")


@contextmanager
def captured(
    model: PreTrainedModel, names: Sequence[str] = ()
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Keep the outputs of all layers with hooks of this test's own: (windows, length, neurons)."""
    outputs: dict[str, list[torch.Tensor]] = {
        name: [] for name in names or [layer.name for layer in find_layers(model)]
    }
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, kept=kept: kept.append(output.float().clone())
        )
        for name, kept in outputs.items()
    ]
    with torch.no_grad():
        yield outputs
    for handle in handles:
        handle.remove()


def flat(outputs: dict[str, list[torch.Tensor]], skip_first: int = 0) -> Array:
    """Return all counted rows of all layers side by side (tokens, neurons)."""
    layers = []
    for kept in outputs.values():  # those of OPT's MLP are rows already
        parts = [(x[:, skip_first:] if skip_first else x).flatten(0, -2) for x in kept]
        layers.append(torch.cat(parts))
    return torch.cat(layers, dim=1).double().numpy()


def neuron_names(run: xr.DataTree) -> list[str]:
    table = run.to_dataset().to_dataframe()
    return [f"{layer}:{i}" for layer, i in zip(table["layer"], table["index"], strict=True)]


def agrees(dataset: xr.Dataset, rows: Array) -> None:
    """Compare a dataset with the rows (tokens, neurons) that should have been counted."""
    values = {str(name): dataset[name].to_numpy() for name in dataset}
    std = rows.std(axis=0)
    assert (values["count"] == len(rows)).all()
    assert np.array_equal(values["min"], rows.min(axis=0))
    assert np.array_equal(values["max"], rows.max(axis=0))
    # Values are summed to half a lattice step; the pilot's std is within a factor 2 of the final.
    np.testing.assert_allclose(values["mean"] / std, rows.mean(axis=0) / std, atol=LATTICE)
    np.testing.assert_allclose(values["std"] / std, 1, atol=LATTICE)
    exact = gaussian.from_samples(rows)
    assert (np.abs(values["wasserstein"] - exact) <= values["wasserstein_error"] + 1e-12).all()
    assert (values["wasserstein_error"] < 0.02).mean() > 0.99


# Every architecture.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_measure_counts_what_each_layer_puts_out(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype)
    windows = windows_of(tokens(12))
    run = measure(model, windows, batch_size=5)
    with captured(model) as outputs:
        for batch in windows.tokens.split(5):
            model(batch)
    agrees(run.to_dataset(), flat(outputs))
    sizes = {name: kept[0].shape[-1] for name, kept in outputs.items()}
    assert neuron_names(run) == [f"{name}:{i}" for name, size in sizes.items() for i in range(size)]
    assert summary(run)["warnings"] == []


# Layers that cannot be heard.


DEAF = {
    tiny_mamba: [f"backbone.layers.{block}.mixer.dt_proj" for block in (0, 1)],
    tiny_llama4: [f"model.layers.{block}.feed_forward.router" for block in (0, 1)],
}


@pytest.mark.parametrize("make", DEAF)
def test_what_cannot_be_heard_is_left_out_and_said(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model, windows = make(), windows_of(tokens(6))
    exclude = ["*.experts.*"] if make is tiny_llama4 else []
    run = measure(model, windows, exclude=exclude, out=tmp_path / "run")
    heard = dict.fromkeys(run["layer"].to_numpy())
    every = [layer.name for layer in find_layers(model, "*", exclude)]
    assert [*heard] == [name for name in every if name not in DEAF[make]]
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [*written["skipped_layers"]] == DEAF[make]
    assert about(open_run(tmp_path / "run"))["skipped_layers"] == written["skipped_layers"]
    said = f"{', '.join(DEAF[make])} "
    assert sum(said in warning for warning in summary(run)["warnings"]) == 1
    with record(model, exclude=exclude) as recorder, torch.no_grad():
        for batch in windows.tokens.split(4):
            model(batch)
    recorded = recorder.tree()
    assert [*about(recorded)["skipped_layers"]] == DEAF[make]
    for name, values in recorded.to_dataset().items():
        np.testing.assert_array_equal(values, run[str(name)])
    with captured(model, [*heard]) as outputs:
        for batch in windows.tokens.split(4):
            model(batch)
    agrees(run.to_dataset(), flat(outputs))


@pytest.mark.parametrize("layers", [["*.dt_proj"], ["*", "backbone.layers.1.mixer.dt_proj"]])
def test_what_cannot_be_heard_is_refused_if_it_is_asked_for(layers: list[str]) -> None:
    model = tiny_mamba()
    with pytest.raises(ValueError, match=r"layers\.[01]\.mixer\.dt_proj.*did not run"):
        measure(model, windows_of(tokens(2)), layers=layers)
    with pytest.raises(ValueError, match=r"dt_proj.*did not run"), record(model, layers):
        pass


def test_excluded_layers_are_left_out_of_the_run_and_of_its_tables(tmp_path: Path) -> None:
    model, windows = tiny_model(), windows_of(tokens(4))
    run = measure(model, windows, layers="*.mlp.*", exclude="*.1.*", out=tmp_path / "run")
    assert {*run["block"].to_numpy().tolist()} == {0, 2}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["exclude"] == ["*.1.*"]
    assert about(run)["exclude"] == ["*.1.*"]
    assert "exclude" not in measure(model, windows, layers="*.0.*").attrs
    for table in (
        rank(run, 999, exclude=["*.up_proj"]),
        entangle.diff(run, run, exclude=["*.up_proj"]).neurons,
    ):
        found = {name.rpartition(":")[0] for name in table["neuron"]}
        expected = {
            f"model.layers.{b}.mlp.{role}_proj" for b in (0, 2) for role in ("gate", "down")
        }
        assert found == expected
    with pytest.raises(LookupError, match=r"'\*\.1\.\*'"):
        rank(run, exclude="*.1.*")
    with pytest.raises(LookupError, match="no layer is left"):
        rank(run, layers="*.up_proj", exclude="*.mlp.*")


class Twice(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_layer_with_a_forward_of_its_own_is_measured_by_its_outputs() -> None:
    model: Any = tiny_model()
    model.model.layers[1].mlp.up_proj = Twice(24, 37)
    windows = windows_of(tokens(4))
    run = measure(model, windows, layers="*.1.mlp.*")
    with captured(model, [x.name for x in find_layers(model, "*.1.mlp.*")]) as outputs:
        model(windows.tokens)
    agrees(run.to_dataset(), flat(outputs))


def test_the_norms_of_codes_are_nan_and_their_outputs_are_measured() -> None:
    model: Any = tiny_model()
    windows = windows_of(tokens(4))
    dense = measure(model, windows, layers="*.1.mlp.*").to_dataset()
    model.model.layers[1].mlp.up_proj = CodesLinear(model.model.layers[1].mlp.up_proj)
    run = measure(model, windows, layers="*.1.mlp.*").to_dataset()
    up = run["role"].to_numpy() == "mlp.up_proj"
    assert np.isnan(run["weight_norm"].to_numpy()[up]).all()
    assert np.isfinite(run["weight_norm"].to_numpy()[~up]).all()
    np.testing.assert_allclose(run["std"][up], dense["std"][up], rtol=0.05)
    with captured(model, [x.name for x in find_layers(model, "*.1.mlp.*")]) as outputs:
        model(windows.tokens)
    agrees(run, flat(outputs))


# Padding and positions.


def ragged(model: PreTrainedModel, side: str) -> Iterator[dict[str, torch.Tensor]]:
    """Give the arguments of padded batches: windows of several lengths, each padded to 16."""
    for seed, lengths in enumerate([(11, 16, 3), (7, 1, 13)], start=1):
        ids = tokens(3, seed=seed)
        mask = torch.zeros_like(ids)
        for window, length in enumerate(lengths):
            mask[window, :length] = 1
        if side == "left":
            ids, mask = ids.flip(1), mask.flip(1)
        arguments = {"input_ids": ids.where(mask == 1, 0), "attention_mask": mask}
        if side == "left" and "position_ids" in inspect.signature(model.forward).parameters:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        yield arguments


def unpadded(batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            yield {"input_ids": ids[mask == 1][None]}


def recorded(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], **options: Any
) -> xr.Dataset:
    """Record batches after a pilot of whole windows, the same in every run."""
    with record(model, bins=2048, **options) as recorder, torch.no_grad():
        model(tokens(6))
        for batch in batches:
            model(**batch)
    return recorder.dataset()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_is_not_counted_and_changes_nothing(name: str, side: str) -> None:
    model = tiny_model(name)
    padded = recorded(model, ragged(model, side))
    plain = recorded(model, unpadded(ragged(model, side)))
    assert (padded["count"] == 6 * LENGTH + 11 + 16 + 3 + 7 + 1 + 13).all()
    assert (padded["count"] == plain["count"]).all()
    # The same tokens through other batches: equal to rounding, and a value that rounding carries
    # over the edge of a bin moves the distance by 1/128 std / 147 tokens.
    for key in ("mean", "std"):
        np.testing.assert_allclose(padded[key] / plain["std"], plain[key] / plain["std"], atol=1e-5)
    np.testing.assert_allclose(padded["wasserstein"], plain["wasserstein"], atol=1e-4)
    for key in ("min", "max"):
        np.testing.assert_allclose(padded[key] / plain["std"], plain[key] / plain["std"], atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_first_tokens_left_out_are_those_of_each_window_not_its_padding(side: str) -> None:
    model = tiny_model("qwen2")
    padded = recorded(model, ragged(model, side), skip_first=4)
    plain = recorded(model, unpadded(ragged(model, side)), skip_first=4)
    assert (padded["count"] == 6 * 12 + 7 + 12 + 0 + 3 + 0 + 9).all()
    assert (padded["count"] == plain["count"]).all()
    np.testing.assert_allclose(padded["wasserstein"], plain["wasserstein"], atol=1e-4)


@pytest.mark.parametrize("skip_first", [0, 1, 15])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-alibi"])
def test_measure_leaves_out_the_first_tokens_of_each_window(name: str, skip_first: int) -> None:
    model = tiny_model(name)
    windows = windows_of(tokens(40))
    run = measure(model, windows, batch_size=20, skip_first=skip_first)
    with captured(model) as outputs:
        model(windows.tokens)
    agrees(run.to_dataset(), flat(outputs, skip_first))
    assert run.attrs["tokens"] == 40 * (LENGTH - skip_first)


def test_a_first_batch_of_nothing_but_padding_is_refused() -> None:
    model = tiny_model()

    def record_padding() -> None:
        with record(model):
            model(tokens(2), attention_mask=torch.zeros(2, LENGTH))

    with pytest.raises(ValueError, match=r"pilot.*no rows"):
        record_padding()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bloom"])
def test_generating_text_records_each_token_once(name: str) -> None:
    model: Any = tiny_model(name)
    prompts = tokens(8)
    lengths = {"min_new_tokens": 9, "max_new_tokens": 9}
    with record(model) as recorder:
        written = model.generate(prompts, do_sample=False, use_cache=True, **lengths)
    with captured(model) as outputs:
        model(written[:, :-1])  # the last token is written, but never read
    dataset = recorder.dataset()
    rows = flat(outputs)
    assert (dataset["count"] == 8 * (LENGTH + 8)).all()
    np.testing.assert_allclose(dataset["min"], rows.min(axis=0), atol=1e-4)
    np.testing.assert_allclose(dataset["mean"], rows.mean(axis=0), atol=1e-3)
    difference = np.abs(dataset["wasserstein"] - gaussian.from_samples(rows))
    assert (difference <= dataset["wasserstein_error"] + 1e-4).all()


# The recorder.


def same(first: xr.DataTree, second: xr.DataTree) -> bool:
    return all(
        torch.equal(tensor.nan_to_num(), other.nan_to_num())
        for tensor, other in zip(
            from_tree(first).tensors().values(), from_tree(second).tensors().values(), strict=True
        )
    )


def test_what_is_recorded_can_be_read_at_any_time(tmp_path: Path) -> None:
    model = tiny_model()
    with record(model, "*.1.mlp.*") as recorder:
        with pytest.raises(RuntimeError, match=r"nothing.*recorded"):
            recorder.tree()
        with torch.no_grad():
            model(tokens(4))
        assert (recorder.dataset()["count"] == 64).all()
        with torch.no_grad():
            model(tokens(3, seed=1))
        assert (recorder.dataset()["count"] == 112).all()
    after = recorder.tree()
    assert after.attrs["tokens"] == 112
    assert recorder.dataset().identical(after.to_dataset())
    with torch.no_grad():
        model(tokens(4))
    assert same(recorder.tree(), after)  # outside the with block nothing is heard


def test_two_recorders_at_once_record_what_each_does_alone() -> None:
    model = tiny_model("gpt2")

    def alone(**options: Any) -> xr.DataTree:
        with record(model, **options) as recorder, torch.no_grad():
            for seed in range(3):
                model(tokens(4, seed=seed))
        return recorder.tree()

    mlp: dict[str, Any] = {"layers": ["*.mlp.*"], "skip_first": 2, "bins": 64}
    with record(model) as one, record(model, **mlp) as two, torch.no_grad():
        for seed in range(3):
            model(tokens(4, seed=seed))
    assert same(one.tree(), alone())
    assert same(two.tree(), alone(**mlp))


def test_calls_may_be_in_any_mode_of_autograd() -> None:
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    found = []
    for order in itertools.permutations(modes):
        model, text = tiny_model("gpt2"), tokens(3)
        with contextlib.ExitStack() as stack:
            with order[0]():  # the recorder is made in this mode too
                recorder = stack.enter_context(entangle.record(model))
            for mode, window in zip(order, text.split(1), strict=True):
                with mode():
                    model(window)
        found.append(recorder.tree())
    assert all(tree.identical(found[0]) for tree in found)


def test_gradients_and_training_go_on_while_recording() -> None:
    model = tiny_model()
    ids = tokens(4)
    model(ids, labels=ids).loss.backward()
    expected: dict[str, Any] = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with record(model) as recorder:
        model(ids, labels=ids).loss.backward()
    assert (recorder.dataset()["count"] == 64).all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[key]), key


def test_after_a_pass_that_broke_off_nothing_is_handed_out() -> None:
    model = tiny_model()

    def explode(*_: Any) -> None:
        raise KeyboardInterrupt

    def swallow() -> None:
        with record(model) as recorder, torch.no_grad():
            model(tokens(4))
            handle = model.get_submodule("model.layers.1").register_forward_hook(explode)
            with pytest.raises(KeyboardInterrupt):
                model(tokens(4))
            handle.remove()
            with pytest.raises(RuntimeError, match=r"forward pass.*different"):
                recorder.tree()
            with pytest.raises(RuntimeError, match=r"forward pass.*different"):
                recorder.dataset()

    with pytest.raises(RuntimeError, match=r"forward pass.*different"):
        swallow()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": "*.mlp.fc"}, LookupError, r"layer.*'\*\.mlp\.fc'.*mlp\.\w+_proj"),
        ({"bins": 7}, ValueError, r"bins.*even.*\b2048\b.*\b7\b"),
        ({"skip_first": -1}, ValueError, r"skip_first.*negative.*-1\b"),
    ],
)
def test_options_out_of_range_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        record(tiny_model(), **options).__enter__()


# Measuring a text.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": windows_of(tokens(2, CONTEXT + 1))}, r"\b65 tokens.*context.*\b64\b"),
        ({"windows": windows_of(tokens(2) + 200)}, r"token 4\d\d\b.*\b260 tokens"),
        ({"skip_first": LENGTH}, r"skip_first.*\b15\b.*windows of 16\D+16\b"),
        ({"batch_size": 0}, r"batch size 0\b"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(tiny_model(), **{"windows": windows_of(tokens(4))} | options)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        measure(tiny_model().train(), windows_of(tokens(4)))


def test_a_run_knows_what_it_was_measured_on(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    windows = windows_of(tokens(4))
    run = measure(model, windows, layers="*layers.0.*", batch_size=3, skip_first=1, bins=128)
    expected = {
        "tokens": 60,
        "bins": 128,
        "class": "MixtralForCausalLM",
        "dtype": "float32",
        "device": "cpu",
        "text": "random tokens",
        "fingerprint": windows.fingerprint,
        "windows": 4,
        "length": 16,
        "available_windows": 4,
        "seed": 0,
        "bos": "never",
        "skip_first": 1,
        "batch_size": 3,
        "layers": ["*layers.0.*"],
    }
    assert run.attrs | expected == run.attrs
    assert len(run.attrs["skipped_parameters"]) == 2  # the weights of the routers
    assert set(run["block"].to_numpy()) == {0}


def test_the_same_measurement_is_the_same_in_every_bit_on_disk_too(tmp_path: Path) -> None:
    model, windows = tiny_model("gpt2"), windows_of(tokens(6))
    first = measure(model, windows, batch_size=4, out=tmp_path / "a")
    measure(model, windows, batch_size=4, out=tmp_path / "b")
    files = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*")}
    assert files == {path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*")}
    for file in files:
        if (tmp_path / "a" / file).is_file() and file.name != "log.json":
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert same(open_run(tmp_path / "a"), first)


def test_a_run_that_exists_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    model, windows = tiny_model(), windows_of(tokens(4))
    measure(model, windows, layers="*.0.*", out=tmp_path / "run")
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.raises(FileExistsError, match=r"run exists.*--overwrite"):
        measure(model, windows, out=tmp_path / "run")
    assert passes == []
    measure(model, windows, layers="*.1.*", out=tmp_path / "run", overwrite=True)
    assert set(open_run(tmp_path / "run")["block"].to_numpy()) == {1}


def test_a_measurement_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_model()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model.get_submodule("model.layers.2").register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(model, windows_of(tokens(4)), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# Neurons that cannot be measured.


def test_broken_and_dead_neurons_are_named_and_the_others_are_as_ever() -> None:
    clean, broken = tiny_model("gpt2"), tiny_model("gpt2")
    last: Any = broken.get_submodule("transformer.h.1.mlp.c_proj")
    with torch.no_grad():
        last.weight[:, 3] = 0.0  # dead: its bias and nothing else
        last.weight[0, 5] = torch.nan
        last.weight[0, 7] = torch.inf
    windows = windows_of(tokens(5))
    expected = measure(clean, windows).to_dataset()
    run = measure(broken, windows)
    dataset = run.to_dataset()
    at = [f"transformer.h.1.mlp.c_proj:{i}" for i in (3, 5, 7)]
    wrong = np.isin(neuron_names(run), at)
    assert wrong.sum() == 3
    assert np.array_equal(np.isnan(dataset["wasserstein"]), wrong)
    assert dataset["nonfinite"].to_numpy()[wrong].tolist() == [0, 80, 80]
    for key in ("wasserstein", "mean", "std", "count", "min", "max"):
        values, truth = dataset[key].to_numpy(), expected[key].to_numpy()
        assert np.array_equal(values[~wrong], truth[~wrong])
    nonfinite, dead = summary(run)["warnings"]
    assert re.search(rf"^2 .*\bNaN\b.* {at[1]}, {at[2]}$", nonfinite)
    assert re.search(rf"^1 dead.* {at[0]}$", dead)
    assert not {*at} & {*rank(run, 1000)["neuron"]}


# Mapping difficulty.


def by_hand(
    model: PreTrainedModel, ids: torch.Tensor, skip_first: int = 0, pairs: int = 10_000
) -> tuple[Array, list[int]]:
    """Return all layers' difficulties, and pairs, from inputs and outputs that hooks gather."""
    windows, layers = windows_of(ids), find_layers(model)
    inputs = inputs_of(model, layers, windows, skip_first)
    with captured(model) as outputs:
        for batch in ids.split(2):
            model(batch)
    found = []
    for layer in layers:
        kept = [part.reshape(-1, ids.shape[1], layer.neurons) for part in outputs[layer.name]]
        rows = torch.cat(kept)[:, skip_first:].flatten(0, 1)
        found.append(mapping_difficulty(inputs[layer.name], rows, pairs, seed=0))
    counted = [one.pairs for one in found for _ in one.difficulty]
    return np.concatenate([one.difficulty for one in found]), counted


@pytest.mark.parametrize("skip_first", [0, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "opt", "gemma2", "bloom"])
def test_difficulty_is_that_of_the_inputs_and_outputs_that_hooks_see(
    name: str, skip_first: int
) -> None:
    model, ids = tiny_model(name), tokens(7)
    run = measure(model, windows_of(ids), difficulty=99, batch_size=2, skip_first=skip_first)
    expected, pairs = by_hand(model, ids, skip_first)
    dataset = run.to_dataset()
    np.testing.assert_allclose(dataset["difficulty"], expected, rtol=1e-3)
    assert dataset["difficulty_pairs"].to_numpy().tolist() == pairs
    together = dataset["difficulty_pairs"] + dataset["difficulty_equal"]
    assert (together == 7 * (LENGTH - skip_first) // 2).all()
    if name == "llama":  # whose first layer sees of a token nothing but which one it is
        first = dataset.isel(
            neuron=dataset["layer"].to_numpy() == "model.layers.0.self_attn.q_proj"
        )
        last = dataset.isel(neuron=dataset["layer"].to_numpy() == "model.layers.2.mlp.up_proj")
        ids = ids[:, skip_first:].flatten()
        order = np.random.default_rng(0).permutation(len(ids))
        half = len(ids) // 2 * 2
        same_token = int((ids[order[0:half:2]] == ids[order[1:half:2]]).sum())
        assert (first["difficulty_equal"] == same_token).all()
        assert (last["difficulty_equal"] == 0).all()


def test_difficulty_of_an_expanded_model() -> None:
    model, ids = tiny_model("llama"), tokens(8)
    entangle.sparsify(
        model, windows_of(tokens(12, seed=4)), sparsity=0.5, experts=3, layers="*.mlp.*"
    )
    run = measure(model, windows_of(ids), difficulty=200, batch_size=2)
    np.testing.assert_allclose(run["difficulty"], by_hand(model, ids)[0], rtol=1e-3)


def test_difficulty_changes_nothing_else_and_only_some_layers_have_it(tmp_path: Path) -> None:
    model, windows = tiny_model("llama"), windows_of(tokens(6))
    plain = measure(model, windows, layers=["*.1.mlp.*", "*.2.mlp.up_proj"])
    words: dict[str, Any] = {"layers": ["*.1.mlp.*", "*.2.mlp.up_proj"], "out": tmp_path / "run"}
    run = measure(model, windows, difficulty=20, **words)
    assert same(run, plain)
    names = ["difficulty", "difficulty_pairs", "difficulty_equal"]
    assert run.to_dataset().drop_vars(names).drop_attrs().identical(plain.to_dataset().drop_attrs())
    assert run.attrs == plain.attrs | {"difficulty": 20}
    assert (run["difficulty_pairs"] == 20).all()
    opened = open_run(tmp_path / "run")
    assert opened.attrs["difficulty"] == 20
    assert opened.to_dataset().load().identical(run.to_dataset())
    assert same(opened, run)


def test_the_pairs_do_not_depend_on_the_batches() -> None:
    model, windows = tiny_model("qwen2"), windows_of(tokens(9))
    first, second = (
        measure(model, windows, difficulty=25, batch_size=size)["difficulty"] for size in (2, 5)
    )
    np.testing.assert_allclose(first, second, rtol=1e-3)
    every = measure(model, windows, difficulty=72, batch_size=5)["difficulty"]
    assert not np.allclose(every, second, rtol=0.01)


def test_pairs_are_of_at_most_64_windows_evenly_spread() -> None:
    model, ids = tiny_model("gpt2"), tokens(70, 4)
    run = measure(model, windows_of(ids), difficulty=10_000, batch_size=2)
    places = np.linspace(0, 69, 64).round().astype(int)
    expected, _ = by_hand(model, ids[torch.from_numpy(places)])
    np.testing.assert_allclose(run["difficulty"], expected, rtol=1e-3)
    assert (run["difficulty_pairs"] + run["difficulty_equal"] == 64 * 4 // 2).all()
    assert (run["count"] == 280).all()


def test_a_negative_number_of_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"difficulty.*pair.*-1\b"):
        measure(tiny_model(), windows_of(tokens(4)), difficulty=-1)


# --- on a GPU, or as on one: the kernel is interpreted, and what would wait for a GPU is counted


WAITING = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "unique"}


class Waits(TorchDispatchMode):
    """The operations that wait for a device, since their result or its shape is on the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__.partition(".")[0]
        masks = [x for x in args[1] if x is not None] if name == "index" else []
        if name in WAITING or any(mask.dtype == torch.bool for mask in masks):
            self.seen.append(name)
        return func(*args, **kwargs or {})


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """See also `tolist`, which is no operation on the CPU."""
    found, tolist = Waits(), torch.Tensor.tolist

    def seen(tensor: torch.Tensor) -> Any:
        found.seen.append("tolist")
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", seen)
    return found


def test_what_waits_is_seen(waits: Waits) -> None:
    x = torch.arange(3)
    with waits:
        assert int(x[1]) == 1
        assert len(x[x > 0]) == 2
        assert (x > 1).any()
        assert x.tolist() == [0, 1, 2]
        assert len(x[x]) == 3
    assert len(waits.seen) == 4


@pytest.mark.parametrize("padded", [False, True])
def test_on_a_gpu_no_hook_waits_and_the_state_is_the_cpus(
    padded: bool, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = tiny_model()
    model.to(device)  # type: ignore[arg-type]  # as it is declared
    names = [f"model.layers.{block}.self_attn.k_proj" for block in (0, 1)]
    batches = [tokens(2, seed=seed).to(device) for seed in (1, 2)]
    masks = [torch.ones_like(ids) for ids in batches]
    if padded:
        masks[0][0, :5] = 0
        masks[1][1, 9:] = 0

    heard: list[tuple[str, torch.Tensor, torch.Tensor | None]] = []
    add = Recorder.add

    def adding(self: Recorder, layer: Any, rows: Any, places: Any = None) -> None:
        heard.append((layer.name, rows.clone(), places))
        with waits:
            add(self, layer, rows, places)

    monkeypatch.setattr(Recorder, "add", adding)
    monkeypatch.setattr(histograms, "kernels_of", lambda _: "triton")
    with record(model, names, skip_first=1) as recorder, torch.inference_mode():
        waits.seen.clear()
        for ids, mask in zip(batches, masks, strict=True):
            model(input_ids=ids, attention_mask=mask)
    assert set(waits.seen) <= {"tolist"}
    assert len(waits.seen) == len(batches)  # once a batch, for the mask
    found = recorder.state()

    monkeypatch.undo()
    expected = Recorder(recorder.layers, 1024)
    for name, rows, places in heard:
        layer = next(layer for layer in recorder.layers if layer.name == name)
        assert places is not None  # of the tokens that are skipped
        expected.add(layer, rows[places].cpu())
    for name, tensor in expected.state().tensors().items():
        if name == "powers":
            np.testing.assert_allclose(found.powers, tensor, rtol=1e-12)
        else:
            np.testing.assert_array_equal(found.tensors()[name], tensor, err_msg=name)
    counted = sum(int(mask.cumsum(1).sub(1).ge(1).logical_and(mask > 0).sum()) for mask in masks)
    assert found.count.unique().tolist() == [counted]


@pytest.mark.parametrize(
    ("mask", "skip_first", "times"),
    [
        (None, 0, 0),
        (None, 2, 1),
        (torch.ones(2, 8), 0, 1),
        (torch.tensor([[1] * 8, [0] * 8]), 1, 1),
    ],
)
def test_a_batch_waits_at_most_once(
    mask: torch.Tensor | None, skip_first: int, times: int, waits: Waits
) -> None:
    model = tiny_model()
    arguments = {"input_ids": tokens(2, 8), "attention_mask": mask}
    with waits:
        batch = counted_tokens(model, (), arguments, skip_first)
        for layer in find_layers(model):
            rows, places = batch.rows_and_places(layer, torch.zeros(16, 3))
            assert (len(rows) if places is None else len(places)) == batch.counted
    assert len(waits.seen) == times
