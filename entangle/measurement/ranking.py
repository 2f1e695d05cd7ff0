"""Rankings of neurons, sets of neurons, and rank correlations of their variables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy
import xarray as xr

from entangle.numerics.gaussian import noise_floor
from entangle.runs.dataset import dataset_of, kinds_of, matching, outputs_of, rows_by_layer, trusted

Neurons = dict[str, npt.NDArray[np.int64]]  # the indices of each layer's neurons, ascending
COLUMNS = (
    *("wasserstein", "wasserstein_error", "wasserstein_bulk", "wasserstein_bulk_error"),
    *("far_variance", "mean", "std", "skewness", "kurtosis", "modes"),
)


def rank(
    run: xr.DataTree | xr.Dataset,
    top: int = 30,
    *,
    by: str = "wasserstein",
    layers: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
) -> pd.DataFrame:
    """Return the ``top`` neurons of the matching layers with the largest ``by``, largest first.

    Inputs that the run has beside outputs are ranked with them; ``*:input`` matches their layers.
    Layers that match a pattern in ``exclude`` are left out.
    Neurons that have no distance, or an error bound above 0.1, are left out (of the bulk's distance,
    if they are ranked by it). Neurons without a
    value of ``by`` come last. Ties keep the order of the model. The columns are:

    - ``neuron``: LAYER:INDEX, or LAYER:input:INDEX for an input channel.
    - the variable ``by``, in its unit (`runs.dataset.UNITS`).
    - ``layer_ratio``: ``by`` divided by its median over the layer's ranked neurons.
    - ``wasserstein``, ``wasserstein_error``: the distance and its certified error bound, in std.
    - ``wasserstein_bulk``, ``wasserstein_bulk_error``: the same without the 1% of tokens farthest
      from the median, against what is left of a Gaussian (see `numerics.bulk`).
    - ``kind``: outliers or shape (see `runs.dataset.kinds_of`).
    - ``far_variance``: the share of the variance beyond 6 std.
    - ``mean``, ``std``: of the output, in its units.
    - ``skewness``, ``kurtosis`` (excess): without a unit.
    - ``modes``: how many modes the smoothed histogram has.
    - ``count``, ``noise_floor``: the neuron's tokens and the noise floor of so many, in std. Only if
      the ranked neurons have different counts, as those of trained experts do: a high distance of few
      tokens may be noise.

    Raises:
        LookupError: the run has no such variable, or a pattern matches none of its layers.
    """
    dataset = dataset_of(run)
    values = _variable(dataset, by)
    names = dataset["layer"].to_numpy()
    chosen = trusted(dataset, by) & matching(names, layers, exclude)
    order = np.flatnonzero(chosen)
    order = order[np.argsort(-values[order], kind="stable")][: max(top, 0)]
    rows, known = dataset.isel(neuron=order), [name for name in COLUMNS if name in dataset]
    table = rows[list(dict.fromkeys([by, *known]))].to_dataframe()
    index = table["index"].astype(str)
    table.insert(0, "neuron", table["layer"] + ":" + index)
    medians = pd.Series(values[chosen]).groupby(names[chosen]).median()
    counts = dataset["count"].to_numpy()
    own = ["count", "noise_floor"] if len(np.unique(counts[chosen])) > 1 else []
    table["count"] = counts[order]
    table["noise_floor"] = [noise_floor(count) for count in counts[order]]
    if "wasserstein_bulk" in rows:
        table["kind"] = kinds_of(rows)
        known = ["kind", *known]
    table.insert(2, "layer_ratio", table[by] / table["layer"].map(medians).astype(float))
    columns = ["neuron", by, "layer_ratio", *[name for name in known if name != by]]
    return table[list(dict.fromkeys([*columns, *own]))].reset_index(drop=True)


def top_by_layer(
    run: xr.DataTree | xr.Dataset,
    share: float | None = None,
    *,
    count: int | None = None,
    by: str = "wasserstein",
    lowest: bool = False,
    layers: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
) -> Neurons:
    """Return the neurons of each matching layer that have the largest (or lowest) ``by``.

    They are a ``share`` of the layer's neurons, at least one, or a ``count`` of them. Neurons that
    have no distance, an error bound above 0.1, or no value of ``by`` are left out. Ties keep the
    first. Input channels that the run has are those of the layer LAYER:input.

    Raises:
        LookupError: the run has no such variable, or a pattern matches none of its layers.
        ValueError: share and count are both given or both missing, the share is not above 0 and at
            most 1, or the count is below 1.
    """
    if (share is None) == (count is None):
        raise ValueError(
            f"expected a share of each layer's neurons or a count of them, got share={share} and "
            f"count={count}"
        )
    if count is not None and count < 1:
        raise ValueError(f"expected a count of at least 1 neuron per layer, got {count}")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"expected a share of neurons above 0 and at most 1, got {share}")
    dataset = dataset_of(run)
    values = _variable(dataset, by) * (1 if lowest else -1)
    ranked, indices = trusted(dataset, by) & np.isfinite(values), dataset["index"].to_numpy()
    chosen = {}
    for name, rows in rows_by_layer(dataset, layers, exclude).items():
        known = rows[ranked[rows]]
        size = count if share is None else max(1, round(share * len(rows)))
        best = known[np.argsort(values[known], kind="stable")][:size]
        chosen[name] = np.sort(indices[best])
    return chosen


def matched_random(
    run: xr.DataTree | xr.Dataset, neurons: Mapping[str, npt.ArrayLike], *, seed: int = 0
) -> Neurons:
    """Return as many random neurons of each layer as ``neurons`` has of it.

    ``neurons`` has the form that `top_by_layer` returns. The random neurons are drawn by ``seed``
    from those that are ranked (see `rank`). With the same seed, a smaller draw is a subset of a
    larger one.

    Raises:
        LookupError: the run lacks one of the layers.
    """
    dataset = dataset_of(run)
    # Outputs first, so that no draw of theirs depends on which inputs the run has beside them.
    names = np.append(outputs_of(dataset)["layer"], dataset["layer"])
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
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
    exclude: str | Sequence[str] = (),
) -> pd.DataFrame:
    """Return Spearman's rank correlation of ``by`` with other variables, a row per layer.

    The columns are:

    - ``layer``, ``block``, ``role``: the layer's labels.
    - ``neurons``: how many of its neurons are ranked (see `rank`) and have a value of ``by``.
    - for each other variable NAME, a column NAME: the rank correlation, from -1 to 1, over those of
      these neurons that have a value of NAME. It is NaN for fewer than four neurons, or if one
      variable is constant.
    - NAME``_error``: its standard error for independent neurons (Bonett and Wright, Psychometrika
      65, 2000).

    Raises:
        LookupError: the run has no such variable, or a pattern matches none of its layers.
    """
    dataset, others = dataset_of(run), [others] if isinstance(others, str) else others
    variables = {name: _variable(dataset, name) for name in (by, *others)}
    blocks, roles = dataset["block"].to_numpy(), dataset["role"].to_numpy()
    ranked = trusted(dataset, by) & np.isfinite(variables[by])
    table = []
    for name, all_rows in rows_by_layer(dataset, layers, exclude).items():
        rows = all_rows[ranked[all_rows]]
        row = {"layer": name, "block": int(blocks[all_rows[0]]), "role": str(roles[all_rows[0]])}
        row |= {"neurons": len(rows)}
        for other in others:
            both = rows[np.isfinite(variables[other][rows])]
            found = correlation(variables[by][both], variables[other][both])
            row |= {other: found[0], f"{other}_error": found[1]}
        table.append(row)
    return pd.DataFrame(table)


def correlation(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> tuple[float, float]:
    """Return Spearman's rank correlation and its standard error (Bonett and Wright, 2000).

    Both are NaN for fewer than four values, or if x or y is constant.
    """
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan, math.nan
    rho = float(scipy.stats.spearmanr(x, y).statistic)
    return rho, (1 - rho**2) * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))


def _variable(dataset: xr.Dataset, name: str) -> npt.NDArray[np.float64]:
    """Return a variable's values (neurons,).

    Raises:
        LookupError: the run has no variable of this name.
    """
    if name not in dataset or dataset[name].dims != ("neuron",) or name in dataset.coords:
        names = [str(one) for one in dataset if dataset[one].dims == ("neuron",)]
        raise LookupError(
            f"the run has no variable {name!r} of neurons: expected one of {', '.join(names)}"
        )
    return dataset[name].to_numpy().astype(float)
