"""Two runs side by side: what moved, against pandas and SciPy."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

import entangle
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model

LAYERS = ["*.self_attn.q_proj", "*.mlp.up_proj"]


@pytest.fixture(scope="module")
def pair() -> list[xr.DataTree]:
    """The same model on two texts."""
    model = tiny_model("llama")
    return [
        entangle.measure(model, random_windows(20, seed=seed), layers=LAYERS) for seed in (1, 2)
    ]


def test_layers_have_the_rank_correlation_of_their_neurons(pair: list[xr.DataTree]) -> None:
    found = entangle.diff(*pair)
    first, other = (run.to_dataset() for run in pair)
    assert found.layers["layer"].tolist() == list(dict.fromkeys(first["layer"].to_numpy()))
    for row in found.layers.to_dict(orient="records"):
        here = (first["layer"] == row["layer"]).to_numpy()
        x, y = (one["wasserstein"].to_numpy()[here] for one in (first, other))
        assert row["correlation"] == pytest.approx(stats.spearmanr(x, y).statistic)
        assert (row["median"], row["other_median"]) == (np.median(x), np.median(y))
        assert row["neurons"] == here.sum()
        bound = sum(one["wasserstein_error"].to_numpy()[here] for one in (first, other))
        assert row["beyond"] == (abs(y - x) > bound).mean()


def test_neurons_come_by_how_far_they_moved_beyond_their_bounds(pair: list[xr.DataTree]) -> None:
    neurons = entangle.diff(*pair).neurons
    first, other = (run.to_dataset() for run in pair)
    assert len(neurons) == first.sizes["neuron"]
    values = {
        f"{layer}:{index}": (x, y, ex + ey)
        for layer, index, x, y, ex, ey in zip(
            first["layer"].to_numpy(),
            first["index"].to_numpy(),
            first["wasserstein"].to_numpy(),
            other["wasserstein"].to_numpy(),
            first["wasserstein_error"].to_numpy(),
            other["wasserstein_error"].to_numpy(),
            strict=True,
        )
    }
    for row in neurons.to_dict(orient="records"):
        x, y, bound = values[row["neuron"]]
        assert (row["first"], row["other"], row["change"]) == (x, y, y - x)
        assert row["bound"] == bound
        assert row["beyond"] == pytest.approx(max(abs(y - x) - bound, 0))
    reach = neurons["change"].abs() - neurons["bound"]
    assert (np.diff(reach) <= 0).all()


def test_only_what_both_runs_know_is_compared(pair: list[xr.DataTree]) -> None:
    first, other = (run.to_dataset().load().copy(deep=True) for run in pair)
    first["wasserstein_error"][3] = 0.2  # not trusted
    other["wasserstein"][5] = np.nan  # dead
    other = other.isel(neuron=slice(0, -40))
    neurons = entangle.diff(first, other).neurons
    names = [
        f"{layer}:{index}"
        for layer, index in zip(first["layer"].to_numpy(), first["index"].to_numpy(), strict=True)
    ]
    kept = [name for i, name in enumerate(names[:-40]) if i not in {3, 5}]
    assert sorted(neurons["neuron"]) == sorted(kept)
    some = entangle.diff(first, other, layers="*.1.mlp.up_proj")
    assert some.layers["layer"].tolist() == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(LookupError, match=r"layer.*'nothing'"):
        entangle.diff(first, other, layers="nothing")
    with pytest.raises(LookupError, match=r"\b1 chosen layers.*no layer.*\.2\.mlp\.up_proj"):
        entangle.diff(first, other, layers="*.2.mlp.up_proj")


def test_a_run_compared_with_itself_does_not_move(pair: list[xr.DataTree]) -> None:
    found = entangle.diff(pair[0], pair[0])
    assert (found.neurons["change"] == 0).all()
    assert found.layers["correlation"].to_numpy() == pytest.approx(1)
