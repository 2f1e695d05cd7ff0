"""A run's distances beside those of the neurons' raw outputs: by our closed form, SciPy and POT.

The layers run once more over the run's own text. Each way takes the raw outputs, in float64:

* ``exact``, ours: ∫|F⁻¹ - Φ⁻¹| du in closed form (`numerics.gaussian.from_samples`);
* ``scipy``: ∫|F - Φ| dx by numerical integration (`scipy.integrate`) with the law's own
  distribution function (`scipy.stats`). F is a staircase, and Φ is smooth between its steps;
* ``pot``: the cost of the optimal transport (`ot.emd2_1d`) to 131,072 equal masses, each at the
  median of its share of the law. A law has no samples, so these stand for it. They are as far from
  it as `mass_error` says, by which the cost may differ from the distance, and no more.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ot
import pandas as pd
import scipy
import xarray as xr
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from entangle.measurement.rerunning import neuron_outputs, setup_again
from entangle.model.text import TokenWindows
from entangle.numerics.bulk import REMOVED
from entangle.numerics.gaussian import from_samples
from entangle.numerics.kernels.bulk_cpu import LIMIT
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.runs.dataset import check_neuron, dataset_of, rows_by_layer, trusted

MASSES = 2**17  # that stand for a law
ROUNDING = 1e-9  # of sums in float64, far more than was ever seen
LAYERS = 5  # whose neurons are checked if none are named
_VALUES = 2**27  # outputs in memory at a time
_STEP = 0.25  # the longest piece of an integral where the law has mass; five points are exact there
Array = npt.NDArray[np.float64]


@with_torch_defaults
def check(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset,
    neurons: str | Sequence[str] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Compute distances of neurons, LAYER:INDEX, from raw outputs in three ways; compare the run's.

    ``windows`` must be those that ``run`` was measured on. Without ``neurons`` they are those of
    `spread_neurons`. The columns are:

    - ``neuron``, ``tokens``: its name, and how many outputs it has.
    - ``wasserstein``, ``wasserstein_error``: the run's distance and its certified bound, in std.
    - ``exact``, ``scipy``, ``pot``: the distance of the raw outputs (see `measurement.checking`).
    - ``wasserstein_bulk``, ``wasserstein_bulk_error``: those of the bulk, in its std.
    - ``bulk_scipy``, ``bulk_pot``: the distance of the bulk's raw outputs; NaN if they are constant.
    - ``agrees``: whether each of these distances is within the bound of the run's, and the three
      ways agree, up to their own errors.

    The own errors are in ``attrs``: ``rounding`` of ``exact`` and ``scipy``, ``pot_error`` and
    ``bulk_pot_error`` of ``pot``.

    Raises:
        LookupError: the run has no such neuron, or none with a distance.
        ValueError: the run was measured on other weights or other windows, is a shard, a neuron has
            no distance, or the model is in training mode.
    """
    data = dataset_of(run)
    named = spread_neurons(run) if neurons is None else neurons
    names = list(dict.fromkeys([named] if isinstance(named, str) else named))
    for name in names:
        check_neuron(data, name)
        if not np.isfinite(float(data["wasserstein"].sel(neuron=name))):
            raise ValueError(
                f"{name} has no distance, as it is dead, not finite or of an expert without tokens: "
                "choose another neuron"
            )
    setup = setup_again(model, windows, run=run, neurons=names, progress=progress)
    size = max(1, _VALUES // setup.tokens)
    rows: list[dict[str, Any]] = []
    bar = tqdm(range(0, len(names), size), unit="pass", disable=not progress)
    for first in bar:
        group = names[first : first + size]
        for name, values in zip(group, neuron_outputs(setup, group, setup.batches).T, strict=True):
            rows.append(_row(data.sel(neuron=name), values[~np.isnan(values)]))
    table = pd.DataFrame(rows)
    table.attrs |= {"rounding": ROUNDING}
    table.attrs |= {"pot_error": mass_error(None), "bulk_pot_error": mass_error(LIMIT)}
    return table


def spread_neurons(
    run: xr.DataTree | xr.Dataset,
    *,
    layers: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
) -> list[str]:
    """Return three neurons of each of five layers that are spread over the matching ones.

    They are the most entangled, the median and the least entangled neuron of those that are ranked
    (see `runs.dataset.trusted`).

    Raises:
        LookupError: a pattern matches no layer, or no neuron of them is ranked.
    """
    data = dataset_of(run)
    distance, known = data["wasserstein"].to_numpy(), trusted(data)
    groups = [rows[known[rows]] for rows in rows_by_layer(data, layers, exclude).values()]
    groups = [rows[np.argsort(distance[rows], kind="stable")] for rows in groups if len(rows)]
    if not groups:
        raise LookupError("no neuron of these layers has a distance that could be checked")
    spread = np.linspace(0, len(groups) - 1, LAYERS).round().astype(int)
    chosen = [
        groups[place][rank]
        for place in dict.fromkeys(spread.tolist())
        for rank in dict.fromkeys([len(groups[place]) - 1, len(groups[place]) // 2, 0])
    ]
    return [str(name) for name in data["neuron"].to_numpy()[chosen]]


def _row(stored: xr.Dataset, outputs: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Return the row of a neuron of these outputs (tokens,)."""
    found = {
        "exact": float(from_samples(outputs[:, None])[0]),
        "scipy": by_scipy(outputs, None),
        "pot": by_pot(outputs, None),
    }
    bulk = bulk_of(outputs)
    of_bulk = {"bulk_scipy": by_scipy(bulk, LIMIT), "bulk_pot": by_pot(bulk, LIMIT)}
    row = {"neuron": str(stored["neuron"].item()), "tokens": len(outputs)}
    agrees = True
    for name, ways, limit in (("wasserstein", found, None), ("wasserstein_bulk", of_bulk, LIMIT)):
        # An older dataset has no bulks, and a bulk of one value has no distance.
        distance, bound = (float(stored.get(key, np.nan)) for key in (name, f"{name}_error"))
        row |= {name: distance, f"{name}_error": bound, **ways}
        if limit is None or np.isfinite([distance, *ways.values()]).all():
            agrees &= _agree(distance, bound, ways, mass_error(limit))
    return row | {"agrees": agrees}


def _agree(stored: float, bound: float, found: Mapping[str, float], pot_error: float) -> bool:
    """Return whether the found distances are within the bound of the stored, and near each other."""
    errors = {name: ROUNDING + ("pot" in name) * pot_error for name in found}
    near = (
        abs(found[one] - found[other]) <= errors[one] + errors[other]
        for one in found
        for other in found
    )
    within = (abs(found[name] - stored) <= bound + errors[name] for name in found)
    return all(near) and all(within)


def bulk_of(outputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return outputs (tokens,) without the 1% that are farthest from their median."""
    farness = np.abs(outputs.astype(np.float64) - np.median(outputs.astype(np.float64)))
    kept = len(outputs) - round(REMOVED * len(outputs))
    return outputs[np.argsort(farness, kind="stable")[:kept]]


def by_scipy(outputs: npt.NDArray[Any], limit: float | None) -> float:
    """Return the distance of outputs (tokens,) to N(0, 1), within ±``limit`` if given, in their std.

    The integral is cut where F steps, where Φ crosses the height of a step, and into short pieces,
    so that |F - Φ| is smooth in each. It is NaN for constant outputs.
    """
    law, x = law_of(limit), _sorted(outputs, limit)
    if not len(x):
        return np.nan
    crossings = law.ppf(np.arange(1, len(x)) / len(x))
    pieces = [*np.arange(-10, 10 + _STEP, _STEP), *([-limit, limit] if limit else [])]
    cuts = np.sort(np.concatenate([x, crossings, pieces]))
    begin, length = cuts[:-1, None], np.diff(cuts)[:, None]
    below = np.searchsorted(x, cuts[:-1], side="right")[:, None] / len(x)  # F

    def height(t: Array) -> Array:
        return np.asarray(length * np.abs(below - law.cdf(begin + length * t)))  # (pieces, points)

    parts, _ = scipy.integrate.fixed_quad(height, 0, 1, n=5)
    return float(np.sum(parts) / law.std())


def by_pot(outputs: npt.NDArray[Any], limit: float | None) -> float:
    """Return the cost of the optimal transport to the masses of `law_of`, in std of the outputs.

    It is NaN for constant outputs.
    """
    x = _sorted(outputs, limit)
    if not len(x):
        return np.nan
    return float(ot.emd2_1d(x, masses(limit), metric="euclidean") / law_of(limit).std())


def _sorted(outputs: npt.NDArray[Any], limit: float | None) -> Array:
    """Return sorted outputs (tokens,) with mean 0 and the law's std; none of constant outputs."""
    x = np.sort(outputs.astype(np.float64))
    if len(x) < 2 or x[0] == x[-1]:
        return x[:0]
    return np.asarray((x - x.mean()) / x.std() * law_of(limit).std())


@functools.cache
def law_of(limit: float | None) -> Any:
    """Return SciPy's N(0, 1), kept within ±``limit`` if it is given."""
    return scipy.stats.norm() if limit is None else scipy.stats.truncnorm(-limit, limit)


@functools.cache
def masses(limit: float | None) -> Array:
    """Return the medians of equal shares of a law, which stand for it."""
    return np.asarray(law_of(limit).ppf((np.arange(MASSES) + 0.5) / MASSES))


@functools.cache
def mass_error(limit: float | None) -> float:
    """Return W1 between a law and its `masses`, in std of the law.

    A share's mass lies at its median, so its cost is what lies above less what lies below: with
    ∫x φ(x) dx = -φ(x), of the share from a to b with median m it is 2 φ(m) - φ(a) - φ(b).
    """
    law = law_of(limit)
    ends = law.pdf(law.ppf(np.arange(MASSES + 1) / MASSES))
    cost = 2 * law.pdf(masses(limit)).sum() - ends[1:].sum() - ends[:-1].sum()
    return float(cost / law.std())
