"""Choice of a budget on calibration windows set aside: its variable and strength, or its blocks."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Unpack

import pandas as pd
import xarray as xr
from transformers import PreTrainedModel

from entangle.experiments.sweeping import sweep_arms
from entangle.model.placing import check_in_memory
from entangle.model.text import TokenWindows
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.pruning.options import (
    DISTANCE,
    EXPERT_DEFAULTS,
    OF_INPUTS,
    SEARCH,
    TRIM,
    UNIFORM,
    Budget,
    Pruning,
    PruningOptions,
    arms_of,
    several,
    with_options,
)
from entangle.pruning.searching import search_starts, searched, set_aside
from entangle.pruning.sparsifying import check_prunings, needed_run
from entangle.runs.setup import Setup

STRENGTHS = (0.1, 0.25, 0.4)
VARIABLES: tuple[Budget, ...] = (DISTANCE, "ranks", "wasserstein")
By = Literal["strength", "search"]


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenBudget:
    """The chosen budget, and the table of all candidates."""

    budget: str
    strength: float
    against_uniform: float  # nats per token, windows set aside; NaN if uniform is best
    against_uniform_error: float
    table: pd.DataFrame  # of the candidates, scored on the windows set aside
    blocks: dict[int, int] | None = None  # of a search: the number of zeros of each block


@with_options(budget=VARIABLES, strength=STRENGTHS)
@with_torch_defaults
def choose_budget(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset | None = None,
    by: By = "strength",
    layers: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    batch_size: int = 4,
    skip_first: int = 0,
    progress: bool | None = None,
    **options: Unpack[PruningOptions],
) -> ChosenBudget:
    """Return a budget that was chosen on a fourth of the calibration windows, which is set aside.

    The other windows are for calibration. Pruning is with one expert and dense propagation. The
    evaluation text is not used. The model is restored at the end.

    ``by`` ``strength`` chooses how the rows of a measured ``run`` differ: the budget with the lowest
    perplexity. The candidates are all combinations of ``budget`` and ``strength``, and uniform rows
    with strength 0. The other options are those of `sweep`, and so is the table.

    ``by`` ``search`` chooses the zeros of each block: an evolutionary search for the lowest KL
    divergence from the dense model (EvoPress, arXiv 2410.14649), with at most ``scores`` scores. It
    begins with uniform blocks, and with a ``run`` also with the entanglement budget; each of these
    searches has half of the scores. Candidates have the method's weights as published. Rows are
    uniform, or have one ``budget`` and ``strength``. `sparsify` and `sweep` search with
    ``across="search"``, and given ``blocks`` they need not. Columns of the table:

    * ``across``: ``uniform`` or ``entanglement``, a start; or ``search``.
    * ``start``: what the search began with; empty for a start.
    * ``scores``: scores of the search; 0 for a start.
    * ``kl``, ``kl_error``: KL(dense ‖ pruned) on all windows set aside, nats per token.
    * ``nats``, ``nats_error``: negative log-likelihood, nats per token.
    * ``kl_against_uniform``, ``nats_against_uniform`` and their errors: ``kl`` and ``nats`` minus
      those of uniform blocks, paired by window.
    * ``windows``: windows set aside.

    Raises:
        ValueError: as `sweep`; or there are fewer than four windows, ``by`` is none of the two, a run is
            missing, a budget has no strength, an option that is not compared is given, there are too
            few scores, or no candidate has a score.
    """
    given: dict[str, Any] = dict(options)
    if by not in {"strength", "search"}:
        raise ValueError(f"a budget is chosen by strength or search, got by={by!r}")
    alike = ("experts", "propagate", "reconstruct", *EXPERT_DEFAULTS, *OF_INPUTS)
    for name in alike if by == "strength" else (*alike, "solve"):
        if name in given:
            raise ValueError(
                "budgets are compared with one expert, dense propagation, dense inputs and no "
                f"reconstruction, and a search has the method's weights as published: leave out "
                f"{name}={given[name]!r}"
            )
    if run is None and by == "strength":
        raise ValueError("a strength is of a measured run of the model: pass it as run")
    prunings = _candidates(given) if by == "strength" else [_searched_pruning(given)]
    needed_run(prunings, run)
    check_in_memory(model, "choosing a budget")
    setup = Setup.of(
        model,
        windows,
        run=run,
        layers=layers,
        exclude=exclude,
        batch_size=batch_size,
        skip_first=skip_first,
        progress=progress,
        pruned=True,
    )
    if by == "search":
        pruning = prunings[0]
        check_prunings(setup, prunings)
        blocks, table = searched(setup, pruning, search_starts(setup, pruning))
        found: dict[Any, Any] = table.sort_values("kl", kind="stable").to_dict("records")[0]
        change, error = found["nats_against_uniform"], found["nats_against_uniform_error"]
        return ChosenBudget(pruning.budget, pruning.strength, change, error, table, blocks)
    setup = set_aside(setup)
    table = sweep_arms(setup, prunings)
    arms = table[1:].dropna(subset="nats").sort_values("nats", kind="stable")
    if arms.empty:
        problems = [problem for problem in table["problem"].unique() if problem]
        raise ValueError(f"no budget has a score: {'; '.join(problems)}")
    best: dict[Any, Any] = arms.to_dict("records")[0]
    change, error = best["against_uniform"], best["against_uniform_error"]
    return ChosenBudget(best["budget"], float(best["strength"] or 0), change, error, table)


def _candidates(given: dict[str, Any]) -> list[Pruning]:
    """Return the prunings whose budgets are compared.

    Raises:
        ValueError: a budget has no strength.
    """
    budgets = several(given.pop("budget", VARIABLES))
    compared = {"strength", "across"}  # besides budget; all others take one value
    Pruning.of(**{name: value for name, value in given.items() if name not in compared})
    if SEARCH in several(given.get("across", UNIFORM)):
        raise ValueError(
            f"a strength is chosen with blocks of a rule: leave out across={given['across']!r}, or choose "
            "by search"
        )
    alike = sorted({UNIFORM, TRIM} & {*budgets})
    if alike:
        raise ValueError(f"budget {alike[0]} has no strength to choose: give other budgets")
    candidates = {"method": "sparsegpt", "strength": STRENGTHS} | given
    return arms_of(**candidates | {"budget": [UNIFORM, *budgets], "propagate": "dense"})


def _searched_pruning(given: dict[str, Any]) -> Pruning:
    """Return the pruning whose blocks are searched.

    Raises:
        ValueError: the blocks are given.
    """
    if given.get("across", SEARCH) != SEARCH:
        raise ValueError(
            f"a search chooses the blocks itself: leave out across={given['across']!r}"
        )
    return Pruning.of(**given | {"across": SEARCH})
