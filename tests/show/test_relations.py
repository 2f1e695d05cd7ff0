"""Pictures of measures against distance: points, medians, titles and limits are the data's."""

import re
import statistics
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from entangle import plots
from entangle.runs.dataset import attributes_of
from tests.show.test_plots import make_run, panels, words

Array = npt.NDArray[np.float64]

EXPERTS = [1, 4, 4, 16, 16]
ABOUT = {"model": "data/SmolLM2-135M", "evaluation": "data/docs/other.txt", "held_out_tokens": 8192}


def drawn(seed: int, *shape: int) -> Array:
    return np.exp(0.5 * np.random.default_rng(seed).standard_normal(shape))


def distances() -> dict[tuple[int, str], Array]:
    """Return those of two blocks and two roles: 300 and 40 neurons, and 30 alone in the second."""
    sizes = {(0, "mlp.up"): 300, (0, "mlp.down"): 40, (1, "mlp.up"): 300, (1, "mlp.down"): 30}
    return {key: 0.05 * drawn(seed, size) for seed, (key, size) in enumerate(sizes.items())}


@pytest.fixture
def run() -> xr.Dataset:
    data = make_run(distances())
    size = data.sizes["neuron"]
    noise = drawn(9, size)
    data["difficulty"] = "neuron", data["wasserstein"].values ** 0.5 * noise * 70
    data["wasserstein"][7] = np.nan
    data["wasserstein_error"][11] = 0.5
    data["difficulty"][13] = np.nan
    return data


@pytest.fixture
def found(run: xr.Dataset) -> xr.Dataset:
    """A run as disentangle returns it, of two sparsities; some improvements are not finite."""
    size = run.sizes["neuron"]
    values = 1 + 0.2 * drawn(5, size, 2, 5) * (1 + 5 * run["wasserstein"].values[:, None, None])
    values[:, :, 0] = 1
    values[17, 1, 1], values[19, 1, 3] = np.nan, np.inf
    return run.assign(improvement=(("neuron", "sparsity", "arm"), values)).assign_coords(
        experts=("arm", EXPERTS), sparsity=["0.5", "2:4"]
    ).assign_attrs(attributes_of({"disentangled": ABOUT}))  # fmt: skip


EDGES = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1]


def medians(x: Array, y: Array) -> list[tuple[float, float]]:
    """Return the medians of tenths, neuron by neuron; those of fewer than 25 are none."""
    known = np.isfinite(x) & np.isfinite(y)
    pairs = sorted(zip(x[known], y[known], strict=True))
    points = []
    for low, high in pairwise(EDGES):
        part = [pair for i, pair in enumerate(pairs) if low <= (i + 0.5) / len(pairs) < high]
        if len(part) >= 25:
            points.append([statistics.median(one) for one in zip(*part, strict=True)])
    return [(float(a), float(b)) for a, b in points]


def points_of(ax: Axes, label: str) -> list[tuple[float, float]]:
    (line,) = (line for line in ax.lines if line.get_label() == label)
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def cloud_of(ax: Axes) -> set[tuple[float, float]]:
    (line,) = (line for line in ax.lines if line.get_marker() == ".")
    assert line.get_linestyle() == "None"
    return {(float(x), float(y)) for x, y in np.asarray(line.get_xydata())}


def saved(figure: Figure) -> Figure:
    """Draw it in full: a warning is an error."""
    figure.savefig(BytesIO(), format="png")
    return figure


