"""Tables of what clusters and experts gain: against pandas and SciPy, from made-up runs."""

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from entangle.experiments.disentangle_table import layers_table, markdown, quantiles_table

Array = npt.NDArray[np.float64]

SIZES = {"h.0.up": 40, "h.0.down": 7, "h.1.up": 41, "h.1.down": 1}  # neurons
EXPERTS = [1, 4, 4, 16, 16]
SPARSITIES = ["0.8", "2:4"]
ABOUT: dict[Any, Any] = {
    "model": "some/model",
    "layers": ["*.up", "*.down"],
    "tokens": 65_536,
    "text": "data/docs",
    "windows": 128,
    "length": 512,
    "held_out_tokens": 8192,
    "evaluation": "data/others",
    "skipped_parameters": [],
    "run": {"tokens": 12_345, "text": "data/before"},
}


def made_up() -> xr.DataTree:
    """Return what disentangle might find: some neurons untrusted, dead, or without a difficulty."""
    rng, count = np.random.default_rng(0), sum(SIZES.values())

    def drawn(*shape: int) -> Array:
        return rng.gamma(3, 0.1, (count, *shape))

    one = {name: drawn() for name in ("wasserstein", "kurtosis", "weight_norm", "std")}
    one |= {"held_out_wasserstein": drawn(), "held_out_difficulty": drawn()}
    one["wasserstein_error"] = np.full(count, 0.01)
    within = {name: drawn(5) for name in ("wasserstein_within", "difficulty_within")}
    sparse = {name: drawn(2, 5) for name in ("distance_to_dense", "improvement")}
    # So that correlations differ from zero and from each other.
    sparse["improvement"] += 3 * one["wasserstein"][:, None, None] * np.arange(5) / 4
    halves = sparse["improvement"][..., None] * rng.uniform(0.8, 1.2, (count, 2, 5, 2))
    one["wasserstein"][3] = math.nan  # dead
    one["wasserstein_error"][[5, 41]] = 0.2  # untrusted: of the first layer and the second
    one["held_out_difficulty"][8] = math.nan
    within["difficulty_within"][8] = math.nan
    sparse["improvement"][9], halves[9] = math.nan, math.nan
    sparse["improvement"][10, :, 1:], halves[10, 0, 1, 0] = math.inf, math.inf  # nothing is lost
    sizes, names = list(SIZES.values()), list(SIZES)
    variables: dict[str, Any] = {name: ("neuron", values) for name, values in one.items()}
    variables |= {name: (("neuron", "arm"), values) for name, values in within.items()}
    variables |= {name: (("neuron", "sparsity", "arm"), x) for name, x in sparse.items()}
    variables["improvement_halves"] = (("neuron", "sparsity", "arm", "half"), halves)
    data = xr.Dataset(
        variables,
        coords={
            "layer": ("neuron", np.repeat(names, sizes)),
            "block": ("neuron", np.repeat([0, 0, 1, 1], sizes)),
            "role": ("neuron", np.repeat([name[4:] for name in names], sizes)),
            "index": ("neuron", np.concatenate([np.arange(size) for size in sizes])),
            "experts": ("arm", EXPERTS),
            "assign": ("arm", ["kmeans", "kmeans", "random", "kmeans", "random"]),
            "sparsity": SPARSITIES,
        },
        attrs=ABOUT,
    )
    return xr.DataTree.from_dict({"/": data})


def neurons_of(tree: xr.DataTree, arm: int, place: int) -> pd.DataFrame:
    """Return a row for each neuron that has a distance, with all that is found for one arm."""
    data = tree.to_dataset()
    one = [name for name in data.data_vars if data[name].dims == ("neuron",)]
    frame = data[one].reset_coords(["layer", "block", "role", "index"]).to_dataframe()
    frame = frame.drop(columns=["experts", "assign", "sparsity"], errors="ignore")
    improvement = data["improvement"].values[:, place]
    distance = data["distance_to_dense"].values[:, place]
    frame["improvement"], frame["improvement_random"] = improvement[:, arm], improvement[:, arm + 1]
    halves = data["improvement_halves"].values[:, place, arm]
    frame["even"], frame["odd"] = halves[:, 0], halves[:, 1]
    for column, other in (("one", 0), ("experts", arm), ("random", arm + 1)):
        frame[f"distance_{column}"] = distance[:, other]
    for name in ("wasserstein", "difficulty"):
        within = data[f"{name}_within"].values
        frame[f"{name}_within"], frame[f"{name}_random"] = within[:, arm], within[:, arm + 1]
        less = (within[:, arm] < within[:, arm + 1]).astype(float)
        frame[f"{name}_less"] = np.where(np.isnan(within[:, arm]), math.nan, less)
    known = frame["wasserstein"].notna() & (frame["wasserstein_error"] <= 0.1)
    return frame[known].replace(math.inf, math.nan)


