"""Tables of arms: which arms are compared with which, and what is printed of them."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from entangle.experiments.sweep_table import COSTS, markdown, tables_of

NEURONS = (2, 3)  # of two layers
TEXTS = {"e": [0, 1]}  # the windows of one text
RNG = np.random.default_rng(0)


def layer(name: str, neurons: int, error: float) -> dict[str, Any]:
    return {"layer": name, "neurons": neurons, "error": error, "held_out_error": 2 * error} | {
        "damping": 0.01
    }


def arm(experts: int, sparsity: str = "0.5", **words: Any) -> dict[str, Any]:
    """Return an arm with losses of its own."""
    named = {"method": "sparsegpt", "mask": "row", "solve": "exact", "propagate": "dense"}
    named |= {"reconstruct": "none", "experts": experts}  # type: ignore[dict-item]
    routed = {"assign": "kmeans", "components": "auto", "shrinkage": 0.5} if experts > 1 else {}
    costs = {name: 100.0 + place for place, name in enumerate(COSTS)}
    costs |= {"density": 0.3125, "stored": 950.0, "dense_multiply_adds": 200.0}
    costs |= {"dense_weights": 200.0}
    return named | routed | {"sparsity": sparsity} | words | {
        "window_nats": [3.0, 3.5],
        "tokens": 60,
        "realised": 0.5,
        "costs": costs,
        "layers": [layer("a", 2, 0.1), layer("b", 3, 0.3)],
        "lost": RNG.uniform(1, 9, 5).astype(np.float32),
        "held_out_lost": RNG.uniform(1, 9, 5).astype(np.float32),
    }  # fmt: skip


DENSE = {"method": "dense", "window_nats": [2.0, 2.5], "tokens": 60, "realised": 0.0, "layers": []}
DENSE |= {"costs": dict.fromkeys(COSTS, 1.0)}


def improvement(one: dict[str, Any], several: dict[str, Any], losses: str) -> Any:
    return np.sqrt(one[losses].astype(float) / several[losses].astype(float))


def test_each_mixture_is_compared_with_one_expert_of_the_same_words() -> None:
    ones = [arm(1, s, mask=m) for s in ("0.5", "0.7") for m in ("row", "block")]
    mixtures = [arm(4, one["sparsity"], mask=one["mask"]) for one in ones]
    mixtures.append(arm(16, "0.7", mask="block", assign="random"))
    table, layers = tables_of([DENSE, *mixtures, *ones], TEXTS)
    assert table["improvement"][len(mixtures) + 1 :].isna().all()
    for place, (one, several) in enumerate(zip([*ones, ones[-1]], mixtures, strict=True), start=1):
        for losses, name in (("lost", "improvement"), ("held_out_lost", "held_out_improvement")):
            gains = improvement(one, several, losses)
            assert table[name][place] == pytest.approx(np.median(gains))
            rows = layers.iloc[2 * (place - 1) : 2 * place]
            assert rows["layer"].tolist() == ["a", "b"]
            assert rows[name].tolist() == pytest.approx(
                [np.median(gains[:2]), np.median(gains[2:])]
            )


def test_mixtures_with_other_inputs_or_no_partner_are_not_compared() -> None:
    sparse = [arm(experts, propagate="sparse") for experts in (1, 4)]
    table, _ = tables_of([DENSE, *sparse, arm(1, "0.6"), arm(4, "0.7")], TEXTS)
    assert table["improvement"].isna().all()
    assert table["held_out_improvement"].isna().all()


def described(results: list[dict[str, Any]]) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    table, _ = tables_of(results, TEXTS)
    table.attrs |= {"model": "m", "layers": ["*"], "tokens": 9, "text": "t", "windows": 2}
    table.attrs |= {"length": 3, "evaluation_length": 3, "evaluation": "e", "evaluation_windows": 2}
    table.attrs |= {"skipped_parameters": []}
    lines = [line for line in markdown(table).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return table, [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_what_is_printed_is_what_was_found() -> None:
    one, several = arm(1), arm(4)
    several["layers"] = [layer("a", 2, 0.1), layer("b", 3, 0.3)]
    table, rows = described([DENSE, one, several])
    assert table["layer_error"][2] == pytest.approx(0.2)
    gain = np.median(improvement(one, several, "held_out_lost"))
    assert rows[2] == {
        "method": "sparsegpt",
        "mask": "row",
        "solve": "exact",
        "propagate": "dense",
        "reconstruct": "none",
        "experts": "4",
        "sparsity": "0.5",
        "realised": "0.5000",
        "perplexity": f"{np.exp(3.25):.1f} ± {np.exp(3.25) * 0.25:.1f}",
        "ratio": f"{np.e:.4g}",
        "difference (nats)": "1",
        "layer error": "0.2",
        "held out": "0.4",
        "improvement": f"{gain:.3f}",
        "multiply-adds": "31.2%",
        "stored": "4.75x",
        "disk": f"{several['costs']['disk_bytes'] / 1e6:,.4g} MB",
        "memory": f"{several['costs']['memory_bytes'] / 1e6:,.4g} MB",
    }
    assert rows[1]["improvement"] == "-"
    assert rows[0]["method"] == "dense"
    assert rows[0]["experts"] == "-"


def test_errors_of_reconstruction_are_means_and_of_other_arms_are_left_out() -> None:
    plain, tuned = arm(1), arm(1, "0.7", reconstruct="mlp")
    layers = [layer("a", 2, 0.1), layer("b", 3, 0.3), layer("c", 3, 0.3)]
    for one, errors in zip(layers, [(0.5, 0.25), (0.25, 0.125), (math.nan, math.nan)], strict=True):
        one |= dict(zip(("mlp_error_before", "mlp_error"), errors, strict=True))
    tuned["layers"] = layers
    table, rows = described([DENSE, plain, tuned])
    assert table["mlp_error_before"].tolist()[2] == 0.375
    assert table["mlp_error"].tolist()[2] == 0.1875
    assert table["mlp_error"].isna().tolist() == [True, True, False]
    assert [row["MLP error before"] for row in rows] == ["-", "-", "0.375"]
    assert [row["after"] for row in rows] == ["-", "-", "0.1875"]
    _, without = described([DENSE, plain])
    assert "after" not in without[0]


def test_what_an_arm_says_otherwise_than_the_dense_model_is_printed() -> None:
    def with_divergence(one: dict[str, Any], *means: list[float], tail: float) -> dict[str, Any]:
        names = ("kl", "agreement", "lost", "gained")
        return one | {
            "divergence": dict(zip(names, means, strict=True)) | {"tails": [[tail, tail / 4]]}
        }

    dense = with_divergence(DENSE, [0, 0], [1, 1], [0, 0], [0, 0], tail=0)
    one = with_divergence(arm(1), [0.25, 0.75], [0.5, 0.75], [0.25, 0.25], [0, 0.25], tail=2)
    broken = arm(1, "0.7") | {"window_nats": [None, None], "problem": "not finite"}
    table, rows = described([dense, one, broken, arm(1, "0.8")])
    assert table["kl"].isna().tolist() == [False, False, True, True]
    assert table["agreement_error"][1] == 0.125
    heads = ("KL (nats)", "KL 99.9%", "agreement", "lost", "gained")
    assert [[row[head] for head in heads] for row in rows] == [
        ["0", "0", "100%", "0%", "0%"],
        ["0.50 ± 0.25", "2.00 ± 0.50", "62 ± 12%", "25%", "12 ± 12%"],
        ["-"] * 5,
        ["-"] * 5,
    ]
    assert "KL (nats)" not in described([DENSE, arm(1)])[1][0]


def test_what_is_not_usual_of_a_mixture_is_said() -> None:
    assert "experts" not in described([DENSE, arm(1)])[1][0]
    usual = described([DENSE, arm(1), arm(4)])[1][2]
    assert not {"assign", "components", "shrinkage"} & {*usual}
    others: list[tuple[str, Any]] = [("assign", "random"), ("components", 0), ("shrinkage", 2.0)]
    for name, word in others:
        row = described([DENSE, arm(1), arm(4, **{name: word})])[1][2]
        assert row[name] == str(word)
        assert len({"assign", "components", "shrinkage"} & {*row}) == 1
