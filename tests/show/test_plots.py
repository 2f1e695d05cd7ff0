"""The pictures: what is drawn is what the run holds, and all of it can be read."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pytest
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.text import Text
from scipy import stats

from entangle.numerics.gaussian import noise_floor
from entangle.numerics.histograms import Histograms
from entangle.show import plots
from tests.distributions import bulk_of
from tests.show.test_sketches import held_in

Array = npt.NDArray[Any]
LAYER = "model.layers.5.mlp.up_proj"
ATTRIBUTES = {"model": "data/SmolLM2-135M", "text": "data/python-docs", "tokens": 65536}
LLAMA = {
    "self_attn.q_proj": 72,
    "self_attn.k_proj": 24,
    "self_attn.v_proj": 24,
    "self_attn.o_proj": 72,
    "mlp.gate_proj": 1536,
    "mlp.up_proj": 192,
    "mlp.down_proj": 72,
}
GPT2 = {"attn.c_attn": 288, "attn.c_proj": 96, "mlp.c_fc": 384, "mlp.c_proj": 96}


def make_run(
    distances: Mapping[tuple[int, str], Any], prefix: str = "model.layers", **variables: Any
) -> xr.Dataset:
    """Return the root of a run: the distances of each (block, role), plain values for the rest."""
    sizes = [len(values) for values in distances.values()]
    wasserstein = np.concatenate([np.asarray(v, float) for v in distances.values()])
    columns = {
        "wasserstein": wasserstein,
        "wasserstein_error": np.where(np.isnan(wasserstein), np.nan, 1e-4),
        **{name: np.zeros(len(wasserstein)) for name in ("mean", "skewness", "kurtosis")},
        **{name: np.ones(len(wasserstein)) for name in ("std", "weight_norm", "max")},
        "min": -np.ones(len(wasserstein)),
        "modes": np.ones(len(wasserstein), np.int64),
        "count": np.full(len(wasserstein), 65536),
    } | variables
    layers = [f"{prefix}.{block}.{role}" for block, role in distances]
    names = [f"{x}:{i}" for x, size in zip(layers, sizes, strict=True) for i in range(size)]
    return xr.Dataset(
        {name: ("neuron", values) for name, values in columns.items()},
        coords={
            "neuron": names,
            "layer": ("neuron", np.repeat(layers, sizes)),
            "block": ("neuron", np.repeat([block for block, _ in distances], sizes)),
            "role": ("neuron", np.repeat([role for _, role in distances], sizes)),
            "index": ("neuron", np.concatenate([np.arange(size) for size in sizes])),
        },
        attrs=ATTRIBUTES,
    )


def make_model(
    roles: Mapping[str, int] = LLAMA, blocks: int = 30, apart: tuple[int, str] | None = None
) -> xr.Dataset:
    """Return a run like that of a real model: medians 0.02 to 0.18, one layer that stands apart."""
    rng = np.random.default_rng(0)
    distances = {}
    for block, (number, (role, size)) in itertools.product(range(blocks), enumerate(roles.items())):
        middle = 0.02 + 0.16 * (0.5 + 0.5 * np.sin(block / 5 + number)) ** 3
        spread = 0.3 if (block, role) == apart else 0.5
        middle = 0.44 if (block, role) == apart else middle
        distances[block, role] = middle * np.exp(spread * rng.standard_normal(size))
    return make_run(distances)


def make_tree(rows: Array, **variables: Any) -> xr.DataTree:
    """Return the run of one layer whose outputs are ``rows`` (tokens, neurons)."""
    histograms = Histograms.from_rows(torch.from_numpy(rows))
    moments = histograms.moments()
    root = make_run(
        {(5, "mlp.up_proj"): np.full(rows.shape[1], 0.25)},
        **{
            "mean": moments.mean,
            "std": moments.std,
            "skewness": moments.skewness,
            "kurtosis": moments.kurtosis,
            "min": rows.min(axis=0),
            "max": rows.max(axis=0),
            "count": moments.count,
        }
        | variables,
    )
    return make_parts(root, histograms)


def make_parts(root: xr.Dataset, histograms: Histograms) -> xr.DataTree:
    return xr.DataTree.from_dict({"/": root, "/histogram": held_in(histograms)})


def panels(figure: Figure) -> dict[str, Axes]:
    """Return the panels by the first line of their titles."""
    return {ax.get_title().split("\n")[0]: ax for ax in figure.axes if ax.get_title()}


def colour_bar(figure: Figure) -> Axes:
    return next(ax for ax in figure.axes if ax.get_label() == "<colorbar>")


def mesh_of(ax: Axes) -> Any:
    (mesh,) = (artist for artist in ax.collections if isinstance(artist, QuadMesh))
    return mesh


def cells_of(ax: Axes) -> Any:
    return np.ma.masked_invalid(mesh_of(ax).get_array())


def bars_of(ax: Axes) -> tuple[Array, Array]:
    """Return heights and edges of the histogram's bars."""
    (steps,) = (patch for patch in ax.patches if isinstance(patch, StepPatch))
    data: Any = steps.get_data()
    return np.asarray(data.values), np.asarray(data.edges)


