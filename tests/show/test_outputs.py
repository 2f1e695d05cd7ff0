"""Pictures of one neuron's held-out outputs: bars, colours and numbers are what was kept."""

import re
from collections.abc import Callable
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.text import Text

from entangle import plots
from entangle.runs.dataset import attributes_of
from tests.show.test_plots import make_run

Array = npt.NDArray[np.float64]

UP, DOWN = "model.layers.0.mlp.up", "model.layers.0.mlp.down"
TOKENS = 3000
MIDDLES = np.array([2.0, -1.0, 0.5, 6.0])  # of the clusters' outputs


def made_up(*, far: int = 0) -> xr.DataTree:
    """Return a run that kept a neuron of one layer and two of the other, some tokens ``far`` out."""
    rng = np.random.default_rng(0)
    run = make_run({(0, "mlp.up"): [0.1, 0.4, 0.2], (0, "mlp.down"): [0.05, 0.3]})
    within, improvement = rng.uniform(0.01, 0.9, (5, 5)), rng.uniform(0.8, 2, (5, 2, 5))
    improvement[:, :, 0] = 1
    run = run.assign(
        held_out_wasserstein=("neuron", rng.uniform(0.1, 0.5, 5)),
        wasserstein_within=(("neuron", "arm"), within),
        distance_to_dense=(("neuron", "sparsity", "arm"), rng.uniform(0.01, 0.2, (5, 2, 5))),
        improvement=(("neuron", "sparsity", "arm"), improvement),
    ).assign_coords(experts=("arm", [1, 2, 2, 4, 4]), sparsity=["0.5", "2:4"])
    about = {"model": "data/SmolLM2-135M", "evaluation": "data/docs/other.txt"}
    run.attrs |= attributes_of({"disentangled": about | {"held_out_tokens": TOKENS}})
    four = rng.integers(0, 4, TOKENS)
    four[four == 2] = 3  # a cluster without a held-out token
    two = (four > 1).astype(np.int64)
    labels = np.stack([np.zeros_like(four), two, rng.permutation(two), four, rng.permutation(four)])
    dense = MIDDLES[four] + 0.5 * rng.standard_normal((3, TOKENS))
    dense[1] *= -3
    dense[1, :far] = 500
    dense[1, far : 2 * far] = -400
    sparse = dense[:, None, None] + 0.3 * rng.standard_normal((3, 2, 5, TOKENS))
    outputs = xr.Dataset(
        {
            "clusters": (("clustered", "arm", "token"), np.stack([labels, labels[:, ::-1]])),
            "dense": (("kept", "token"), dense.astype(np.float32)),
            "sparse": (("kept", "sparsity", "arm", "token"), sparse.astype(np.float32)),
        },
        coords={"kept": [f"{UP}:0", f"{UP}:1", f"{DOWN}:1"], "clustered": [UP, DOWN]},
    )
    return xr.DataTree.from_dict({"/": run, "/outputs": outputs})


def outputs_of(tree: xr.DataTree) -> xr.Dataset:
    return tree.children["outputs"].to_dataset(inherit=False)


def saved(figure: Figure) -> Figure:
    """Draw it in full: a warning is an error."""
    figure.savefig(BytesIO(), format="png")
    return figure


def stacks_of(ax: Axes) -> list[tuple[str, Array, Array]]:
    """Return colour, bottoms and heights of each set of bars, from the lowest to the highest."""
    return [
        (
            to_hex(bars[0].get_facecolor()),
            np.array([bar.get_y() for bar in bars]),
            np.array([bar.get_height() for bar in bars]),
        )
        for bars in ax.containers
    ]


def edges_of(ax: Axes) -> Array:
    bars: Any = ax.containers[0]
    return np.array([bar.get_x() for bar in bars] + [bars[-1].get_x() + bars[-1].get_width()])


def row_of(tree: xr.DataTree, place: int) -> xr.Dataset:
    return tree.to_dataset().isel(neuron=place)


@pytest.mark.parametrize(("name", "kept", "place"), [(None, 1, 1), (f"{DOWN}:1", 2, 4)])
def test_bars_of_clusters_are_stacked_shares_of_the_tokens(
    name: str | None, kept: int, place: int
) -> None:
    tree = made_up()
    figure = saved(plots.clusters(tree, name))
    outputs = outputs_of(tree)
    dense = outputs["dense"].values[kept]
    labels = outputs["clusters"].values[1 if kept == 2 else 0]
    for ax, arm in zip(figure.axes, (1, 3), strict=True):
        edges, stacks, top = edges_of(ax), stacks_of(ax), np.zeros(80)
        assert len(edges) == 81
        assert edges[0] <= dense.mean() - 3.5 * dense.std() * (1 - 1e-6)
        parts = [dense[labels[arm] == one] for one in np.unique(labels[arm])]
        parts.sort(key=np.mean)  # from the lowest to the highest
        assert len(stacks) == len(parts) == (2 if arm == 1 else 3)
        assert len({colour for colour, _, _ in stacks}) == len(parts)
        for (_, bottom, height), part in zip(stacks, parts, strict=True):
            np.testing.assert_allclose(bottom, top, atol=1e-12)
            counts = np.histogram(part, edges)[0]
            np.testing.assert_allclose(height * np.diff(edges), counts / TOKENS, atol=3e-3 / 30)
            top = bottom + height
        inside = ((dense >= edges[0]) & (dense <= edges[-1])).sum()
        assert (top * np.diff(edges)).sum() == pytest.approx(inside / TOKENS, rel=1e-4)
        (line,) = ax.lines
        x, y = np.asarray(line.get_xydata()).T
        mean, std = dense.astype(float).mean(), dense.astype(float).std()
        gaussian = np.exp(-0.5 * ((x - mean) / std) ** 2) / np.sqrt(2 * np.pi) / std
        np.testing.assert_allclose(y, gaussian, rtol=1e-4)
        within = row_of(tree, place)["wasserstein_within"].values
        assert ax.get_title() == (
            f"{len(parts)} clusters: W1 within {within[arm]:.3f}, within random ones "
            f"{within[arm + 1]:.3f}"
        )
    whole = float(row_of(tree, place)["held_out_wasserstein"])
    assert figure.get_suptitle().splitlines() == [
        f"{name or UP + ':1'}, W1 {whole:.3f}",
        "data/SmolLM2-135M · docs/other · 3,000 held-out tokens",
    ]
    assert figure.get_supylabel() == "density, a colour for each cluster"


