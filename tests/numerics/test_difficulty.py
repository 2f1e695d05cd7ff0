"""Mapping difficulty: against the published definition, written out in plain Python."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from entangle.numerics.difficulty import mapping_difficulty

Pair = tuple[int, int]


def drawn(tokens: int, pairs: int, seed: int) -> list[Pair]:
    """Return the pairs that the definition's random draw gives: of a permutation, two by two."""
    order = np.random.default_rng(seed).permutation(tokens).tolist()
    return list(zip(order[0::2], order[1::2], strict=False))[:pairs]


def brute(inputs: torch.Tensor, outputs: torch.Tensor, pairs: Sequence[Pair]) -> list[float]:
    """Return the mean over pairs of (|Δy| / median |Δy|) / (‖Δx‖ / max ‖Δx‖), neuron by neuron."""
    x, y = inputs.double().tolist(), outputs.double().tolist()
    kept = [(a, b) for a, b in pairs if x[a] != x[b]]
    apart = [math.dist(x[a], x[b]) for a, b in kept]
    found = []
    for neuron in range(outputs.shape[1]):
        change = [abs(y[a][neuron] - y[b][neuron]) for a, b in kept]
        median, total = float(np.median(change)), 0.0
        for dx, dy in zip(apart, change, strict=True):
            total += (dy / median) / (dx / max(apart))
        found.append(total / len(kept))
    return found


def random_rows(
    tokens: int, inputs: int = 5, neurons: int = 3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator) * 3 + 1
    return x, torch.randn(tokens, neurons, generator=generator) - 2


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("pairs", [1, 4, 5, 10])  # an even and an odd number: two medians
@pytest.mark.parametrize("tokens", [20, 21])
def test_it_is_what_was_published(tokens: int, pairs: int, seed: int) -> None:
    x, y = random_rows(tokens)
    found = mapping_difficulty(x, y, pairs, seed=seed)
    expected = brute(x, y, drawn(tokens, pairs, seed))
    np.testing.assert_allclose(found.difficulty, expected, rtol=1e-12)
    assert (found.pairs, found.equal) == (pairs, 0)
    assert found.difficulty.dtype == np.float64


def test_one_pair_is_one_by_hand() -> None:
    x, y = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, -2.0], [9.0, 5.0]])
    assert mapping_difficulty(x, y, 1).difficulty.tolist() == [1, 1]


@pytest.mark.parametrize("seed", range(12))
def test_two_pairs_by_hand(seed: int) -> None:
    """Of four tokens on a line any matching gives a value that can be worked out on paper."""
    x, y = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[0.0], [2.0], [3.0], [0.0]])
    by_hand = {
        # 0-1 and 2-3: dx 1, 4, dy 2, 3: median 2.5, (2/1 + 3/4) / 2 * 4 / 2.5
        2.2: 2.75 / 2 * 4 / 2.5,
        # 0-2 and 1-3: dx 3, 6, dy 3, 2: median 2.5, (3/3 + 2/6) / 2 * 6 / 2.5
        1.6: (4 / 3) / 2 * 6 / 2.5,
        # 0-3 and 1-2: dx 7, 2, dy 0, 1: median 0.5, (0/7 + 1/2) / 2 * 7 / 0.5
        3.5: 0.5 / 2 * 7 / 0.5,
    }
    value = mapping_difficulty(x, y, 9, seed=seed).difficulty.item()
    assert any(math.isclose(value, hand) for hand in by_hand)
    assert all(math.isclose(key, hand) for key, hand in by_hand.items())


def matchings(tokens: list[int]) -> list[list[Pair]]:
    if not tokens:
        return [[]]
    first, *rest = tokens
    return [
        [(first, other), *more]
        for other in rest
        for more in matchings([token for token in rest if token != other])
    ]


def test_pairs_are_disjoint_and_random() -> None:
    x, y = random_rows(6, neurons=1)
    possible = [brute(x, y, pairs)[0] for pairs in matchings(list(range(6)))]
    assert len(possible) == 15
    met = set()
    for seed in range(60):
        found = mapping_difficulty(x, y, 100, seed=seed)
        near = [i for i, value in enumerate(possible) if math.isclose(value, found.difficulty[0])]
        assert len(near) == 1
        met.add(near[0])
        assert found.pairs == 3  # fewer tokens than pairs: each token at most once
    assert len(met) > 10