def lines_of(ax: Axes, label: str = "") -> list[tuple[Array, Array, str]]:
    """Return x, y and colour of the lines with a label, or of those without in the data's units."""
    lines: list[Any] = [line for line in ax.lines if line.get_transform() == ax.transData]
    if label:
        lines = [line for line in ax.lines if line.get_label() == label]
    else:
        lines = [line for line in lines if line.get_label().startswith("_child")]
    return [
        (np.asarray(x.get_xdata()), np.asarray(x.get_ydata()), to_hex(x.get_color())) for x in lines
    ]


def words(figure: Figure) -> str:
    """Return all text of a figure."""
    return "\n".join(text.get_text() for text in texts_of(figure))


def texts_of(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if isinstance(text, Text)]


PICTURES: dict[str, Callable[[xr.Dataset], Figure]] = {
    "heatmap": plots.heatmap,
    "layers": plots.layers,
    "ranks": plots.ranks,
}


# heatmap


def test_a_cell_is_the_mean_of_its_share_of_the_sorted_neurons() -> None:
    run = make_run(
        {
            (0, "a.up"): [0.1, 0.4, 0.3, 0.2],
            (0, "a.down"): [0.1, 0.3, 0.2],
            (1, "a.up"): [0.5, 0.5, 0.7, 0.7],
            (1, "a.down"): [0.06],
        }
    )
    drawn = panels(plots.heatmap(run, bins=2))
    assert list(drawn) == ["up", "down"]
    np.testing.assert_allclose(cells_of(drawn["up"]), [[0.35, 0.15], [0.7, 0.5]])
    # 1.5 neurons a column: the one in the middle counts by half in both.
    halves = [(0.3 + 0.2 / 2) / 1.5, (0.1 + 0.2 / 2) / 1.5]
    np.testing.assert_allclose(cells_of(drawn["down"]), [halves, [0.06, 0.06]])


def test_experts_of_a_block_stand_side_by_side() -> None:
    run = make_run(
        {
            (0, "mlp.experts.0.up"): [0.1, 0.4],
            (0, "mlp.experts.1.up"): [0.2, 0.3],
            (0, "mlp.experts.10.up"): [np.nan, np.nan],  # no token was sent to it
            (1, "mlp.experts.0.up"): [0.5, 0.6],
            (1, "mlp.gate"): [0.7],
        }
    )
    figure = plots.heatmap(run, bins=4)
    drawn = panels(figure)
    assert [ax.get_title().split("\n")[1] for ax in drawn.values()] == [
        "11 experts of 2",
        "1 neurons",
    ]
    cells = cells_of(drawn["up"])
    expected = np.full((2, 22), np.nan)  # two columns for each expert
    expected[0, :4], expected[1, :2] = [0.4, 0.1, 0.3, 0.2], [0.6, 0.5]
    np.testing.assert_allclose(cells.filled(np.nan), expected)
    assert drawn["up"].get_xlim() == (0, 100)
    assert "experts side by side" in figure.get_supxlabel()
    ranked = np.asarray(plots.ranks(run).axes[0].lines[0].get_ydata(), float)
    np.testing.assert_allclose(ranked, [0.4, 0.3, 0.2, 0.1])  # of a block's experts together


def test_blocks_go_down_and_neurons_go_from_the_most_entangled() -> None:
    run = make_model(blocks=12)
    figure = plots.heatmap(run, bins=20)
    for role, ax in panels(figure).items():
        bottom, top = ax.get_ylim()
        assert (top, bottom) == (-0.5, 11.5)
        assert ax.get_xlim() == (0, 100)
        cells = cells_of(ax)
        assert cells.shape == (12, 20)
        assert (np.diff(cells, axis=1) <= 0).all()
        whole = (
            run["wasserstein"].where(run["role"].str.endswith(role)).groupby(run["block"]).mean()
        )
        np.testing.assert_allclose(cells.mean(axis=1), whole)
    assert figure.get_supxlabel() == (
        "neurons, most entangled first (% of layer; a column is the mean of its 5%)"
    )
    assert figure.get_supylabel() == "block"
    assert len({ax.get_position().y0 for ax in panels(figure).values()}) == 1
    assert list(panels(figure)) == [role.split(".")[-1] for role in LLAMA]


