"""Labels on numbers: a run as an xarray tree, a row per neuron."""

import dataclasses
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from entangle.model.layers import LinearLayer, say_skipped, weight_of
from entangle.model.placing import fetch, give_back
from entangle.numerics import wasserstein
from entangle.numerics.difficulty import Difficulty
from entangle.numerics.histograms import Histograms

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

_DIMENSIONS = {"counts": ("neuron", "bin")} | dict.fromkeys(
    ("tail_count", "tail_excess", "tail_square"), ("neuron", "side")
)


def to_tree(
    histograms: Histograms, layers: Sequence[LinearLayer], attributes: Mapping[str, Any]
) -> xr.DataTree:
    """Return the run: its root the dataset, its child ``histogram`` the whole mergeable state.

    ``histograms`` holds the neurons of ``layers`` one after the other; the tree shares its memory.
    """
    labels = labels_of(layers).assign(weight_norm=("neuron", weight_norms(layers)))
    return tree_of(histograms, labels, attributes)


def tree_of(
    histograms: Histograms, labels: xr.Dataset, attributes: Mapping[str, Any]
) -> xr.DataTree:
    """Return the run of neurons with these labels (`labels_of`, and their ``weight_norm``)."""
    moments = histograms.moments()
    distances = wasserstein.from_histograms(histograms, moments)
    invalid = histograms.invalid()
    values = {
        "wasserstein": distances.wasserstein,
        "wasserstein_error": distances.error,
        "mean": moments.mean,
        "std": moments.std,
        "skewness": moments.skewness,
        "kurtosis": moments.kurtosis,
        "modes": histograms.modes(moments),
        "min": np.where(invalid, np.nan, histograms.minimum.cpu().numpy()),
        "max": np.where(invalid, np.nan, histograms.maximum.cpu().numpy()),
        "count": moments.count,
        "nonfinite": np.maximum(invalid, (histograms.nonfinite + histograms.beyond).cpu().numpy()),
        "weight_norm": labels["weight_norm"].to_numpy(),
    }
    dataset = xr.Dataset(
        {name: labelled(name, value) for name, value in values.items()},
        coords=labels.coords,
        attrs=dict(attributes),
    )
    state = {
        name: (_DIMENSIONS.get(name, ("neuron", "moment")[: tensor.ndim]), tensor.cpu().numpy())
        for name, tensor in histograms.tensors().items()
    }
    histogram = xr.Dataset(state)
    return xr.DataTree.from_dict({"/": dataset, "/histogram": histogram})


def labelled(name: str, values: npt.NDArray[Any]) -> tuple[str, npt.NDArray[Any], dict[str, str]]:
    """Return a variable of the neurons with its long name and unit."""
    return "neuron", values, dict(zip(("long_name", "units"), UNITS[name], strict=True))


def with_difficulty(tree: xr.DataTree, found: Mapping[str, Difficulty]) -> xr.DataTree:
    """Return the run with the mapping difficulty of its neurons, found by layer."""
    dataset = tree.to_dataset()
    names = dataset["layer"].to_numpy()
    layers = [found[name] for name in dict.fromkeys(names)]
    sizes = [len(layer.difficulty) for layer in layers]
    values = {
        "difficulty": np.concatenate([layer.difficulty for layer in layers]),
        "difficulty_pairs": np.repeat([layer.pairs for layer in layers], sizes),
        "difficulty_equal": np.repeat([layer.equal for layer in layers], sizes),
    }
    dataset = dataset.assign({name: labelled(name, value) for name, value in values.items()})
    histogram = tree.children["histogram"].to_dataset(inherit=False)
    return xr.DataTree.from_dict({"/": dataset, "/histogram": histogram})


def from_tree(tree: xr.DataTree, span: slice = slice(None)) -> Histograms:
    """Return the mergeable state that a run holds of its neurons, or of some of them.

    Raises:
        ValueError: the tree has no histograms.
    """
    if "histogram" not in tree.children:
        raise ValueError("this run has no histograms: it holds the dataset alone")
    group = tree["histogram"].to_dataset().isel(neuron=span)
    names = [field.name for field in dataclasses.fields(Histograms)]
    return Histograms(**{name: torch.from_numpy(group[name].to_numpy()) for name in names})


def labels_of(
    layers: Sequence[LinearLayer], among: Sequence[LinearLayer] | None = None
) -> xr.Dataset:
    """Return the neurons' coordinates: their layer, its block and its role, and their index in it.

    Names have the width of the longest ``among`` layers, so that several datasets become one.
    """
    sizes = [layer.neurons for layer in layers]
    every = layers if among is None else among
    name, role = (
        np.array(names).dtype for names in zip(*((x.name, x.role) for x in every), strict=True)
    )
    coordinates: dict[str, Any] = {
        "layer": ("neuron", np.repeat(np.array([layer.name for layer in layers], name), sizes)),
        "block": ("neuron", np.repeat([layer.block for layer in layers], sizes)),
        "role": ("neuron", np.repeat(np.array([layer.role for layer in layers], role), sizes)),
        "index": ("neuron", np.concatenate([np.arange(size) for size in sizes])),
    }
    return xr.Dataset(coords=coordinates)


def weight_norms(layers: Sequence[LinearLayer]) -> Array:
    """Return the norm of each neuron's weights."""

    def norms(layer: LinearLayer) -> torch.Tensor:
        away = weight_of(layer).is_meta  # in a file
        if away:
            fetch(layer.module)
        norm = torch.linalg.vector_norm(weight_of(layer).double(), dim=-1)
        if away:
            give_back(layer.module)
        mean: torch.Tensor = norm.reshape(-1, norm.shape[-1]).mean(dim=0).cpu()
        return mean

    return torch.cat([norms(layer) for layer in layers]).numpy()


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
            "noise_floor": wasserstein.noise_floor(tokens),
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
