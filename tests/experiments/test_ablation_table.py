"""Effects: the tables against NumPy and SciPy, from scores that are made up."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from entangle.experiments.ablation_table import effects_of, equivalent_share, markdown, table_of

Array = npt.NDArray[np.float64]
WINDOWS = 6


def dense(seed: int = 0) -> dict[str, Any]:
    nats = 3 + np.random.default_rng(seed).normal(0, 0.3, WINDOWS)
    return {"intervention": "dense", "window_nats": nats.tolist(), "tokens": 90}


def arm(
    name: str, share: float, more: float, seed: int | None = None, **words: Any
) -> dict[str, Any]:
    """Return an arm's result: ``more`` nats than the dense model, window by window with noise."""
    generator = np.random.default_rng([sum(map(ord, name)), round(1000 * share), seed or 0])
    nats = np.array(dense()["window_nats"]) + more + generator.normal(0, 0.05, WINDOWS)
    return {
        "intervention": "sparsify",
        "sparsity": "0.9",
        "experts": 1,
        "neurons": name,
        "share": share,
        "seed": seed,
        "block": None,
        "neurons_treated": round(1000 * share),
        "realised": 0.9,
        "model_sparsity": 0.02,
        "window_nats": nats.tolist(),
        "tokens": 90,
    } | words


def results() -> list[dict[str, Any]]:
    """Return a top set that hurts as 7% or so of random neurons, a bottom one, and random ones."""
    random = [
        arm("random", share, more, seed)
        for share, more in ((0.03, 0.1), (0.1, 0.4))
        for seed in range(4)
    ]
    return [dense(), arm("wasserstein", 0.03, 0.28), *random, arm("bottom", 0.03, 0.02)]


def nats(found: Sequence[dict[str, Any]], name: str, share: float = 0.03) -> Array:
    rows = [one for one in found if (one.get("neurons"), one.get("share")) == (name, share)]
    return np.array([one["window_nats"] for one in rows])