def test_one_scale_with_units_shows_both_the_bulk_and_the_layer_that_stands_apart() -> None:
    figure = plots.heatmap(make_model(apart=(11, "mlp.down_proj")))
    drawn = panels(figure)
    scales = {(mesh_of(ax).norm, mesh_of(ax).get_cmap().name) for ax in drawn.values()}
    assert len(scales) == 1
    mesh = mesh_of(drawn["down_proj"])
    low, middle, apart = (float(mesh.norm(value)) for value in (0.02, 0.18, 0.44))
    assert middle - low > 0.2
    assert apart - middle > 0.2
    assert apart > 0.8
    assert mesh.norm.vmax > 0.44
    bar = colour_bar(figure)
    assert bar.get_ylabel().replace("\n", " ") == "1-Wasserstein distance to a Gaussian (std)"
    # What the scale does not reach has an arrow; the colours become lighter all the way.
    assert max(cells_of(ax).max() for ax in drawn.values()) > mesh.norm.vmax
    assert mesh.colorbar.extend == "max"
    lightness = mesh.get_cmap()(np.linspace(0, 1, 50))[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) > 0).all()


def test_neurons_without_a_trusted_distance_are_left_out_and_counted() -> None:
    error = np.full(8, 1e-4)
    error[[0, 4]] = 0.2, 0.1
    distances = {(0, "mlp.up"): [0.9, 0.2, np.nan, 0.4], (1, "mlp.up"): [0.3, 0.3, 0.3, 0.3]}
    run = make_run(distances, wasserstein_error=error)
    figure = plots.heatmap(run, bins=4)
    cells = cells_of(panels(figure)["up"])
    np.testing.assert_allclose(cells[0, :2], [0.4, 0.2])
    assert cells.mask.tolist() == [[False, False, True, True], [False] * 4]
    note = r"\b1 dead.*\b1 left out.*\b0\.1\b"
    assert all(re.search(note, words(draw(run))) for draw in PICTURES.values())
    # The bound is the distance's: other variables of such a neuron are as good as any.
    run["std"] = "neuron", np.arange(8.0)
    other = plots.heatmap(run, variable="std", bins=4)
    np.testing.assert_allclose(cells_of(panels(other)["up"])[0], [3, 2, 1, 0])
    assert "left out" not in words(other)
    assert "population standard\ndeviation of the output" in words(other)


def test_a_block_without_a_role_is_blank_and_a_dead_neuron_grey() -> None:
    run = make_run(
        {(0, "q"): [0.1, np.nan], (2, "q"): [0.1, 0.2], (1, "expert"): [0.3, 0.1, 0.2, 0.3]}
    )
    drawn = panels(plots.heatmap(run, bins=2))
    for role, absent in (("q", [1]), ("expert", [0, 2])):
        blanks = [p for p in drawn[role].patches if isinstance(p, Rectangle)]
        assert sorted(p.get_y() + 0.5 for p in blanks) == absent
        assert all(p.get_facecolor() == (1, 1, 1, 1) for p in blanks)
        assert cells_of(drawn[role]).mask[absent].all()
        assert to_hex(drawn[role].get_facecolor()) == to_hex("0.75")
    assert cells_of(drawn["q"]).mask[0].tolist() == [False, True]


def test_a_variable_with_negative_values_is_coloured_around_zero() -> None:
    kurtosis = np.r_[np.linspace(-1.5, 3, 99), 500]
    run = make_run({(0, "mlp.up"): np.full(100, 0.1)}, kurtosis=kurtosis)
    figure = plots.heatmap(run, variable="kurtosis", bins=100)
    mesh = mesh_of(panels(figure)["up"])
    assert mesh.norm(0) == pytest.approx(0.5)
    assert mesh.norm(-3) == pytest.approx(1 - mesh.norm(3))
    assert mesh.norm(3) - mesh.norm(0) > 0.1
    assert colour_bar(figure).get_ylabel() == "excess kurtosis"
    assert "largest first" in figure.get_supxlabel()


