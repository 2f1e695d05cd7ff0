"""Choice of a budget's variable and strength on calibration windows set aside."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Unpack

import pandas as pd
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.experiments.sweeping import sweep_arms
from entangle.model.placing import check_in_memory
from entangle.model.text import TokenWindows
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.pruning.options import (
    DISTANCE,
    EXPERT_DEFAULTS,
    TRIM,
    UNIFORM,
    Budget,
    Pruning,
    PruningOptions,
    arms_of,
    several,
    with_options,
)
from entangle.runs.setup import Setup

STRENGTHS = (0.1, 0.25, 0.4)
VARIABLES: tuple[Budget, ...] = (DISTANCE, "ranks", "wasserstein")
_EVERY = 4  # one window in this many is set aside


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenBudget:
    """The chosen budget, and the table of all candidates."""

    budget: str
    strength: float
    against_uniform: float  # nats per token, windows set aside; NaN if uniform is best
    against_uniform_error: float
    table: pd.DataFrame  # as `sweep` returns it, scored on the windows set aside


@with_options(budget=VARIABLES, strength=STRENGTHS)
@with_torch_defaults
def choose_budget(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset,
    layers: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    batch_size: int = 4,
    skip_first: int = 0,
    progress: bool = False,
    **options: Unpack[PruningOptions],
) -> ChosenBudget:
    """Return the budget of rows with the lowest perplexity on a fourth of the calibration windows.

    The other windows are for calibration. Pruning is with one expert and dense propagation, so that
    a candidate costs one pruning and one score. The candidates are all combinations of ``budget``
    and ``strength``, and uniform rows with strength 0. The other options are those of `sweep`. The
    evaluation text is not used.

    Raises:
        ValueError: as `sweep`; or there are fewer than four windows, a budget has no strength, an
            option of experts, propagation or reconstruction is given, or no candidate has a score.
    """
    given: dict[str, Any] = dict(options)
    for name in ("experts", "propagate", "reconstruct", *EXPERT_DEFAULTS):
        if name in given:
            raise ValueError(
                "budgets are compared with one expert, dense propagation and no reconstruction: leave out "
                f"{name}={given[name]!r}"
            )
    budgets = several(given.pop("budget", VARIABLES))
    searched = {"strength", "across"}  # besides budget; all others take one value
    Pruning.of(**{name: value for name, value in given.items() if name not in searched})
    alike = sorted({UNIFORM, TRIM} & {*budgets})
    if alike:
        raise ValueError(f"budget {alike[0]} has no strength to choose: give other budgets")
    if len(windows) < _EVERY:
        raise ValueError(
            f"too few calibration windows to choose a strength: expected at least {_EVERY}, got "
            f"{len(windows)}. Give more windows, or a strength"
        )
    check_in_memory(model, "choosing a budget")
    aside = torch.zeros(len(windows), dtype=torch.bool)
    aside[windows.places[::_EVERY]] = True
    rest, scored = windows.chosen(~aside), windows.chosen(aside)
    candidates = {"method": "sparsegpt", "strength": STRENGTHS} | given
    candidates |= {"budget": [UNIFORM, *budgets], "propagate": "dense"}
    setup = Setup.of(
        model,
        rest,
        scored,
        run=run,
        layers=layers,
        exclude=exclude,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
        set_aside=True,
        pruned=True,
    )
    table = sweep_arms(setup, arms_of(**candidates))
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
