"""The pictures of sweeps and ablations show the numbers of their tables."""

import itertools
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle import plots

WORDS = ["method", "mask", "propagate", "sparsity", "density", "perplexity", "perplexity_error"]
ROUTED: dict[str, Any] = {"experts": 1, "assign": "", "components": "", "shrinkage": ""}


def table(*arms: tuple[str, str, str, str, float, float, float]) -> pd.DataFrame:
    dense = ("dense", "", "", "", 1.0, 15.0, 0.5)
    frame = pd.DataFrame([dense, *arms], columns=WORDS).assign(**ROUTED)
    return frame.assign(windows=40, tokens=20_440, problem="")


SWEEP = table(
    ("sparsegpt", "row", "dense", "0.8", 0.21, 400.0, 20.0),
    ("sparsegpt", "row", "dense", "0.5", 0.5, 19.0, 1.0),
    ("sparsegpt", "row", "dense", "2:4", 0.5, 25.0, 1.5),
    ("sparsegpt", "block", "dense", "0.5", 0.5, 20.0, 1.0),
    ("wanda", "row", "dense", "2:4", 0.5, 30.0, 2.0),
    ("magnitude", "row", "dense", "0.5", 0.5, np.nan, np.nan),
)


def lines_of(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    ax = figure.axes[0]
    handles, labels = ax.get_legend_handles_labels()
    points = {}
    for handle, label in zip(handles, labels, strict=True):
        line: Any = handle[0] if isinstance(handle, tuple) else handle
        points[label] = list(zip(*map(list, line.get_data()), strict=True))
    return points


def test_lines_hold_the_arms_by_their_multiply_adds() -> None:
    figure = plots.sweep(SWEEP)
    points = lines_of(figure)
    assert points["sparsegpt, mask by row"] == [(0.21, 400.0), (0.5, 19.0)]
    assert points["sparsegpt, mask by block"] == [(0.5, 20.0)]
    assert points["wanda, mask by row"] == [(0.5, 30.0)]  # n:m alone is a mark of its own
    assert not any(label.startswith("magnitude") for label in points)  # it has no score
    assert "dense, 15" in points
    ax = figure.axes[0]
    texts: list[Any] = list(ax.texts)
    assert {text.get_text() for text in texts} == {"2:4"}
    assert sorted(text.xy for text in texts) == [(0.5, 25.0), (0.5, 30.0)]
    assert ax.get_yscale() == "log"
    assert "20,440 tokens, 40 windows" in ax.get_ylabel()


def test_sparse_inputs_have_a_line_over_the_input_sparsity_for_each_sparsity() -> None:
    frame = table(
        ("none", "", "", "0", 0.6, 17.0, 1.0),
        ("none", "", "", "0", 0.5, 18.0, 1.0),
        ("sparsegpt", "row", "sparse", "0.5", 0.5, 19.0, 1.0),
        ("sparsegpt", "row", "sparse", "0.5", 0.3, 25.0, 1.0),
        ("sparsegpt", "row", "sparse", "0.5", 0.4, 22.0, 1.0),
        ("sparsegpt", "row", "sparse", "0.7", 0.3, 40.0, 1.0),
        ("sparsegpt", "row", "sparse", "0.7", 0.2, 60.0, 1.0),
    )
    inputs = ["", "teal", "teal", "dense", "teal", "teal", "dense", "wina"]
    shares = ["uniform" if one in {"teal", "wina"} else "" for one in inputs]
    frame = frame.assign(inputs=inputs, input_shares=shares)
    frame = frame.assign(input_sparsity=["", 0.4, 0.5, "", 0.4, 0.2, "", 0.4])
    points = lines_of(plots.sweep(frame))
    assert points == {
        "none, inputs teal": [(0.5, 18.0), (0.6, 17.0)],
        "sparsegpt": [(0.3, 40.0), (0.5, 19.0)],
        "sparsegpt, inputs teal, weights 0.5": [(0.3, 25.0), (0.4, 22.0)],
        "sparsegpt, inputs wina, weights 0.7": [(0.2, 60.0)],
        "dense, 15": points["dense, 15"],
    }


def test_what_does_not_differ_is_not_said() -> None:
    only = table(("wanda", "row", "sparse", "0.5", 0.5, 20.0, 1.0))
    assert set(lines_of(plots.sweep(only))) == {"wanda", "dense, 15"}


def test_each_number_of_experts_and_each_rival_has_a_line_of_its_own_colour() -> None:
    arms = [
        ("sparsegpt", "row", "dense", sparsity, density + extra, perplexity, 1.0)
        for extra in (0.0, 0.02, 0.03, 0.04)
        for sparsity, density, perplexity in (("0.7", 0.3, 50.0), ("0.6", 0.4, 25.0))
    ]
    frame = table(*arms, ("wanda", "row", "dense", "0.7", 0.3, 200.0, 9.0))
    frame.loc[3:, "experts"] = [4, 4, 16, 16, 16, 16, 1]
    frame.loc[3:, "assign"] = ["kmeans"] * 4 + ["random"] * 2 + [""]
    frame.loc[3:8, ["components", "shrinkage"]] = ["auto", "0.5"]
    ax = plots.sweep(frame).axes[0]
    points = lines_of(plots.sweep(frame))
    assert list(points) == [
        "dense, 15",
        "sparsegpt, 1 expert",
        "sparsegpt, 4 experts",
        "sparsegpt, 16 experts",
        "sparsegpt, 16 experts, at random",
        "wanda",
    ]
    assert points["sparsegpt, 4 experts"] == [(0.3 + 0.02, 50.0), (0.4 + 0.02, 25.0)]
    lines = {container.get_label(): container.lines[0] for container in ax.containers}  # type: ignore[attr-defined]
    styles = {label: line.get_linestyle() for label, line in lines.items()}
    assert styles["sparsegpt, 16 experts"] == "-"
    assert styles["sparsegpt, 16 experts, at random"] == "--"
    assert lines["sparsegpt, 16 experts"].get_marker() == "o"
    assert lines["sparsegpt, 16 experts, at random"].get_marker() == "x"
    colours = {label: mpl.colors.to_hex(line.get_color()) for label, line in lines.items()}
    assert colours["sparsegpt, 16 experts"] == colours["sparsegpt, 16 experts, at random"]
    assert len(set(colours.values())) == 4
    frame.loc[5:6, "shrinkage"] = "0"  # what differs between mixtures is said
    assert "sparsegpt, 16 experts, shrinkage 0" in lines_of(plots.sweep(frame))


def test_bars_are_the_errors() -> None:
    only = table(("wanda", "row", "sparse", "0.5", 0.5, 20.0, 3.0))
    container: Any = plots.sweep(only).axes[0].containers[0]
    (bar,) = container.lines[2][0].get_segments()
    assert bar[:, 1].tolist() == [17.0, 23.0]


def test_arms_of_one_sparsity_are_not_spread_out_by_rounding() -> None:
    arms = [("wanda", "row", "sparse", "0.5", 0.5 + part, 20.0, 1.0) for part in (0.0, 4e-6)]
    low, high = plots.sweep(table(*arms)).axes[0].get_xlim()
    assert low < 0.49
    assert high > 0.51


def test_it_draws_onto_given_axes() -> None:
    ax = Figure().add_subplot()
    assert plots.sweep(SWEEP, ax=ax) is ax


def test_no_arm_with_a_score_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sweep.*score"):
        plots.sweep(table(("wanda", "row", "sparse", "0.5", 0.5, np.nan, np.nan)))


# Ablations.


SETS = ("wasserstein", "random", "bottom", "std")


def ablated(
    shares: tuple[float, ...] = (0.03,),
    blocks: tuple[str, ...] = ("",),
    kinds: tuple[tuple[str, str, int], ...] = (("sparsify", "0.9", 1),),
    sets: tuple[str, ...] = SETS,
) -> pd.DataFrame:
    """Return a table such as `effects_of` makes; random sets have intervals twice their errors."""
    rng = np.random.default_rng(0)
    dense: dict[str, Any] = dict.fromkeys(("sparsity", "block", "set"), "")
    dense |= {"intervention": "dense", "experts": 1, "share": 0.0, "perplexity": 15.25}
    rows = [dense | {"difference": 0.0, "difference_error": 0.0}]
    for (deed, sparsity, experts), share, block, name in itertools.product(
        kinds, shares, blocks, sets
    ):
        row: dict[str, Any] = {"intervention": deed, "sparsity": sparsity, "experts": experts}
        row |= {"block": block, "set": name, "share": share}
        difference, error = rng.uniform(-0.2, 3), rng.uniform(0.01, 0.1)
        row |= {"perplexity": 15.25 * np.exp(difference), "difference": difference}
        rows.append(row | {"difference_error": error})
    frame = pd.DataFrame(rows).assign(tokens=20_951, windows=41)
    random = frame["set"] == "random"
    half = (2 * frame["difference_error"]).where(random)
    frame["difference_low"] = frame["difference"] - half
    frame["difference_high"] = frame["difference"] + half
    frame.attrs = {"model": "data/tiny", "evaluation": "data/docs", "layers": ["*.mlp.*"]}
    return frame


def bar_of(container: Any) -> tuple[list[tuple[float, float]], Any, str]:
    """Return points with their bars: the marks, the bars' segments and the colour."""
    line, _, (bars,) = container.lines
    colours = {mpl.colors.to_hex(one) for one in (line.get_color(), *bars.get_colors())}
    assert len(colours) == 1
    points = [(float(x), float(y)) for x, y in line.get_xydata()]
    return points, np.array(bars.get_segments()), colours.pop()


def drawn_of(ax: Axes) -> dict[str, tuple[list[tuple[float, float]], Any]]:
    """Return the points of each line and its bars' segments, by label."""
    return {str(bars.get_label()): bar_of(bars)[:2] for bars in ax.containers}


def saved(figure: Figure) -> Figure:
    """Draw it in full: a warning is an error."""
    figure.savefig(BytesIO(), format="png")
    return figure


RANDOM = "random (95%, seeds)"
LABELS = {"top wasserstein": "wasserstein", RANDOM: "random", "bottom wasserstein": "bottom"}
LABELS["top std"] = "std"


def bars_are(segments: Any, part: pd.DataFrame, axis: int) -> bool:
    """See that bars are one error either way, of random sets the interval."""
    low, high = (part[f"difference_{end}"] for end in ("low", "high"))
    error = part["difference_error"]
    low, high = low.fillna(part["difference"] - error), high.fillna(part["difference"] + error)
    np.testing.assert_allclose(segments[:, 0, axis], low, rtol=1e-12)
    np.testing.assert_allclose(segments[:, 1, axis], high, rtol=1e-12)
    return len(segments) == len(part)


def test_one_share_is_drawn_set_by_set_below_a_scale_of_ratios() -> None:
    kinds = (("sparsify", "0.9", 1), ("sparsify", "0.9", 16), ("zero", "", 1))
    table = ablated(kinds=kinds)
    figure = saved(plots.ablation(table))
    titles = ["0.9 sparse, one expert", "0.9 sparse, 16 experts", "zero"]
    assert [ax.get_title() for ax in figure.axes] == titles
    order = ["wasserstein", "std", "random", "bottom"]
    for ax, kind in zip(figure.axes, kinds, strict=True):
        chosen = table.set_index(["intervention", "sparsity", "experts"]).loc[[kind]]
        part = chosen.set_index("set").loc[order].reset_index()
        points, segments, colours = zip(*map(bar_of, ax.containers), strict=True)
        assert [list(one) for one in points] == [
            [(difference, place)] for place, difference in enumerate(part["difference"])
        ]
        assert bars_are(np.concatenate(segments), part, axis=0)
        assert len(set(colours)) == 4
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
            *("top wasserstein", "top std", RANDOM, "bottom wasserstein")
        ]
        (top,) = ax.child_axes
        figure.canvas.draw()
        assert top.get_xlim() == pytest.approx(np.exp(ax.get_xlim()))
    assert figure.axes[0].get_ylim() == (3.5, -0.5)  # the first on top
    assert (
        figure.get_supxlabel()
        == "difference to the dense model (nats a token)\nbars: one standard error"
    )
    assert figure.get_suptitle() == (
        "data/tiny · *.mlp.* · data/docs\n20,951 tokens, dense perplexity 15.25"
    )
    assert not figure.legends


