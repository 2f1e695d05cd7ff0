"""The tables of `disentangle`: by layer, and by quantiles of the distance within a layer."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from entangle.measurement.ranking import correlation
from entangle.runs.dataset import (
    dataset_of,
    dependence_notes,
    overlap_notes,
    skipped_notes,
    trusted,
)
from entangle.runs.markdown import table_lines, with_error

Array = npt.NDArray[np.float64]

QUANTILES = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)  # of the distances within a layer
MEASURES = {  # correlated with the improvement; values name the variable
    "wasserstein": "wasserstein",
    "difficulty": "held_out_difficulty",
    "kurtosis": "kurtosis",
    "weight_norm": "weight_norm",
    "std": "std",
}


def _kinds(tree: xr.DataTree) -> Iterator[tuple[dict[str, Any], dict[str, Array]]]:
    """Yield each number of experts and sparsity, with its measures (neurons,) by name."""
    data = dataset_of(tree)
    values = {str(name): data[name].to_numpy() for name in data.data_vars}
    experts = data["experts"].to_numpy()
    shown = {
        "wasserstein": values["held_out_wasserstein"],
        "difficulty": values["held_out_difficulty"],
    }
    # Arm 0 has one expert; then come pairs of k-means and random clusters.
    for arm in range(1, len(experts), 2):
        for place, sparsity in enumerate(data["sparsity"].to_numpy()):
            found = dict(shown)
            for name in ("wasserstein", "difficulty"):
                found[f"{name}_within"] = values[f"{name}_within"][:, arm]
                found[f"{name}_random"] = values[f"{name}_within"][:, arm + 1]
                differ = found[f"{name}_random"] - found[f"{name}_within"]
                found[f"{name}_less"] = np.where(np.isnan(differ), np.nan, differ > 0)
            # The improvement of a neuron that experts reproduce exactly is infinite: left out.
            found["improvement"] = _finite(values["improvement"][:, place, arm])
            found["improvement_random"] = _finite(values["improvement"][:, place, arm + 1])
            found["improvement_halves"] = _finite(values["improvement_halves"][:, place, arm])
            for name, other in (("one", 0), ("experts", arm), ("random", arm + 1)):
                found[f"distance_{name}"] = values["distance_to_dense"][:, place, other]
            yield {"experts": int(experts[arm]), "sparsity": str(sparsity)}, found


def layers_table(tree: xr.DataTree) -> pd.DataFrame:
    """Return a table with a row per number of experts, sparsity and layer.

    Only neurons with a trusted distance count. Values are of held-out tokens. Random clusters have
    the sizes of the k-means clusters. A number that does not exist is NaN. Columns:

    * ``experts``: number of clusters.
    * ``sparsity``: sparsity of the experts.
    * ``layer``, ``block``, ``role``: the layer.
    * ``neurons``: neurons that count.
    * ``wasserstein``: distance of the dense outputs to a Gaussian, std, median over neurons.
    * ``difficulty``: mapping difficulty (a ratio), median over neurons.
    * ``wasserstein_within``, ``wasserstein_random``: distance within k-means and within random
      clusters, mean over clusters weighted by tokens, in std within the cluster, median over
      neurons.
    * ``wasserstein_less``: share of neurons with a smaller distance within k-means clusters than
      within random ones.
    * ``difficulty_within``, ``difficulty_random``, ``difficulty_less``: the same for difficulty.
    * ``improvement``: RMSE of the outputs with one expert over that with k-means experts, median
      over neurons.
    * ``improvement_random``: the same with random clusters.
    * ``distance_one``, ``distance_experts``, ``distance_random``: 1-Wasserstein distance between
      sparse and dense outputs with one expert, k-means experts and random ones, in std of the
      dense outputs, median over neurons.
    * ``improvement_sd``: standard deviation of the improvement over neurons.
    * ``reliability``: rank correlation of the improvements on the even and on the odd windows, so
      of half the tokens each.
    * ``with_wasserstein``, ``with_difficulty``, ``with_kurtosis``, ``with_weight_norm``,
      ``with_std``: rank correlation of the improvement with that variable of the neuron.
    """
    data = dataset_of(tree)
    table = []
    for kind, found in _kinds(tree):
        for layer, rows in _layers(data).items():
            row: dict[str, Any] = {**kind, "layer": layer}
            row |= {name: data[name].to_numpy()[rows[0]] for name in ("block", "role")}
            row |= {"neurons": len(rows)}
            for name, values in found.items():
                here = values[rows]
                if name.endswith("_less"):
                    row[name] = _nanmean(here)
                elif name != "improvement_halves":
                    row[name] = float(np.nanmedian(here)) if np.isfinite(here).any() else math.nan
            improvement = found["improvement"][rows]
            known = improvement[np.isfinite(improvement)]
            row["improvement_sd"] = float(known.std(ddof=1)) if len(known) > 1 else math.nan
            row["reliability"] = _correlation(*found["improvement_halves"][rows].T)
            for name, variable in MEASURES.items():
                measure = data[variable].to_numpy()[rows]
                row[f"with_{name}"] = _correlation(improvement, measure)
            table.append(row)
    return pd.DataFrame(table)


def quantiles_table(tree: xr.DataTree) -> pd.DataFrame:
    """Return a table with a row per number of experts, sparsity and range of distance quantiles.

    Quantiles are within a layer, of the distances in the run. They are not of the held-out
    distances, so the choice of neurons does not bias the held-out values. Values are means over
    neurons, then over layers. Columns:

    * ``experts``: number of clusters.
    * ``sparsity``: sparsity of the experts.
    * ``from``, ``to``: the range of quantiles; 0 to 1 is all neurons.
    * ``layers``, ``neurons``: layers and neurons in it.
    * ``wasserstein``, ``difficulty``, their ``_within``, ``_random`` and ``_less``,
      ``improvement``, ``improvement_random``, ``distance_one``, ``distance_experts``,
      ``distance_random``, ``reliability``: as in `layers_table`, with the same units, but means
      where that has medians.
    * each of these with ``_error``: its standard error over layers, in the same unit.
    """
    data = dataset_of(tree)
    ranks = {}
    for layer, rows in _layers(data).items():
        order = np.argsort(data["wasserstein"].to_numpy()[rows], kind="stable")
        ranks[layer] = np.empty(len(rows))
        ranks[layer][order] = (np.arange(len(rows)) + 0.5) / len(rows)
    ranges = [(QUANTILES[0], QUANTILES[-1]), *itertools.pairwise(QUANTILES)]
    table = []
    for kind, found in _kinds(tree):
        halves = found.pop("improvement_halves")
        for low, high in ranges:
            here = {
                layer: rows[(ranks[layer] >= low) & (ranks[layer] < high)]
                for layer, rows in _layers(data).items()
            }
            here = {layer: rows for layer, rows in here.items() if len(rows)}
            if not here:
                continue
            row: dict[str, Any] = {**kind, "from": low, "to": high}
            row |= {"layers": len(here), "neurons": sum(map(len, here.values()))}
            for name, values in found.items():
                means = np.array([_nanmean(values[rows]) for rows in here.values()])
                row |= dict(zip((name, f"{name}_error"), _mean_error(means), strict=True))
            same = np.array([_correlation(*halves[rows].T) for rows in here.values()])
            row |= dict(zip(("reliability", "reliability_error"), _mean_error(same), strict=True))
            table.append(row)
    return pd.DataFrame(table)


def _layers(data: xr.Dataset) -> dict[str, npt.NDArray[np.int64]]:
    """Return the indices of each layer's neurons with a trusted distance."""
    known = np.flatnonzero(trusted(data))
    groups = pd.Series(known).groupby(data["layer"].to_numpy()[known], sort=False)
    return {str(name): rows.to_numpy() for name, rows in groups}


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, np.nan)


