"""Order neurons, choose sets of them, and say how their variables go together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy
import xarray as xr

from entangle.runs.dataset import dataset_of, matching, rows_by_layer, trusted

Neurons = dict[str, npt.NDArray[np.int64]]  # by layer, their indices in it, ascending
COLUMNS = ("wasserstein", "wasserstein_error", "mean", "std", "skewness", "kurtosis", "modes")


def rank(
    run: xr.DataTree | xr.Dataset,
    top: int = 30,
    *,
    by: str = "wasserstein",
    layers: str | Sequence[str] = ("*",),
) -> pd.DataFrame:
    """Return the ``top`` neurons with the largest ``by`` of the matching layers, best first.

    Neurons without a distance, or with one whose bound is above 0.1, are left out. Ties keep the
    order of the model. ``layer_ratio`` is the value over its layer's median.

    Raises:
        LookupError: the run has no such variable, or a pattern matches none of its layers.
    """
    dataset = dataset_of(run)
    values = _variable(dataset, by)
    names = dataset["layer"].to_numpy()
    chosen = trusted(dataset) & matching(names, layers)
    order = np.flatnonzero(chosen)
    order = order[np.argsort(-values[order], kind="stable")][: max(top, 0)]
    rows = dataset.isel(neuron=order)
    table = rows[list(dict.fromkeys([by, *COLUMNS]))].to_dataframe()
    index = table["index"].astype(str)
    table.insert(0, "neuron", table["layer"] + ":" + index)
    medians = pd.Series(values[chosen]).groupby(names[chosen]).median()
    table.insert(2, "layer_ratio", table[by] / table["layer"].map(medians))
    columns = ["neuron", by, "layer_ratio", *[name for name in COLUMNS if name != by]]
    return table[columns].reset_index(drop=True)


def top_by_layer(
    run: xr.DataTree | xr.Dataset,
    share: float | None = None,
    *,
    count: int | None = None,
    by: str = "wasserstein",
    lowest: bool = False,
    layers: str | Sequence[str] = ("*",),
) -> Neurons:
    """Return a share of each matching layer's neurons, those with the largest (or lowest) ``by``.

    Or so many of them; of a share at least one of each layer. Neurons without a distance, or with one whose bound is above
    0.1, or without a value of ``by``, are left out; of ties the first are taken.

    Raises:
        LookupError: the run has no such variable, or a pattern matches none of its layers.
        ValueError: not one of share and count, a share that is not above 0 and at most 1, or a count
            below 1.
    """
    if (share is None) == (count is None):
        raise ValueError("expected a share of each layer's neurons, or a count of them")
    if count is not None and count < 1:
        raise ValueError(f"expected a count of at least 1 neuron of each layer, got {count}")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"expected a share of neurons above 0 and at most 1, got {share}")
    dataset = dataset_of(run)
    values = _variable(dataset, by) * (1 if lowest else -1)
    ranked, indices = trusted(dataset) & np.isfinite(values), dataset["index"].to_numpy()
    chosen = {}
    for name, rows in rows_by_layer(dataset, layers).items():
        known = rows[ranked[rows]]
        size = count if share is None else max(1, round(share * len(rows)))
        best = known[np.argsort(values[known], kind="stable")][:size]
        chosen[name] = np.sort(indices[best])
    return chosen


def matched_random(
    run: xr.DataTree | xr.Dataset, neurons: Mapping[str, npt.ArrayLike], *, seed: int = 0
) -> Neurons:
    """Return as many neurons of each layer, drawn at random by ``seed`` from those with a distance.

    ``neurons`` are those of each layer, as `top_by_layer` returns them.

    Of one seed a smaller draw is part of a larger one.

    Raises:
        LookupError: a layer that the run has not.
    """
    dataset = dataset_of(run)
    places = {name: place for place, name in enumerate(dict.fromkeys(dataset["layer"].to_numpy()))}
    ranked, indices = trusted(dataset), dataset["index"].to_numpy()
    drawn = {}
    for name, rows in rows_by_layer(dataset, list(neurons)).items():
        known = indices[rows[ranked[rows]]]
        order = np.random.default_rng([seed, places[name]]).permutation(known)
        drawn[name] = np.sort(order[: len(np.asarray(neurons[name]))])
    return drawn


def rank_correlations(
    run: xr.DataTree | xr.Dataset,
    by: str = "wasserstein",
    others: str | Sequence[str] = ("difficulty", "kurtosis", "weight_norm", "std"),
    *,
    layers: str | Sequence[str] = ("*",),
) -> pd.DataFrame:
    """Return Spearman's rank correlation of ``by`` with other variables, a row per layer.

    Over the neurons that have both and are ranked (see `rank`); ``_error`` is Bonett and
    Wright's standard error (Psychometrika 65, 2000), for independent neurons. NaN for fewer than
    four of them, or where one variable is constant.

    Raises:
        LookupError: the run has no such variable, or a pattern matches none of its layers.
    """
    dataset, others = dataset_of(run), [others] if isinstance(others, str) else others
    variables = {name: _variable(dataset, name) for name in (by, *others)}
    blocks, roles = dataset["block"].to_numpy(), dataset["role"].to_numpy()
    ranked = trusted(dataset) & np.isfinite(variables[by])
    table = []
    for name, every in rows_by_layer(dataset, layers).items():
        rows = every[ranked[every]]
        row = {"layer": name, "block": int(blocks[every[0]]), "role": str(roles[every[0]])}
        row |= {"neurons": len(rows)}
        for other in others:
            both = rows[np.isfinite(variables[other][rows])]
            found = correlation(variables[by][both], variables[other][both])
            row |= {other: found[0], f"{other}_error": found[1]}
        table.append(row)
    return pd.DataFrame(table)


def correlation(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> tuple[float, float]:
    """Return Spearman's rank correlation and its standard error (Bonett and Wright, 2000)."""
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan, math.nan
    rho = float(scipy.stats.spearmanr(x, y).statistic)
    return rho, (1 - rho**2) * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))


def _variable(dataset: xr.Dataset, name: str) -> npt.NDArray[np.float64]:
    """Return a variable of the neurons.

    Raises:
        LookupError: the run has none of this name.
    """
    if name not in dataset or dataset[name].dims != ("neuron",) or name in dataset.coords:
        raise LookupError(f"the run has no variable {name!r}, but {', '.join(map(str, dataset))}")
    return dataset[name].to_numpy().astype(float)
