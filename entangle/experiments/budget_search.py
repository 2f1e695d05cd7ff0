"""Choose a budget's strength, and its variable, on calibration windows set aside."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Unpack

import pandas as pd
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.experiments.sweeping import sweep
from entangle.model.placing import check_in_memory
from entangle.model.text import TokenWindows
from entangle.pruning.options import (
    DISTANCE,
    EXPERT_DEFAULTS,
    TRIM,
    UNIFORM,
    Budget,
    Pruning,
    PruningOptions,
    several,
    with_options,
)

STRENGTHS = (0.1, 0.25, 0.4)
VARIABLES: tuple[Budget, ...] = (DISTANCE, "ranks", "wasserstein")
_EVERY = 4  # a window in so many is set aside


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenBudget:
    """What was chosen, and the table that says why."""

    budget: str
    strength: float
    against_uniform: float  # nats a token on the windows set aside; NaN if uniform rows are best
    against_uniform_error: float
    table: pd.DataFrame  # as `sweep` returns it, scored on the windows set aside


@with_options(budget=VARIABLES, strength=STRENGTHS)
def choose_budget(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset,
    layers: str | Sequence[str] = ("*",),
    batch_size: int = 4,
    skip_first: int = 0,
    progress: bool = False,
    **options: Unpack[PruningOptions],
) -> ChosenBudget:
    """Return the budget of rows with the lowest perplexity on a fourth of the calibration windows.

    The other windows are pruned by, with one expert and dense propagation, so that a candidate
    costs a pruning and a score. Uniform rows are a candidate too, of strength 0. Options are those
    of `sweep`; candidates are several of ``budget`` and of ``strength``. The evaluation text is not
    seen.

    Raises:
        ValueError: as `sweep` does, fewer than four windows, a budget without a strength, or no
            candidate has a score.
    """
    given: dict[str, Any] = dict(options)
    for name in ("experts", "propagate", *EXPERT_DEFAULTS):
        if name in given:
            raise ValueError(
                "budgets are compared with one expert and dense propagation, so leave out "
                f"{name}={given[name]!r}"
            )
    budgets = several(given.pop("budget", VARIABLES))
    searched = {"strength", "across"}  # beside the budget: of all others there is one value
    Pruning.of(**{name: value for name, value in given.items() if name not in searched})
    alike = sorted({UNIFORM, TRIM} & {*budgets})
    if alike:
        raise ValueError(f"a budget of {alike[0]} rows has no strength to choose: name another")
    if len(windows) < _EVERY:
        raise ValueError(
            f"strength auto sets a window in {_EVERY} aside, but there are {len(windows)}: give "
            "more windows, or a strength"
        )
    check_in_memory(model, "choosing a budget")
    aside = torch.arange(len(windows)) % _EVERY == 0
    rest, scored = (
        dataclasses.replace(windows, tokens=windows.tokens[which]) for which in (~aside, aside)
    )
    candidates = {"method": "sparsegpt", "strength": STRENGTHS} | given
    candidates |= {"budget": [UNIFORM, *budgets], "propagate": "dense"}
    table = sweep(
        model,
        rest,
        scored,
        run=run,
        layers=layers,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
        **candidates,
    )
    arms = table[1:].dropna(subset="nats").sort_values("nats", kind="stable")
    if arms.empty:
        problems = [problem for problem in table["problem"].unique() if problem]
        raise ValueError(f"no budget has a score: {'; '.join(problems)}")
    best = arms.to_dict(orient="records")[0]
    strength = float(best["strength"] or 0)
    return ChosenBudget(
        budget=str(best["budget"]),
        strength=strength,
        against_uniform=best["against_uniform"],
        against_uniform_error=best["against_uniform_error"],
        table=table,
    )
