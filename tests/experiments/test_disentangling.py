"""Disentangle: its numbers against those of a sweep, its folder, kills and refusals."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file
from transformers import PreTrainedModel

import entangle
from entangle.experiments import disentangling
from entangle.experiments.disentangle_table import layers_table, quantiles_table
from entangle.experiments.disentangling import check_settings
from entangle.experiments.held_out import measure_layer
from entangle.model.layers import find_layers
from entangle.model.text import TokenWindows, evenly_spaced
from entangle.numerics import gaussian
from entangle.numerics.sparsity import Sparsity
from entangle.pruning.options import ONE, Clustering
from entangle.runs import setup
from entangle.runs.dataset import attributes_of, disentangled
from entangle.runs.setup import COMMAND
from tests.model.test_hooks import hooks_left
from tests.pruning.test_sparsifying import inputs_of, random_windows
from tests.tiny_models import tiny_model

Array = npt.NDArray[np.float64]

NAMES = ("gpt2", "qwen2")
SPARSITIES = ["0.5", "0.75"]
TOKENS = 80  # held-out: 5 windows of 16
_RUNS: dict[str, xr.DataTree] = {}
_FOUND: dict[str, xr.DataTree] = {}


def windows() -> TokenWindows:
    return random_windows(12)


def held_out() -> TokenWindows:
    return random_windows(5, seed=7)


def run_of(name: str) -> xr.DataTree:
    """Return the run of a tiny model, measured on a text of its own, once."""
    if name not in _RUNS:
        _RUNS[name] = entangle.measure(tiny_model(name), random_windows(10, seed=11))
    return _RUNS[name]


def disentangle(model: PreTrainedModel, name: str = "gpt2", **options: Any) -> xr.DataTree:
    words: dict[str, Any] = {"experts": [3, 4], "sparsity": SPARSITIES, "batch_size": 2}
    evaluation, run = options.pop("evaluation", held_out()), options.pop("run", run_of(name))
    return entangle.disentangle(model, windows(), evaluation, run=run, **words | options)


def found_of(name: str) -> xr.DataTree:
    """Return what is found of a tiny model, once; that it is untouched is seen by the way."""
    if name not in _FOUND:
        model = tiny_model(name)
        _FOUND[name] = disentangle(model, name)
        assert untouched(model, name)
    return _FOUND[name]


def outputs_of(tree: xr.DataTree) -> xr.Dataset:
    """Return what is kept of some neurons' outputs."""
    return tree.children["outputs"].to_dataset(inherit=False)


def about_of(tree: xr.DataTree) -> dict[str, Any]:
    """Return what it was made of, which stands beside what the run was made of."""
    about = disentangled(tree)
    assert tree.attrs == attributes_of(about["run"] | {"disentangled": about})
    return about


