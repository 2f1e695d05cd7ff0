"""The dataset of a run: a row per neuron or input, and the names and units of its variables."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from entangle.model.patterns import INPUT, as_list, chosen, unmatched
from entangle.numerics import gaussian

Array = npt.NDArray[np.float64]

UNITS = {
    "wasserstein": ("1-Wasserstein distance to a Gaussian", "std"),
    "wasserstein_error": ("certified bound of the error of wasserstein", "std"),
    "wasserstein_bulk": ("1-Wasserstein distance of the bulk to a Gaussian", "its std"),
    "wasserstein_bulk_error": ("certified bound of the error of wasserstein_bulk", "its std"),
    "negentropy": ("negentropy of the bulk", "nats"),
    "bimodality": ("bimodality coefficient of the bulk", "1"),
    "far_variance": ("share of the variance beyond 6 std", "1"),
    "mean": ("mean output", "output"),
    "std": ("population standard deviation of the output", "output"),
    "skewness": ("skewness", "1"),
    "kurtosis": ("excess kurtosis", "1"),
    "modes": ("modes of the smoothed histogram", "1"),
    "min": ("smallest output", "output"),
    "max": ("largest output", "output"),
    "count": ("tokens counted", "tokens"),
    "nonfinite": ("outputs that are NaN, infinite or too large to be summed", "tokens"),
    "weight_norm": (
        "Euclidean norm of the weights, of an input those of its column (in an expanded layer, mean "
        "over experts)",
        "1",
    ),
    "difficulty": ("mapping difficulty", "1"),
    "difficulty_pairs": ("pairs of tokens in the mean of the mapping difficulty", "pairs"),
    "difficulty_equal": (
        "pairs of tokens with equal inputs, left out of the mapping difficulty",
        "pairs",
    ),
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
"""The long name and the unit of each variable."""

TRUSTED_ERROR = 0.1  # neurons with a larger error bound are not ranked
NAMED_ERROR = 0.02  # neurons with a larger error bound are named in the summary
NOISY_FLOOR = 0.05  # neurons of trained experts with a higher noise floor are named
NOISY_TOKENS = math.ceil((gaussian.NOISE / NOISY_FLOOR) ** 2)

_MAPPINGS = ("versions", "disentangled", "skipped_layers", "texts")  # attributes that are mappings
# Attributes that are lists.
_LISTS = (
    *("layers", "input_layers", "exclude", "skipped_parameters", "dependent_on", "window_hashes"),
    "notes",
)


def labelled(name: str, values: npt.NDArray[Any]) -> tuple[str, npt.NDArray[Any], dict[str, str]]:
    """Return a variable (neurons,) for `xarray.Dataset`, with its long name and unit."""
    return "neuron", values, dict(zip(("long_name", "units"), UNITS[name], strict=True))


def dataset_of(run: xr.DataTree | xr.Dataset) -> xr.Dataset:
    """Return the root dataset of a run, or the given dataset, with the index ``neuron``."""
    return upgraded(run.to_dataset() if isinstance(run, xr.DataTree) else run)


def outputs_of(run: xr.DataTree | xr.Dataset) -> xr.Dataset:
    """Return the dataset of a run's neurons alone, without rows of layers' inputs."""
    data = dataset_of(run)
    output = data["side"].to_numpy() == "output"
    return data if output.all() else data.isel(neuron=output)


def upgraded(data: xr.Dataset) -> xr.Dataset:
    """Return a dataset of an older version in this version's form; others are unchanged.

    Older datasets have only outputs, and no ``side``. Those of 0.1.0 also lack the index ``neuron``
    and have attributes that netCDF cannot hold.
    """
    if "side" not in data.coords:
        side = np.full(data.sizes["neuron"], "output")
        data = data.assign_coords(side=("neuron", side))
    if "neuron" in data.coords:
        return data
    pairs = zip(data["layer"].to_numpy(), data["index"].to_numpy(), strict=True)
    found = data.assign_coords(neuron=[f"{layer}:{index}" for layer, index in pairs])
    found.attrs = attributes_of({str(name): value for name, value in data.attrs.items()})
    return found


def attributes_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of run.json as attributes of a dataset that netCDF can hold.

    Values that are None are left out, and mappings become JSON.
    """
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else value
        for name, value in about.items()
        if value is not None
    }


def about(run: xr.DataTree | xr.Dataset) -> dict[str, Any]:
    """Return the content of run.json, without what is null, from the attributes of a run.

    NetCDF returns numbers and lists as NumPy types, and a list of one string as a string: convert
    them back.
    """
    found: dict[str, Any] = {}
    for name, value in run.attrs.items():
        plain = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
        if name in _MAPPINGS and isinstance(plain, str):
            plain = json.loads(plain)
        found[str(name)] = [plain] if name in _LISTS and isinstance(plain, str) else plain
    return found


