"""Rules of sparse inputs: thresholds against torch's quantiles, top-k and greedy against brute force."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from entangle.numerics.input_rules import (
    Magnitudes,
    Threshold,
    column_norms,
    greedy_shares,
    rule_of,
    top_inputs,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantile_is_that_of_the_absolute_values_within_a_bin(dtype: torch.dtype) -> None:
    # A few inputs are a thousand times as large as the others, as behind a SwiGLU.
    rows = noise(200, 48) ** 3
    rows[::7, 3] *= 1000
    rows = rows.to(dtype)
    found = Magnitudes()
    for part in rows.split(64):
        found.add(part)
    assert int(found.counts.sum()) == rows.numel()
    for share in (0.05, 0.25, 0.5, 0.9, 0.97):
        exact = float(rows.abs().float().flatten().quantile(share))
        value = found.quantile(share)
        assert value == pytest.approx(exact, rel=2**-9)
        if dtype is torch.float32:  # many of the few values of bfloat16 are the threshold itself
            below = float((~Threshold(value).keep(rows)).float().mean())
            assert below == pytest.approx(share, abs=2e-3)


def test_a_quantile_is_interpolated_in_its_bin() -> None:
    found = Magnitudes()
    inside = torch.linspace(1, 1 + 2**-10, 1001)[:-1]  # one bin
    found.add(-inside)
    for share in (0.1, 0.5, 0.75):
        assert found.quantile(share) == pytest.approx(1 + share * 2**-10, abs=1e-7)


def test_zeros_lie_below_no_threshold() -> None:
    found = Magnitudes()
    found.add(torch.tensor([0.0] * 6 + [1.0, -2.0, 3.0, 4.0]))
    assert found.quantile(0.5) < 1e-30
    assert found.quantile(0.7) == pytest.approx(2, rel=2**-9)


def test_there_is_no_quantile_of_nothing_nor_of_infinities() -> None:
    with pytest.raises(ValueError, match="no inputs"):
        Magnitudes().quantile(0.5)
    found = Magnitudes()
    found.add(torch.tensor([1.0, math.inf, -math.inf, math.nan]))
    assert math.isfinite(found.quantile(0.2))
    with pytest.raises(ValueError, match="finite"):
        found.quantile(0.5)


def test_all_values_lie_below_the_threshold_of_share_1() -> None:
    found, rows = Magnitudes(), noise(40, 8)
    found.add(rows)
    value = found.quantile(1.0)
    largest = float(rows.abs().max())
    assert largest < value < largest * (1 + 2**-9)
    found.add(torch.tensor([math.inf]))
    with pytest.raises(ValueError, match="finite"):
        found.quantile(1.0)


def test_greedy_reaches_a_high_share_with_thresholds_of_real_inputs() -> None:
    inputs, sizes = [noise(300, 8, seed=seed) for seed in range(3)], (10.0, 10.0, 10.0)
    magnitudes = [Magnitudes() for _ in inputs]
    for one, rows in zip(magnitudes, inputs, strict=True):
        one.add(rows)

    def error(shares: Sequence[float]) -> float:
        rules = [Threshold(m.quantile(s)) for m, s in zip(magnitudes, shares, strict=True)]
        lost = [rows[~rule.keep(rows)] for rule, rows in zip(rules, inputs, strict=True)]
        # The first layer hardly counts, so its share becomes 1.
        return sum(w * float(x.square().sum()) for w, x in zip((1e-3, 1.0, 1.0), lost, strict=True))

    found = greedy_shares(sizes, 0.9, error, step=0.5)
    assert found[0] == pytest.approx(1)
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) == pytest.approx(27)


def test_a_threshold_keeps_what_reaches_it_and_nan() -> None:
    kept = Threshold(1.0).keep(torch.tensor([0.5, -0.5, 1.0, -1.0, 2.0, math.nan]))
    assert kept.tolist() == [False, False, True, True, True, True]


def test_wina_keeps_the_largest_products() -> None:
    weight, inputs = noise(5, 8, seed=1), noise(3, 4, 8, seed=2)
    rule = top_inputs(column_norms(weight), 0.375)
    assert rule.kept == 5
    kept = rule.keep(inputs)
    for token, chosen in zip(inputs.reshape(-1, 8), kept.reshape(-1, 8), strict=True):
        products = [abs(float(x)) * float(weight[:, j].norm()) for j, x in enumerate(token)]
        best = sorted(range(8), key=lambda j: products[j])[-5:]
        assert chosen.nonzero().flatten().tolist() == sorted(best)


def test_experts_have_the_mean_square_of_their_norms() -> None:
    weight = noise(3, 5, 8)
    torch.testing.assert_close(column_norms(weight), weight.norm(dim=1).square().mean(0).sqrt())
    torch.testing.assert_close(column_norms(weight[:1]), column_norms(weight[0]))


def test_rules_come_back_from_their_tensors() -> None:
    threshold = Threshold(0.1 + 0.2)
    assert rule_of(threshold.tensors()) == threshold
    top = top_inputs(noise(8).abs(), 0.5)
    again = rule_of(top.tensors())
    inputs = noise(6, 8, seed=3)
    assert torch.equal(again.keep(inputs), top.keep(inputs))
    with pytest.raises(LookupError):
        rule_of({"norms": noise(8)})


def stepped(sizes: Sequence[int], counts: Sequence[int], step: float) -> list[float]:
    return [step * count / size for size, count in zip(sizes, counts, strict=True)]


def test_greedy_is_the_best_of_all_divisions_if_errors_add_up_and_grow() -> None:
    # With separable convex errors the greedy steps lead to the optimum over all numbers of steps.
    sizes, costs = (30, 20, 10), (1.0, 3.0, 0.5)

    def error(shares: Sequence[float]) -> float:
        return sum(c * n * s**2 for c, n, s in zip(costs, sizes, shares, strict=True))

    found = greedy_shares(sizes, 0.5, error, step=1.5)
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) == pytest.approx(30)
    step = 1.5  # in 20 steps to half of the weights
    every = itertools.product(range(21), repeat=3)
    divisions = [stepped(sizes, one, step) for one in every if sum(one) == 20]
    least = min((one for one in divisions if max(one) <= 1), key=error)
    assert found == pytest.approx(least)


def test_greedy_fills_a_layer_at_most_and_reaches_the_share() -> None:
    sizes = (100.0, 7.0, 7.0)  # a small layer has room for one whole step
    found = greedy_shares(sizes, 0.99, lambda shares: shares[0], step=5)
    assert max(found) <= 1
    assert sum(s * n for s, n in zip(found, sizes, strict=True)) == pytest.approx(0.99 * 114)
    assert greedy_shares(sizes, 0.2, lambda shares: shares[0], step=5)[1:] == pytest.approx(
        [0.6514] * 2, abs=0.01
    )
    assert greedy_shares(sizes, 0.0, sum, step=5) == [0, 0, 0]
    assert greedy_shares([0, 0], 0.5, sum, step=0) == [0, 0]  # all weights are zero
    with pytest.raises(ValueError, match="finite"):
        greedy_shares(sizes, 0.5, lambda _: math.nan, step=5)