def steps_of(ax: Axes) -> dict[str, tuple[Array, Array]]:
    """Return heights and edges by label."""
    steps: list[Any] = [patch for patch in ax.patches if isinstance(patch, StepPatch)]
    data = {str(one.get_label()): one.get_data() for one in steps}
    return {label: (np.asarray(d.values), np.asarray(d.edges)) for label, d in data.items()}


@pytest.mark.parametrize("sparsity", [None, "0.5"])
def test_sparse_outputs_lie_over_the_dense_ones(sparsity: str | None) -> None:
    tree, place = made_up(), 1 if sparsity is None else 0
    figure = saved(plots.sparse(tree, f"{UP}:0", sparsity=sparsity))
    outputs, row = outputs_of(tree), row_of(tree, 0)
    said = sparsity or "2:4"  # the last unless one is named
    for ax, arm in zip(figure.axes, (0, 1, 3), strict=True):
        steps = steps_of(ax)
        assert set(steps) == {"dense", f"{said} sparse"}
        values = {"dense": outputs["dense"].values[0]}
        values[f"{said} sparse"] = outputs["sparse"].values[0, place, arm]
        for label, (heights, edges) in steps.items():
            counts = np.histogram(values[label], edges)[0]
            np.testing.assert_allclose(heights * np.diff(edges), counts / TOKENS, rtol=1e-4)
        distance, gain = (row[n].values[place] for n in ("distance_to_dense", "improvement"))
        lines = [f"{(1, 2, 2, 4)[arm]} expert{'s' * (arm > 0)}"]
        lines += [f"W1 to dense {distance[arm]:.3f}, improvement {gain[arm]:.2f}"]
        lines += [f"(at random {distance[arm + 1]:.3f}, {gain[arm + 1]:.2f})"] * (arm > 0)
        assert ax.get_title().splitlines() == lines
    assert figure.get_suptitle().splitlines() == [
        f"{UP}:0",
        "data/SmolLM2-135M · docs/other · 3,000 held-out tokens",
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense", f"{said} sparse"]


@pytest.mark.parametrize("draw", [plots.clusters, plots.sparse])
def test_tokens_outside_the_picture_are_counted(draw: Callable[..., Figure]) -> None:
    near, far = (saved(draw(made_up(far=count))) for count in (0, 2))
    outside = "output of the neuron (output units)"
    for figure, count in ((near, 0), (far, 2)):
        low, high = figure.axes[0].dataLim.intervalx
        dense = outputs_of(made_up(far=count))["dense"].values[1]
        beyond = int(((dense < low) | (dense > high)).sum())
        assert beyond >= 2 * count
        more = rf"\n{beyond} of 3,000 tokens.*" if beyond else ""
        assert re.fullmatch(re.escape(outside) + more, figure.get_supxlabel())
    assert "of 3,000 tokens" in far.get_supxlabel()


@pytest.mark.parametrize("draw", [plots.clusters, plots.sparse])
def test_what_was_not_kept_is_told(draw: Callable[..., Figure]) -> None:
    tree = made_up()
    with pytest.raises(LookupError, match=rf"outputs.*'{UP}:2'.*\b{UP}:0\b"):
        draw(tree, f"{UP}:2")
    for run in (tree.to_dataset(), xr.DataTree(tree.to_dataset())):
        with pytest.raises(LookupError, match=r"outputs.*disentangle"):
            draw(run)
    with pytest.raises(LookupError, match=r"sparsity '0\.9'.*\b0\.5, 2:4\b"):
        plots.sparse(tree, sparsity="0.9")
    before = dict(mpl.rcParams)
    draw(tree)
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("draw", [plots.clusters, plots.sparse, plots.improvement])
def test_names_are_drawn_as_they_are(draw: Callable[..., Figure]) -> None:
    tree = made_up()
    about = {"model": "data/$_{$", "evaluation": "\udce9.txt", "held_out_tokens": TOKENS}
    tree.attrs |= attributes_of({"disentangled": about})
    figure = saved(draw(tree))
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert any(r"data/\$_{\$ · \udce9 ·" in text for text in texts)