def test_any_other_variable_is_named_by_its_attributes() -> None:
    run = make_run({(0, "mlp.up"): [0.1, 0.2]})
    run["oddity"] = "neuron", [1.0, 2.0], {"long_name": "oddity of it", "units": "pairs"}
    figure = plots.heatmap(run, variable="oddity")
    assert colour_bar(figure).get_ylabel().replace("\n", " ") == "oddity of it (pairs)"


# layers


def test_layers_draws_the_quantiles_the_maximum_and_the_noise_floor_of_each_block() -> None:
    rng = np.random.default_rng(0)
    distances: dict[tuple[int, str], Array] = {
        (block, role): np.append(rng.uniform(0.01, 0.3, 40), np.nan)
        for block in (0, 1, 3)
        for role in ("mlp.up", "mlp.down")
    }
    count = np.repeat([100, 200, 400, 100, 100, 100], 41)
    figure = plots.layers(make_run(distances, count=count))
    ax = panels(figure)["up"]
    values = [distances[block, "mlp.up"][:40] for block in (0, 1, 3)]
    ((places, largest, _),) = lines_of(ax, "largest")
    np.testing.assert_array_equal(places, [0, 1, 2, 3])
    np.testing.assert_allclose(largest[[0, 1, 3]], [v.max() for v in values])
    assert np.isnan(largest[2])
    boxes = [p for p in ax.patches if isinstance(p, Rectangle) and np.isfinite(p.get_height())]
    spans = [(p.get_x() + p.get_width() / 2, p.get_y(), p.get_y() + p.get_height()) for p in boxes]
    expected = [
        (block, *np.quantile(v, ends))
        for ends in ([0.05, 0.95], [0.25, 0.75])
        for block, v in zip((0, 1, 3), values, strict=True)
    ]
    np.testing.assert_allclose(spans, expected)
    (medians,) = (c for c in ax.collections if isinstance(c, LineCollection))
    vertices = [np.asarray(path.vertices) for path in medians.get_paths()]
    drawn = [(line[:, 0].mean(), line[0, 1]) for line in vertices]
    lines = [(block, height) for block, height in drawn if np.isfinite(height)]
    np.testing.assert_allclose(
        lines, [(b, np.median(v)) for b, v in zip((0, 1, 3), values, strict=True)]
    )
    floors, edges = bars_of(ax)
    np.testing.assert_array_equal(edges, [-0.5, 0.5, 1.5, 2.5, 3.5])
    np.testing.assert_allclose(
        floors, [noise_floor(100), noise_floor(400), np.nan, noise_floor(100)]
    )
    assert ax.get_yscale() == "log"
    assert figure.get_supylabel().replace("\n", " ") == "1-Wasserstein distance to a Gaussian (std)"
    assert re.fullmatch(r"block\n6 dead.*", figure.get_supxlabel())
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {
        *("largest", "median", "noise floor", "5% to 95%", "25% to 75%")
    }


def test_a_layer_without_any_token_has_no_noise_floor() -> None:
    distances = {(0, "a"): [0.1, 0.2], (1, "a"): [np.nan, np.nan]}
    run = make_run(distances, count=np.array([50, 50, 0, 0]))
    floors, _ = bars_of(panels(plots.layers(run))["a"])
    np.testing.assert_allclose(floors, [noise_floor(50), np.nan])
    assert len(lines_of(panels(plots.ranks(run))["a"])) == 2


# ranks


def test_ranks_draws_each_layer_sorted_against_its_share() -> None:
    run = make_run(
        {
            (0, "mlp.up"): [0.1, 0.4, np.nan, 0.2],
            (5, "mlp.up"): [0.02, 0.3],
            (5, "mlp.down"): [0.5, 0.6],
        }
    )
    figure = plots.ranks(run)
    drawn = panels(figure)
    first, second = lines_of(drawn["up"])
    np.testing.assert_allclose(first[0], [12.5, 37.5, 62.5])  # the dead neuron keeps its share
    np.testing.assert_allclose(first[1], [0.4, 0.2, 0.1])
    np.testing.assert_allclose(second[0], [25, 75])
    np.testing.assert_allclose(second[1], [0.3, 0.02])
    (other,) = lines_of(drawn["down"])
    assert first[2] != second[2]
    assert second[2] == other[2]
    assert colour_bar(figure).get_ylabel() == "block"
    assert all(ax.get_yscale() == "log" for ax in drawn.values())
    assert figure.get_supxlabel().startswith("neurons, most entangled first (% of layer)")
    for ax in drawn.values():
        ((_, floor, _),) = lines_of(ax, "noise floor")
        np.testing.assert_allclose(floor, noise_floor(65536))


