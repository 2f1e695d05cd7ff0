"""Record the distributions of a model's neurons while it runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.model.hooks import Listener, listening
from entangle.model.layers import LinearLayer, find_layers, weight_of
from entangle.numerics.histograms import Histograms
from entangle.runs import labelling


class Recorder:
    """The histograms of some layers' neurons, filled while their model runs.

    The first batch places their bins. It counts, unless it is another process's to count.
    """

    def __init__(
        self, layers: Sequence[LinearLayer], bins: int, *, first_counts: bool = True
    ) -> None:
        self.layers = list(layers)
        self.first_counts = first_counts
        self.listener: Listener | None = None
        sizes = [layer.neurons for layer in layers]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        # All on the host, where pages cost memory once they are written to; a layer on the
        # host adds to its slice directly, one on a device to its own and is copied at the end.
        self._all = Histograms.zeros(sum(sizes), bins=bins)
        self._slices = {
            layer.name: slice(end - size, end)
            for layer, size, end in zip(layers, sizes, ends, strict=True)
        }
        self._histograms: dict[str, Histograms] = {}

    def add(self, layer: LinearLayer, rows: torch.Tensor) -> None:
        """Add a batch's counted rows (tokens, neurons) of a layer; its first is the pilot."""
        histograms = self._histograms.get(layer.name)
        if histograms is None:
            if rows.device.type == "cpu":
                histograms = self._all[self._slices[layer.name]]
            else:
                histograms = Histograms.zeros(
                    layer.neurons, bins=self._all.bins, device=rows.device
                )
            histograms.start(rows)
            self._histograms[layer.name] = histograms
            if not self.first_counts:
                return
        histograms.add(rows)

    def tree(self) -> xr.DataTree:
        """Return what is recorded so far: the dataset, and as its child the mergeable state.

        Raises:
            RuntimeError: the model has not run, a layer did not run in each batch, or the last
                forward pass did not come to its end.
        """
        if self.listener is None or self.listener.batches == 0:
            raise RuntimeError("nothing is recorded: call the model inside the with block")
        self.listener.check()
        counted = {"tokens": self.listener.tokens, "bins": self._all.bins}
        return labelling.to_tree(self.state(), self.layers, counted)

    def state(self) -> Histograms:
        """Return the histograms of all layers, one after the other, on the host: no copy of those."""
        for name, histograms in self._histograms.items():
            if histograms.count.device.type != "cpu":
                self._all[self._slices[name]].copy_(histograms)
        return self._all

    def restore(self, state: Histograms) -> None:
        """Go on from what `state` returned, each layer's on its device."""
        self._all.copy_(state)
        for layer in self.layers:
            part, device = self._all[self._slices[layer.name]], weight_of(layer).device
            self._histograms[layer.name] = part if device.type == "cpu" else part.to(device)

    def dataset(self) -> xr.Dataset:
        """Return the dataset alone: one row per neuron."""
        return self.tree().to_dataset()


@contextmanager
def record(
    model: PreTrainedModel,
    layers: str | Sequence[str] = ("*",),
    *,
    bins: int = 1024,
    skip_first: int = 0,
) -> Iterator[Recorder]:
    """Record the layers that match any pattern or name while ``model`` runs in the with block.

    The first batch is the pilot that places the histograms' bins: make it a typical one. Padding
    is left out by the ``attention_mask`` that the model is called with, and so are the first
    ``skip_first`` tokens of each window.

    Raises:
        LookupError: a pattern matches no layer.
        RuntimeError: at the end, a layer did not run once in each batch.
        ValueError: a compiled model, or ``bins`` or ``skip_first`` out of range.
    """
    recorder = Recorder(find_layers(model, layers), bins)
    with listening(model, recorder.layers, recorder.add, skip_first=skip_first) as listener:
        recorder.listener = listener
        yield recorder
