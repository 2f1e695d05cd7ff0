"""The search keeps its total and its bounds, and finds the optimum of a convex fitness."""

import itertools
from collections.abc import Mapping

import pytest

from entangle.numerics.evolution import OFFSPRING, SCORES, evolve

SIZES = {0: 40, 2: 60, 5: 40}
START = {0: 20, 2: 30, 5: 20}
WEIGHTS = {0: 1.0, 2: 3.0, 5: 0.2}


def cost(zeros: Mapping[int, int], _: int = 0) -> float:
    return sum(WEIGHTS[block] * (count / SIZES[block]) ** 2 for block, count in zeros.items())


def test_it_finds_the_best_of_all_levels_with_the_total() -> None:
    step, seen = 5, []

    def few(zeros: Mapping[int, int], generation: int) -> float:
        seen.append(dict(zeros))
        return cost(zeros, generation)

    found = evolve(START, SIZES, step, few=few, many=cost, scores=40 * SCORES, seed=3)
    levels = [range(count % step, SIZES[b] + 1, step) for b, count in START.items()]
    every = [dict(zip(START, counts, strict=True)) for counts in itertools.product(*levels)]
    allowed = [one for one in every if sum(one.values()) == sum(START.values())]
    assert found == min(allowed, key=cost)
    assert cost(found) < cost(START)
    assert all(one in allowed for one in seen)


@pytest.mark.parametrize("generations", [0, 1, 3])
def test_generations_fit_into_the_scores(generations: int) -> None:
    calls: list[tuple[str, int]] = []

    def counting(kind: str) -> object:
        def fitness(zeros: Mapping[int, int], generation: int) -> float:
            calls.append((kind, generation))
            return cost(zeros)

        return fitness

    how = {"few": counting("few"), "many": counting("many")}
    scores = generations * SCORES + SCORES - 1
    evolve(START, SIZES, 1, scores=scores, seed=0, **how)  # type: ignore[arg-type]
    assert len(calls) == generations * SCORES
    assert {generation for _, generation in calls} == {*range(generations)}
    assert sum(kind == "few" for kind, _ in calls) == generations * OFFSPRING


def test_the_parent_stays_if_no_survivor_is_better_on_more_text() -> None:
    def never(zeros: Mapping[int, int], _: int) -> float:
        return 0.0 if zeros == START else 1.0

    words = {"few": cost, "many": never, "scores": 5 * SCORES, "seed": 0}
    assert evolve(START, SIZES, 5, **words) == START  # type: ignore[arg-type]


def test_one_block_has_nothing_to_switch() -> None:
    words = {"few": cost, "many": cost, "scores": 5 * SCORES, "seed": 0}
    assert evolve({0: 7}, {0: 40}, 5, **words) == {0: 7}  # type: ignore[arg-type]


def test_another_seed_is_another_search() -> None:
    found = []
    for seed in (0, 0, 1):
        seen: list[dict[int, int]] = []

        def few(zeros: Mapping[int, int], _: int, into: list[dict[int, int]] = seen) -> float:
            into.append(dict(zeros))
            return cost(zeros)

        evolve(START, SIZES, 1, few=few, many=cost, scores=3 * SCORES, seed=seed)
        found.append(seen)
    assert found[0] == found[1] != found[2]