def test_ranks_marks_known_distributions_where_they_are_and_names_them_once() -> None:
    figure = plots.ranks(make_model(blocks=3))
    marks = [0.53538, 0.31442, 0.15428, 0.14541, 0.102, 0.0593]
    for ax in panels(figure).values():
        lines: list[Any] = [x for x in ax.lines if x.get_transform() == ax.get_yaxis_transform()]
        drawn = sorted({float(height) for line in lines for height in line.get_ydata()})
        np.testing.assert_allclose(drawn[1:], sorted(marks))  # the first is the noise floor
    for name, place in (("exponential", 0.31442), ("uniform, Laplace", 0.149845)):
        (label,) = (text for text in texts_of(figure) if text.get_text() == name)
        assert label.get_position()[0] > 1
        assert label.get_position()[1] == pytest.approx(place)


# neuron


def two_humps(tokens: int = 20_000) -> Array:
    rng = np.random.default_rng(0)
    low = rng.random(tokens) < 0.3
    return np.where(low, rng.normal(-1.5, 0.4, tokens), rng.normal(0.8, 0.5, tokens)).astype(
        "float32"
    )


def test_the_bars_integrate_to_the_share_shown_and_lie_on_fine_bins() -> None:
    outputs = two_humps()
    tree = make_tree(outputs[:, None])
    figure = plots.neuron(tree, f"{LAYER}:0")
    ax = panels(figure)[f"{LAYER}:0"] if LAYER in panels(figure) else figure.axes[0]
    heights, edges = bars_of(ax)
    inside = ((outputs >= edges[0]) & (outputs < edges[-1])).mean()
    assert heights @ np.diff(edges) == pytest.approx(inside, abs=1e-4)
    expected, _ = np.histogram(outputs, edges)
    fine = 16 * float(tree.children["histogram"]["scale"].to_numpy()[0]) / 1024
    np.testing.assert_allclose(heights, expected / len(outputs) / np.diff(edges), atol=0.01)
    steps = np.diff(edges) / fine
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-9)
    rule = 2 * np.subtract(*np.quantile(outputs, [0.75, 0.25])) / len(outputs) ** (1 / 3)
    assert abs(steps[0] * fine - rule) < fine
    assert len(set(np.round(steps[:-1]))) == 1


def test_the_curve_is_the_fitted_gaussian() -> None:
    outputs = two_humps()
    ax = plots.neuron(make_tree(outputs[:, None]), f"{LAYER}:0").axes[0]
    (line,) = (line for line in ax.lines if line.get_label() == "fitted Gaussian")
    x, density = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    normal = stats.norm(outputs.mean(dtype=float), outputs.std(dtype=float))
    np.testing.assert_allclose(density, normal.pdf(x), rtol=0.01)
    bulk = bulk_of(outputs)
    assert x[0] == pytest.approx(bulk[0] - 0.3 * np.ptp(bulk), abs=0.1)
    assert x[-1] == pytest.approx(bulk[-1] + 0.3 * np.ptp(bulk), abs=0.1)


def test_the_axes_are_in_output_units_and_in_standard_deviations() -> None:
    outputs = two_humps()
    figure = plots.neuron(make_tree(outputs[:, None]), f"{LAYER}:0")
    figure.draw_without_rendering()
    (ax,) = figure.axes
    (top,) = ax.child_axes
    ends = (np.asarray(ax.get_xlim()) - outputs.mean()) / outputs.std()
    np.testing.assert_allclose(top.get_xlim(), ends, atol=0.01)
    assert top.get_xlabel() == "standard deviations from the mean"
    assert ax.get_xlabel().startswith("output of the neuron (output units)\n")
    assert ax.get_ylabel() == "density (share of tokens per output unit)"