def row_of(table: pd.DataFrame, name: str, share: float = 0.03) -> Any:
    rows = table[(table["set"] == name) & (table["share"] == share)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_each_arm_has_a_row_and_seeds_are_merged() -> None:
    found = results()
    arms, table = table_of(found), effects_of(found)
    assert arms["set"].tolist() == ["", "wasserstein", *["random"] * 8, "bottom"]
    assert arms["seed"].tolist() == ["", "", *map(str, [0, 1, 2, 3] * 2), ""]
    assert table["set"].tolist() == ["", "wasserstein", "random", "random", "bottom"]
    assert table["share"].tolist() == [0, 0.03, 0.03, 0.1, 0.03]
    assert table["seeds"].tolist() == [0, 0, 4, 4, 0]
    assert table["neurons"].tolist() == [0, 30, 30, 100, 30]
    assert table["intervention"].tolist() == ["dense", *["sparsify"] * 4]
    assert "seed" not in table
    for one, result in zip(arms.to_dict(orient="records"), found, strict=True):
        change = np.array(result["window_nats"]) - found[0]["window_nats"]
        assert one["perplexity"] == pytest.approx(math.exp(np.mean(result["window_nats"])))
        assert one["difference"] == pytest.approx(change.mean(), abs=1e-12)
        assert one["difference_error"] == pytest.approx(stats.sem(change), abs=1e-12)
        assert one["ratio"] == pytest.approx(math.exp(change.mean()))
        assert (one["windows"], one["tokens"], one["problem"]) == (WINDOWS, 90, "")


@pytest.mark.parametrize("name", ["wasserstein", "bottom"])
def test_a_set_is_scored_paired_by_window_and_against_random_ones(name: str) -> None:
    found = results()
    row = row_of(effects_of(found), name)
    before, random = np.array(found[0]["window_nats"]), nats(found, "random")
    (top,) = nats(found, name)
    assert row["perplexity"] == pytest.approx(math.exp(top.mean()))
    assert row["perplexity_error"] == pytest.approx(math.exp(top.mean()) * stats.sem(top))
    assert row["difference"] == pytest.approx((top - before).mean())
    assert row["difference_error"] == pytest.approx(stats.sem(top - before))
    assert row["difference_error"] < stats.sem(top) / 2  # paired, and windows differ much
    assert row["ratio"] == pytest.approx(math.exp(top.mean()) / math.exp(before.mean()))
    assert row["ratio_error"] == pytest.approx(row["ratio"] * stats.sem(top - before))
    assert np.isnan(row[["perplexity_low", "difference_high"]].astype(float)).all()
    over = top - random.mean(axis=0)
    error = math.sqrt(stats.sem(over) ** 2 + stats.sem(random.mean(axis=1)) ** 2)
    assert row["over_random"] == pytest.approx(over.mean())
    assert row["over_random_error"] == pytest.approx(error)
    gains = np.exp(random.mean(axis=1)) - math.exp(before.mean())
    assert row["times_random"] == pytest.approx(
        (math.exp(top.mean()) - math.exp(before.mean())) / gains.mean()
    )
    curve = [0.0, *((nats(found, "random", share) - before).mean() for share in (0.03, 0.1))]
    expected = np.interp((top - before).mean(), curve, [0, 0.03, 0.1])
    assert row["equivalent_share"] == pytest.approx(expected)
    assert row["equivalent_low"] < row["equivalent_share"] < row["equivalent_high"]
    assert row["times_low"] < row["times_random"] < row["times_high"]
    assert row["equivalent_low"] <= row["equivalent_share"] < row["equivalent_high"]


def test_random_ones_have_means_and_t_intervals_over_seeds() -> None:
    found = results()
    table = effects_of(found)
    for share in (0.03, 0.1):
        row, random = row_of(table, "random", share), nats(found, "random", share)
        change = random - found[0]["window_nats"]
        for name, values in (
            ("perplexity", np.exp(random.mean(axis=1))),
            ("difference", change.mean(axis=1)),
        ):
            low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
            assert row[name] == pytest.approx(values.mean())
            assert row[f"{name}_low"] == pytest.approx(low)
            assert row[f"{name}_high"] == pytest.approx(high)
        assert row["difference_error"] == pytest.approx(stats.sem(change.mean(axis=0)))
        assert row["ratio"] == pytest.approx(np.exp(change.mean(axis=1)).mean())
        assert np.isnan(
            row[["over_random", "times_random", "equivalent_share"]].astype(float)
        ).all()


def test_the_dense_model_is_no_different_from_itself() -> None:
    first = effects_of(results()).iloc[0]
    assert (first["difference"], first["difference_error"], first["ratio"]) == (0, 0, 1)
    assert math.isnan(first["over_random"])


def test_one_seed_has_no_interval_and_no_error_against_random() -> None:
    row = row_of(
        effects_of([dense(), arm("wasserstein", 0.03, 0.3), arm("random", 0.03, 0.1, 0)]),
        "wasserstein",
    )
    assert math.isfinite(row["over_random"])
    assert math.isfinite(row["times_random"])
    assert math.isinf(row["equivalent_share"])
    for name in ("over_random_error", "equivalent_low", "equivalent_high"):
        assert math.isnan(row[name])


def test_sets_are_compared_with_random_ones_that_were_treated_the_same() -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"sparsity": "0.5"},
        {"experts": 4},
        {"intervention": "zero", "sparsity": ""},
        {"block": 0},
        {"block": 1},
    ]
    found, expected = [dense()], []
    for place, kind in enumerate(kinds):
        found.append(arm("wasserstein", 0.03, 0.5, **kind))
        random = [arm("random", 0.03, 0.1 * place, seed, **kind) for seed in range(2)]
        found += random
        expected.append((nats(found[-3:], "wasserstein") - nats(random, "random")).mean())
    table = effects_of([*found, arm("std", 0.1, 0.4)])
    tops = table[table["set"] == "wasserstein"]
    assert len(table) == 1 + 2 * 6 + 1
    assert tops["over_random"].tolist() == pytest.approx(expected)
    assert tops["block"].tolist() == ["", "", "", "", "0", "1"]
    # Of 10% there are no random neurons.
    assert np.isnan(
        row_of(table, "std", 0.1)[["over_random", "equivalent_share"]].astype(float)
    ).all()


# The equivalent share.


@given(
    steps=st.lists(st.tuples(st.floats(0.001, 0.2), st.floats(0.001, 1)), min_size=1, max_size=6),
    part=st.floats(0, 1),
)
def test_on_a_curve_that_rises_it_is_linear_interpolation(
    steps: list[tuple[float, float]], part: float
) -> None:
    shares, curve = np.cumsum(steps, axis=0).T.tolist()
    difference = part * curve[-1]
    expected = np.interp(difference, [0, *curve], [0, *shares])
    assert equivalent_share(difference, shares, curve) == pytest.approx(expected, abs=1e-12)
    assert equivalent_share(curve[-1] * (1 + 1e-9), shares, curve) == math.inf