MEANS = {  # column of a table, and where it is in the rows above
    "wasserstein": "held_out_wasserstein",
    "difficulty": "held_out_difficulty",
    **{
        name: name
        for name in (
            *("wasserstein_within", "wasserstein_random", "wasserstein_less"),
            *("difficulty_within", "difficulty_random", "difficulty_less"),
            *("improvement", "improvement_random"),
            *("distance_one", "distance_experts", "distance_random"),
        )
    },
}
KINDS = [(arm, place) for arm in (1, 3) for place in (0, 1)]


def test_a_row_per_layer_has_medians_shares_and_rank_correlations() -> None:
    tree = made_up()
    table = layers_table(tree)
    assert table["experts"].tolist() == [4] * 8 + [16] * 8
    assert table["sparsity"].tolist() == [*["0.8"] * 4, *["2:4"] * 4] * 2
    assert table["layer"].tolist() == list(SIZES) * 4
    assert table["neurons"].tolist() == [38, 6, 41, 1] * 4
    assert table["block"].tolist() == [0, 0, 1, 1] * 4
    assert table["role"].tolist() == ["up", "down"] * 8
    measures = {
        "with_wasserstein": "wasserstein",
        "with_difficulty": "held_out_difficulty",
        "with_kurtosis": "kurtosis",
        "with_weight_norm": "weight_norm",
        "with_std": "std",
    }
    assert set(table.columns) == {
        *("experts", "sparsity", "layer", "block", "role", "neurons"),
        *("improvement_sd", "reliability", *MEANS, *measures),
    }
    rows = iter(table.to_dict(orient="records"))
    for arm, place in KINDS:
        frame = neurons_of(tree, arm, place)
        for name, part in frame.groupby("layer", sort=False):
            row = next(rows)
            for column, source in MEANS.items():
                value = part[source].mean() if column.endswith("_less") else part[source].median()
                assert row[column] == pytest.approx(value, rel=1e-12), (name, column)
            if len(part) == 1:
                assert all(math.isnan(row[c]) for c in ("improvement_sd", "reliability", *measures))
                continue
            assert row["improvement_sd"] == pytest.approx(part["improvement"].std(), rel=1e-12)
            pairs = {"reliability": ("even", "odd")}
            pairs |= {column: ("improvement", source) for column, source in measures.items()}
            for column, (x, y) in pairs.items():
                both = part[[x, y]].dropna()
                rho = float(stats.spearmanr(both[x], both[y]).statistic)
                assert row[column] == pytest.approx(rho, abs=1e-12), (name, column)
    whole = table[table["layer"] == "h.1.up"]
    assert (whole["reliability"] > 0.5).all()
    assert (whole["with_wasserstein"] > 0.5).any()


RANGES = [(0, 1), (0, 0.5), (0.5, 0.9), (0.9, 0.95), (0.95, 0.99), (0.99, 1)]


def test_a_row_per_range_of_quantiles_has_means_over_layers_and_their_errors() -> None:
    tree = made_up()
    table = quantiles_table(tree)
    rows = iter(table.to_dict(orient="records"))
    for arm, place in KINDS:
        frame = neurons_of(tree, arm, place)
        frame["place"] = frame.groupby("layer")["wasserstein"].transform(
            lambda values: (values.rank(method="first") - 0.5) / len(values)
        )
        for low, high in RANGES:
            part = frame[(frame["place"] >= low) & (frame["place"] < high)]
            if part.empty:
                continue
            row = next(rows)
            assert (row["experts"], row["sparsity"]) == (EXPERTS[arm], SPARSITIES[place])
            assert (row["from"], row["to"]) == (low, high)
            assert (row["layers"], row["neurons"]) == (part["layer"].nunique(), len(part))
            for column, source in MEANS.items():
                means = part.groupby("layer")[source].mean().dropna()
                assert row[column] == pytest.approx(means.mean(), rel=1e-12), (low, column)
                error = means.std() / math.sqrt(len(means))
                assert row[f"{column}_error"] == pytest.approx(error, rel=1e-9, nan_ok=True)
            both = [one[["even", "odd"]].dropna() for _, one in part.groupby("layer")]
            same = [stats.spearmanr(one["even"], one["odd"])[0] for one in both if len(one) > 3]
            reliability = np.mean(same) if same else math.nan
            assert row["reliability"] == pytest.approx(reliability, rel=1e-9, nan_ok=True)
    assert next(rows, None) is None
    # A single neuron is in the middle of its layer, and of 41 none is among the last hundredth.
    assert table["neurons"].tolist()[:6] == [86, 42, 35, 5, 4, 86]


