"""A search for the number of zeros of each block, on calibration windows set aside."""

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from entangle.model import ranks
from entangle.model.divergence import mean_over_windows
from entangle.model.kept_logits import KeptLogits, keep_logits
from entangle.model.score import Score
from entangle.model.scoring import NotFiniteError, score_of
from entangle.model.text import TokenWindows
from entangle.numerics.evolution import SCORES, Fitness, Zeros, evolve
from entangle.pruning.budgets import zeros_of
from entangle.pruning.levels import PrunedBlocks
from entangle.pruning.options import SEARCH, UNIFORM, Pruning
from entangle.runs.setup import Setup

STEP = 0.02  # a level's zeros, as a share of the weights of the smallest block
FEW, MANY = 2, 8  # windows on which offspring are scored, and survivors and parents


@dataclasses.dataclass(frozen=True, eq=False)
class _Text:
    """Some windows, and the dense model's logits on them."""

    windows: TokenWindows
    logits: KeptLogits


def search_blocks(setup: Setup, pruning: Pruning, scores: int) -> tuple[Zeros, pd.DataFrame]:
    """Search from uniform blocks and, with a run, from the entanglement budget.

    Each search has its share of ``scores``. The setup's evaluation are the windows set aside: pairs of
    them score offspring, and groups of eight score survivors and parents, in turns. Return the
    zeros of each block of the best candidate by the KL divergence on all of them, and a table of
    the starts and of what was found (see `choose_budget`).

    Raises:
        ValueError: the search cannot begin, or a score is missing (see `choose_budget`).
    """
    assert setup.evaluation is not None
    starts = _starts(setup, pruning)
    share = scores // len(starts)
    if share < SCORES:
        raise ValueError(
            f"a generation takes {SCORES} scores, and {len(starts)} searches have {scores}: give at "
            f"least {SCORES * len(starts)} scores"
        )
    sizes = {b: sum(x.neurons * x.inputs for x in here) for b, here in setup.blocks.items()}
    step = max(int(STEP * min(sizes.values())), 1)
    whole = _kept(setup, setup.evaluation)
    few, many = _groups(setup, FEW), _groups(setup, MANY)
    with tempfile.TemporaryDirectory() as temporary:
        blocks = PrunedBlocks(setup, pruning, Path(ranks.from_rank(0, temporary)))
        bar = tqdm(total=share // SCORES * SCORES * len(starts), unit="score", desc="search")

        def fitness(texts: list[_Text]) -> Fitness:
            def kl(zeros: Mapping[int, int], generation: int) -> float:
                bar.update()
                found = _score(setup, blocks, zeros, texts[generation % len(texts)])
                return math.inf if found is None else mean_kl(found)

            return kl

        try:
            candidates: list[tuple[str, str, int, Zeros]] = []
            for name, start in starts.items():
                candidates.append((name, "", 0, start))
                found = evolve(
                    start,
                    sizes,
                    step,
                    few=fitness(few),
                    many=fitness(many),
                    scores=share,
                    seed=setup.seed,
                )
                candidates.append((SEARCH, name, share // SCORES * SCORES, found))
            scored = [_score(setup, blocks, zeros, whole) for *_, zeros in candidates]
        finally:
            bar.close()
            blocks.restore()
    rows = [
        {"across": across, "start": start, "scores": count} | _columns(one, scored[0])
        for (across, start, count, _), one in zip(candidates, scored, strict=True)
    ]
    table = pd.DataFrame(rows)
    if table["kl"].isna().all():
        raise ValueError("the search found no blocks with a finite score: prune fewer weights")
    return candidates[int(table["kl"].idxmin())][3], table


def mean_kl(score: Score) -> float:
    """Return a score's mean KL divergence from the dense model, in nats per token."""
    assert score.divergence is not None
    return float(score.divergence.kl.mean(dtype=np.float64))


def _starts(setup: Setup, pruning: Pruning) -> dict[str, Zeros]:
    """Return the zeros of each block that the searches begin with, by their rule."""
    uniform = {
        block: sum(x.neurons * round(pruning.sparsity.share * x.inputs) for x in here)
        for block, here in setup.blocks.items()
    }
    if setup.run is None:
        return {UNIFORM: uniform}
    rule = dataclasses.replace(pruning, across="entanglement")
    rows = zeros_of(setup.layers, rule, run=setup.run, seed=setup.seed)
    counts = {
        block: sum(int(torch.as_tensor(rows[x.name]).sum()) for x in here)
        for block, here in setup.blocks.items()
    }
    return {UNIFORM: uniform, "entanglement": counts}


def _groups(setup: Setup, size: int) -> list[_Text]:
    """Return the windows set aside in groups; what is left over is in none."""
    assert setup.evaluation is not None
    windows, places = setup.evaluation, setup.evaluation.places
    groups = places.split(min(size, len(windows)))
    whole = [group for group in groups if len(group) == len(groups[0])]
    return [_kept(setup, windows.chosen(group)) for group in whole]


def _kept(setup: Setup, windows: TokenWindows) -> _Text:
    logits = keep_logits(setup.model, windows, batch_size=setup.batch_size)
    if logits is None:
        raise ValueError(
            "a search compares logits with the dense model's, but those of this model cannot be made "
            "again from its last block: choose blocks by a rule, such as across entanglement"
        )
    return _Text(windows, logits)


def _score(
    setup: Setup, blocks: PrunedBlocks, zeros: Mapping[int, int], text: _Text
) -> Score | None:
    """Return the score of the model with these numbers of zeros; None if it is not finite."""
    blocks.put(zeros)
    try:
        return score_of(
            setup.model,
            text.windows,
            against=text.logits,
            batch_size=setup.batch_size,
            skip_first=setup.skip_first,
            progress=False,
        )
    except NotFiniteError:
        return None


def _columns(score: Score | None, uniform: Score | None) -> dict[str, Any]:
    """Return the columns of one candidate; differences are to uniform blocks, paired by window."""
    names = ("kl", "nats", "kl_against_uniform", "against_uniform")
    found: dict[str, Any] = {}
    for name in names:
        base = uniform if name.endswith("uniform") else None
        if score is None or (name.endswith("uniform") and base is None):
            found |= {name: math.nan, f"{name}_error": math.nan}
            continue
        values = _of_windows(score, name) - (_of_windows(base, name) if base else 0.0)
        found[name], found[f"{name}_error"] = mean_over_windows(values)
    return found


def _of_windows(score: Score, name: str) -> Any:
    if not name.startswith("kl"):
        return score.window_nats
    assert score.divergence is not None
    return score.divergence.kl.mean(axis=1, dtype=np.float64)