@pytest.mark.parametrize(
    ("difference", "curve", "expected"),
    [
        (0.1, [0.2, 0.4], 0.05),
        (0.2, [0.2, 0.4], 0.1),
        (0.3, [0.2, 0.4], 0.2),
        (0.4, [0.2, 0.4], 0.3),
        (0.5, [0.2, 0.4], math.inf),
        (0.0, [0.2, 0.4], 0.0),
        (-0.7, [0.2, 0.4], 0.0),
        (0.1, [0.2, 0.05], 0.05),  # where it is first reached
        (0.1, [-0.2, 0.2], 0.25),  # over a share that does good: from -0.2 up to 0.2
        (0.2, [-0.1, -0.2], math.inf),
        (0.2, [0.1, 0.1], math.inf),
        (0.1, [0.1, 0.1], 0.1),
        (math.nan, [0.1, 0.2], math.nan),
        (0.1, [0.1, math.nan], math.nan),
        (math.inf, [0.1, 0.2], math.inf),
    ],
)
def test_the_equivalent_share_by_hand(
    difference: float, curve: list[float], expected: float
) -> None:
    found = equivalent_share(difference, [0.1, 0.3], curve)
    assert found == pytest.approx(expected, nan_ok=True)


# Arms that have no score.


def without_score(result: dict[str, Any]) -> dict[str, Any]:
    nothing = {"window_nats": [None] * WINDOWS, "tokens": 0, "problem": "not finite in 6 windows"}
    return result | nothing


def test_an_arm_without_a_score_says_why_and_the_others_stay() -> None:
    whole = results()
    found = [*whole[:-1], without_score(whole[-1])]
    table, expected = effects_of(found), effects_of(whole)
    bottom = row_of(table, "bottom")
    assert bottom["problem"] == "not finite in 6 windows"
    numbers = ["perplexity", "difference", "ratio", "over_random", "times_random"]
    assert np.isnan(bottom[[*numbers, "equivalent_share"]].astype(float)).all()
    pd.testing.assert_frame_equal(table[:-1], expected[:-1], check_exact=True)
    assert table_of(found)["problem"].tolist() == [*[""] * 10, "not finite in 6 windows"]


@pytest.mark.parametrize("seed", [0, 2])
def test_random_neurons_of_which_one_seed_has_no_score_are_no_measure(seed: int) -> None:
    found = results()
    found[2 + seed] = without_score(found[2 + seed])
    table = effects_of(found)
    random, top = row_of(table, "random"), row_of(table, "wasserstein")
    assert random["problem"] == "not finite in 6 windows"
    assert math.isnan(random["perplexity"])
    assert math.isfinite(top["perplexity"])
    assert np.isnan(top[["over_random", "times_random", "equivalent_share"]].astype(float)).all()
    assert math.isfinite(row_of(table, "random", 0.1)["perplexity"])


def test_random_neurons_that_change_nothing_are_no_error() -> None:
    idle = [dense() | arm("random", 0.03, 0, seed) for seed in range(2)]
    idle = [one | {"window_nats": dense()["window_nats"]} for one in idle]
    table = effects_of([dense(), arm("wasserstein", 0.03, 0.3), *idle])
    top = row_of(table, "wasserstein")
    assert top["over_random"] == pytest.approx(top["difference"])
    assert not math.isfinite(top["times_random"])


# Markdown.

ABOUT: dict[str, Any] = {
    "model": "tiny",
    "layers": ["*.mlp.*", "*.q_proj"],
    "tokens": 4096,
    "text": "calibration.txt",
    "windows": 8,
    "length": 512,
    "pruned": True,
    "evaluation": "evaluation.txt",
    "evaluation_windows": WINDOWS,
    "evaluation_length": 512,
    "run": {"tokens": 65536, "text": "measured.txt"},
    "skipped_parameters": [],
    "missing_sets": [],
}


def written(found: Sequence[dict[str, Any]], **about: Any) -> tuple[str, list[dict[str, str]]]:
    """Return the Markdown, and its table's rows."""
    table = effects_of(found)
    table.attrs.update(ABOUT | about)
    words = markdown(table)
    lines = [line for line in words.splitlines() if line.startswith("|")]
    head, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set("".join(rule)) == {"-"}
    return words, [dict(zip(head, row, strict=True)) for row in rows]