def test_the_text_says_the_numbers_and_what_was_measured() -> None:
    outputs = two_humps()
    tree = make_tree(
        outputs[:, None],
        wasserstein=np.array([0.27331]),
        wasserstein_error=np.array([0.00012]),
        modes=np.array([2]),
    )
    text = words(plots.neuron(tree, f"{LAYER}:0"))
    numbers = dict(line.rsplit(maxsplit=1) for line in text.split("\n") if line.count("  ") > 1)
    numbers = {label.strip(): number for label, number in numbers.items()}
    assert numbers["W1 (std)"] == "0.2733"
    assert numbers["error bound"] == "±0.0002"  # rounded up: it stays a bound
    assert float(numbers["mean"]) == pytest.approx(outputs.mean(), abs=1e-3)
    assert float(numbers["std"]) == pytest.approx(outputs.std(), rel=5e-3)
    assert float(numbers["skewness"]) == pytest.approx(-0.58, abs=0.03)
    assert float(numbers["excess kurtosis"]) == pytest.approx(-0.98, abs=0.05)
    assert numbers["modes"] == "2"
    assert numbers["tokens"] == "20,000"
    assert f"{LAYER}:0\nSmolLM2-135M · data/python-docs · 65,536 tokens" in text
    doubtful = make_tree(outputs[:, None], wasserstein_error=np.array([0.2]))
    assert "W1, untrusted" in words(plots.neuron(doubtful, f"{LAYER}:0"))


def test_tokens_outside_the_picture_and_the_histogram_are_counted() -> None:
    outputs = np.random.default_rng(0).normal(0, 0.4, 10_000).astype("float32")
    outputs[:20] = 60.0
    figure = plots.neuron(make_tree(outputs[:, None]), f"{LAYER}:0")
    assert (
        figure.axes[0].get_xlim()[1] < 20
    )  # no room is spent on the empty space up to the histogram's end
    reach = rf"\b20 of 10,000 tokens.*{outputs.min():.3g}\b.*\b60\b.*\b20 of them.*histogram"
    assert re.search(reach, words(figure))
    heights, edges = bars_of(figure.axes[0])
    assert heights @ np.diff(edges) == pytest.approx(0.998)
    assert f"0.20% to {(60 - outputs.mean()) / outputs.std():+.3g} std \u25b8" in words(figure)
    inside = plots.neuron(make_tree(two_humps()[:, None]), f"{LAYER}:0")
    assert "all 20,000 tokens" in words(inside)
    assert "\u25b8" not in words(inside)


def test_neurons_side_by_side_are_each_in_their_own_std() -> None:
    """In its std a neuron looks the same whatever its scale and its place."""
    outputs = np.random.default_rng(0).normal(size=20_000).astype("float32")
    both = np.stack([outputs * 30 - 100, two_humps()], axis=1)
    names = [f"{LAYER}:1", f"{LAYER}:0"]
    figure = plots.neurons(make_tree(both), names)
    assert len(figure.axes) == 2
    for ax, name, column in zip(figure.axes, names, both.T[::-1], strict=True):
        assert ax.get_title(loc="left").startswith(f"{name}\nW1 ")
        heights, edges = bars_of(ax)
        standard = (column - column.mean()) / column.std()
        bulk = bulk_of(standard)
        assert edges[0] == pytest.approx(bulk[0] - 0.3 * np.ptp(bulk), abs=0.05)
        assert edges[-1] == pytest.approx(bulk[-1] + 0.3 * np.ptp(bulk), abs=0.05)
        truth, _ = np.histogram(standard, edges)
        np.testing.assert_allclose(heights, truth / 20_000 / np.diff(edges), atol=0.02)
        (line,) = ax.lines
        x, density = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        np.testing.assert_allclose(density, stats.norm.pdf(x), rtol=1e-12)
        assert heights.max() < ax.get_ylim()[1] < 1.2 * max(heights.max(), 0.4)  # its own height
        assert (x[0], x[-1]) == (-8, 8)
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_neurons_that_cannot_be_drawn_are_named() -> None:
    constant = np.stack([two_humps(), np.full(20_000, 3.0, "float32")], axis=1)
    tree = make_tree(constant)
    with pytest.raises(ValueError, match=rf"{LAYER}:1\b.*dead"):
        plots.neurons(tree, [f"{LAYER}:0", f"{LAYER}:1"])
    with pytest.raises(ValueError, match=r"neuron.*LAYER:INDEX"):
        plots.neurons(tree, [])
    with pytest.raises(ValueError, match=r"histograms.*tree"):
        plots.neurons(tree.to_dataset(), [f"{LAYER}:0"])  # type: ignore[arg-type]
    with pytest.raises(LookupError, match=rf"neuron '{LAYER}:9'.*\b2 neurons.*\b1\b"):
        plots.neurons(tree, [f"{LAYER}:9"])


