"""Inputs of layers are measured beside outputs, and every command tells the two apart."""

import base64
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
import torch
import xarray as xr
from torch import nn
from transformers import PreTrainedModel

import entangle
from entangle.__main__ import main
from entangle.experiments.ablating import neurons_of
from entangle.experiments.interventions import Arm
from entangle.measurement.measuring import measure
from entangle.model.layers import find_layers
from entangle.model.sides import LayerInputs, find_inputs
from entangle.model.text import TokenWindows
from entangle.numerics.gaussian import from_samples
from entangle.pruning.budgets import zeros_of
from entangle.pruning.options import Pruning
from entangle.runs.dataset import about, check_neuron, outputs_of, summary
from entangle.show import reporting
from tests.measurement.test_recording import Array, agrees, tokens, windows_of
from tests.tiny_models import save_tiny, tiny_llama4, tiny_mamba, tiny_model, tiny_tokenizer

DOWN = "model.layers.0.mlp.down_proj"
WORDS = "The quick brown fox jumps over the lazy dog; a wizard's job is to vex chumps quickly. "


def raw_inputs(
    model: PreTrainedModel, names: Sequence[str], batches: Sequence[dict[str, torch.Tensor]]
) -> dict[str, list[torch.Tensor]]:
    """Return what layers receive, heard by plain hooks: a tensor per batch."""
    heard: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0].float().clone())
        )
        for name, kept in heard.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return heard


def rows_of(heard: dict[str, list[torch.Tensor]]) -> Array:
    """Return the inputs of all layers side by side (tokens, inputs)."""
    parts = [torch.cat([x.flatten(0, -2) for x in kept]) for kept in heard.values()]
    return torch.cat(parts, dim=1).double().numpy()


def inputs_of(run: xr.DataTree | xr.Dataset) -> xr.Dataset:
    data = run.to_dataset() if isinstance(run, xr.DataTree) else run
    return data.isel(neuron=data["side"].to_numpy() == "input")


# What is measured.


@pytest.mark.parametrize(
    ("name", "pattern", "dtype"),
    [
        ("llama", "*.down_proj", torch.float32),
        ("llama", "*.1.self_attn.*", torch.bfloat16),
        ("gpt2", "*.mlp.*", torch.float32),
        ("opt", "*.fc1", torch.float16),  # its rows have two dimensions
    ],
)
def test_inputs_are_what_each_layer_receives_and_outputs_stay_as_they_are(
    name: str, pattern: str, dtype: torch.dtype
) -> None:
    model, windows = tiny_model(name, dtype=dtype), windows_of(tokens(12))
    run = measure(model, windows, input_layers=pattern, batch_size=5)
    names = [layer.name for layer in find_layers(model, pattern)]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    heard = raw_inputs(model, names, [{"input_ids": one} for one in windows.tokens.split(5)])
    found = inputs_of(run)
    agrees(found, rows_of(heard))
    sizes = {one: kept[0].shape[-1] for one, kept in heard.items()}
    expected = [f"{one}:input:{i}" for one, size in sizes.items() for i in range(size)]
    assert found["neuron"].to_numpy().tolist() == expected
    assert {*found["layer"].to_numpy()} == {f"{one}:input" for one in names}
    assert (np.char.endswith(found["role"].to_numpy(), ":input")).all()
    weights: Any = [model.get_submodule(one).get_parameter("weight").detach() for one in names]
    weights = [one if name == "gpt2" else one.T for one in weights]  # (inputs, neurons)
    norms = np.concatenate([np.linalg.norm(one.double().numpy(), axis=1) for one in weights])
    np.testing.assert_allclose(found["weight_norm"], norms)
    alone = measure(model, windows, batch_size=5).to_dataset()
    assert outputs_of(run).drop_attrs().identical(alone.drop_attrs())
    assert about(run)["input_layers"] == [pattern]
    assert "input_layers" not in about(alone)
    blocks = run["block"].to_numpy()
    assert (np.diff(blocks) >= 0).all()  # as block by block runs write them


def test_distances_of_inputs_are_scipys() -> None:
    model, windows = tiny_model(), windows_of(tokens(40))
    found = inputs_of(measure(model, windows, layers="*.q_proj", input_layers=DOWN))
    rows = rows_of(raw_inputs(model, [DOWN], [{"input_ids": windows.tokens}]))
    gaussian = scipy.stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    for channel in range(0, 37, 6):
        values = (rows[:, channel] - rows[:, channel].mean()) / rows[:, channel].std()
        distance = scipy.stats.wasserstein_distance(values, gaussian)
        row = found.isel(neuron=channel)
        assert abs(row["wasserstein"] - distance) < row["wasserstein_error"] + 5e-4
        assert distance > 0.2  # a product of two: no Gaussian