def disentangled(run: xr.DataTree | xr.Dataset) -> dict[str, Any]:
    """Return the run.json of a run that `disentangle` wrote; empty for any other run."""
    found: dict[str, Any] = about(run).get("disentangled", {})
    return found


def trusted(run: xr.DataTree | xr.Dataset, by: str = "wasserstein") -> npt.NDArray[np.bool_]:
    """Return a mask (neurons,) of those that are ranked: a distance, and a bound of at most 0.1.

    It is of ``wasserstein_bulk`` if ``by`` is that, and else of ``wasserstein``.
    """
    dataset, name = dataset_of(run), by if by == "wasserstein_bulk" else "wasserstein"
    bound, distance = dataset[f"{name}_error"].to_numpy(), dataset[name].to_numpy()
    known: npt.NDArray[np.bool_] = (bound <= TRUSTED_ERROR) & np.isfinite(distance)
    return known


def kinds_of(data: xr.Dataset) -> npt.NDArray[np.str_]:
    """Return the kind of each neuron (neurons,): ``outliers``, ``shape``, or empty if not known.

    Outliers make a distance if more than half of the variance is beyond 6 std, or if it is less than
    half as large without the 1% of tokens farthest from the median. Any other is of the shape. It
    is not known where the bulk's distance has a bound above 0.1 that leaves both possible, or the
    distance is not known.
    """
    names = ("wasserstein", "wasserstein_bulk", "wasserstein_bulk_error", "far_variance")
    distance, bulk, error, far = (data[name].to_numpy() for name in names)
    half, apart = distance / 2, far > 0.5
    known = (error <= TRUSTED_ERROR) | (bulk + error < half) | (bulk - error >= half) | apart
    kinds: npt.NDArray[np.str_] = np.where((bulk < half) | apart, "outliers", "shape")
    return np.where(known & np.isfinite(distance), kinds, "")


def summary(run: xr.DataTree | xr.Dataset) -> dict[str, Any]:
    """Return what a run was measured on, the quantiles of its distances (in std), and warnings.

    They are of its neurons. If it has input channels too, those of these are in ``inputs``.
    """
    dataset = dataset_of(run)
    inputs = dataset.isel(neuron=dataset["side"].to_numpy() == "input")
    tokens = int(dataset.attrs.get("tokens", dataset["count"].max()))
    names = ("model", "text", "windows", "length")
    shard = {name: dataset.attrs[name] for name in ("shard",) if name in dataset.attrs}
    return (
        {name: dataset.attrs.get(name, "?") for name in names}
        | shard
        | {
            "tokens": tokens,
            "noise_floor": gaussian.noise_floor(tokens),
            **_distances(outputs_of(dataset)),
            **_of_experts(dataset, tokens),
            **({"inputs": _distances(inputs)} if inputs.sizes["neuron"] else {}),
            "warnings": [
                *_warnings(outputs_of(dataset), "neuron", "outputs", tokens),
                *_warnings(inputs, "input", "values", tokens),
                *dependence_notes(about(dataset).get("dependent_on", [])),
                *skipped_notes(about(dataset), "measured"),
            ],
        }
    )


def _distances(dataset: xr.Dataset) -> dict[str, Any]:
    """Return how many neurons, or inputs, there are, and the quantiles of their distances in std."""
    distance, error = dataset["wasserstein"].to_numpy(), dataset["wasserstein_error"].to_numpy()
    known = np.where(trusted(dataset), distance, np.nan)
    largest = int(np.nanargmax(known)) if np.isfinite(known).any() else None
    median, quantile = np.nanquantile(known, [0.5, 0.95]) if largest is not None else (np.nan,) * 2
    bulk = {"bulk": _bulk_distances(dataset)} if "wasserstein_bulk" in dataset else {}
    return bulk | {
        "neurons_measured": dataset.sizes["neuron"],
        "layers": len(set(dataset["layer"].to_numpy())),
        "median": float(median),
        "quantile_95": float(quantile),
        "largest": np.nan if largest is None else float(distance[largest]),
        "largest_error": np.nan if largest is None else float(error[largest]),
        "largest_neuron": "none" if largest is None else dataset["neuron"][largest].item(),
    }


def _of_experts(dataset: xr.Dataset, tokens: int) -> dict[str, Any]:
    """Return how many tokens those matrices of trained experts had that had not all; empty if none.

    An expert that had all ``tokens`` is like any other layer.
    """
    counts = dataset["count"].to_numpy()
    few = counts < tokens
    if not few.any():
        return {}
    names = [name.removesuffix(INPUT) for name in dataset["layer"].to_numpy()[few]]
    layers = pd.Series(counts[few]).groupby(names).first()
    return {
        "experts": {
            "matrices": len(layers),
            "without_tokens": int((layers == 0).sum()),
            "least_tokens": int(layers.min()),
            "most_tokens": int(layers.max()),
        }
    }


