"""Order and sets of neurons: checked against plain loops, pandas and SciPy."""

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

import entangle
from entangle.measurement.ranking import correlation


@pytest.fixture
def run() -> xr.Dataset:
    distance = [0.1, 0.5, np.nan, 0.5, 0.3, 0.9, 0.2, 0.4]
    error = [0.01, 0.01, np.nan, 0.01, 0.01, 0.2, 0.01, 0.01]
    values = np.arange(8.0)
    variables = dict.fromkeys(("mean", "std", "skewness", "kurtosis", "modes"), values)
    variables |= {"wasserstein": np.array(distance), "wasserstein_error": np.array(error)}
    variables |= {"count": np.full(8, 100)}
    return xr.Dataset(
        {name: ("neuron", value) for name, value in variables.items()},
        coords={
            "layer": ("neuron", ["h.0.up"] * 4 + ["h.0.down"] * 4),
            "block": ("neuron", [0] * 8),
            "role": ("neuron", ["up"] * 4 + ["down"] * 4),
            "index": ("neuron", [0, 1, 2, 3] * 2),
        },
    )


def test_the_most_entangled_come_first_and_ties_keep_the_order_of_the_model(
    run: xr.Dataset,
) -> None:
    table = entangle.rank(run, 4)
    assert table["neuron"].tolist() == ["h.0.up:1", "h.0.up:3", "h.0.down:3", "h.0.down:0"]
    assert table["wasserstein"].tolist() == [0.5, 0.5, 0.4, 0.3]
    # Over the medians of those that can be ranked: of 0.1, 0.5, 0.5 and of 0.3, 0.2, 0.4.
    assert table["layer_ratio"].tolist() == pytest.approx([1, 1, 0.4 / 0.3, 1])


def test_neurons_without_a_trusted_distance_are_left_out(run: xr.Dataset) -> None:
    names = entangle.rank(run, 100)["neuron"].tolist()
    assert len(names) == 6
    assert not {"h.0.up:2", "h.0.down:1"} & set(names)
    assert entangle.rank(run, 0).empty


def test_by_another_variable_of_some_layers(run: xr.Dataset) -> None:
    table = entangle.rank(run, 2, by="mean", layers="*.up")
    assert table["neuron"].tolist() == ["h.0.up:3", "h.0.up:1"]
    assert list(table.columns[:3]) == ["neuron", "mean", "layer_ratio"]


def test_unknown_names_are_refused(run: xr.Dataset) -> None:
    with pytest.raises(LookupError, match=r"'beauty'.*wasserstein"):
        entangle.rank(run, by="beauty")
    with pytest.raises(LookupError, match=r"layer.*'\*\.x'"):
        entangle.rank(run, layers=["*.x"])
    with pytest.raises(LookupError, match=r"variable 'layer'.*wasserstein"):
        entangle.rank(run, by="layer")


# Sets of neurons.

SIZES = {"h.0.up": 40, "h.0.down": 25, "h.1.up": 40}


@pytest.fixture
def many() -> xr.Dataset:
    """Return a run with ties, neurons that are not trusted, and some without kurtosis."""
    generator, total = np.random.default_rng(5), sum(SIZES.values())
    distance = generator.uniform(0, 1, total).round(1)  # with ties
    error = np.where(generator.uniform(size=total) < 0.2, 0.3, 0.05)
    distance[::9] = np.nan
    kurtosis = distance + generator.normal(0, 0.4, total)
    kurtosis[::7] = np.nan
    kurtosis[3] = np.inf
    variables = {"wasserstein": distance, "wasserstein_error": error, "kurtosis": kurtosis}
    variables |= {"std": generator.uniform(size=total), "weight_norm": np.ones(total)}
    layers = np.repeat(list(SIZES), list(SIZES.values()))
    return xr.Dataset(
        {name: ("neuron", value) for name, value in variables.items()},
        coords={
            "layer": ("neuron", layers),
            "block": ("neuron", [int(name.split(".")[1]) for name in layers]),
            "role": ("neuron", [name.split(".")[2] for name in layers]),
            "index": ("neuron", np.concatenate([np.arange(size) for size in SIZES.values()])),
        },
    )


