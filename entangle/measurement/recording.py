"""Recording of the distributions of neurons, and of input channels, while the model runs."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.model.hooks import BatchCounter, check_hooks, recording_rows, unheard_layers
from entangle.model.layers import device_of
from entangle.model.patterns import INPUT, as_list
from entangle.model.sides import (
    Recordable,
    find_both,
    in_order,
    layer_of,
    stack_of,
    without_skipped,
)
from entangle.numerics.histograms import Histograms
from entangle.runs import labelling

# Fewer tokens in the pilot than this do not place a trained expert's bins alone.
FEW = 32


class Recorder:
    """The histograms of some layers' neurons or input channels, filled while the model runs.

    The first batch is the pilot: it places the bins. It is also counted if ``first_counts``; with
    several processes, only one of them counts it.
    """

    def __init__(
        self,
        layers: Sequence[Recordable],
        bins: int,
        *,
        first_counts: bool = True,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self.layers = list(layers)
        self.skipped = dict(skipped or {})  # why other layers are not recorded, by name
        self.first_counts = first_counts
        self.counter: BatchCounter | None = None
        sizes = [layer.neurons for layer in layers]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        # One allocation on the host, whose pages use memory only once they are written to. Layers
        # on the host add to their slice directly. Layers on a device have histograms there, which
        # `state` copies into the slice.
        self._all = Histograms.zeros(sum(sizes), bins=bins)
        self._slices = {
            layer.name: slice(end - size, end)
            for layer, size, end in zip(layers, sizes, ends, strict=True)
        }
        self._histograms: dict[str, Histograms] = {}
        # Trained experts with few tokens in the pilot, and their rows in it.
        self._few: dict[str, tuple[Recordable, torch.Tensor]] = {}

    def add(
        self, layer: Recordable, rows: torch.Tensor, places: torch.Tensor | None = None
    ) -> None:
        """Add a layer's outputs or inputs (tokens, neurons) of a batch; its first is the pilot.

        ``places`` are the indices of the rows that count; None counts all.
        """
        if self._few and (layer.name in self._few or layer.name in self._histograms):
            self._place_few()  # the pilot is over
        if layer.name in self._histograms:
            self._histograms[layer.name].add(rows, places)
            return
        count = len(rows if places is None else places)
        if count < FEW and stack_of(layer) is not None:
            self._few[layer.name] = layer, rows.clone() if places is None else rows[places]
            return
        self._begin(layer, rows, places)

    def _begin(
        self,
        layer: Recordable,
        rows: torch.Tensor,
        places: torch.Tensor | None,
        others: tuple[int, float] | None = None,
    ) -> None:
        """Place a layer's bins by its rows in the pilot, and count these if the pilot counts."""
        if rows.device.type == "cpu":
            histograms = self._all[self._slices[layer.name]]
        else:
            histograms = Histograms.zeros(layer.neurons, bins=self._all.bins, device=rows.device)
        histograms.start(rows, places, others=others)
        self._histograms[layer.name] = histograms
        if self.first_counts:
            histograms.add(rows, places)

    def _place_few(self) -> None:
        """Place the bins of trained experts that had few tokens in the pilot, by the other experts'."""
        spreads: dict[object, list[float]] = {}
        for layer in self.layers:
            if layer.name in self._histograms:
                scale = self._histograms[layer.name].scale.median()
                spreads.setdefault(stack_of(layer), []).append(float(scale))
        few, self._few = self._few, {}
        for layer, rows in few.values():
            known = spreads.get(stack_of(layer)) or [_spread(few.values(), stack_of(layer))]
            self._begin(layer, rows, None, (FEW, statistics.median(known)))

    def tree(self) -> xr.DataTree:
        """Return the run so far: the root is the dataset, the child ``histogram`` the state.

        Raises:
            RuntimeError: the model has not run, a layer did not run once in each batch, or the last
                forward pass did not finish.
        """
        if self.counter is None or self.counter.batches == 0:
            raise RuntimeError("nothing was recorded: call the model inside the with block")
        self.counter.check()
        counted: dict[str, Any] = {"tokens": self.counter.tokens, "bins": self._all.bins}
        counted |= {"skipped_layers": self.skipped} if self.skipped else {}
        return labelling.to_tree(self.state(), self.layers, counted)

    def state(self) -> Histograms:
        """Return the histograms of all layers, in order, on the host; it is not a copy."""
        self._place_few()
        for name, histograms in self._histograms.items():
            if histograms.count.device.type != "cpu":
                self._all[self._slices[name]].copy_(histograms)
        return self._all

    def restore(self, state: Histograms) -> None:
        """Continue from a state that `state` returned; each layer's part goes to its device."""
        self._all.copy_(state)
        for layer in self.layers:
            part, device = self._all[self._slices[layer.name]], device_of(layer_of(layer))
            self._histograms[layer.name] = part if device.type == "cpu" else part.to(device)

    def dataset(self) -> xr.Dataset:
        """Return the dataset without the histograms: a row per neuron and per input channel."""
        return self.tree().to_dataset()


def _spread(few: Iterable[tuple[Recordable, torch.Tensor]], stack: object) -> float:
    """Return the median std of the rows of experts that all had few tokens; 0 if that is unknown."""
    rows = [rows.double() for layer, rows in few if stack_of(layer) == stack and len(rows) > 1]
    found = [float(one.std(dim=0, correction=0).median()) for one in rows]
    return statistics.median(found) if found else 0.0


@contextmanager
def record(
    model: PreTrainedModel,
    layers: str | Sequence[str] = ("*",),
    *,
    input_layers: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    bins: int = 1024,
    skip_first: int = 0,
) -> Iterator[Recorder]:
    """Record the layers that match any pattern or name while ``model`` runs in the with block.

    Of layers that match ``input_layers`` the inputs are recorded too, beside the outputs of ``layers``
    (see `measure`). Layers that match a pattern in ``exclude`` are left out, and so are those that
    cannot be heard (see `unheard_layers`): the model runs once on 16 tokens to find them. It is an
    error if a pattern is the exact name of one of them.
    The first batch is the pilot that places the histograms' bins, so it should be a typical one.
    Tokens that the model's ``attention_mask`` marks as padding are not counted, nor are the first
    ``skip_first`` tokens of each window.

    Raises:
        LookupError: a pattern matches no layer, or all layers are excluded.
        RuntimeError: at the end of the block, a layer had not run once in each batch.
        ValueError: the model is compiled, ``bins`` or ``skip_first`` is out of range, or a layer
            that a pattern names cannot be heard, or none can.
    """
    check_hooks(model, skip_first)
    matched, inputs = find_both(model, layers, input_layers, exclude)
    skipped = unheard_layers(model, in_order(matched, inputs), _some_tokens(model))
    recorded = in_order(
        without_skipped(matched, skipped, as_list(layers)),
        without_skipped(inputs, skipped, [name + INPUT for name in as_list(input_layers)]),
    )
    recorder = Recorder(recorded, bins, skipped=skipped)
    with recording_rows(model, recorder.layers, recorder.add, skip_first=skip_first) as counter:
        recorder.counter = counter
        yield recorder


def _some_tokens(model: PreTrainedModel) -> torch.Tensor:
    """Return 16 tokens (1, 16) from the middle of the vocabulary, far from special ones."""
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return (torch.arange(16) + size // 2)[None] % size
