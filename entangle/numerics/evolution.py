"""A search over the numbers of zeros of a model's blocks, at a constant total.

It is EvoPress (arXiv 2410.14649, algorithm 1): each generation, some offspring of one parent are made
by level switches, scored on little text, and the best of them, with the parent, on more.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

BlockZeros = dict[int, int]  # by block
Fitness = Callable[[Mapping[int, int], int], float]  # of the zeros, in a generation; less is better

OFFSPRING, SURVIVORS = 8, 2
SCORES = OFFSPRING + SURVIVORS + 1  # of a generation: offspring, then survivors and the parent
SWITCHES = 3  # at most, in one mutation


def evolve(
    start: Mapping[int, int],
    sizes: Mapping[int, int],
    step: int,
    *,
    few: Fitness,
    many: Fitness,
    scores: int,
    seed: int,
) -> BlockZeros:
    """Return the zeros of each block that the search ends with.

    ``sizes`` are the weights of each block. A level is ``step`` zeros more or less. ``few`` scores
    offspring, ``many`` the survivors and the parent; the best of these is the next parent. The search
    ends when another generation would take more than ``scores`` scores in all, or when no switch is
    possible.
    """
    rng, parent = np.random.default_rng(seed), dict(start)
    for generation in range(scores // SCORES):
        offspring = _offspring(parent, sizes, step, rng)
        if not offspring:
            break
        found = [few(one, generation) for one in offspring]
        best = [offspring[place] for place in np.argsort(found, kind="stable")[:SURVIVORS]]
        parent = min([parent, *best], key=lambda one: many(one, generation))
    return parent


def _offspring(
    parent: BlockZeros, sizes: Mapping[int, int], step: int, rng: np.random.Generator
) -> list[BlockZeros]:
    """Return mutated copies of the parent, all different; fewer if there are not so many."""
    found: list[BlockZeros] = []
    for _ in range(8 * OFFSPRING):
        one = _mutated(parent, sizes, step, rng)
        if one != parent and one not in found:
            found.append(one)
        if len(found) == OFFSPRING:
            break
    return found


def _mutated(
    parent: BlockZeros, sizes: Mapping[int, int], step: int, rng: np.random.Generator
) -> BlockZeros:
    """Return a copy after some switches: one block has a level more, another a level less.

    Their number is the smaller of two uniform draws from 1 to 3, as published.
    """
    zeros = dict(parent)
    for _ in range(int(rng.integers(1, SWITCHES + 1, size=2).min())):
        up = [block for block, count in zeros.items() if count + step <= sizes[block]]
        down = [block for block, count in zeros.items() if count >= step]
        if not up or not down:
            break
        more, less = _drawn(up, rng), _drawn(down, rng)
        if more != less:
            zeros[more] += step
            zeros[less] -= step
    return zeros


def _drawn(blocks: Sequence[int], rng: np.random.Generator) -> int:
    return blocks[int(rng.integers(len(blocks)))]