def rows_of(run: xr.Dataset, layer: str) -> list[dict[str, Any]]:
    """Return a layer's neurons that are trusted."""
    rows: list[Any] = run.to_dataframe().to_dict(orient="records")
    return [
        row
        for row in rows
        if row["layer"] == layer and row["wasserstein_error"] <= 0.1 and row["wasserstein"] >= 0
    ]


def chosen(run: xr.Dataset, layer: str, share: float, by: str, sign: int) -> list[int]:
    known = [row for row in rows_of(run, layer) if math.isfinite(row[by])]
    ordered = sorted(known, key=lambda row: (sign * row[by], row["index"]))
    count = max(1, round(share * SIZES[layer]))
    return sorted(row["index"] for row in ordered[:count])


@pytest.mark.parametrize("by", ["wasserstein", "kurtosis", "std"])
@pytest.mark.parametrize("share", [0.001, 0.03, 0.1, 0.37, 1])
@pytest.mark.parametrize("lowest", [False, True])
def test_the_share_of_each_layer_is_what_plain_sorting_takes(
    many: xr.Dataset, by: str, share: float, lowest: bool
) -> None:
    found = entangle.top_by_layer(many, share, by=by, lowest=lowest)
    assert list(found) == list(SIZES)
    for layer, neurons in found.items():
        assert neurons.tolist() == chosen(many, layer, share, by, 1 if lowest else -1)


def test_of_ties_the_first_are_taken(run: xr.Dataset) -> None:
    found = entangle.top_by_layer(run, 0.25)
    assert {name: rows.tolist() for name, rows in found.items()} == {"h.0.up": [1], "h.0.down": [3]}
    lowest = entangle.top_by_layer(run, 0.5, lowest=True, layers="*.up")
    assert {name: rows.tolist() for name, rows in lowest.items()} == {"h.0.up": [0, 1]}


def test_a_layer_without_a_trusted_neuron_has_none(run: xr.Dataset) -> None:
    run["wasserstein_error"][:4] = 0.5
    found = entangle.top_by_layer(run, 0.5)
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "h.0.up": [],
        "h.0.down": [0, 3],
    }
    drawn = entangle.matched_random(run, {"h.0.up": [0, 1]})
    assert drawn["h.0.up"].tolist() == []


def test_of_a_tree_and_of_its_dataset_the_sets_are_the_same(many: xr.Dataset) -> None:
    tree = xr.DataTree(many)
    top, other = entangle.top_by_layer(tree, 0.1), entangle.top_by_layer(many, 0.1)
    assert all(np.array_equal(top[name], other[name]) for name in SIZES)


@pytest.mark.parametrize("seed", range(3))
def test_random_neurons_are_as_many_trusted_and_nested(many: xr.Dataset, seed: int) -> None:
    tops = [entangle.top_by_layer(many, share) for share in (0.03, 0.1, 0.5)]
    drawn = [entangle.matched_random(many, top, seed=seed) for top in tops]
    for layer in SIZES:
        for top, random in zip(tops, drawn, strict=True):
            assert len(random[layer]) == len(top[layer]) == len(set(random[layer].tolist()))
            assert sorted(random[layer]) == random[layer].tolist()
            assert {*random[layer]} <= {row["index"] for row in rows_of(many, layer)}
        for small, large in itertools.pairwise(drawn):
            assert {*small[layer]} < {*large[layer]}


def test_random_neurons_differ_by_seed_and_layer_and_not_by_what_else_is_asked(
    many: xr.Dataset,
) -> None:
    many["wasserstein"] = "neuron", np.linspace(0, 1, many.sizes["neuron"])
    many["wasserstein_error"][:] = 0
    wanted = {name: range(8) for name in SIZES}
    drawn = entangle.matched_random(many, wanted, seed=1)
    again = entangle.matched_random(many, {"h.1.up": range(8)}, seed=1)
    assert again["h.1.up"].tolist() == drawn["h.1.up"].tolist()
    assert drawn["h.0.up"].tolist() != drawn["h.1.up"].tolist()  # both of 40
    assert (
        drawn["h.0.up"].tolist() != entangle.matched_random(many, wanted, seed=2)["h.0.up"].tolist()
    )
    counts = np.zeros(40)
    for seed in range(400):
        counts[entangle.matched_random(many, wanted, seed=seed)["h.0.up"]] += 1
    assert counts.sum() == 3200
    assert stats.chisquare(counts).pvalue > 1e-4  # each as often as any other


