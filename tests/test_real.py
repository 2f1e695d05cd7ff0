"""The real 135M model on real text: distances against exact ones, and what is known of it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xarray as xr
from scipy import stats

import entangle
from entangle.model.layers import find_layers
from entangle.model.tokenwise import layers_of_tokens
from entangle.numerics import gaussian, wasserstein
from entangle.numerics.histograms import Histograms
from entangle.runs import store
from entangle.runs.dataset import runs_of
from tests.numerics.test_bulk import exact

DATA = Path(__file__).parents[1] / "data"
LAYERS = [
    "model.layers.0.self_attn.q_proj",  # its inputs are few: one per kind of token
    "model.layers.0.mlp.gate_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.2.mlp.down_proj",
    "model.layers.5.mlp.up_proj",
    "model.layers.8.self_attn.o_proj",
    "model.layers.11.mlp.down_proj",  # massive first tokens
    "model.layers.15.self_attn.k_proj",
    "model.layers.20.self_attn.v_proj",
    "model.layers.28.mlp.down_proj",  # massive first tokens
    "model.layers.29.mlp.down_proj",
]
Array = npt.NDArray[np.float64]

pytestmark = pytest.mark.real


class Measured:
    """A run on 8 windows of 512, and the raw outputs of some of its layers."""

    def __init__(self) -> None:
        model = entangle.load_model(DATA / "smollm2-135m")
        tokenizer = entangle.load_tokenizer(DATA / "smollm2-135m")
        self.windows = entangle.token_windows(DATA / "python-docs", tokenizer, windows=8)
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in LAYERS}
        handles = [
            layer.module.register_forward_hook(
                lambda _, __, output, name=layer.name: parts[name].append(output.flatten(0, 1))
            )
            for layer in find_layers(model, LAYERS)
        ]
        self.run = entangle.measure(model, self.windows)
        for handle in handles:
            handle.remove()
        self.raw = {name: torch.cat(outputs) for name, outputs in parts.items()}
        self.exact = {name: gaussian.from_samples(rows) for name, rows in self.raw.items()}

    def values(self, variable: str, layer: str) -> Array:
        dataset = self.run.to_dataset()
        values: Array = dataset[variable].to_numpy()[dataset["layer"].to_numpy() == layer]
        return values


@pytest.fixture(scope="module")
def measured() -> Measured:
    return Measured()


@pytest.mark.parametrize("layer", LAYERS)
def test_distances_lie_within_their_bounds_of_the_exact_ones(
    measured: Measured, layer: str
) -> None:
    distance, exact = measured.values("wasserstein", layer), measured.exact[layer]
    error = np.abs(distance - exact)
    assert (error <= measured.values("wasserstein_error", layer)).all()
    assert (error <= 0.002).mean() >= 0.99
    top, exact_top = (set(np.argsort(-values)[:20]) for values in (distance, exact))
    assert len(top & exact_top) >= 19
    assert stats.spearmanr(distance, exact).statistic >= 0.998


@pytest.mark.parametrize("layer", LAYERS)
def test_distances_of_bulks_lie_within_their_bounds_of_the_exact_ones(
    measured: Measured, layer: str
) -> None:
    distance = measured.values("wasserstein_bulk", layer)[::16]
    bound = measured.values("wasserstein_bulk_error", layer)[::16]
    truth = np.array([exact(column) for column in measured.raw[layer].numpy()[:, ::16].T])
    assert (np.abs(distance - truth) <= bound + 2e-4).all()
    fine = bound < 0.02
    assert (np.abs(distance - truth)[fine] <= 0.004).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_moments_are_those_of_the_raw_outputs(measured: Measured, layer: str) -> None:
    rows = measured.raw[layer].double().numpy()
    std = rows.std(axis=0)
    step = 16 / 1024 / 64  # of the pilot's std, which is near the final one or below
    assert np.abs((measured.values("mean", layer) - rows.mean(axis=0)) / std).max() < step
    assert np.abs(measured.values("std", layer) / std - 1).max() < step
    kurtosis = stats.kurtosis(rows)
    assert np.allclose(measured.values("skewness", layer), stats.skew(rows), rtol=2e-3, atol=2e-3)
    assert np.allclose(measured.values("kurtosis", layer), kurtosis, rtol=2e-3, atol=2e-3)
    assert (measured.values("min", layer) == rows.min(axis=0)).all()
    assert (measured.values("max", layer) == rows.max(axis=0)).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_pilot_without_first_tokens_violates_no_bound(measured: Measured, layer: str) -> None:
    rows = measured.raw[layer]
    pilot = rows[:2048]
    histograms = Histograms.zeros(rows.shape[1])
    histograms.start(pilot[torch.arange(len(pilot)) % 512 != 0])
    histograms.add(rows)
    found = wasserstein.from_histograms(histograms, histograms.moments())
    assert (np.abs(found.wasserstein - measured.exact[layer]) <= found.error).all()


def test_the_libraries_agree_to_their_own_sampling_error(measured: Measured) -> None:
    rows = measured.raw["model.layers.5.mlp.up_proj"][:, :40]
    drawn = np.sort(np.random.default_rng(7).standard_normal(len(rows)))
    # W1 between the drawn sample and N(0, 1), not standardised: all that they may differ by.
    fine = stats.norm.ppf((np.arange(64 * len(rows)) + 0.5) / (64 * len(rows)))
    sampling_error = np.abs(np.repeat(drawn, 64) - fine).mean()
    assert sampling_error == pytest.approx(1.3 / len(rows) ** 0.5, rel=0.9)
    exact = gaussian.from_samples(rows)
    for method in ("pot", "scipy"):
        theirs = gaussian.from_samples(rows, method=method, seed=7)
        assert np.abs(theirs - exact).max() <= sampling_error * 1.001


def test_what_is_known_of_the_model_is_found(measured: Measured) -> None:
    dataset = measured.run.to_dataset()
    assert dataset.sizes["neuron"] == 155_520
    assert (dataset["count"] == 8 * 512).all()
    frame = dataset.to_dataframe()
    by_layer = frame.groupby("layer")["wasserstein"]
    assert len(by_layer) == 210
    apart = frame[frame["layer"] == "model.layers.11.mlp.down_proj"]
    assert apart["wasserstein"].median() > 0.4
    assert (apart["kurtosis"] > 100).mean() > 0.6
    assert by_layer.median().drop("model.layers.11.mlp.down_proj").max() < 0.25
    assert (by_layer.max() > 4 * 0.833 / 4096**0.5).all()
    assert 100 < (by_layer.max() > 0.2).sum() < 190
    assert 4 < (by_layer.max() / by_layer.median()).median() < 7
    up = frame[frame["layer"] == "model.layers.5.mlp.up_proj"]
    assert up["index"].iloc[int(up["wasserstein"].argmax())] == 816
    top = entangle.rank(measured.run, 20)
    assert (top["neuron"].str.startswith("model.layers.11.mlp.down_proj:")).sum() >= 10


def test_the_mlps_layers_are_known_by_what_they_do() -> None:
    model = entangle.load_model(DATA / "smollm2-135m")
    layers = find_layers(model)
    mlp = [layer for layer in layers if layer.role.startswith("mlp.")]
    assert layers_of_tokens(model, layers) == mlp


def test_a_saved_run_is_what_was_measured(measured: Measured, tmp_path: Path) -> None:
    store.write_run(tmp_path, [measured.run], {"model": "real"}, dict, runs_of(measured.run))
    opened = entangle.open_run(tmp_path)
    assert opened.identical(measured.run)
    plain = xr.open_zarr(tmp_path / "neurons.zarr", chunks=None)
    assert plain.identical(measured.run.to_dataset())
