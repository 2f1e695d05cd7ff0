"""Conversion of histograms to a run, an xarray tree with a row per neuron, and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from entangle.model.layers import dequantised, device_of, parameter_of
from entangle.model.placing import load_block, release_block
from entangle.model.sides import LayerInputs, Recordable, layer_of
from entangle.numerics import wasserstein
from entangle.numerics.difficulty import Difficulty
from entangle.numerics.histograms import Histograms
from entangle.runs.dataset import Array, attributes_of, labelled
from entangle.runs.shapes import shapes_of

_DIMENSIONS = {"counts": ("neuron", "bin")} | dict.fromkeys(
    ("tail_count", "tail_excess", "tail_square"), ("neuron", "tail")
)


def to_tree(
    histograms: Histograms, layers: Sequence[Recordable], attributes: Mapping[str, Any]
) -> xr.DataTree:
    """Return the run: its root is the dataset, its child ``histogram`` the mergeable state.

    ``histograms`` has the neurons of ``layers``, layer after layer; the tree shares its memory.
    """
    labels = labels_of(layers).assign(weight_norm=("neuron", weight_norms(layers)))
    return tree_of(histograms, labels, attributes)


def tree_of(
    histograms: Histograms, labels: xr.Dataset, attributes: Mapping[str, Any]
) -> xr.DataTree:
    """Return the run; ``labels`` are those of `labels_of`, with the variable ``weight_norm``."""
    moments = histograms.moments()
    distances = wasserstein.from_histograms(histograms, moments)
    invalid = histograms.invalid()
    unknown = invalid | (moments.count == 0)
    arrays = {name: tensor.cpu().numpy() for name, tensor in histograms.tensors().items()}
    values = {
        "wasserstein": distances.wasserstein,
        "wasserstein_error": distances.error,
        **shapes_of(arrays, moments.mean, moments.std),
        "mean": moments.mean,
        "std": moments.std,
        "skewness": moments.skewness,
        "kurtosis": moments.kurtosis,
        "modes": histograms.modes(moments),
        "min": np.where(unknown, np.nan, histograms.minimum.cpu().numpy()),
        "max": np.where(unknown, np.nan, histograms.maximum.cpu().numpy()),
        "count": moments.count,
        "nonfinite": np.maximum(invalid, (histograms.nonfinite + histograms.beyond).cpu().numpy()),
        "weight_norm": labels["weight_norm"].to_numpy(),
    }
    dataset = xr.Dataset(
        {name: labelled(name, value) for name, value in values.items()},
        coords=labels.coords,
        attrs=attributes_of(attributes),
    )
    state = {
        name: (_DIMENSIONS.get(name, ("neuron", "moment")[: array.ndim]), array)
        for name, array in arrays.items()
    }
    histogram = xr.Dataset(state)
    return xr.DataTree.from_dict({"/": dataset, "/histogram": histogram})


def with_difficulty(tree: xr.DataTree, found: Mapping[str, Difficulty]) -> xr.DataTree:
    """Return the run with the mapping difficulty of its neurons, given by layer name.

    It is of a layer's map from inputs to outputs: for input channels it is NaN, of 0 pairs.
    """
    dataset = tree.to_dataset()
    names = dataset["layer"].to_numpy()
    sizes = pd.Series(names).groupby(names, sort=False).size()
    none = [Difficulty(np.full(size, np.nan), 0, 0) for size in sizes]
    layers = [found.get(name, nan) for name, nan in zip(sizes.index, none, strict=True)]
    values = {
        "difficulty": np.concatenate([layer.difficulty for layer in layers]),
        "difficulty_pairs": np.repeat([layer.pairs for layer in layers], sizes),
        "difficulty_equal": np.repeat([layer.equal for layer in layers], sizes),
    }
    dataset = dataset.assign({name: labelled(name, value) for name, value in values.items()})
    histogram = tree.children["histogram"].to_dataset(inherit=False)
    return xr.DataTree.from_dict({"/": dataset, "/histogram": histogram})


def from_tree(tree: xr.DataTree, span: slice = slice(None)) -> Histograms:
    """Return the mergeable state of a run's neurons, or of a span of them.

    Raises:
        ValueError: the tree has no histograms.
    """
    if "histogram" not in tree.children:
        raise ValueError(
            "this run has no histograms, only a dataset: read its folder with open_run"
        )
    return from_held(tree["histogram"].to_dataset().isel(neuron=span))


def from_held(group: xr.Dataset) -> Histograms:
    """Return the state of histograms that a run holds."""
    names = [field.name for field in dataclasses.fields(Histograms)]
    return Histograms(**{name: torch.from_numpy(group[name].to_numpy()) for name in names})


def labels_of(
    layers: Sequence[Recordable], among: Sequence[Recordable] | None = None
) -> xr.Dataset:
    """Return the coordinates ``neuron``, ``layer``, ``block``, ``role``, ``index`` and ``side``.

    ``neuron``, LAYER:INDEX, is the index of the dataset. Inputs are of the layer LAYER:input, and
    their ``side`` is input; that of neurons is output. All strings are as wide as the longest of
    the ``among`` layers (default: ``layers``), so that datasets can be concatenated.
    """
    sizes = [layer.neurons for layer in layers]
    every = layers if among is None else among
    widest = ((f"{x.name}:{x.neurons - 1}", x.name, x.role) for x in every)
    neuron, name, role = (np.array(names).dtype for names in zip(*widest, strict=True))
    names = np.empty(sum(sizes), neuron)
    ends = np.cumsum(sizes)
    for layer, size, end in zip(layers, sizes, ends, strict=True):
        names[end - size : end] = np.strings.add(f"{layer.name}:", np.arange(size).astype(np.str_))
    coordinates: dict[str, Any] = {
        "neuron": ("neuron", names),
        "layer": ("neuron", np.repeat(np.array([layer.name for layer in layers], name), sizes)),
        "block": ("neuron", np.repeat([layer.block for layer in layers], sizes)),
        "role": ("neuron", np.repeat(np.array([layer.role for layer in layers], role), sizes)),
        "index": ("neuron", np.concatenate([np.arange(size) for size in sizes])),
        "side": ("neuron", np.repeat(np.array([layer.side for layer in layers], "<U6"), sizes)),
    }
    return xr.Dataset(coords=coordinates)


def weight_norms(layers: Sequence[Recordable]) -> Array:
    """Return the Euclidean norm of each neuron's weights (neurons,), of experts the mean norm.

    The weights of a neuron are a row of its layer's weight; those of an input channel are the
    column that is multiplied by it. It is NaN for quantised weights that torch cannot dequantise.
    """

    def norms(one: Recordable) -> torch.Tensor:
        layer = layer_of(one)
        module, _ = parameter_of(layer)
        in_file = device_of(layer).type == "meta"
        if in_file:
            load_block(module)
        weight = dequantised(layer)
        if weight is None:
            norm = torch.full((one.neurons,), torch.nan, dtype=torch.float64)
        else:
            column = isinstance(one, LayerInputs)
            norm = torch.linalg.vector_norm(weight.double(), dim=-2 if column else -1)
        if in_file:
            release_block(module)
        mean: torch.Tensor = norm.reshape(-1, norm.shape[-1]).mean(dim=0).cpu()
        return mean

    return torch.cat([norms(layer) for layer in layers]).numpy()