def test_several_shares_are_drawn_as_lines_from_the_smallest() -> None:
    shares = (0.1, 0.01, 0.3)
    kinds = tuple(("sparsify", sparsity, 1) for sparsity in ("0.5", "0.9", "2:4", "1:4"))
    table = ablated(shares=shares, kinds=kinds)
    figure = saved(plots.ablation(table))
    assert len(figure.axes) == 4  # three in a row, and no empty ones
    for ax, (_, sparsity, _) in zip(figure.axes, kinds, strict=True):
        assert ax.get_title() == f"{sparsity} sparse, one expert"
        drawn = drawn_of(ax)
        assert list(drawn) == list(LABELS)
        for label, (points, segments) in drawn.items():
            part = table[(table["sparsity"] == sparsity) & (table["set"] == LABELS[label])]
            part = part.sort_values("share")
            assert points == list(zip(part["share"], part["difference"], strict=True))
            assert bars_are(segments, part, axis=1)
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "symlog")
        assert list(ax.get_xticks()) == [0.01, 0.1, 0.3]
    figure.canvas.draw()
    ticks = [text.get_text() for text in figure.axes[3].get_xticklabels()]
    assert [float(tick.removesuffix("%")) for tick in ticks] == [1, 10, 30]
    styles = {bars.get_label(): bars.lines[0].get_linestyle() for bars in figure.axes[0].containers}  # type: ignore[attr-defined]
    assert styles == dict.fromkeys(LABELS, "-") | {RANDOM: "--", "bottom wasserstein": "--"}
    assert figure.get_supxlabel() == "share of each layer's neurons treated"
    assert (
        figure.get_supylabel()
        == "difference to the dense model (nats a token)\nbars: one standard error"
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(LABELS)


def test_a_block_at_a_time_has_a_panel_for_each_share() -> None:
    table = ablated(shares=(0.03, 0.1), blocks=("0", "2", "10"))
    figure = saved(plots.ablation(table))
    titles = [f"0.9 sparse, one expert, {share} of neurons" for share in ("3%", "10%")]
    assert [ax.get_title() for ax in figure.axes] == titles
    for ax, share in zip(figure.axes, (0.03, 0.1), strict=True):
        for label, (points, segments) in drawn_of(ax).items():
            part = table[(table["share"] == share) & (table["set"] == LABELS[label])]
            # As numbers: 10 is after 2.
            assert points == list(zip([0, 2, 10], part["difference"], strict=True))
            assert bars_are(segments, part, axis=1)
        assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "linear")
    assert figure.get_supxlabel() == "treated block"


