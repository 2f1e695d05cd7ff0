"""Second histograms, with bins of their own, of neurons whose bulk lies in too few bins of a run's."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.measurement.rerunning import setup_again
from entangle.model import ranks
from entangle.model.hooks import backbone_of, recording_rows
from entangle.model.placing import input_device, is_offloaded
from entangle.model.progress import progress_bar
from entangle.model.sides import Recordable
from entangle.model.text import TokenWindows
from entangle.numerics.bulk import ends_of_counts
from entangle.numerics.histograms import Histograms
from entangle.numerics.kernels.bins import HALF_RANGE
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.runs import labelling, store
from entangle.runs.dataset import NAMED_ERROR, dataset_of
from entangle.runs.setup import Setup
from entangle.runs.shapes import finer

# Of a neuron, also over several calls; one makes its bins narrower by up to as many times as there are.
PASSES = 3
_FEW = 4  # a bulk needs finer bins if it lies in less than a fourth of them
_FARTHEST = 2.0**20  # bins from the center: what is farther out is counted there
Rows = npt.NDArray[np.int64]


@with_torch_defaults
def resolve(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    run: str | Path,
    progress: bool | None = None,
) -> xr.DataTree:
    """Give neurons whose bulk lies in too few bins second histograms, and return the run with them.

    ``run`` is the folder of a run that was measured with this model on these ``windows``. Its bulks'
    distances with an error bound above 0.02 are those concerned, if the bulk is in less than a
    fourth of the bins. The second bins cover what the first say about the bulk's place; where that
    is not enough, there are third ones in their place. A bulk that three passes do not resolve is
    one value, or nearly so, and is not tried again (`unresolvable`). Only the bulk's variables change. The second
    histograms are written to resolved.npz in the folder, and `open_run` reads them.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the run was measured on other weights or other windows, is a shard, or the model
            is in training mode, spread over processes, or has its blocks in files.
    """
    tree = store.open_run(run)
    rows = unresolved(tree)
    setup = _setup(model, windows, tree, rows, progress)
    with progress_bar(total=PASSES, unit="pass", shown=progress) as bar:
        while len(rows):
            state = _counted(setup, dataset_of(tree), rows, _state(tree, rows)).tensors()
            store.write_resolved(run, rows, {**state, "passes": _passes(tree, rows) + 1})
            tree = store.open_run(run)
            rows = unresolved(tree)
            bar.update()
    return tree


def unresolved(tree: xr.DataTree) -> Rows:
    """Return the rows of neurons whose bulk's distance has a bound above 0.02 for lack of bins.

    Those that have had as many passes as a bulk gets are left out.
    """
    rows = _in_few_bins(tree)
    return rows[_passes(tree, rows) < PASSES]


def unresolvable(tree: xr.DataTree) -> list[str]:
    """Return the neurons whose bulk no bins resolve, since it is one value, or nearly so."""
    rows = _in_few_bins(tree)
    names = dataset_of(tree)["neuron"].to_numpy()[rows[_passes(tree, rows) >= PASSES]]
    return [str(name) for name in names]


def _passes(tree: xr.DataTree, rows: Rows) -> Rows:
    """Return how many passes have resolved each of these rows."""
    found = np.zeros(dataset_of(tree).sizes["neuron"], np.int64)
    if "resolved" in tree.children:
        known = tree.children["resolved"]
        found[known["row"].to_numpy()] = known["passes"].to_numpy()
    return found[rows]


def _in_few_bins(tree: xr.DataTree) -> Rows:
    """Return the rows of neurons with a bound above 0.02 whose bulk is in less than a fourth of the bins."""
    data = dataset_of(tree)
    rows = np.flatnonzero(data["wasserstein_bulk_error"].to_numpy() > NAMED_ERROR)
    if not len(rows):
        return rows
    state = {name: tensor.numpy() for name, tensor in _state(tree, rows).tensors().items()}
    few: Rows = rows[ends_of_counts(state).bins < state["counts"].shape[1] / _FEW]
    return few


def _state(tree: xr.DataTree, rows: Rows) -> Histograms:
    """Return the state of these rows, the second one of those that have it."""
    first = tree.children["histogram"].to_dataset(inherit=False).isel(neuron=rows).load()
    return labelling.from_held(finer(first, tree, rows))


def _setup(
    model: PreTrainedModel,
    windows: TokenWindows,
    tree: xr.DataTree,
    rows: Rows,
    progress: bool | None,
) -> Setup:
    """Check that the run is of this model and these windows; return what runs the layers of rows.

    Raises:
        ValueError: it is not, or the model cannot be run at once.
    """
    if ranks.count() > 1 or is_offloaded(model):
        raise ValueError(
            "second histograms need the whole model in memory and one process: leave --offload and "
            "torchrun out"
        )
    data = dataset_of(tree)
    chosen = data["neuron"].to_numpy()[rows if len(rows) else [0]]  # to check model and windows too
    return setup_again(model, windows, run=tree, neurons=chosen.tolist(), progress=progress)


def _counted(setup: Setup, data: xr.Dataset, rows: Rows, first: Histograms) -> Histograms:
    """Return the histograms of these rows over the windows, with bins where ``first`` has the bulk."""
    state = {name: tensor.numpy() for name, tensor in first.tensors().items()}
    ends = ends_of_counts(state)
    center = torch.from_numpy((ends.least + ends.most) / 2)
    # A little wider, so that rounding of the center and of float32 outputs loses nothing
    reach = torch.from_numpy(ends.most - ends.least) / 2 * 1.01 + center.abs() * 2.0**-22
    second = Histograms.zeros(len(rows), bins=first.bins)
    second.place(center, reach / HALF_RANGE)
    far = _FARTHEST * second.width
    names, indices = data["layer"].to_numpy()[rows], data["index"].to_numpy()[rows]
    spans = {name: np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())}

    def on_rows(layer: Recordable, values: torch.Tensor, places: torch.Tensor | None) -> None:
        span = spans[layer.name]
        part = second[slice(int(span[0]), int(span[-1]) + 1)]
        values = values[:, torch.from_numpy(indices[span]).to(values.device)]
        values = (values if places is None else values.index_select(0, places)).double().cpu()
        low, high = part.center - far[span], part.center + far[span]
        part.add(values.maximum(low).minimum(high).float())

    layers = [layer for layer in setup.recorded if layer.name in spans]
    model, device = setup.model, input_device(setup.model)
    with (
        torch.inference_mode(),
        recording_rows(model, layers, on_rows, skip_first=setup.skip_first),
    ):
        for batch in setup.batches:
            backbone_of(model)(input_ids=batch.to(device), use_cache=False)
    return second
