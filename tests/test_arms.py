"""The picture of a sweep shows the numbers of its table."""

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from entangle import plots

WORDS = ["method", "mask", "propagate", "sparsity", "density", "perplexity", "perplexity_error"]
ROUTED: dict[str, Any] = {"experts": 1, "assign": "", "components": "", "pull": ""}


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
    frame.loc[3:8, ["components", "pull"]] = ["auto", "0.5"]
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
    frame.loc[5:6, "pull"] = "0"  # what differs between mixtures is said
    assert "sparsegpt, 16 experts, pull 0" in lines_of(plots.sweep(frame))


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
    with pytest.raises(ValueError, match="no arm of this sweep has a score"):
        plots.sweep(table(("wanda", "row", "sparse", "0.5", 0.5, np.nan, np.nan)))