def test_random_neurons_of_one_seed_have_the_error_over_windows() -> None:
    for shares in ((0.03,), (0.03, 0.1)):
        table = ablated(shares=shares, sets=("random",))
        table[["difference_low", "difference_high"]] = np.nan
        (container,) = saved(plots.ablation(table)).axes[0].containers
        assert bars_are(bar_of(container)[1], table[1:], axis=0 if len(shares) == 1 else 1)


@pytest.mark.parametrize("shares", [(0.03,), (0.01, 0.1)])
def test_a_rival_set_that_has_no_colour_of_its_own_is_drawn_too(shares: tuple[float, ...]) -> None:
    table = ablated(shares, sets=(*SETS, "entropy", "surprise"))
    figure = saved(plots.ablation(table))
    containers = figure.axes[0].containers
    assert len(containers) == 6
    assert len({bar_of(container)[2] for container in containers}) == 6
    texts = [text.get_text() for text in figure.findobj(mpl.text.Text)]
    assert {"top entropy", "top surprise"} <= {*texts}


def test_arms_without_a_score_are_left_out_and_none_is_an_error() -> None:
    table = ablated()
    broken = table["set"] == "bottom"
    table.loc[broken, ["perplexity", "difference", "difference_error"]] = np.nan
    figure = saved(plots.ablation(table))
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        *("top wasserstein", "top std", RANDOM)
    ]
    table.loc[1:, "perplexity"] = np.nan
    with pytest.raises(ValueError, match=r"ablation.*score"):
        plots.ablation(table)