def test_padding_is_not_counted() -> None:
    model, ids = tiny_model(), tokens(3)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 11:] = 0
    with entangle.record(model, DOWN, input_layers=DOWN, skip_first=2) as recorder, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    kept = (mask != 0) & (mask.cumsum(dim=1) > 2)
    (rows,) = raw_inputs(model, [DOWN], [{"input_ids": ids, "attention_mask": mask}])[DOWN]
    found = inputs_of(recorder.dataset())
    assert (found["count"] == int(kept.sum())).all()
    np.testing.assert_array_equal(found["max"], rows[kept].amax(dim=0))


def test_what_cannot_be_heard_is_left_out_and_said() -> None:
    """The router of Llama 4 gives a tuple, but what it receives are rows; dt_proj does not run."""
    run = measure(tiny_llama4(), windows_of(tokens(2)), input_layers=["*.router", "*.q_proj"])
    assert "model.layers.1.feed_forward.router:input" in inputs_of(run)["layer"]
    mamba, name = tiny_mamba(), "backbone.layers.0.mixer.dt_proj"
    run = measure(mamba, windows_of(tokens(2)), input_layers=["*.0.*"])
    assert {name, f"{name}:input"} <= {*about(run)["skipped_layers"]}
    assert any(f"{name}:input" in warning for warning in summary(run)["warnings"])
    for named in (name, "*.dt_proj"):
        with pytest.raises(ValueError, match=rf"{re.escape(name)}:input\b.* did not run"):
            measure(mamba, windows_of(tokens(2)), input_layers=named)


def test_patterns_are_of_layers_and_what_is_left_out_is_named_as_inputs_are() -> None:
    model = tiny_model()
    names = [f"model.layers.{block}.mlp.down_proj:input" for block in range(3)]
    assert [one.name for one in find_inputs(model, "*.down_proj")] == names
    assert [one.name for one in find_inputs(model, "*.down_proj", "*.1.*")] == names[::2]
    assert [one.name for one in find_inputs(model, "*.down_proj", "*.down_proj")] == names
    with pytest.raises(LookupError, match=r"no layer matches '\*\.down'"):
        find_inputs(model, "*.down")
    with pytest.raises(LookupError, match="no layer is left"):
        find_inputs(model, "*.down_proj", "*:input")
    run = measure(model, windows_of(tokens(2)), layers=(), input_layers=DOWN)  # inputs alone
    assert run.sizes["neuron"] == summary(run)["inputs"]["neurons_measured"] == 37
    words: dict[str, Any] = {"input_layers": "*.down_proj"}
    some = measure(model, windows_of(tokens(2)), **words, exclude=[names[0], "*.1.*", "*.q_proj"])
    assert {*inputs_of(some)["layer"].to_numpy()} == {names[2]}
    assert "model.layers.0.mlp.down_proj" in outputs_of(some)["layer"]
    some = measure(model, windows_of(tokens(2)), layers=(), **words, exclude=names[0])
    assert {*some["layer"].to_numpy()} == {*names[1:]}
    with entangle.record(model, **words, exclude=names[0]) as recorder:
        assert names[0] not in {one.name for one in recorder.layers}
        model(input_ids=tokens(1))
    with pytest.raises(LookupError, match=r"no layer matches '\*\.up_proj:input'"):
        measure(model, windows_of(tokens(2)), **words, exclude="*.up_proj:input")
    with pytest.raises(ValueError, match=r"difficulty 5.*only inputs"):
        measure(model, windows_of(tokens(2)), layers=(), input_layers=DOWN, difficulty=5)
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    mlp.add_module("down_proj:input", nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"a layer .*0\.mlp\.down_proj:input\b"):
        find_inputs(model, DOWN)


# Where a run goes.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, and runs of them with inputs and without."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "model", "llama")
    (folder / "text.txt").write_text(WORDS * 60)
    words = f"measure {folder}/model --text {folder}/text.txt --length 32 --windows 20"
    words += " --layers *.mlp.* --input-layers *.down_proj *.0.self_attn.o_proj"
    words += f" --difficulty 20 --skip-first 2 --out {folder}/run"
    assert main(words.split()) == 0
    options: dict[str, Any] = {"layers": "*.mlp.*", "difficulty": 20, "skip_first": 2}
    measure(entangle.load_model(folder / "model"), drawn(folder), **options, out=folder / "without")
    return folder


def drawn(place: Path) -> TokenWindows:
    text = place / "text.txt"
    return entangle.token_windows(text, tiny_tokenizer(), windows=20, length=32)


