"""The shapes of bulks as variables of a run: computed where an older run is opened without them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from entangle.numerics.bulk import shapes_of_counts
from entangle.numerics.places import Distribution
from entangle.runs.dataset import TRUSTED_ERROR, UNITS, Array, dataset_of

SHAPES = ("wasserstein_bulk", "wasserstein_bulk_error", "negentropy", "bimodality", "far_variance")
_ROWS = 8192  # neurons whose histograms are in memory at a time
State = Mapping[str, npt.NDArray[Any]]


def shapes_of(state: State, mean: Array, std: Array) -> dict[str, Array]:
    """Return the variables (neurons,) of `SHAPES` of a state of `Histograms`.

    Negentropy and bimodality are NaN where the error bound of the bulk's distance is above 0.1.
    """
    found = shapes_of_counts(state, mean, std)
    coarse = ~(found.error <= TRUSTED_ERROR)
    return {
        "wasserstein_bulk": found.wasserstein,
        "wasserstein_bulk_error": found.error,
        "negentropy": np.where(coarse, np.nan, found.negentropy),
        "bimodality": np.where(coarse, np.nan, found.bimodality),
        "far_variance": found.far_variance,
    }


def with_shapes(
    data: xr.Dataset, held: xr.Dataset, resolved: xr.Dataset | None = None
) -> xr.Dataset:
    """Return the dataset with the variables of `SHAPES`, computed when they are first read.

    ``held`` are its histograms, and ``resolved`` the second ones of some neurons (see
    `measurement.resolving`), whose bulks replace those of the first. A dataset that has the
    variables is returned as it is if nothing is resolved.
    """
    stored = all(name in data for name in SHAPES)
    if stored and resolved is None:
        return data

    @functools.cache
    def values() -> dict[str, Array]:
        mean, std = data["mean"].to_numpy(), data["std"].to_numpy()
        found = {name: data[name].to_numpy() for name in SHAPES} if stored else computed(mean, std)
        if resolved is not None:
            rows = resolved["row"].to_numpy()
            second = shapes_of(_state_of(resolved), mean[rows], std[rows])
            for name in SHAPES[:-1]:  # of all tokens the first histogram has more
                found[name] = found[name].copy()
                found[name][rows] = second[name]
        return found

    def computed(mean: Array, std: Array) -> dict[str, Array]:
        parts = []
        for begin in range(0, len(mean), _ROWS):
            span = slice(begin, begin + _ROWS)
            parts.append(shapes_of(_state_of(held.isel(neuron=span)), mean[span], std[span]))
        return {name: np.concatenate([part[name] for part in parts]) for name in SHAPES}

    size = data.sizes["neuron"]
    return data.assign({name: _later(name, size, values) for name in SHAPES})


def _later(name: str, size: int, values: Callable[[], Mapping[str, Array]]) -> xr.Variable:
    """Return a variable (neurons,) whose values are computed when they are read."""
    lazy = indexing.LazilyIndexedArray(_Computed(size, lambda: values()[name]))
    return xr.Variable("neuron", lazy, dict(zip(("long_name", "units"), UNITS[name], strict=True)))


def _state_of(held: xr.Dataset) -> State:
    return {str(name): held[name].to_numpy() for name in held.data_vars}


def held_of(held: xr.Dataset, run: xr.DataTree, names: Sequence[str]) -> xr.Dataset:
    """Return the histograms of neurons, LAYER:INDEX, the second ones of those that have them.

    ``held`` are the run's first histograms, with the index ``neuron``.
    """
    return finer(
        held.sel(neuron=list(names)).load(),
        run,
        held.get_index("neuron").get_indexer(pd.Index(names)),
    )


def distribution_of(run: xr.DataTree, neuron: str) -> Distribution:
    """Return the distribution of a neuron, LAYER:INDEX, by its finest histogram.

    Raises:
        ValueError: the neuron has no tokens.
    """
    data = dataset_of(run)
    row = data.sel(neuron=neuron)
    if not int(row["count"]):
        raise ValueError(f"{neuron} has no distribution: no token was sent to its expert")
    first = run.children["histogram"].to_dataset(inherit=False)
    first = first.assign_coords(neuron=data["neuron"])
    held = held_of(first, run, [neuron]).isel(neuron=0)
    state = {str(name): one.to_numpy() for name, one in held.items()}
    # A second histogram has its own smallest and largest output, which are cut.
    return Distribution.of(state | {"minimum": row["min"].item(), "maximum": row["max"].item()})


def finer(held: xr.Dataset, run: xr.DataTree, rows: npt.ArrayLike) -> xr.Dataset:
    """Return loaded histograms with the second ones in the place of the first, where there are any.

    ``rows`` (neurons,) are their rows in the run.
    """
    if "resolved" not in run.children:
        return held
    second = run.children["resolved"].to_dataset(inherit=False)
    place = pd.Index(second["row"].to_numpy()).get_indexer(pd.Index(np.asarray(rows)))
    chosen = np.flatnonzero(place >= 0)
    found = held.copy(deep=True)
    for name in found.data_vars:
        found[name].to_numpy()[chosen] = second[name].to_numpy()[place[chosen]]
    return found


class _Computed(BackendArray):
    """An array of float64 that a function returns when it is read."""

    def __init__(self, size: int, values: Callable[[], Array]) -> None:
        self.shape, self.dtype, self.values = (size,), np.dtype(np.float64), values

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, lambda inner: self.values()[inner]
        )