def test_of_an_odd_number_of_tokens_one_is_left_over_and_of_few_pairs_the_rest() -> None:
    x, y = random_rows(7)
    assert mapping_difficulty(x, y, 100).pairs == 3
    assert mapping_difficulty(x, y, 2).pairs == 2


def test_pairs_with_equal_inputs_are_left_out_of_mean_median_and_maximum() -> None:
    x, y = random_rows(40, inputs=1)
    x = (x > 1).float() + (x > 4).float() * 9  # three values
    found = mapping_difficulty(x, y, 20, seed=3)
    pairs = drawn(40, 20, 3)
    equal = sum(x[a].item() == x[b].item() for a, b in pairs)
    assert 0 < equal < 20
    assert (found.pairs, found.equal) == (20 - equal, equal)
    np.testing.assert_allclose(found.difficulty, brute(x, y, pairs), rtol=1e-12)


def test_without_two_different_inputs_there_is_none() -> None:
    found = mapping_difficulty(torch.ones(8, 3), torch.randn(8, 2), 100)
    assert np.isnan(found.difficulty).tolist() == [True, True]
    assert (found.pairs, found.equal) == (0, 4)
    lonely = mapping_difficulty(torch.ones(1, 3), torch.ones(1, 2), 5)
    assert (len(lonely.difficulty), lonely.pairs, lonely.equal) == (2, 0, 0)


def test_a_constant_neuron_has_none_and_the_others_are_as_ever() -> None:
    x, y = random_rows(30)
    expected = mapping_difficulty(x, y, 15).difficulty
    y[:, 1] = 4.25
    found = mapping_difficulty(x, y, 15).difficulty
    assert np.isnan(found).tolist() == [False, True, False]
    assert found[[0, 2]].tolist() == expected[[0, 2]].tolist()
    y[:, 1] = 0
    y[0, 1] = 1  # in one pair of all
    assert np.isnan(mapping_difficulty(x, y, 15).difficulty[1])


def test_scale_and_offset_of_inputs_and_outputs_and_rotations_change_nothing() -> None:
    x, y = (rows.double() for rows in random_rows(50))
    expected = mapping_difficulty(x, y, 25).difficulty
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    for inputs, outputs in (
        (x, y * torch.tensor([1e-3, -7.0, 1e4])),
        (x * 1e3, y),
        (x + 5, y - 3),
        (x @ rotation, y),
    ):
        found = mapping_difficulty(inputs, outputs, 25).difficulty
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert not np.allclose(mapping_difficulty(x * x, y, 25).difficulty, expected, rtol=1e-3)


def test_a_neuron_does_not_depend_on_the_others() -> None:
    x, y = random_rows(30, neurons=6)
    whole = mapping_difficulty(x, y, 15).difficulty
    assert mapping_difficulty(x, y[:, 2:4], 15).difficulty.tolist() == whole[2:4].tolist()


def test_a_steep_neuron_is_more_difficult_than_a_linear_one() -> None:
    x = torch.linspace(-1, 1, 2001)[:, None]
    found = mapping_difficulty(x, torch.cat([x, (x * 60).sin()], dim=1), 1000).difficulty
    assert found[1] > 3 * found[0]


def test_the_seed_chooses_the_pairs_and_the_dtype_is_no_matter() -> None:
    x, y = (rows.bfloat16() for rows in random_rows(30))
    first = mapping_difficulty(x, y, 6, seed=1)
    assert mapping_difficulty(x, y, 6, seed=1).difficulty.tolist() == first.difficulty.tolist()
    assert mapping_difficulty(x, y, 6, seed=2).difficulty.tolist() != first.difficulty.tolist()
    np.testing.assert_allclose(first.difficulty, brute(x, y, drawn(30, 6, 1)), rtol=1e-12)


@pytest.mark.parametrize(
    ("outputs", "pairs", "message"),
    [
        (9, 3, r"inputs of 8 tokens.*outputs of 9$"),
        (8, 0, r"\b1 pair\b.* 0$"),
        (8, -1, r"\b1 pair\b.* -1$"),
    ],
)
def test_what_cannot_be_measured_is_refused(outputs: int, pairs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mapping_difficulty(torch.randn(8, 2), torch.randn(outputs, 3), pairs)
