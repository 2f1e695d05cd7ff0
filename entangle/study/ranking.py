"""Order neurons."""

import fnmatch
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from entangle.study.dataset import dataset_of, trusted

COLUMNS = ("wasserstein", "wasserstein_error", "mean", "std", "skewness", "kurtosis", "modes")


def top_neurons(
    run: xr.DataTree | xr.Dataset,
    count: int = 30,
    *,
    by: str = "wasserstein",
    layers: str | Sequence[str] = ("*",),
) -> pd.DataFrame:
    """Return the neurons with the largest ``by`` of the matching layers, best first.

    Neurons without a distance, or with one whose bound is above 0.1, are left out. Ties keep the
    order of the model. ``layer_ratio`` is the value over its layer's median.

    Raises:
        LookupError: the run has no such variable, or a pattern matches none of its layers.
    """
    dataset = dataset_of(run)
    if by not in dataset or dataset[by].dims != ("neuron",) or by in dataset.coords:
        raise LookupError(f"the run has no variable {by!r}, but {', '.join(map(str, dataset))}")
    names = dataset["layer"].to_numpy()
    chosen = trusted(dataset) & matching(names, layers)
    values = dataset[by].to_numpy()
    order = np.flatnonzero(chosen)
    order = order[np.argsort(-values[order].astype(float), kind="stable")][: max(count, 0)]
    rows = dataset.isel(neuron=order)
    table = rows[list(dict.fromkeys([by, *COLUMNS]))].to_dataframe()
    index = table["index"].astype(str)
    table.insert(0, "neuron", table["layer"] + ":" + index)
    medians = pd.Series(values[chosen]).groupby(names[chosen]).median()
    table.insert(2, "layer_ratio", table[by] / table["layer"].map(medians))
    columns = ["neuron", by, "layer_ratio", *[name for name in COLUMNS if name != by]]
    return table[columns].reset_index(drop=True)


def matching(names: npt.NDArray[np.str_], patterns: str | Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return which layer names match any pattern.

    Raises:
        LookupError: a pattern matches none.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    distinct = sorted(set(names))
    for pattern in patterns:
        if not fnmatch.filter(distinct, pattern):
            raise LookupError(f"no layer of this run matches {pattern!r}, for instance {names[0]}")
    matched = {name for name in distinct if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    return np.isin(names, list(matched))
