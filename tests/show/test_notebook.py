"""One neuron in a notebook: what it shows is what the run holds."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import entangle
from entangle.numerics.gaussian import from_samples
from tests.measurement.test_context_search import drawn_windows
from tests.pruning.test_sparsifying import random_windows
from tests.runs.test_contexts_file import OLDER
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

LAYER = "model.layers.1.mlp.up_proj"
OTHER = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def run() -> xr.DataTree:
    return entangle.measure(tiny_model("llama"), random_windows(20), layers=[LAYER])


def test_a_neuron_says_its_numbers_and_draws_its_histogram(run: xr.DataTree) -> None:
    neuron = run.entangle.neuron(f"{LAYER}:3")
    values = run.to_dataset().isel(neuron=3)
    distance = float(values["wasserstein"])
    assert repr(neuron).startswith(f"{LAYER}:3: W1 {distance:.4f} ± ")
    words = neuron._repr_html_()
    assert f"<td>{distance:.4f}</td>" in words
    assert f"<td>{float(values['kurtosis']):.4g}</td>" in words
    assert f"<b>{LAYER}:3</b>" in words
    heights = np.array([float(x) for x in re.findall(r"height='([\d.]+)' fill", words)])
    line = re.search(r"points='([^']*)'", words)
    assert line is not None
    gaussian = 100 - np.array([float(p.split(",")[1]) for p in line.group(1).split()])
    assert len(heights) == len(gaussian) == 72
    assert max(heights.max(), gaussian.max()) == pytest.approx(100, abs=0.1)
    # Both are densities on one scale: all but some tokens, and all but a little of the Gaussian.
    assert heights.sum() == pytest.approx(gaussian.sum(), rel=0.03)
    figure = neuron.plot()
    assert f"{LAYER}:3" in figure.axes[0].get_title(loc="left")
    with pytest.raises(LookupError, match=rf"{LAYER}:37'.*\b37 neurons.*\b36\b"):
        run.entangle.neuron(f"{LAYER}:37")


def test_contexts_are_those_in_the_runs_folder(run: xr.DataTree, tmp_path: Path) -> None:
    entangle.measure(tiny_model("llama"), random_windows(), layers=[LAYER], out=tmp_path / "run")
    neuron = entangle.open_run(tmp_path / "run").entangle.neuron(f"{LAYER}:0")
    with pytest.raises(LookupError, match=f"entangle contexts .*run {LAYER}:0"):
        _ = neuron.contexts
    (one,) = OLDER["contexts"]
    contexts = [one | {"token": "a"}, one | {"token": "b"}]
    found = {f"{LAYER}:0": OLDER | {"contexts": contexts}}
    (tmp_path / "run" / "contexts.json").write_text(json.dumps(found))
    assert neuron.contexts["token"].tolist() == ["a", "b"]
    assert neuron.contexts.attrs == {n: OLDER[n] for n in OLDER if n != "contexts"}
    with pytest.raises(LookupError, match=f"contexts of {LAYER}:0.*entangle contexts"):
        _ = run.entangle.neuron(f"{LAYER}:0").contexts  # a run that is in no folder


def test_windows_and_sign_cases_are_those_in_the_runs_folder(tmp_path: Path) -> None:
    model, windows, tokenizer = tiny_model("llama"), drawn_windows(9), tiny_tokenizer()
    out = tmp_path / "run"
    entangle.measure(model, windows, layers=[LAYER, OTHER], out=out)
    run = entangle.open_run(out)
    neurons = [run.entangle.neuron(f"{layer}:3") for layer in (LAYER, OTHER)]
    for neuron in neurons:
        with pytest.raises(LookupError, match=f"entangle contexts .*{neuron.name}"):
            _ = neuron.windows
    names = [neuron.name for neuron in neurons]
    found = entangle.contexts(model, windows, run=run, neurons=names, tokenizer=tokenizer, out=out)
    gated, other = neurons
    assert [one.window for one in gated.windows] == [one.window for one in found[0].windows]
    words = gated.windows._repr_html_()
    texts = [html.unescape(one) for one in re.findall(r"<span[^>]*>(.*?)</span>", words)]
    assert "".join(texts) == "".join("".join(one.tokens) for one in gated.windows)
    shades = np.concatenate([one.shades for one in gated.windows])
    alphas = [float(one) for one in re.findall(r"rgba\([\d,]+,([\d.]+)\)", words)]
    assert alphas == pytest.approx(0.65 * np.abs(shades), abs=0.006)
    assert gated.cases["tokens"].sum() == windows.tokens.numel()
    assert gated.cases.attrs["up"] == f"{LAYER}:3"
    with pytest.raises(LookupError, match="no part of a gated MLP"):
        _ = other.cases
    assert {"scale", "windows", "unit"}.isdisjoint(gated.contexts.attrs)


def test_a_neuron_reads_a_text_with_the_runs_model(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    loaded = entangle.load_model(tmp_path / "model")
    entangle.measure(loaded, drawn_windows(9), layers=[LAYER], out=tmp_path / "run")
    neuron = entangle.open_run(tmp_path / "run").entangle.neuron(f"{LAYER}:3")
    found, text = neuron.on("a <b>\n"), "a <b>\n"
    tokens = tiny_tokenizer()(text)["input_ids"]
    heard: list[torch.Tensor] = []
    hook = model.get_submodule(LAYER).register_forward_hook(lambda *a: heard.append(a[2]))
    with torch.no_grad():
        model(torch.tensor([tokens]))
    hook.remove()
    assert found.table["output"].tolist() == pytest.approx(heard[0][0, :, 3].tolist(), rel=1e-4)
    assert "".join(found.table["token"]) == text
    words = found._repr_html_()
    assert "&lt;" in words
    assert "<b>\n" not in words
    assert f"quantile {found.table['quantile'][0]:.4f}" in words
    given = neuron.on(text, model=model, tokenizer=tiny_tokenizer())
    assert given.table.equals(found.table)


def test_clusters_are_those_of_its_kept_outputs(run: xr.DataTree) -> None:
    found = entangle.disentangle(
        tiny_model("llama"),
        random_windows(40, seed=1),
        random_windows(30, seed=2),
        run=run,
        experts=[3],
        neurons=[f"{LAYER}:5"],
        layers=[LAYER],
    )
    table = found.entangle.neuron(f"{LAYER}:5").by_cluster
    outputs = found["outputs"].to_dataset()
    dense = outputs["dense"].sel(kept=f"{LAYER}:5").to_numpy()
    labels = outputs["clusters"].sel(clustered=LAYER).to_numpy()
    assert table.groupby(["experts", "assign"])["tokens"].sum().tolist() == [480, 480, 480]
    for arm, (experts, assign) in enumerate([(1, "kmeans"), (3, "kmeans"), (3, "random")]):
        rows = table[(table["experts"] == experts) & (table["assign"] == assign)]
        assert rows["cluster"].tolist() == sorted({*labels[arm].tolist()})
        for row in rows.to_dict(orient="records"):
            part = dense[labels[arm] == row["cluster"]]
            assert row["tokens"] == len(part)
            assert row["mean"] == pytest.approx(part.mean(), rel=1e-5)
            assert row["wasserstein"] == from_samples(part[:, None])[0]
    with pytest.raises(LookupError, match=r"clusters.*disentangle"):
        _ = run.entangle.neuron(f"{LAYER}:5").by_cluster
    others = {int(str(name).rpartition(":")[2]) for name in outputs["kept"].to_numpy()}
    other = next(index for index in range(37) if index not in others)
    with pytest.raises(LookupError, match=f"disentangle.*--neurons {LAYER}:{other}"):
        _ = found.entangle.neuron(f"{LAYER}:{other}").by_cluster


def test_the_accessor_comes_with_what_returns_runs_and_not_before() -> None:
    words = (
        "import sys, entangle; assert 'torch' not in sys.modules; import xarray as xr;"
        "assert not hasattr(xr.DataTree, 'entangle'); entangle.open_run;"
        "assert hasattr(xr.DataTree, 'entangle')"
    )
    subprocess.run([sys.executable, "-c", words], check=True)