def test_budgets_of_one_sparsity_stand_one_below_the_other_the_best_first() -> None:
    words = [("uniform", "", "uniform"), ("std", "0.25", "uniform"), ("std", "0.25", "depth")]
    frame = table(*(("sparsegpt", "row", "dense", "0.7", 0.3, 40.0 - p, 1.0) for p in range(3)))
    frame[["budget", "strength", "across"]] = [("uniform", "", "uniform"), *words]
    frame["difference"] = [0.0, 0.9, 0.8, 0.7]
    frame["difference_error"] = [0.0, 0.01, 0.02, 0.03]
    figure = plots.sweep(frame)
    (panel,) = figure.axes
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == [
        "sparsegpt, rows std 0.25, blocks depth",
        "sparsegpt, rows std 0.25, blocks uniform",
        "sparsegpt, rows uniform, blocks uniform",
    ]
    drawn = {}
    for container in panel.containers:
        parts: Any = container
        line, _, (bars,) = parts.lines
        for x, y, bar in zip(*line.get_data(), bars.get_segments(), strict=True):
            drawn[labels[int(y)]] = float(x), float(np.ptp(bar[:, 0]) / 2)
    for place, label in enumerate(labels[::-1]):
        assert drawn[label] == pytest.approx((0.9 - 0.1 * place, 0.01 * (place + 1)))
    assert panel.get_ylim()[0] > panel.get_ylim()[1]