def _nanmean(values: Array) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _mean_error(values: Array) -> tuple[float, float]:
    """Return the mean and standard error of the finite values."""
    known = values[np.isfinite(values)]
    if not len(known):
        return math.nan, math.nan
    error = known.std(ddof=1) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return float(known.mean()), float(error)


def _correlation(x: Array, y: Array) -> float:
    both = np.isfinite(x) & np.isfinite(y)
    return correlation(x[both], y[both])[0]


def markdown(about: Mapping[Any, Any], layers: pd.DataFrame, quantiles: pd.DataFrame) -> str:
    """Return both tables in Markdown, below a paragraph on models, texts and units."""
    run = about["run"]
    lines = [
        f"{about['model']}, layers {' '.join(about['layers'])}: clusters and experts are computed "
        f"from {about['tokens']:,} tokens of {about['text']} ({about['windows']} windows of "
        f"{about['length']}), and the neurons are measured on {about['held_out_tokens']:,} held-out "
        f"tokens of {about['evaluation']}, both with the dense model. Experts are pruned by "
        f"SparseGPT with mask row, solve {about.get('solve', 'greedy')}. ± is the standard error over layers.",
        *overlap_notes(about),
        *dependence_notes(about.get("dependent_on", [])),
        *skipped_notes(about, "measured"),
        "",
        "The relative improvement of a neuron is the RMSE of its outputs with one expert divided by "
        "that with several. The table has its median over a layer's neurons, also with random "
        "clusters (at random), its standard deviation over them (sd), its reliability (the rank "
        "correlation between the improvements on the even and on the odd held-out windows), and its "
        f"rank correlations with variables of the neuron: `wasserstein`, `kurtosis` and `std` are of "
        f"{run.get('tokens', 0):,} tokens of {run.get('text', '?')}, mapping difficulty is of the "
        "held-out tokens. All numbers are means over layers.",
        "",
    ]
    heads = ["experts", "sparsity", "improvement", "at random", "sd", "reliability"]
    heads += [f"with {name}" for name in MEASURES]
    names = ["improvement", "improvement_random", "improvement_sd", "reliability"]
    names += [f"with_{name}" for name in MEASURES]
    rows = [heads]
    for (experts, sparsity), part in layers.groupby(["experts", "sparsity"], sort=False):
        cells = [_cell(*_mean_error(part[name].to_numpy())) for name in names]
        rows.append([str(experts), str(sparsity), *cells])
    lines += [
        *table_lines(rows),
        "",
        "The neurons of each layer are grouped by quantiles of their distance in the run. Numbers are "
        "means over a group's neurons, then over layers. Distance is that of the dense outputs to a "
        "Gaussian. Within clusters it is the mean over clusters, weighted by tokens. Random clusters "
        "have the same sizes (they are the k-means clusters with the tokens shuffled), and so the "
        "same noise of small clusters: compare only these two. Less is the share of neurons with a "
        "smaller distance within clusters than within random ones. Improvement and reliability are "
        "as above. To dense is the distance between sparse and dense outputs: with one expert, with "
        "several, and with several at random.",
        "",
    ]
    names = ["wasserstein", "wasserstein_within", "wasserstein_random", "wasserstein_less"]
    names += ["improvement", "improvement_random", "reliability"]
    names += ["distance_one", "distance_experts", "distance_random"]
    heads = ["experts", "sparsity", "neurons of a layer", "distance", "within clusters"]
    heads += ["within random ones", "less", "improvement", "at random", "reliability"]
    heads += ["to dense, one", "several", "at random"]
    lines += [*_by_quantile(quantiles, heads, names), "", "The same for mapping difficulty.", ""]
    names = ["difficulty", "difficulty_within", "difficulty_random", "difficulty_less"]
    heads = ["experts", "sparsity", "neurons of a layer", "difficulty", "within clusters"]
    heads += ["within random ones", "less"]
    once = quantiles[quantiles["sparsity"] == quantiles["sparsity"].iloc[0]].assign(sparsity="any")
    return "\n".join([*lines, *_by_quantile(once, heads, names)]) + "\n"


def _by_quantile(quantiles: pd.DataFrame, heads: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the lines of a table with a row per range of quantiles."""
    rows = [list(heads)]
    for row in quantiles.to_dict(orient="records"):
        span = "all" if row["to"] - row["from"] == 1 else f"{row['from']:.0%} to {row['to']:.0%}"
        cells = [_cell(row[name], row[f"{name}_error"]) for name in names]
        rows.append([str(row["experts"]), row["sparsity"], f"{span} ({row['neurons']:,})", *cells])
    return table_lines(rows)


def _cell(value: float, error: float) -> str:
    return with_error(value, error) if math.isfinite(value) else "-"