def _bulk_distances(dataset: xr.Dataset) -> dict[str, Any]:
    """Return the quantiles of the bulks' distances, in their std, and how many are not known."""
    distance, error = (
        dataset[name].to_numpy() for name in ("wasserstein_bulk", "wasserstein_bulk_error")
    )
    known = np.where(trusted(dataset, "wasserstein_bulk"), distance, np.nan)
    found = {"unknown": int((error > TRUSTED_ERROR).sum())}
    if not np.isfinite(known).any():
        return found | {"median": np.nan, "largest": np.nan, "largest_neuron": "none"}
    largest = int(np.nanargmax(known))
    return found | {
        "median": float(np.nanmedian(known)),
        "largest": float(distance[largest]),
        "largest_error": float(error[largest]),
        "largest_neuron": dataset["neuron"][largest].item(),
    }


def _warnings(dataset: xr.Dataset, what: str, values: str, tokens: int) -> list[str]:
    """Return warnings of neurons, or inputs, without a distance, with few tokens or a large bound.

    ``tokens`` are those of the run; a trained expert has some of them.
    """
    distance, error = dataset["wasserstein"].to_numpy(), dataset["wasserstein_error"].to_numpy()
    broken, counts = dataset["nonfinite"].to_numpy() > 0, dataset["count"].to_numpy()
    unused = counts < min(tokens, 2)  # of one token there is no std
    few = ~unused & (counts < min(tokens, NOISY_TOKENS))
    dead, large = np.isnan(distance) & ~broken & ~unused, error > TRUSTED_ERROR
    noisy = f"fewer than {NOISY_TOKENS} tokens, so with a noise floor above {NOISY_FLOOR} std"
    cases = [
        (unused, f"{what}{{}} of experts that had no token, or only one, so without a distance"),
        (few, f"{what}{{}} of experts with {noisy}"),
        (broken, f"{what}{{}} with NaN, infinite or too large {values}, so without a distance"),
        (dead, f"dead {what}{{}} (constant {values}), so without a distance"),
        (large, f"{what}{{}} with an error bound above {TRUSTED_ERROR}, so not ranked"),
        ((error > NAMED_ERROR) & ~large, f"{what}{{}} with an error bound above {NAMED_ERROR}"),
    ]
    warnings = []
    for mask, text in cases:
        first = dataset["neuron"][np.flatnonzero(mask)[:3]].to_numpy().tolist()
        if first:
            count = int(mask.sum())
            plural, more = "s" * (count > 1), ", ..." * (count > len(first))
            warnings.append(f"{count:,} {text.format(plural)}: {', '.join(first)}{more}")
    return warnings


def neuron_names(layer: str, indices: Iterable[int]) -> list[str]:
    """Return the names, LAYER:INDEX, of the neurons of a layer with these indices."""
    return [f"{layer}:{index}" for index in indices]


def check_neuron(data: xr.Dataset, name: str) -> None:
    """Check that the dataset has the neuron LAYER:INDEX.

    Raises:
        LookupError: it has no such neuron.
    """
    if name in data.indexes["neuron"]:
        return
    layer = name.rpartition(":")[0]
    names = data["layer"].to_numpy().astype(str)
    inputs_of = layer.removesuffix(INPUT)
    if layer not in names and inputs_of != layer and inputs_of in names:
        raise LookupError(
            f"no neuron {name!r}: the run has no inputs of {inputs_of}. Measure them with "
            f"--input-layers {inputs_of}"
        )
    if layer not in names:
        near = get_close_matches(layer or name, {*names}, 3, 0.3) or names[:1]
        close = " or ".join(f"{one}:0" for one in near)
        raise LookupError(f"no neuron {name!r}: expected LAYER:INDEX, such as {close}")
    indices = data["index"].to_numpy()[names == layer]
    has = f"{len(indices):,} neurons, {indices.min()} to {indices.max()}"
    raise LookupError(f"no neuron {name!r}: {layer} has {has}")


def values_of(data: xr.Dataset, variable: str, layer: str, indices: Iterable[int]) -> Array:
    """Return a variable (neurons,) of a layer's neurons with these indices, in their order.

    Raises:
        LookupError: the run lacks the variable or one of the neurons.
    """
    if variable not in data:
        raise LookupError(
            f"the run has no {variable}: measure it again with this version of entangle"
        )
    names = neuron_names(layer, indices)
    rows = data.indexes["neuron"].get_indexer(pd.Index(names))
    if (rows < 0).any():
        raise LookupError(
            f"the run has only {int((rows >= 0).sum())} of the {len(names)} neurons of {layer}: "
            "measure all layers that are to be pruned"
        )
    values: Array = data[variable].to_numpy()[rows].astype(np.float64)
    return values