def test_ranges_without_a_neuron_have_no_row_and_a_single_layer_no_error() -> None:
    tree = made_up()
    data = tree.to_dataset()
    few = data.isel(neuron=np.flatnonzero(data["layer"] == "h.0.down"))
    table = quantiles_table(xr.DataTree(few))
    # Six of seven can be ranked, in the middles of sixths: none above 11/12.
    spans = list(zip(table["from"], table["to"], table["neurons"], strict=True))
    assert spans == [(0, 1, 6), (0, 0.5, 3), (0.5, 0.9, 2), (0.9, 0.95, 1)] * 4
    assert table["improvement"].notna().all()
    assert table["improvement_error"].isna().all()


def test_ties_are_ranked_in_the_order_of_the_model() -> None:
    data = made_up().to_dataset().isel(neuron=slice(47, 87))  # 40 of the layer without gaps
    data["wasserstein"][:] = 0.25
    table = quantiles_table(xr.DataTree(data))
    improvement = data["improvement"].values[:, 0, 1]
    found = table.set_index(["from", "to"])["improvement"].iloc[:5].tolist()
    parts = [improvement, improvement[:20], improvement[20:36], improvement[36:38]]
    expected = [*(part.mean() for part in parts), improvement[38:].mean()]
    assert found == pytest.approx(expected, rel=1e-12)


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def cells_are(lines: list[list[str]], table: pd.DataFrame, names: list[str]) -> bool:
    """See that the cells behind a row's first three are its values, as their errors round them."""
    for cells, row in zip(lines, table.to_dict(orient="records"), strict=True):
        assert cells[:2] == [str(row["experts"]), row["sparsity"]]
        for cell, name in zip(cells[3:], names, strict=True):
            if math.isnan(row[name]):
                assert cell == "-"
                continue
            value, error = float(cell.split(" ± ")[0]), row[f"{name}_error"]
            if error > 0:
                assert float(cell.split(" ± ")[1]) == pytest.approx(error, rel=0.05)
            slack = 0.05 * error if error > 0 else 5e-4 * abs(row[name])
            assert value == pytest.approx(row[name], abs=slack)
    return True


def test_markdown_has_its_tables_rounded_to_their_errors() -> None:
    tree = made_up()
    layers, quantiles = layers_table(tree), quantiles_table(tree)
    text = markdown(tree.attrs, layers, quantiles)
    for said in (
        r"^some/model.*\*\.up \*\.down",
        r"\b65,536 tokens.*data/docs.*\b128 windows of 512\b",
        r"\b8,192 held-out tokens.*data/others",
        r"\b12,345 tokens.*data/before",
    ):
        assert re.search(said, text)
    lines = [cells_of(line) for line in text.splitlines() if line.startswith("|")]
    once = quantiles[quantiles["sparsity"] == "0.8"]
    assert len(lines) == 2 + 4 + 2 + len(quantiles) + 2 + len(once)
    names = ["improvement", "improvement_random", "improvement_sd", "reliability"]
    names += [f"with_{name}" for name in ("wasserstein", "difficulty", "kurtosis", "weight_norm")]
    names += ["with_std"]
    kinds = layers.groupby(["experts", "sparsity"])
    for cells, (kind, part) in zip(lines[2:6], kinds, strict=True):
        assert cells[:2] == list(map(str, kind))
        for cell, name in zip(cells[2:], names, strict=True):
            known = part[name].dropna()
            value, error = map(float, cell.split(" ± "))
            assert error == pytest.approx(known.std() / math.sqrt(len(known)), rel=0.05)
            assert value == pytest.approx(known.mean(), abs=0.05 * error)
    spans = ["all (86)", "0% to 50% (42)"]
    assert [cells[2] for cells in lines[8:10]] == spans
    names = ["wasserstein", "wasserstein_within", "wasserstein_random", "wasserstein_less"]
    names += ["improvement", "improvement_random", "reliability"]
    names += ["distance_one", "distance_experts", "distance_random"]
    end = 8 + len(quantiles)
    assert cells_are(lines[8:end], quantiles, names)
    names = ["difficulty", "difficulty_within", "difficulty_random", "difficulty_less"]
    assert cells_are(lines[end + 2 :], once.assign(sparsity="any"), names)


def test_markdown_says_what_was_skipped_and_what_is_not_known() -> None:
    tree = made_up()
    about = ABOUT | {"run": {}, "skipped_parameters": ["h.0.experts.w", "h.1.experts.w"]}
    data = tree.to_dataset().isel(neuron=[-1])  # of a layer with one neuron nothing has an error
    text = markdown(about, layers_table(xr.DataTree(data)), quantiles_table(xr.DataTree(data)))
    assert re.search(r"\b2 matri.*h\.0\.experts\.w, h\.1\.experts\.w", text)
    assert re.search(r"\b0 tokens.*\?", text)
    first = next(line for line in text.splitlines() if line.startswith("| 4 "))
    assert cells_of(first)[4:] == ["-"] * 7
    assert float(cells_of(first)[2]) == pytest.approx(float(data["improvement"][0, 0, 1]), rel=1e-3)