def untouched(model: PreTrainedModel, name: str = "gpt2") -> bool:
    before, now = tiny_model(name).state_dict(), model.state_dict()
    same = all(torch.equal(tensor, before[key]) for key, tensor in now.items())
    return same and now.keys() == before.keys() and hooks_left(model) == 0


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    """Return all files below folders of a run, and what is in them."""
    files = [file for name in names for file in sorted((folder / name).rglob("*"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_improvement_is_that_of_a_sweeps_held_out_losses(name: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {"assign": ["kmeans", "random"], "propagate": ["dense"]}
    entangle.sweep(
        tiny_model(name),
        windows(),
        held_out(),
        sparsity=SPARSITIES,
        method=["sparsegpt"],
        experts=[1, 3, 4],
        batch_size=2,
        out=tmp_path / "sweep",
        **words,
    )

    def lost(sparsity: str, *routed: str) -> Array:
        file = "-".join(["sparsegpt-row-exact-dense-none", *routed, "dense", sparsity])
        values = load_file(tmp_path / "sweep" / "arms" / f"{file}.safetensors")["held_out_lost"]
        return np.asarray(values.double())

    data = found_of(name).to_dataset()
    assert data["improvement"].dims == ("neuron", "sparsity", "arm")
    assert data["experts"].values.tolist() == [1, 3, 3, 4, 4]
    assert data["assign"].values.tolist() == ["kmeans", "kmeans", "random", "kmeans", "random"]
    assert data["sparsity"].values.tolist() == SPARSITIES
    assert np.array_equal(data["layer"], run_of(name)["layer"])
    for place, sparsity in enumerate(SPARSITIES):
        one = lost(sparsity, "1")
        assert (data["improvement"].values[:, place, 0] == 1).all()
        for arm, experts, assign in zip(
            range(1, 5), data["experts"].values[1:], data["assign"].values[1:], strict=True
        ):
            several = lost(sparsity, str(experts), str(assign), "auto", "0.5")
            found = data["improvement"].values[:, place, arm]
            np.testing.assert_allclose(found, np.sqrt(one / several), rtol=1e-4)
            assert found.std() > 0.01
            # A whole is between its halves.
            halves = data["improvement_halves"].values[:, place, arm]
            assert (halves.min(axis=1) <= found * (1 + 1e-9)).all()
            assert (halves.max(axis=1) >= found * (1 - 1e-9)).all()
            assert (halves[:, 0] != halves[:, 1]).all()


def halved(first: Array, second: Array, *, length: int, half: int) -> float:
    """Return the ratio of the errors' norms on the even or the odd windows."""
    chosen = np.arange(len(first)) // length % 2 == half
    return float(np.linalg.norm(first[chosen]) / np.linalg.norm(second[chosen]))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_dense_model_on_held_out_tokens(name: str) -> None:
    model, tree = tiny_model(name), found_of(name)
    layers = find_layers(model)
    data, kept = tree.to_dataset(), outputs_of(tree)
    inputs = inputs_of(model, layers, held_out(), 0)
    with torch.no_grad():
        outputs = {layer.name: layer.module(inputs[layer.name]) for layer in layers}
    exact = np.concatenate([gaussian.from_samples(one) for one in outputs.values()])
    np.testing.assert_allclose(data["held_out_wasserstein"], exact, rtol=1e-3)
    assert about_of(tree)["held_out_tokens"] == TOKENS == kept.sizes["token"]
    # Of each layer that which the run shows to be the most entangled.
    frame = run_of(name).to_dataset().to_dataframe()
    best = frame.loc[frame.groupby("layer", sort=False)["wasserstein"].idxmax()]
    names = [f"{one.layer}:{one.index}" for one in best[["layer", "index"]].itertuples(index=False)]
    assert kept["kept"].values.tolist() == names
    assert kept["clustered"].values.tolist() == [layer.name for layer in layers]
    for place, key in enumerate(names):
        layer, index = key.split(":")
        expected = outputs[layer][:, int(index)].numpy()
        np.testing.assert_allclose(kept["dense"].values[place], expected, rtol=1e-3, atol=1e-4)
        row = data.isel(neuron=frame.index.get_loc(best.index[place]))
        for one, arm in np.ndindex(2, 5):
            sparse = kept["sparse"].values[place, one, arm]
            errors = kept["sparse"].values[place, one, 0] - expected, sparse - expected
            ratio = np.linalg.norm(errors[0]) / np.linalg.norm(errors[1])
            assert float(row["improvement"][one, arm]) == pytest.approx(ratio, rel=1e-2)
            halves = [halved(*errors, length=16, half=half) for half in range(2)]
            assert row["improvement_halves"].values[one, arm] == pytest.approx(halves, rel=1e-2)
            apart = np.abs(np.sort(sparse) - np.sort(expected)).mean() / expected.std()
            assert float(row["distance_to_dense"][one, arm]) == pytest.approx(apart, rel=1e-2)
    assert data["wasserstein_share"].dims == ("neuron", "arm")
    assert (data["wasserstein_share"].values[:, 0] == 1).all()
    clusters = kept["clusters"].values
    assert clusters.shape == (len(layers), 5, TOKENS)
    assert (clusters[:, 0] == 0).all()
    assert clusters.max(axis=(0, 2)).tolist() == [0, 2, 2, 3, 3]


def test_only_matching_layers_and_counted_tokens_and_named_neurons_are_kept() -> None:
    model = tiny_model("gpt2")
    (layer,) = find_layers(model, "*.1.mlp.c_proj")
    frame = run_of("gpt2").to_dataset().to_dataframe()
    top = int(frame.loc[frame["layer"] == layer.name, "wasserstein"].argmax())
    other = 0 if top else 1
    named = [f"{layer.name}:{index}" for index in (other, top, other)]  # one is kept anyway
    tree = disentangle(
        model, layers="*.1.mlp.c_proj", neurons=named, skip_first=4, experts=[1, 3, 3]
    )
    data, outputs = tree.to_dataset(), outputs_of(tree)
    assert outputs["kept"].values.tolist() == [f"{layer.name}:{i}" for i in (top, other)]
    assert data["experts"].values.tolist() == [1, 3, 3]  # one is always there, and none twice
    assert data["assign"].values.tolist() == ["kmeans", "kmeans", "random"]
    assert set(data["layer"].values) == {layer.name}
    rows = inputs_of(model, [layer], held_out(), 4)[layer.name]
    assert len(rows) == 5 * 12 == about_of(tree)["held_out_tokens"]
    with torch.no_grad():
        expected = layer.module(rows)[:, [top, other]].T
    np.testing.assert_allclose(outputs["dense"], expected, rtol=1e-3, atol=1e-4)
    one, several = (outputs["sparse"].values[0, 0, arm] - expected[0].numpy() for arm in (0, 1))
    halves = [halved(one, several, length=12, half=half) for half in range(2)]
    found = data["improvement_halves"].values[top, 0, 1]
    assert found == pytest.approx(halves, rel=1e-2)
    assert about_of(tree)["neurons"] == named


def test_of_a_long_text_64_windows_are_drawn() -> None:
    text = random_windows(70, 4, seed=7)
    words: dict[str, Any] = {"layers": "*.0.mlp.c_fc", "experts": [2], "sparsity": [0.5]}
    tree = disentangle(tiny_model("gpt2"), evaluation=text, **words)
    few = disentangle(tiny_model("gpt2"), evaluation=evenly_spaced(text, 64), **words)
    xr.testing.assert_identical(tree, few)
    about = about_of(tree)
    assert (about["evaluation_windows"], about["held_out_tokens"]) == (64, 256)
    assert outputs_of(tree).sizes["token"] == 256


def test_a_folder_is_a_run_with_tables_and_opens_as_what_was_returned(tmp_path: Path) -> None:
    out = tmp_path / "run"
    token = COMMAND.set("entangle disentangle")
    tree = disentangle(tiny_model("gpt2"), out=out)
    COMMAND.reset(token)
    assert {path.name for path in out.iterdir()} == {
        *("run.json", "log.json", "neurons.zarr", "tables", "text.npy")
    }
    opened = entangle.open_run(out)
    xr.testing.assert_identical(opened.to_dataset().load(), tree.to_dataset())
    xr.testing.assert_identical(outputs_of(opened).load(), outputs_of(tree))
    xr.testing.assert_equal(tree.to_dataset(), found_of("gpt2").to_dataset())  # without a folder
    about = json.loads((out / "run.json").read_text())
    expected = {
        "command": "entangle disentangle",
        "experts": [3, 4],
        "sparsity": SPARSITIES,
        "neurons": [],
        "held_out_tokens": TOKENS,
        "fingerprint": windows().fingerprint,
        "evaluation_fingerprint": held_out().fingerprint,
        "tokens": 12 * 16,
    }
    assert about | expected == about == json.loads(json.dumps(about_of(tree)))
    assert about["run"]["fingerprint"] == random_windows(10, seed=11).fingerprint
    for name, table in (("layers", layers_table(tree)), ("quantiles", quantiles_table(tree))):
        written = pd.read_csv(out / "tables" / f"{name}.csv", dtype={"sparsity": str})
        pd.testing.assert_frame_equal(written, table, check_dtype=False, rtol=1e-14)
    words = (out / "tables" / "disentangle.md").read_text()
    assert re.search(r"\b192 tokens.*random.*\b12 windows of 16\b", words)
    assert re.search(r"\b80 held-out tokens.*random", words)
    top = entangle.rank(opened, 5)
    pd.testing.assert_frame_equal(top, entangle.rank(run_of("gpt2"), 5))
    by = entangle.rank(opened, 3, by="held_out_wasserstein")["held_out_wasserstein"]
    assert by.tolist() == sorted(tree.to_dataset()["held_out_wasserstein"].values)[:-4:-1]
    with pytest.raises(FileExistsError, match=r"run exists.*--overwrite"):
        disentangle(tiny_model("gpt2"), out=out)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the names of the layers that are measured; at the sixth it is killed."""
    seen: list[str] = []

    def measured(layer: Any, *args: Any) -> dict[str, torch.Tensor]:
        seen.append(layer.name)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return measure_layer(layer, *args)

    monkeypatch.setattr(disentangling, "measure_layer", measured)
    return seen


def test_killed_it_goes_on_where_it_was_and_the_bytes_are_the_same(
    tmp_path: Path, counted: list[str]
) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(KeyboardInterrupt):
        disentangle(model, out=tmp_path / "run")
    assert untouched(model)
    partial = tmp_path / "run.partial"
    assert [file.name for file in (partial / "blocks").iterdir()] == ["0.safetensors"]
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileExistsError, match=r"run\.partial.*experts\D+3, 4\D+3\D.*--overwrite"):
        disentangle(model, out=tmp_path / "run", experts=[3])
    done = disentangle(model, out=tmp_path / "run")
    names = [layer.name for layer in find_layers(model)]
    assert counted == [*names[:6], *names[4:]]  # the second block of four layers again
    assert not partial.exists()
    counted[:] = ["enough"] * 6
    whole = disentangle(model, out=tmp_path / "whole")
    xr.testing.assert_identical(done, whole)
    parts = ("tables", "neurons.zarr")
    first, second = (contents(tmp_path / name, *parts) for name in ("run", "whole"))
    assert len(first) > 20
    assert first == second
    abouts = [(tmp_path / name / "run.json").read_bytes() for name in ("run", "whole")]
    assert abouts[0] == abouts[1]


def test_after_an_error_the_model_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(layer: Any, *_: Any) -> None:
        raise ValueError("no such luck")

    monkeypatch.setattr(disentangling, "measure_layer", failed)
    model = tiny_model("qwen2")
    with pytest.raises(ValueError, match=r"^model.layers.0.self_attn.q_proj: no such luck"):
        disentangle(model, "qwen2")
    assert untouched(model, "qwen2")


def test_what_cannot_be_disentangled_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    other = entangle.measure(tiny_model("gpt2", seed=1), random_windows(10, seed=11))
    on_evaluation = entangle.measure(tiny_model("gpt2"), held_out())
    monkeypatch.setattr(setup, "walk_blocks", never)
    model = tiny_model("gpt2")

    def refused(error: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(error, match=match):
            disentangle(model, out=tmp_path / "run", **options)

    hashes = [run.attrs["weights"][:17] for run in (other, on_evaluation)]
    refused(ValueError, "weights.*{}.*{}".format(*hashes), run=other)
    refused(ValueError, r"\b100\.0% .*evaluation", run=on_evaluation)
    refused(ValueError, r"\b100\.0% .*evaluation", evaluation=windows())
    refused(ValueError, r"\b65 tokens.*context.*\b64\b", evaluation=random_windows(2, 65))
    refused(ValueError, r"c_attn.*\b3:5\b.*groups.*\b24\b", sparsity=["3:5"])
    refused(ValueError, rf"experts.*\b{SPARSITIES[-1]}\D+1\b", experts=[1])
    refused(ValueError, "skip_first", skip_first=16)
    refused(LookupError, r"layer.*'\*\.gate'", layers="*.gate")
    name = "transformer.h.0.attn.c_attn"
    for neuron in (f"{name}:72", f"{name}:-1", f"{name}:", name, "transformer.h.9.mlp.c_fc:0"):
        refused(LookupError, rf"neuron '{neuron}'.*{name}:71", neurons=[neuron])
    outside = "transformer.h.1.mlp.c_fc:0"
    refused(LookupError, f"neuron '{outside}'", neurons=[outside], layers="*.0.*")
    model.train()
    refused(ValueError, "training mode")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("experts", "sparsities", "match"),
    [
        ([], [0.5], r"experts.*\b0\.5\D+none"),
        ([1, 1], [0.5], r"experts.*\b0\.5\D+1, 1\b"),
        ([4, 0], [0.5, "2:4"], r"experts.*\b0\.5, 2:4\D+4, 0\b"),
        ([4], [], r"sparsity.*none\D+4\b"),
        ([4], [1.5], r"sparsity.*n:m.*\b1\.5"),
        ([4], ["half"], "sparsity.*n:m.*'half'"),
    ],
)
def test_words_that_make_no_arms_are_told(
    experts: Sequence[int], sparsities: Sequence[str | float], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        check_settings(experts, sparsities)


def test_words_become_sparsities_and_arms_each_once() -> None:
    parsed, arms = check_settings([16, 1, 4, 16], ["0.50", 0.5, "2:4"])
    assert parsed == [Sparsity(0.5), Sparsity(0.5, 2, 4)]
    routed = [Clustering(experts, assign) for experts in (16, 4) for assign in ("kmeans", "random")]
    assert arms == [ONE, *routed]
