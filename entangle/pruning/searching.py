"""A search for the number of zeros of each block, on calibration windows set aside (EvoPress)."""

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from entangle.model import folders, ranks
from entangle.model.divergence import mean_over_windows
from entangle.model.kept_logits import KeptLogits, keep_logits
from entangle.model.progress import progress_bar
from entangle.model.score import Score
from entangle.model.scoring import NotFiniteError, score_of
from entangle.model.text import TokenWindows
from entangle.numerics.evolution import SCORES, BlockZeros, Fitness, evolve
from entangle.pruning.budgets import zeros_of
from entangle.pruning.levels import PrunedBlocks
from entangle.pruning.options import SEARCH, SHUFFLED, UNIFORM, Pruning
from entangle.runs import store
from entangle.runs.setup import Setup

ASIDE = 4  # one window in this many is set aside
STEP = 0.02  # a level's zeros, as a share of the weights of the smallest block
SEARCH_FILE = "search.json"  # in the folder of a pruned model
FEW, MANY = 2, 8  # windows on which offspring are scored, and survivors and parents


def set_aside(setup: Setup) -> Setup:
    """Return a setup whose evaluation is a fourth of the calibration windows; it has the others.

    Raises:
        ValueError: there are fewer than four windows, or the model is not causal.
    """
    windows = _check_windows(setup)
    aside = torch.zeros(len(windows), dtype=torch.bool)
    aside[windows.places[::ASIDE]] = True
    rest, scored = windows.chosen(~aside), windows.chosen(aside)
    found = dataclasses.replace(
        setup, windows=rest, evaluation=scored, seen=None, set_aside=True, scored=True
    )
    _ = found.layers, found.dependent_on  # their errors are raised now
    return found


def _check_windows(setup: Setup) -> TokenWindows:
    """Return the calibration windows, if some of them can be set aside.

    Raises:
        ValueError: there are fewer than four.
    """
    windows = setup.windows
    assert windows is not None
    if len(windows) < ASIDE:
        raise ValueError(
            f"too few calibration windows to choose a budget: expected at least {ASIDE}, got "
            f"{len(windows)}. Give more windows, or a budget that needs no choice"
        )
    return windows


def search_starts(setup: Setup, pruning: Pruning) -> dict[str, BlockZeros]:
    """Return the zeros of each block that the searches begin with, by their rule.

    These are uniform blocks, and with a run the entanglement budget. The options of the search are
    checked before any computation.

    Raises:
        LookupError: the run lacks a layer.
        ValueError: there are too few windows to set some aside, or too few scores for a generation;
            the budget is a control; or there is no entanglement budget to begin with (see `zeros_of`).
    """
    _check_windows(setup)
    starts: dict[str, BlockZeros] = {UNIFORM: uniform_zeros(setup, pruning)}
    if setup.run is not None:
        rule = dataclasses.replace(pruning, across="entanglement", budget=UNIFORM)
        rows = zeros_of(setup.layers, rule, run=setup.run, seed=setup.seed)
        starts["entanglement"] = {
            block: sum(int(torch.as_tensor(rows[x.name]).sum()) for x in here)
            for block, here in setup.blocks.items()
        }
    if pruning.scores // len(starts) < SCORES:
        raise ValueError(
            f"a generation takes {SCORES} scores, and {len(starts)} searches have {pruning.scores}: give "
            f"at least {SCORES * len(starts)} scores"
        )
    if pruning.budget == SHUFFLED:
        raise ValueError(f"a search has no control: give another budget than {SHUFFLED}")
    return starts


def searched(
    setup: Setup,
    pruning: Pruning,
    starts: Mapping[str, BlockZeros],
    file: Path | None = None,
) -> tuple[BlockZeros, pd.DataFrame]:
    """Return the zeros of each block that a search finds, and the table of `search_blocks`.

    ``starts`` are those of `search_starts`. With a ``file`` both are read from it, or written to
    it. Pruned blocks are kept beside it until the search ends.
    """
    if file is None or not file.exists():
        with _folder(file) as folder:
            zeros, table = search_blocks(set_aside(setup), pruning, starts, folder)
        rows = table.to_dict(orient="records")
        if file is not None:
            ranks.on_rank_zero(store.write_json, file, {"zeros": zeros, "candidates": rows})
        return zeros, table
    found = store.read_json(file)
    return {int(b): n for b, n in found["zeros"].items()}, pd.DataFrame(found["candidates"])


@contextmanager
def _folder(file: Path | None) -> Iterator[Path]:
    """Yield a folder for pruned blocks, beside a file or a temporary one, and remove it at the end."""
    if file is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(ranks.from_rank(0, temporary))
            ranks.all_gather(None)
        return
    folder = file.with_suffix(".levels")
    ranks.on_rank_zero(folders.remove_folder, folder)  # of a search that was killed
    yield folder
    ranks.on_rank_zero(folders.remove_folder, folder)