@pytest.mark.parametrize("sparsities", [("0.5", "0.7"), ("0.7", "2:4")])
def test_each_budget_of_each_method_can_be_told_apart(sparsities: tuple[str, str]) -> None:
    """Methods, budgets of rows with strengths, and budgets across blocks: no two lines alike."""
    kinds = list(
        itertools.product(
            ("sparsegpt", "wanda", "magnitude"),
            (("uniform", ""), ("std", "0.1"), ("std", "0.4"), ("trim", "")),
            ("uniform", "entanglement", "shuffled", "depth", "owl"),
        )
    )
    arms = [
        (method, "row", "dense", sparsity, 0.3 if sparsity == "0.7" else 0.5, 20.0 + place, 1.0)
        for sparsity in sparsities
        for place, (method, _, _) in enumerate(kinds)
    ]
    frame = table(*arms)
    budgets = [("uniform", "", "uniform")]
    budgets += 2 * [(budget, strength, across) for _, (budget, strength), across in kinds]
    frame[["budget", "strength", "across"]] = budgets
    frame = frame.assign(difference=np.arange(len(frame)) / 10, difference_error=0.01)
    panel = plots.sweep(frame).axes[0]
    if "2:4" in sparsities:
        labels = [text.get_text() for text in panel.get_yticklabels()]
        assert len({*labels}) == len(labels) == len(arms)
        return
    handles, labels = panel.get_legend_handles_labels()
    assert len({*labels}) == len(labels) == len(kinds) + 1
    looks = set()
    for handle in handles[1:] if labels[0].startswith("dense") else handles[:-1]:
        line: Any = handle
        line = line[0]
        color = mpl.colors.to_hex(line.get_color())
        looks.add((color, str(line.get_linestyle()), str(line._dash_pattern), line.get_marker()))
    assert len(looks) == len(kinds)


def test_strengths_of_one_budget_are_said() -> None:
    arms = [("sparsegpt", "row", "dense", "0.7", 0.3, 20.0 + place, 1.0) for place in range(3)]
    frame = table(*arms).assign(budget="std", across="uniform", difference=0.1)
    frame = frame.assign(strength=["", "0.1", "0.25", "0.4"], difference_error=0.01)
    panel = plots.sweep(frame).axes[0]
    labels = [text.get_text() for text in panel.get_yticklabels()]
    assert labels == [f"sparsegpt, rows std {strength}" for strength in ("0.1", "0.25", "0.4")]


def test_each_text_has_a_panel_with_its_own_scores() -> None:
    first = SWEEP.assign(evaluation="docs/first.txt")
    second = SWEEP.assign(evaluation="docs/second.txt", perplexity=2 * SWEEP["perplexity"])
    both = pd.concat([first, second]).sort_index(kind="stable").reset_index(drop=True)
    figure = plots.sweep(both)
    for panel, name, alone in zip(figure.axes, ("first", "second"), (first, second), strict=True):
        assert panel.get_title(loc="left").endswith(f"docs/{name}")
        expected = plots.sweep(alone).axes[0]
        for line, other in zip(panel.lines, expected.lines, strict=True):
            assert np.array_equal(line.get_xydata(), other.get_xydata(), equal_nan=True)
    with pytest.raises(ValueError, match=r"one text.*\b2\b"):
        plots.sweep(both, ax=Figure().add_subplot())
    assert plots.sweep(both[both["evaluation"] == "docs/first.txt"], ax=figure.axes[0])


def test_a_list_of_budgets_has_one_order_in_all_panels() -> None:
    budgets = ["uniform", "std", "ranks"]
    differences = {"a/first.txt": [0.3, 0.1, 0.2], "a/second.txt": [0.1, 0.2, 0.3]}
    rows = [{"method": "dense", "sparsity": "", "perplexity": 9.0, "difference": 0.0}]
    rows += [
        {"method": "sparsegpt", "sparsity": "0.7", "perplexity": 20.0, "budget": budget}
        for budget in budgets
    ]
    frames = [
        pd.DataFrame(rows).assign(
            **ROUTED | {"mask": "row", "propagate": "sparse", "strength": "", "across": "uniform"},
            difference=[0.0, *values],
            difference_error=0.0,
            tokens=511,
            windows=1,
            evaluation=name,
        )
        for name, values in differences.items()
    ]
    both = pd.concat(frames).sort_index(kind="stable").reset_index(drop=True)
    both["budget"] = both["budget"].fillna("")
    first, second = plots.sweep(both).axes
    labels = [[text.get_text() for text in one.get_yticklabels()] for one in (first, second)]
    assert labels[0] == labels[1]
    assert [label.split("rows ")[1] for label in labels[0]] == ["std", "ranks", "uniform"]
    points = np.concatenate([np.asarray(line.get_xydata()) for line in second.lines])
    assert {int(place): x for x, place in points} == {0: 0.2, 1: 0.3, 2: 0.1}
    assert first.get_xlim() == second.get_xlim()
