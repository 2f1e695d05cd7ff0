"""Labels on numbers: a run as an xarray tree, a row per neuron."""

import fnmatch
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from entangle.numerics import gaussian

Array = npt.NDArray[np.float64]

UNITS = {
    "wasserstein": ("1-Wasserstein distance to a Gaussian", "std"),
    "wasserstein_error": ("certified bound of the error of wasserstein", "std"),
    "mean": ("mean output", "output"),
    "std": ("population standard deviation of the output", "output"),
    "skewness": ("skewness", "1"),
    "kurtosis": ("excess kurtosis", "1"),
    "modes": ("modes of the smoothed histogram", "1"),
    "min": ("least output", "output"),
    "max": ("largest output", "output"),
    "count": ("tokens counted", "tokens"),
    "nonfinite": ("outputs that are NaN or infinite, or too far out to be summed", "tokens"),
    "weight_norm": ("Euclidean norm of the weights, in an expanded layer the experts' mean", "1"),
    "difficulty": ("mapping difficulty", "1"),
    "difficulty_pairs": ("pairs of tokens that the mapping difficulty is the mean of", "pairs"),
    "difficulty_equal": ("pairs of tokens with equal inputs, left out of it", "pairs"),
    "held_out_wasserstein": ("1-Wasserstein distance to a Gaussian on held-out tokens", "std"),
    "held_out_difficulty": ("mapping difficulty on held-out tokens", "1"),
    "wasserstein_within": ("mean distance to a Gaussian within clusters of tokens", "std"),
    "difficulty_within": ("mean mapping difficulty within clusters of tokens", "1"),
    "wasserstein_share": (
        "share of held-out tokens whose clusters count in the mean distance",
        "1",
    ),
    "difficulty_share": (
        "share of held-out tokens whose clusters count in the mean difficulty",
        "1",
    ),
    "distance_to_dense": ("1-Wasserstein distance of sparse outputs to dense ones", "std"),
    "improvement": ("relative improvement: RMSE with one expert over that with several", "1"),
    "improvement_halves": ("relative improvement on even and on odd windows", "1"),
}
"""Each variable's long name and unit."""

TRUSTED_ERROR = 0.1  # a distance whose bound is above is left out of rankings
NAMED_ERROR = 0.02  # one whose bound is above is named in the summary


def labelled(name: str, values: npt.NDArray[Any]) -> tuple[str, npt.NDArray[Any], dict[str, str]]:
    """Return a variable of the neurons with its long name and unit."""
    return "neuron", values, dict(zip(("long_name", "units"), UNITS[name], strict=True))


def dataset_of(run: xr.DataTree | xr.Dataset) -> xr.Dataset:
    """Return the root dataset of a run, or the dataset itself."""
    return run.to_dataset() if isinstance(run, xr.DataTree) else run


def trusted(run: xr.DataTree | xr.Dataset) -> npt.NDArray[np.bool_]:
    """Return which neurons have a distance whose bound is at most 0.1: no others are ranked."""
    dataset = dataset_of(run)
    bound, distance = dataset["wasserstein_error"].to_numpy(), dataset["wasserstein"].to_numpy()
    known: npt.NDArray[np.bool_] = (bound <= TRUSTED_ERROR) & np.isfinite(distance)
    return known


def summary(run: xr.DataTree | xr.Dataset) -> dict[str, Any]:
    """Return what a run was measured on, what it found, and what it could not measure."""
    dataset = dataset_of(run)
    distance, error = dataset["wasserstein"].to_numpy(), dataset["wasserstein_error"].to_numpy()
    layers = dataset["layer"].to_numpy()
    known = np.where(trusted(dataset), distance, np.nan)
    largest = int(np.nanargmax(known)) if np.isfinite(known).any() else None
    median, quantile = np.nanquantile(known, [0.5, 0.95]) if largest is not None else (np.nan,) * 2
    tokens = int(dataset["count"].max())
    names = ("model", "text", "windows", "length")
    shard = {name: dataset.attrs[name] for name in ("shard",) if name in dataset.attrs}
    return (
        {name: dataset.attrs.get(name, "?") for name in names}
        | shard
        | {
            "tokens": tokens,
            "neurons_measured": dataset.sizes["neuron"],
            "layers": len(set(layers)),
            "noise_floor": gaussian.noise_floor(tokens),
            "median": float(median),
            "quantile_95": float(quantile),
            "largest": np.nan if largest is None else float(distance[largest]),
            "largest_error": np.nan if largest is None else float(error[largest]),
            "largest_neuron": "none" if largest is None else neuron_name(dataset, largest),
            "warnings": _warnings(dataset, distance, error),
        }
    )


def _warnings(dataset: xr.Dataset, distance: Array, error: Array) -> list[str]:
    """Say which neurons have no distance, or one to be careful with, and what was not measured."""
    broken = dataset["nonfinite"].to_numpy() > 0
    cases = {
        "with outputs that are NaN, infinite or beyond all bounds, so without a distance": broken,
        "dead (constant), so without a distance": np.isnan(distance) & ~broken,
        f"with an error bound above {TRUSTED_ERROR}, so not ranked": error > TRUSTED_ERROR,
        f"with an error bound above {NAMED_ERROR}": (error > NAMED_ERROR)
        & (error <= TRUSTED_ERROR),
    }
    warnings = []
    for what, which in cases.items():
        first = [neuron_name(dataset, i) for i in np.flatnonzero(which)[:3]]
        if first:
            more = ", ..." if which.sum() > len(first) else ""
            warnings.append(f"{which.sum():,} {what}: {', '.join(first)}{more}")
    warnings += say_skipped(dataset.attrs.get("skipped_parameters", []), "measured")
    return warnings


def neuron_name(dataset: xr.Dataset, position: int) -> str:
    """Return ``LAYER:INDEX`` of the neuron at a position of the dataset."""
    return f"{dataset['layer'].to_numpy()[position]}:{dataset['index'].to_numpy()[position]}"


def position_of(data: xr.Dataset, name: str) -> int:
    """Return the row of the neuron LAYER:INDEX.

    Raises:
        LookupError: if there is none.
    """
    layer, _, index = name.rpartition(":")
    names = data["layer"].to_numpy().astype(str)
    rows = np.flatnonzero(names == layer)
    if not len(rows):
        near = get_close_matches(layer or name, {*names}, 3, 0.3) or names[:1]
        close = " or ".join(f"{one}:0" for one in near)
        raise LookupError(f"no neuron {name!r}: expected LAYER:INDEX, such as {close}")
    indices = data["index"].to_numpy()[rows]
    if not (hit := rows[indices.astype(str) == index]).size:
        has = f"{len(rows):,} neurons, {indices.min()} to {indices.max()}"
        raise LookupError(f"no neuron {name!r}: {layer} has {has}")
    return int(hit[0])


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


def rows_by_layer(
    dataset: xr.Dataset, patterns: str | Sequence[str]
) -> dict[str, npt.NDArray[np.int64]]:
    """Return the places in the dataset of each matching layer's neurons."""
    names = dataset["layer"].to_numpy().astype(str)
    chosen = np.flatnonzero(matching(names, patterns))
    groups = pd.Series(chosen).groupby(names[chosen], sort=False)
    return {str(name): rows.to_numpy() for name, rows in groups}


def say_skipped(names: Sequence[str], deed: str) -> list[str]:
    """Return a line that says what `skipped_parameters` found was not ``deed``, or none."""
    if not names:
        return []
    return [
        f"{len(names)} matrices in the blocks are no linear layers and were not {deed}: "
        f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    ]