def matching(
    names: npt.NDArray[np.str_],
    patterns: str | Sequence[str],
    exclude: str | Sequence[str] = (),
) -> npt.NDArray[np.bool_]:
    """Return a mask (names,) of the layer names that match any pattern, and none in ``exclude``.

    Raises:
        LookupError: a pattern matches no name, or all names that match are excluded.
    """
    patterns, exclude = as_list(patterns), as_list(exclude)
    codes, distinct = pd.factorize(names)
    wrong = unmatched(distinct, (*patterns, *exclude))
    if wrong is not None:
        raise LookupError(
            f"no layer of this run matches {wrong!r}: layers have names such as {names[0]}"
        )
    matched = chosen(distinct, patterns, exclude)
    return np.array(matched, dtype=bool)[codes]


def rows_by_layer(
    dataset: xr.Dataset, patterns: str | Sequence[str], exclude: str | Sequence[str] = ()
) -> dict[str, npt.NDArray[np.int64]]:
    """Return the rows of each matching layer's neurons in the dataset, by the layer's name."""
    names = dataset["layer"].to_numpy().astype(str)
    chosen = np.flatnonzero(matching(names, patterns, exclude))
    groups = pd.Series(chosen).groupby(names[chosen], sort=False)
    return {str(name): rows.to_numpy() for name, rows in groups}


def with_text(run: xr.DataTree, hashes: npt.NDArray[np.uint64] | None) -> xr.DataTree:
    """Return the run with the hashes (runs,) of its text (see `model.overlap`) as child ``text``."""
    if hashes is not None:
        run["text"] = xr.DataTree(xr.Dataset({"hashes": ("run", hashes)}))
    return run


def runs_of(run: xr.DataTree | xr.Dataset) -> npt.NDArray[np.uint64] | None:
    """Return the hashes (runs,) of the run's text, or None.

    A dataset without its tree has none, nor has a run of a version before 0.2.0.
    """
    if isinstance(run, xr.Dataset) or "text" not in run.children:
        return None
    hashes: npt.NDArray[np.uint64] = run["text"]["hashes"].to_numpy()
    return hashes


def overlap_notes(attributes: Mapping[Any, Any]) -> list[str]:
    """Return a line for each text that may have tokens of the evaluation (see `Setup.overlaps`).

    ``attributes`` are those of run.json.
    """
    several = attributes.get("evaluation_texts", {})
    shares = {"the evaluation": attributes.get("overlap", {})}
    shares = {name: facts["overlap"] for name, facts in several.items()} or shares
    texts = {"windows": "calibration windows", "run": "text of the measured run"}
    lines = [
        "The measured run has no hashes of its text: it is only a dataset, or a version before "
        "0.2.0 wrote it. So the evaluation was compared with whole windows only."
        if share is None
        else f"{share:.2%} of the tokens of {evaluation} are in a sequence of 16 tokens that is "
        f"also in the {texts[name]}."
        for evaluation, found in shares.items()
        for name, share in found.items()
    ]
    return list(dict.fromkeys(lines))


def short_names(texts: Sequence[str]) -> list[str]:
    """Return the ends of the paths of texts, without .txt; the paths if two ends are equal."""
    ends = ["/".join(PurePath(text).parts[-2:]).removesuffix(".txt") for text in texts]
    return ends if len({*ends}) == len(ends) else [*texts]


def dependence_notes(dependent_on: Sequence[str]) -> list[str]:
    """Return one line, or none, on what the outputs depend on (see `model.causality`)."""
    if not dependent_on:
        return []
    return [
        f"the model's outputs at a token depend {' and '.join(dependent_on)}, so its distributions "
        "depend on how the text is cut and batched"
    ]


def skipped_notes(attributes: Mapping[Any, Any], action: str) -> list[str]:
    """Return lines on what was not ``action``: matrices that are not layers, and skipped layers.

    ``attributes`` are those of run.json.
    """
    names, layers = attributes.get("skipped_parameters", []), attributes.get("skipped_layers", {})
    lines = []
    if names:
        lines.append(
            f"{len(names)} matrices in the blocks are not linear layers and were not {action}: "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        )
    reasons: dict[str, list[str]] = {}
    for name, reason in layers.items():
        reasons.setdefault(reason, []).append(name)
    for reason, alike in reasons.items():
        shown = f"{', '.join(alike[:3])}{', ...' if len(alike) > 3 else ''}"
        lines.append(
            f"{len(alike)} linear layer{'s' * (len(alike) > 1)} not {action}: {shown} ({reason})"
        )
    return lines