def test_sets_that_cannot_be_are_refused(many: xr.Dataset) -> None:
    for share in (0.0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match=rf"share.*{share}\b"):
            entangle.top_by_layer(many, share)
    with pytest.raises(LookupError, match=r"variable 'difficulty'.*wasserstein"):
        entangle.top_by_layer(many, 0.1, by="difficulty")
    with pytest.raises(LookupError, match=r"layer.*'\*\.x'"):
        entangle.top_by_layer(many, 0.1, layers=["*.up", "*.x"])
    with pytest.raises(LookupError, match=r"layer.*'h\.7\.up'"):
        entangle.matched_random(many, {"h.7.up": [1]})


# Correlations.


def test_rank_correlations_are_scipys_over_neurons_that_have_both(many: xr.Dataset) -> None:
    table = entangle.rank_correlations(many, others=("kurtosis", "std", "weight_norm"))
    assert table["layer"].tolist() == list(SIZES)
    assert table["block"].tolist() == [0, 0, 1]
    assert table["role"].tolist() == ["up", "down", "up"]
    for row in table.to_dict(orient="records"):
        rows = pd.DataFrame(rows_of(many, str(row["layer"])))
        assert row["neurons"] == len(rows)
        for other in ("kurtosis", "std"):
            both = rows[np.isfinite(rows[other])]
            rho = stats.pearsonr(both["wasserstein"].rank(), both[other].rank()).statistic
            assert row[other] == pytest.approx(rho, rel=1e-9)
            expected = (1 - rho**2) * math.sqrt((1 + rho**2 / 2) / (len(both) - 3))
            assert row[f"{other}_error"] == pytest.approx(expected, rel=1e-9)
        assert len(rows[np.isfinite(rows["kurtosis"])]) < len(rows)  # or it shows nothing
        assert math.isnan(row["weight_norm"])  # constant
        assert math.isnan(row["weight_norm_error"])


def test_rank_correlations_by_another_variable_of_some_layers(many: xr.Dataset) -> None:
    table = entangle.rank_correlations(many, "kurtosis", ["wasserstein"], layers="*.up")
    other = entangle.rank_correlations(many, "wasserstein", ["kurtosis"], layers="*.up")
    assert table["layer"].tolist() == ["h.0.up", "h.1.up"]
    assert table["wasserstein"].tolist() == pytest.approx(other["kurtosis"].tolist())
    assert (table["neurons"] < other["neurons"]).all()  # those without kurtosis
    with pytest.raises(LookupError, match=r"variable 'difficulty'.*wasserstein"):
        entangle.rank_correlations(many)
    with pytest.raises(LookupError, match=r"variable 'index'.*wasserstein"):
        entangle.rank_correlations(many, "index", ["std"])
    with pytest.raises(LookupError, match=r"layer.*'\*\.x'"):
        entangle.rank_correlations(many, others=["std"], layers="*.x")


def test_a_correlation_by_hand_and_its_error_at_its_ends() -> None:
    x = np.arange(12.0)
    assert correlation(x, np.exp(x)) == pytest.approx((1, 0), abs=1e-9)
    assert correlation(x, -(x**3)) == pytest.approx((-1, 0), abs=1e-9)
    # Ranks 1 to 4 against 2, 1, 4, 3: 1 - 6 * 4 / (4 * 15) = 0.6, of four neurons.
    rho, error = correlation(np.array([1.0, 5.0, 6.0, 9.0]), np.array([3.0, 0.0, 8.0, 7.0]))
    assert rho == pytest.approx(0.6)
    assert error == pytest.approx(0.64 * math.sqrt(1.18))
    # Ranks 1 to 5 against 4, 1, 3, 5, 2 are off by squares of 20, so there is no correlation.
    none = correlation(np.arange(5.0), np.array([4.0, 1.0, 3.0, 5.0, 2.0]))
    assert none == pytest.approx((0, 1 / math.sqrt(2)), abs=1e-9)


def test_of_fewer_than_four_or_of_constants_there_is_no_correlation() -> None:
    x = np.arange(4.0)
    for pair in ((x[:3], x[:3]), (x, np.ones(4)), (np.ones(4), x), (x[:0], x[:0])):
        assert np.isnan(correlation(*pair)).all()
    assert math.isfinite(correlation(x, x)[0])