@pytest.fixture(scope="module")
def run(place: Path) -> xr.DataTree:
    return entangle.open_run(place / "run")


def test_a_summary_does_not_mix_them(run: xr.DataTree, place: Path) -> None:
    found, without = summary(run), summary(entangle.open_run(place / "without"))
    inputs = found.pop("inputs")
    assert found == without
    known = inputs_of(run)["wasserstein"].to_numpy()
    assert inputs["neurons_measured"] == 3 * 37 + 24
    assert inputs["layers"] == 4
    assert inputs["median"] == np.median(known)
    assert inputs["largest_neuron"] == inputs_of(run)["neuron"].to_numpy()[known.argmax()]


def test_rank_shows_both_and_patterns_tell_them_apart(run: xr.DataTree, place: Path) -> None:
    table = entangle.rank(run, 10_000)
    inputs = table["neuron"].str.contains(":input:")
    assert inputs.sum() == 135
    assert (~inputs).sum() == 3 * (37 + 37 + 24)
    only = entangle.rank(run, 10_000, layers="*:input")
    assert [*only["neuron"]] == [*table["neuron"][inputs]]
    for others in ({"exclude": "*:input"}, {"layers": "*_proj"}):
        left = entangle.rank(run, 10_000, **others)
        assert left.equals(entangle.rank(entangle.open_run(place / "without"), 10_000))
    part = only[only["neuron"].str.startswith(f"{DOWN}:input")]
    assert np.median(part["layer_ratio"]) == pytest.approx(1)


def test_mapping_difficulty_is_of_outputs(run: xr.DataTree, place: Path) -> None:
    found = inputs_of(run)
    assert np.isnan(found["difficulty"]).all()
    assert not found["difficulty_pairs"].any()
    assert np.isfinite(outputs_of(run)["difficulty"]).all()
    tables = [
        (place / one / "tables" / "difficulty.csv").read_bytes() for one in ("run", "without")
    ]
    assert tables[0] == tables[1]
    drawn = entangle.plots.difficulty(run)
    titles = [ax.get_title() for ax in drawn.axes]
    assert titles == [f"{one}\n{size} neurons" for one, size in zip(*ROLES, strict=True)]


ROLES = ("gate_proj", "up_proj", "down_proj"), (37, 37, 24)
INPUTS = ["o_proj:input\n24 inputs", "down_proj:input\n37 inputs"]


@pytest.mark.parametrize("kind", ["heatmap", "layers", "ranks"])
def test_pictures_have_panels_of_inputs(kind: str, run: xr.DataTree) -> None:
    figure = getattr(entangle.plots, kind)(run)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    outputs = [f"{one}\n{size} neurons" for one, size in zip(*ROLES, strict=True)]
    assert sorted(titles) == sorted(outputs + INPUTS)


def test_a_picture_of_one_input_says_so(run: xr.DataTree) -> None:
    (panel, *_) = entangle.plots.neuron(run, f"{DOWN}:input:17").axes
    assert panel.get_xlabel().startswith("input of the layer (input units)")
    assert panel.get_legend_handles_labels()[1] == ["inputs", "fitted Gaussian"]
    both = entangle.plots.neurons(run, [f"{DOWN}:3", f"{DOWN}:input:3"])
    assert both.get_supxlabel().startswith("output of the neuron or input of the layer,")
    page = run.entangle.neuron(f"{DOWN}:input:17")._repr_html_()
    assert re.search(r"histogram of the inputs over.*<small>inputs from", page, re.DOTALL)


def test_contexts_are_those_of_the_inputs(run: xr.DataTree, place: Path) -> None:
    names = [f"{DOWN}:input:5", "model.layers.0.self_attn.o_proj:input:2", f"{DOWN}:5"]
    assert main(["contexts", str(place / "run"), *names]) == 0
    kept = json.loads((place / "run" / "contexts.json").read_text())["neurons"]
    assert [*kept] == names
    model = entangle.load_model(place / "model")
    windows = drawn(place)
    for name in names[:2]:
        layer, _, index = name.replace(":input", "").rpartition(":")
        (rows,) = raw_inputs(model, [layer], [{"input_ids": windows.tokens}])[layer]
        values = rows[:, 2:, int(index)].flatten().double().numpy()
        assert kept[name]["wasserstein"] == pytest.approx(from_samples(values[:, None])[0])
        assert kept[name]["contexts"][0]["output"] == pytest.approx(values.min(), rel=1e-6)
    found = entangle.top_by_layer(run, count=1)  # what --top takes
    assert {f"{DOWN}:input", DOWN} <= {*found}