def test_the_markdown_says_what_the_numbers_are_and_what_on() -> None:
    found = results()
    words, rows = written(found)
    for said in (
        r"tiny.*\*\.mlp\.\* \*\.q_proj.*\b65,536 tokens.*measured\.txt",
        r"\b90 tokens.*evaluation\.txt.*\b6 windows",
        r"\b4,096 tokens.*calibration\.txt.*\b8 windows of 512\b.*\bdense\b",
    ):
        assert re.search(said, words)
    assert "block" not in rows[0]
    assert [row["neurons"] for row in rows] == [
        "-",
        "top wasserstein, 30",
        "random, 30",
        "random, 100",
        "bottom wasserstein, 30",
    ]
    assert [row["share"] for row in rows] == ["-", "3%", "3%", "10%", "3%"]
    table, top = effects_of(found), rows[1]
    expected = row_of(table, "wasserstein")
    assert top["intervention"] == "sparsify"
    assert (top["sparsity"], top["realised"], top["model"]) == ("0.9", "90.00%", "2.00%")
    for cell, name in (
        ("perplexity", "perplexity"),
        ("difference, nats", "difference"),
        ("over random, nats", "over_random"),
    ):
        value, error = map(float, top[cell].split(" ± "))
        assert value == pytest.approx(expected[name], abs=0.06 * expected[f"{name}_error"])
        assert error == pytest.approx(expected[f"{name}_error"], rel=0.06)
    times = [float(word.strip("[],")) for word in top["times random"].split()]
    names = ("times_random", "times_low", "times_high")
    assert times == pytest.approx([expected[name] for name in names], rel=0.01)
    ends = [float(word.strip("[],%")) / 100 for word in top["equivalent share"].split()]
    names = ("equivalent_share", "equivalent_low", "equivalent_high")
    assert ends == pytest.approx([expected[name] for name in names], abs=1e-4)
    random = row_of(table, "random")
    for cell, name in (("perplexity", "perplexity"), ("difference, nats", "difference")):
        numbers = [float(word.strip("[],")) for word in rows[2][cell].split()]
        ends = [random[key] for key in (name, f"{name}_low", f"{name}_high")]
        assert numbers == pytest.approx(ends, rel=1e-3)
    assert [rows[2][cell] for cell in ("times random", "equivalent share")] == ["-", "-"]
    assert rows[0]["ratio"] == "1"


def test_the_markdown_names_what_is_missing_and_what_was_not_reached() -> None:
    found = [*results(), arm("kurtosis", 0.1, 2.0), without_score(arm("std", 0.005, 1))]
    words, rows = written(
        found, missing_sets=["difficulty"], pruned=False, skipped_parameters=["h.0.gate"]
    )
    assert "no difficulty" in words
    assert "calibration.txt" not in words
    assert re.search(r"\b1 matri.*h\.0\.gate", words)
    assert rows[-2]["equivalent share"] == "not reached"
    assert rows[-1]["share"] == "0.50%"
    assert rows[-1]["perplexity"] == rows[-1]["ratio"] == "-"
    assert re.search(r"sparsify top std.*not finite in 6 windows", words)


def test_blocks_have_a_column_where_there_are_some() -> None:
    found = [dense(), *(arm("wasserstein", 0.03, 0.1, block=block) for block in (0, 11))]
    _, rows = written(found)
    assert [row["block"] for row in rows] == ["-", "0", "11"]


def test_the_bootstrap_draws_windows_and_seeds_together() -> None:
    found = results()
    row = row_of(effects_of(found), "wasserstein")
    generator = np.random.default_rng(5)
    before, (top,) = np.array(found[0]["window_nats"]), nats(found, "wasserstein")
    times = []
    for _ in range(4000):
        windows, seeds = generator.integers(WINDOWS, size=WINDOWS), generator.integers(4, size=4)
        dense_ = math.exp(before[windows].mean())
        random = np.exp(nats(found, "random")[seeds][:, windows].mean(axis=1))
        times.append((math.exp(top[windows].mean()) - dense_) / (random - dense_).mean())
    low, high = np.quantile(times, [0.025, 0.975])
    assert row["times_low"] == pytest.approx(low, rel=0.1)
    assert row["times_high"] == pytest.approx(high, rel=0.1)