def search_name(pruning: Pruning) -> str:
    """Return the name of the file of a search, the same for prunings that have the same search."""
    one = pruning
    parts = (one.method, one.mask, one.budget, one.strength, one.scores, one.sparsity)
    return "-".join(map(str, parts)).replace(":", "of").replace("*", "x") + ".json"


def uniform_zeros(setup: Setup, pruning: Pruning) -> BlockZeros:
    """Return the zeros of each block if all rows are alike."""
    return {
        block: sum(x.neurons * round(pruning.sparsity.share * x.inputs) for x in here)
        for block, here in setup.blocks.items()
    }


def search_blocks(
    setup: Setup, pruning: Pruning, starts: Mapping[str, BlockZeros], folder: Path
) -> tuple[BlockZeros, pd.DataFrame]:
    """Search from each of the starts (see `search_starts`).

    The setup's evaluation are the windows set aside. Pairs of them score offspring, and groups of
    eight score survivors and parents, in turns. A candidate's weights are those of the method as
    published, with one expert, dense inputs and dense propagation. Each search has its share of the scores. Return
    the zeros of each block of the candidate with the lowest KL divergence on all windows set aside,
    and a table of the starts and of what was found (see `choose_budget`). Pruned blocks are written
    into ``folder``.

    Raises:
        ValueError: there are too few scores, the dense model's logits cannot be made again, the
            inputs of a layer cannot be used, or no candidate has a finite score.
    """
    assert setup.evaluation is not None
    plain: Any = {"solve": "greedy", "propagate": "dense", "reconstruct": "none"}
    pruning = dataclasses.replace(pruning, **plain, experts=1, inputs="dense")
    sizes = {b: sum(x.neurons * x.inputs for x in here) for b, here in setup.blocks.items()}
    step = max(int(STEP * min(sizes.values())), 1)
    share = pruning.scores // len(starts) // SCORES * SCORES  # whole generations
    whole = _kept(setup, setup.evaluation)
    few, many = _groups(setup, whole, FEW), _groups(setup, whole, MANY)
    candidates: list[tuple[str, str, int, BlockZeros]] = []
    count = share * len(starts)
    with progress_bar(total=count, unit="score", desc="search", shown=setup.progress) as bar:
        blocks = PrunedBlocks(setup, pruning, folder)

        def fitness(texts: list[_Text]) -> Fitness:
            def kl(zeros: Mapping[int, int], generation: int) -> float:
                bar.update()
                found = _score(setup, blocks, zeros, texts[generation % len(texts)])
                return math.inf if found is None else float(_kl_of_windows(found).mean())

            return kl

        try:
            for name, start in starts.items():
                candidates.append((name, "", 0, start))
                how: Any = {"few": fitness(few), "many": fitness(many), "scores": share}
                found = evolve(start, sizes, step, seed=setup.seed, **how)
                candidates.append((SEARCH, name, share, found))
            scores = [_score(setup, blocks, zeros, whole) for *_, zeros in candidates]
        finally:
            blocks.restore()
    table = pd.DataFrame(
        {"across": across, "start": start, "scores": count} | _columns(one, scores[0])
        for (across, start, count, _), one in zip(candidates, scores, strict=True)
    )
    if table["kl"].isna().all():
        raise ValueError("the search found no blocks with a finite score: prune fewer weights")
    return candidates[int(np.nanargmin(table["kl"].to_numpy()))][3], table


@dataclasses.dataclass(frozen=True, eq=False)
class _Text:
    """Some windows, and the dense model's logits on them."""

    windows: TokenWindows
    logits: KeptLogits


def _groups(setup: Setup, whole: _Text, size: int) -> list[_Text]:
    """Return the windows set aside in groups of this size; what is left over is in none."""
    windows, places = whole.windows, whole.windows.places
    groups = places.split(min(size, len(windows)))
    groups = [group for group in groups if len(group) == len(groups[0])]
    if ranks.count() > 1:  # each process has kept other windows
        return [_kept(setup, windows.chosen(group)) for group in groups]
    size = setup.batch_size
    return [_Text(windows.chosen(x), whole.logits.of_windows(x, size)) for x in groups]


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
    found: dict[str, Any] = {}
    for name, of in (("kl", _kl_of_windows), ("nats", lambda one: one.window_nats)):
        values = None if score is None else of(score)
        change = None if values is None or uniform is None else values - of(uniform)
        pair = {name: values, f"{name}_against_uniform": change}
        for column, one in pair.items():
            numbers = (math.nan, math.nan) if one is None else mean_over_windows(one)
            found[column], found[f"{column}_error"] = numbers
    return found | {"windows": 0 if score is None else len(score.window_nats)}


def _kl_of_windows(score: Score) -> Any:
    assert score.divergence is not None
    return score.divergence.kl.mean(axis=1, dtype=np.float64)