def same(points: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> bool:
    np.testing.assert_allclose(points, others, rtol=1e-12)
    return True


def test_difficulty_is_drawn_over_its_layers_median_and_without_untrusted_neurons(
    run: xr.Dataset,
) -> None:
    figure = saved(plots.difficulty(run))
    drawn_panels = panels(figure)
    assert list(drawn_panels) == ["up", "down"]
    frame = run.to_dataframe()
    scaled = frame["difficulty"] / frame.groupby("layer")["difficulty"].transform("median")
    frame["scaled"] = scaled
    frame["known"] = frame["wasserstein"].notna() & (frame["wasserstein_error"] <= 0.1)
    kept = frame[frame["known"] & frame["difficulty"].notna()]
    for role, ax in drawn_panels.items():
        part = kept[kept["role"] == f"mlp.{role}"]
        x, y = part["wasserstein"].to_numpy(), part["scaled"].to_numpy()
        assert cloud_of(ax) == set(zip(x.tolist(), y.tolist(), strict=True))
        line = points_of(ax, "median")
        assert same(line, medians(x, y)) if line else len(part) < 250
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        rhos = [
            stats.spearmanr(one["wasserstein"], one["difficulty"]).statistic
            for _, one in part.groupby("layer")
        ]
        (text,) = ax.texts
        assert text.get_text() == f"rank correlation {np.median(rhos):.2f}"
    assert len(points_of(drawn_panels["up"], "median")) == 10
    assert drawn_panels["up"].get_title() == "up\n300 neurons"
    assert drawn_panels["down"].get_title() == "down\n30 to 40 neurons"
    assert re.search(r"\b1 dead.*\b1 left out.*\b0\.1\b", figure.get_supxlabel())
    assert figure.get_supylabel() == "mapping difficulty\nover the layer's median"
    assert figure.get_suptitle().strip() == "SmolLM2-135M · data/python-docs · 65,536 tokens"


def test_difficulty_of_some_layers_and_in_a_given_figure(run: xr.Dataset) -> None:
    figure = Figure(layout="constrained")
    assert plots.difficulty(xr.DataTree(run), layers="*.1.mlp.up", figure=figure) is figure
    (ax,) = figure.axes
    part = run.isel(neuron=np.flatnonzero(run["layer"] == "model.layers.1.mlp.up"))
    y = part["difficulty"].values / np.median(part["difficulty"].values)
    assert cloud_of(ax) == set(zip(part["wasserstein"].values.tolist(), y.tolist(), strict=True))
    assert same(points_of(ax, "median"), medians(part["wasserstein"].values, y))


@pytest.mark.parametrize("sparsity", [None, "0.5"])
def test_improvement_has_a_panel_for_each_number_of_experts(
    found: xr.Dataset, sparsity: str | None
) -> None:
    figure = saved(plots.improvement(found, sparsity=sparsity))
    place = 1 if sparsity is None else 0  # the last unless one is named
    distance = found["wasserstein"].where(found["wasserstein_error"] <= 0.1).values
    for ax, arm in zip(figure.axes, (1, 3), strict=True):
        values = found["improvement"].values[:, place, arm]
        random = found["improvement"].values[:, place, arm + 1]
        known = np.isfinite(distance) & np.isfinite(values)
        assert cloud_of(ax) == set(zip(distance[known], values[known], strict=True))
        assert same(points_of(ax, "experts of k-means"), medians(distance, values))
        assert same(points_of(ax, "experts at random"), medians(distance, random))
        assert [y for _, y in points_of(ax, "one expert")] == [1, 1]
        assert ax.get_title() == f"{EXPERTS[arm]} experts"
        assert ax.get_xscale() == "log"
        shown = found["improvement"].values[np.isfinite(distance), place, 1:]
        low, high = np.quantile(shown[np.isfinite(shown)], [0.0005, 0.9995])
        assert ax.get_ylim() == pytest.approx((low, high), abs=0.011)
        assert ax.get_ylim()[0] <= low < high <= ax.get_ylim()[1]
    assert len(points_of(figure.axes[0], "experts at random")) == 10  # the last of fewer than 25
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("experts of k-means", "experts at random", "one expert")
    ]
    assert figure.get_suptitle().splitlines() == [
        "data/SmolLM2-135M · docs/other · 8,192 held-out tokens",
        f"{sparsity or '2:4'} sparse",
    ]
    assert figure.get_supylabel() == "relative improvement"
    assert figure.get_supxlabel() == "1-Wasserstein distance to a Gaussian (std)"


def test_improvement_of_some_layers_from_a_tree(found: xr.Dataset) -> None:
    figure = plots.improvement(xr.DataTree(found), layers="*.1.*")
    chosen = np.flatnonzero(found["block"] == 1)
    x, y = found["wasserstein"].values[chosen], found["improvement"].values[chosen, 1, 3]
    assert cloud_of(figure.axes[1]) == set(zip(x.tolist(), y.tolist(), strict=True))


def test_what_cannot_be_drawn_is_told(run: xr.Dataset, found: xr.Dataset) -> None:
    with pytest.raises(LookupError, match=r"mapping difficulty.*--difficulty"):
        plots.difficulty(run.drop_vars("difficulty"))
    with pytest.raises(LookupError, match=r"improvement.*disentangle"):
        plots.improvement(run)
    with pytest.raises(LookupError, match=r"sparsity '0\.9'.*\b0\.5, 2:4\b"):
        plots.improvement(found, sparsity="0.9")
    with pytest.raises(ValueError, match=r"no neuron.*improvement"):
        plots.improvement(found.assign(improvement=found["improvement"] * np.nan))
    saved(plots.improvement(found.assign(improvement=found["improvement"] * 0 + 1)))  # all equal
    for draw in (plots.difficulty, plots.improvement):
        with pytest.raises(LookupError, match=r"layer.*'\*\.gate'"):
            draw(found, layers="*.gate")
        with pytest.raises(ValueError, match=r"no neuron of \d+ .*wasserstein"):
            draw(found.assign(wasserstein=found["wasserstein"] * np.nan))


def test_nothing_global_changes_and_no_words_are_lost(found: xr.Dataset) -> None:
    before = dict(mpl.rcParams)
    for draw in (plots.difficulty, plots.improvement):
        assert "nan" not in words(draw(found))
    assert dict(mpl.rcParams) == before