def test_the_report_shows_both(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "_FIGURES", {"measure": ()})
    monkeypatch.setattr(reporting, "get_plotlyjs", str)
    file = entangle.report(place / "run", place / "report.html")
    text = file.read_text(encoding="utf-8")
    packed = re.search(r'data-name="header">([^<]+)<', text)
    assert packed is not None
    header = json.loads(zlib.decompress(base64.b64decode(packed[1])))
    sides = {layer["name"]: (layer["role"], layer["side"]) for layer in header["layers"]}
    assert sides[f"{DOWN}:input"] == ("mlp.down_proj:input", "input")
    assert sides[DOWN] == ("mlp.down_proj", "output")
    assert len(sides) == 9 + 4
    assert re.search(r"<dt>inputs</dt><dd>135 of 4 layers</dd>", text)
    assert "<dt>input layers</dt><dd>*.down_proj *.0.self_attn.o_proj</dd>" in text


def test_two_runs_are_compared_side_by_side(run: xr.DataTree, place: Path) -> None:
    found = entangle.diff(run, run)
    assert len(found.neurons) == 135 + 3 * 98
    assert not found.neurons["change"].any()
    assert f"{DOWN}:input" in {*found.layers["layer"]}
    assert len(entangle.diff(run, entangle.open_run(place / "without")).layers) == 9
    with pytest.raises(LookupError, match=rf"the second run has no layer {DOWN}:input"):
        entangle.diff(run, entangle.open_run(place / "without"), layers=f"{DOWN}:input")


def test_an_input_that_the_run_lacks_is_told(run: xr.DataTree) -> None:
    data = run.to_dataset()
    check_neuron(data, f"{DOWN}:input:36")
    with pytest.raises(LookupError, match=rf"{DOWN}:input has 37 neurons, 0 to 36"):
        check_neuron(data, f"{DOWN}:input:37")
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(LookupError, match=rf"no inputs of {name}\b.*--input-layers {name}"):
        check_neuron(data, f"{name}:input:1")


# What uses outputs alone.


def test_budgets_and_ablations_use_outputs_alone(run: xr.DataTree, place: Path) -> None:
    model = entangle.load_model(place / "model")
    layers = find_layers(model, "*.mlp.*")
    without = entangle.open_run(place / "without")
    pruning = Pruning.of(sparsity=0.5, budget="wasserstein*std", across="entanglement")
    zeros = [zeros_of(layers, pruning, run=one.to_dataset()) for one in (run, without)]
    assert all(torch.equal(zeros[0][n], zeros[1][n]) for n in zeros[1])  # type: ignore[arg-type]
    for kind in ("wasserstein", "random", "bottom", "difficulty", "weight_norm"):
        arm = Arm("zero", None, 1, kind, 0.2, 0, None)
        chosen = [neurons_of(one, arm, layers) for one in (run, without)]
        assert [*chosen[0]] == [layer.name for layer in layers]
        assert all(np.array_equal(chosen[0][name], chosen[1][name]) for name in chosen[1])


def test_no_command_takes_inputs_for_layers(run: xr.DataTree, place: Path) -> None:
    model, windows = entangle.load_model(place / "model"), windows_of(tokens(4, 16))
    held_out = windows_of(tokens(3, 16, seed=5))
    words: dict[str, Any] = {"run": run, "layers": "*:input"}
    with pytest.raises(LookupError, match=r"no layer of this run matches '\*:input'"):
        entangle.ablate(model, None, held_out, intervention="zero", **words)
    with pytest.raises(LookupError, match=r"no layer of this run matches '\*:input'"):
        entangle.disentangle(model, windows, held_out, experts=2, **words)
    with pytest.raises(LookupError, match=r"no layer matches '\*:input'"):
        entangle.sparsify(model, windows, sparsity=0.5, budget="std", **words)
    with pytest.raises(LookupError, match=rf"no neuron '{DOWN}:input:3' in the chosen"):
        entangle.disentangle(
            model, windows, held_out, run=run, experts=2, neurons=[f"{DOWN}:input:3"]
        )
    # The run has the inputs of this layer, and not its outputs.
    with pytest.raises(LookupError, match=r"only 0 of the 24 neurons of .*0\.self_attn\.o_proj"):
        entangle.sparsify(
            model, windows, sparsity=0.5, budget="std", run=run, layers="*.0.self_attn.o_proj"
        )


def test_inputs_stand_for_no_layer_of_a_model() -> None:
    (one,) = find_inputs(tiny_model(), DOWN)
    assert isinstance(one, LayerInputs)
    assert (one.name, one.role, one.block) == (f"{DOWN}:input", "mlp.down_proj:input", 0)
    assert (one.neurons, one.layer.neurons, one.side) == (37, 24, "input")