def test_a_pilot_that_saw_nothing_of_the_neuron_still_gives_a_picture() -> None:
    histograms = Histograms.zeros(1)
    histograms.start(torch.linspace(-1, 1, 50)[:, None])
    rows = torch.linspace(1000, 2000, 500)[:, None]
    histograms.add(rows)
    moments = histograms.moments()
    root = make_run(
        {(5, "mlp.up_proj"): [0.2]},
        mean=moments.mean,
        std=moments.std,
        count=moments.count,
    )
    figure = plots.neuron(make_parts(root, histograms), f"{LAYER}:0")
    assert re.search(r"\b500 of 500 tokens", words(figure))
    heights, _ = bars_of(figure.axes[0])
    assert not heights.any()


def test_a_name_that_is_wrong_gets_advice() -> None:
    tree = make_tree(np.random.default_rng(0).normal(size=(100, 3)).astype("float32"))
    for name in ("model.layers.5.mlp.up_prj:1", LAYER):
        with pytest.raises(LookupError, match=rf"'{name}'.*LAYER:INDEX.*\b{LAYER}:0\b"):
            plots.neuron(tree, name)
    for index in ("3", "-1", "x", ""):
        with pytest.raises(LookupError, match=rf"'{LAYER}:{index}'.*\b3 neurons.*\b2\b"):
            plots.neuron(tree, f"{LAYER}:{index}")


def test_what_has_no_distribution_is_an_error() -> None:
    rows = np.random.default_rng(0).normal(size=(100, 2)).astype("float32")
    rows[:, 1] = 7.0
    tree = make_tree(rows)
    with pytest.raises(ValueError, match=rf"{LAYER}:1\b.*dead.*\bmean 7\b.*\bstd nan\b"):
        plots.neuron(tree, f"{LAYER}:1")
    for run in (tree.to_dataset(), xr.DataTree(tree.to_dataset())):
        with pytest.raises(ValueError, match=r"histograms.*tree"):
            plots.neuron(run, f"{LAYER}:0")  # type: ignore[arg-type]


def test_a_neuron_is_drawn_onto_given_axes() -> None:
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    tree = make_tree(two_humps()[:, None])
    assert plots.neuron(tree, f"{LAYER}:0", ax=right) is right
    assert bars_of(right)[0].any()
    assert not left.patches


# all of them


def test_a_tree_draws_like_its_root() -> None:
    tree = make_tree(np.random.default_rng(0).normal(size=(100, 3)).astype("float32"))
    assert words(plots.heatmap(tree)) == words(plots.heatmap(tree.to_dataset()))


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_patterns_choose_layers(draw: Callable[..., Figure]) -> None:
    run = make_model(blocks=4)
    assert list(panels(draw(run, layers="*.mlp.*"))) == ["gate_proj", "up_proj", "down_proj"]
    both = ["*.q_proj", "model.layers.2.mlp.up_proj"]
    assert list(panels(draw(run, layers=both))) == ["q_proj", "up_proj"]
    with pytest.raises(LookupError, match=r"layer.*'up_proj'"):
        draw(run, layers=["*.q_proj", "up_proj"])


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_nothing_to_draw_is_an_error_that_says_why(draw: Callable[..., Figure]) -> None:
    run = make_run({(0, "a"): [np.nan, 0.2]}, wasserstein_error=np.array([np.nan, 0.3]))
    with pytest.raises(ValueError, match=r"\b1 dead.*\b1 left out.*\b0\.1\b"):
        draw(run)
    with pytest.raises(LookupError, match=r"variable 'wasserstein'.*wasserstein_error"):
        draw(run.drop_vars("wasserstein"))


def test_options_of_the_heatmap_that_are_wrong() -> None:
    run = make_run({(0, "a"): [0.1]})
    with pytest.raises(ValueError, match="bins=0"):
        plots.heatmap(run, bins=0)
    with pytest.raises(LookupError, match=r"variable 'wassertein'.*wasserstein"):
        plots.heatmap(run, variable="wassertein")


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_titles_say_what_is_known_of_the_run(draw: Callable[..., Figure]) -> None:
    run = make_model(GPT2, blocks=2)
    assert draw(run).get_suptitle().strip() == "SmolLM2-135M · data/python-docs · 65,536 tokens"
    run.attrs = {"model": "openai/gpt2", "text": "data/python-docs/calibration.txt"}
    assert draw(run).get_suptitle() == "gpt2 · python-docs/calibration"
    run.attrs = {}
    assert draw(run).get_suptitle() == ""
    titles = [ax.get_title() for ax in draw(run).axes if ax.get_title()]
    assert titles[1:3] == ["attn.c_proj\n96 neurons", "mlp.c_fc\n384 neurons"]


