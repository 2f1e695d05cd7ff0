"""Comparison of two runs: changes of distances between checkpoints, texts or precisions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from entangle.measurement.ranking import correlation
from entangle.runs.dataset import dataset_of, matching, trusted


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """The differences of two runs over the neurons that are ranked in both.

    ``layers`` has a row per layer, in the first run's order:

    - ``layer``, ``block``, ``role``: the layer's labels.
    - ``neurons``: how many of its neurons are ranked in both runs.
    - ``correlation``: Spearman's rank correlation of the two runs' distances.
    - ``correlation_error``: its standard error, for independent neurons.
    - ``median``, ``other_median``: the median distance in the first and in the other run, in std.
    - ``beyond``: the share (0 to 1) of these neurons whose change exceeds their bound.

    ``neurons`` has a row per neuron, the largest excess of the change over its bound first:

    - ``neuron``: LAYER:INDEX.
    - ``first``, ``other``: its Wasserstein distance in each run, in std.
    - ``change``: other - first, in std.
    - ``bound``: the sum of the certified error bounds of both distances, in std.
    - ``beyond``: ``max(abs(change) - bound, 0)``, in std.
    - ``first_count``, ``other_count``: its tokens in each run. Only if neurons have different counts,
      as those of trained experts do.
    """

    layers: pd.DataFrame
    neurons: pd.DataFrame


def diff(
    run: xr.DataTree | xr.Dataset,
    other: xr.DataTree | xr.Dataset,
    *,
    layers: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
) -> Comparison:
    """Compare the Wasserstein distances of the neurons that both runs have.

    Neurons that have no distance, or an error bound above 0.1, in either run are left out. The
    bounds do not cover the sampling noise of the tokens that each run counted (see `noise_floor`).

    Raises:
        LookupError: a pattern matches no layer of the first run, or no neuron is
            ranked in both runs.
    """
    tables = []
    for one in map(dataset_of, (run, other)):
        kept = one[["wasserstein", "wasserstein_error", "count"]].isel(neuron=trusted(one))
        tables.append(kept.to_dataframe())
    keys = ["layer", "block", "role", "index", "side"]
    both = tables[0].merge(tables[1], on=keys, suffixes=("_first", ""))
    names = dataset_of(run)["layer"].to_numpy().astype(str)
    wanted = set(names[matching(names, layers, exclude)])
    both = both[both["layer"].isin(wanted)]
    if both.empty:
        lacking = sorted(wanted - set(dataset_of(other)["layer"].to_numpy().astype(str)))
        why = (
            f"the second run has no layer {lacking[0]}"
            if lacking
            else "in one run they are dead, have outputs that are not finite, or too large a bound"
        )
        raise LookupError(
            f"no neuron of the {len(wanted)} chosen layers of the first run is ranked in both runs: "
            f"{why}"
        )
    both["first_count"], both["other_count"] = both["count_first"], both["count"]
    both["first"], both["other"] = both["wasserstein_first"], both["wasserstein"]
    both["change"] = both["other"] - both["first"]
    both["bound"] = both["wasserstein_error_first"] + both["wasserstein_error"]
    both["beyond"] = (both["change"].abs() - both["bound"]).clip(lower=0)
    rows: list[dict[str, Any]] = []
    for (layer, block, role), part in both.groupby(["layer", "block", "role"], sort=False):
        rho, error = correlation(part["first"].to_numpy(), part["other"].to_numpy())
        rows.append(
            {
                "layer": layer,
                "block": block,
                "role": role,
                "neurons": len(part),
                "correlation": rho,
                "correlation_error": error,
                "median": float(part["first"].median()),
                "other_median": float(part["other"].median()),
                "beyond": float((part["beyond"] > 0).mean()),
            }
        )
    order = np.argsort(-both["change"].abs().to_numpy() + both["bound"].to_numpy(), kind="stable")
    neurons = both.iloc[order].reset_index(drop=True)
    neurons.insert(0, "neuron", neurons["layer"] + ":" + neurons["index"].astype(str))
    columns = ["neuron", "first", "other", "change", "bound", "beyond"]
    counts = ["first_count", "other_count"]
    columns += counts if (both[counts].nunique() > 1).any() else []
    return Comparison(pd.DataFrame(rows), neurons[columns])