def every_picture() -> Iterator[tuple[str, Callable[[], Figure]]]:
    long = {"model": "x/Meta-Llama-3-8B-Instruct", "text": "hub:wikitext/wikitext-103-raw-v1"}
    dead = make_model(blocks=30, apart=(11, "mlp.down_proj"))
    dead["wasserstein"][::50] = np.nan
    runs = {
        "llama": dead,
        "gpt2": make_model(GPT2, blocks=12),
        "experts": make_model({f"mlp.experts.{i}.w1": 20 for i in range(9)}, blocks=4),
        "one block": make_model(blocks=1),
        "one layer": make_model({"mlp.down_proj": 70}, blocks=1),
        "long names": make_model(blocks=3).assign_attrs(long | {"tokens": 10**9}),
        "one neuron": make_run({(7, "mlp.up_proj"): [0.3]}),
    }
    for (kind, draw), (name, run) in itertools.product(PICTURES.items(), runs.items()):
        yield f"{kind}, {name}", lambda draw=draw, run=run: draw(run)  # type: ignore[misc]
    yield "kurtosis", lambda: plots.heatmap(make_model(), variable="kurtosis")
    yield "neuron", lambda: plots.neuron(make_tree(two_humps()[:, None]), f"{LAYER}:0")
    massive = np.append(two_humps(999), np.float32(26172))[:, None]
    yield "massive", lambda: plots.neuron(make_tree(massive), f"{LAYER}:0")


@pytest.mark.parametrize("draw", [pytest.param(draw, id=name) for name, draw in every_picture()])
def test_all_text_fits_and_none_overlaps_at_a_readmes_width(
    draw: Callable[[], Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = draw()
    assert figure.get_figwidth() * 100 == 850
    figure.set_dpi(100)
    drawn: dict[Text, Any] = {}
    draw_text: Any = Text.draw

    def note_and_draw(text: Text, renderer: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            box, lines = text.get_window_extent(renderer), text.get_text().split("\n")
            box.y1 -= box.height * lines[:1].count("") / len(lines)  # an empty first line is room
            drawn[text] = box
        draw_text(text, renderer)

    monkeypatch.setattr(Text, "draw", note_and_draw)
    figure.savefig(BytesIO(), format="png")
    assert len(drawn) > 8
    assert all(6.5 <= float(text.get_fontsize()) <= 9 for text in drawn)
    boxes = [(text.get_text(), box) for text, box in drawn.items()]
    for text, box in boxes:
        assert -1 < box.x0 < box.x1 < 851, f"{text!r} leaves the picture"
        assert -1 < box.y0 < box.y1 < figure.get_figheight() * 100 + 1, f"{text!r} leaves it"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert width < 1 or height < 2, f"{one!r} and {other!r} overlap"


def test_nothing_global_changes() -> None:
    before = dict(mpl.rcParams)
    run = make_model(GPT2, blocks=2)
    for draw in PICTURES.values():
        draw(run)
    plots.neuron(make_tree(two_humps()[:, None]), f"{LAYER}:0")
    assert dict(mpl.rcParams) == before
    assert not plt.get_fignums()


def test_a_notebook_shows_a_sharp_picture_at_its_size() -> None:
    data, size = plots.layers(make_model(GPT2, blocks=2))._repr_png_()  # type: ignore[attr-defined]
    assert data.startswith(b"\x89PNG")
    assert size["width"] == 850
    assert int.from_bytes(data[16:20], "big") == 1700


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_pictures_are_drawn_into_a_given_figure_or_part_of_one(draw: Callable[..., Figure]) -> None:
    run = make_model(GPT2, blocks=2)
    figure = Figure(figsize=(17, 4), layout="constrained")
    left, right = np.ravel(figure.subfigures(1, 2))  # type: ignore[arg-type]
    assert draw(run, figure=right) is figure
    assert not left.axes
    assert len([ax for ax in right.axes if ax.get_title()]) == 4
    plain = Figure()
    assert draw(run, figure=plain) is plain
    assert plain.get_layout_engine() is not None


ODD = "docs/$_{$ \udce9.txt"  # no formula of matplotlib, and no UTF-8


@pytest.mark.parametrize("draw", [plots.heatmap, plots.layers, plots.ranks])
def test_names_are_drawn_as_they_are(draw: Any) -> None:
    run = make_run({(0, "up"): [0.1, 0.2, 0.4]})
    run.attrs = run.attrs | {"text": ODD}
    figure = draw(run)
    figure.savefig(BytesIO(), format="png")
    assert r"docs/\$_{\$ \udce9" in words(figure)
