"""Which layers read the residual stream, which write to it, and through what: found by trial.

The stream is what a block receives and adds outputs of its layers to. Names and classes of layers
and norms differ between architectures, so all layers of all blocks are silenced (their outputs are
zero), and one thing is let through. Then a layer that reads the stream has inputs that follow from
the states that its block received, by a scale or a norm. The outputs of a layer that writes to the
stream leave the block, also by a scale or a norm. Each state is a window of one token, so no token
sees another.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from transformers import PreTrainedModel

from entangle.model.layers import LinearLayer, find_layers
from entangle.model.placing import check_in_memory
from entangle.model.sides import by_block
from entangle.model.silence import Heard, SilencedModel

_STATES = 8  # the first two are opposite signs, and tell the gain; the others tell whether it fits
_SIZE = 30.0  # of the states: the epsilon of a norm is nothing beside its square
_BITS = 17  # binary digits that number a layer's neurons
_MISFIT = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative; of others that of bfloat16
_MISFIT_16 = 0.03
NORMS = {"": "nothing", "rms": "an RMS norm", "layer": "a layer norm"}


@dataclasses.dataclass(frozen=True, eq=False)
class Passage:
    """The way between the stream and a layer: a gain for each number, and perhaps a norm."""

    norm: str  # a key of NORMS
    gain: torch.Tensor  # (width,) float32, on the CPU: the norm's weight, or a scale

    @classmethod
    def of(cls, states: torch.Tensor, found: torch.Tensor, misfit: float) -> Self | None:
        """Return the passage that makes these values of these states, or None.

        Both are (states, width). ``found`` is gain · n(states) + bias, where n divides a state by its
        root mean square, or standardises it, or does nothing.
        """
        if found.shape != states.shape or not found.isfinite().all():
            return None
        found = found.double()
        bias = (found[0] + found[1]) / 2
        for norm in NORMS:
            normed = _normed(states.double(), norm)
            gain = (found[0] - found[1]) / (2 * normed[0])
            wrong = (found - bias - gain * normed).norm() / (found - bias).norm()
            if wrong < misfit:  # not so if all values are zero
                return cls(norm, gain.float())
        return None

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the directions (rows, width) in the stream that weights (rows, width) multiply.

        A norm also divides by the size of the whole state, which is left out here.
        """
        rows = rows * self.gain
        return rows - rows.mean(dim=-1, keepdim=True) if self.norm == "layer" else rows

    def written(self, columns: torch.Tensor) -> torch.Tensor:
        """Return the directions (columns, width) in the stream that outputs (columns, width) have.

        A norm also divides by the size of all outputs, which is left out here.
        """
        if self.norm == "layer":
            columns = columns - columns.mean(dim=-1, keepdim=True)
        return columns * self.gain


def _normed(states: torch.Tensor, norm: str) -> torch.Tensor:
    if norm == "layer":
        states = states - states.mean(dim=1, keepdim=True)
    return states / states.square().mean(dim=1, keepdim=True).sqrt() if norm else states


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """What `find_stream` found out about a model."""

    layers: Mapping[str, LinearLayer]  # all of the blocks, by name
    reads: Mapping[str, Passage]  # by the name of each layer that reads the stream
    writes: Mapping[str, Passage]  # by the name of each layer that writes to it
    output: Passage | None  # from behind the last block to the output embedding
    embedded: bool  # before the first block the stream is the tokens' embeddings, but for a scale
    # For each layer that writes: layers that read, and which neuron of these alone makes each of its
    # input channels (channels,); -1 if none does, or several.
    units: Mapping[str, Sequence[tuple[str, torch.Tensor]]]

    def feeding(self, layer: str, channel: int) -> list[tuple[str, int]]:
        """Return the neurons (layer, index) that read the stream and make this input channel."""
        rows = [(name, int(made[channel])) for name, made in self.units.get(layer, ())]
        return [(name, index) for name, index in rows if index >= 0]

    def fed_by(self, layer: str, neuron: int) -> tuple[str, int] | None:
        """Return the one input channel (layer, index) that this neuron makes; None for several."""
        found = [
            (name, channel)
            for name, parts in self.units.items()
            for other, made in parts
            if other == layer
            for channel in (made == neuron).nonzero().flatten().tolist()
        ]
        return found[0] if len(found) == 1 else None


def find_stream(model: PreTrainedModel, blocks: Collection[int] | None = None) -> Stream:
    """Try out which layers read the residual stream of a model and write to it.

    Only the layers of some blocks are tried, or those of all. The model runs some tens of times on
    single tokens, without products of weights. No recording counts these runs.

    Raises:
        ValueError: the model has no list of blocks or is compiled, its weights are in files, or its
            blocks are not called with one hidden state for each token, or fail in a trial.
    """
    check_in_memory(model, "to find what a layer reads and writes")
    layers = [one for one in find_layers(model) if blocks is None or one.block in blocks]
    with _refused_in_words():
        return _tried(model, layers)


@contextmanager
def _refused_in_words() -> Iterator[None]:
    """Let a trial that fails say what it means, whatever the model's code raised.

    An error that says it already, or is of the memory, a device or a file, stays as it is.

    Raises:
        ValueError: the body raised another error.
    """
    told = (ValueError, OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
    try:
        yield
    except Exception as error:
        if isinstance(error, told):
            raise
        raise ValueError(
            "it cannot be found out what the layers of this model read and write, since a trial of its "
            f"blocks fails ({type(error).__name__}: {error}): neurons of this model have no words"
        ) from error


def _tried(model: PreTrainedModel, layers: Sequence[LinearLayer]) -> Stream:
    """Try these layers out."""
    trial, misfit = SilencedModel.of(model, layers), _MISFIT.get(model.dtype, _MISFIT_16)
    states = _states(trial.width)
    heard = trial.run(states, {})
    found = {name: Passage.of(states, inputs, misfit) for name, inputs in heard.inputs.items()}
    reads = {name: passage for name, passage in found.items() if passage is not None}
    output = reads.pop("", None)  # the output embedding
    writes = {}
    for turn in _in_turn([one for one in layers if one.neurons == trial.width]):
        after = trial.run(torch.zeros_like(states), {one.name: states for one in turn}).blocks
        for one in turn:
            passage = Passage.of(states, after[one.block], misfit)
            if passage is not None:
                writes[one.name] = passage
    embedded = _are_embeddings(model, heard, misfit)
    units = _units(trial, reads, writes)
    return Stream({one.name: one for one in layers}, reads, writes, output, embedded, units)


def _states(width: int) -> torch.Tensor:
    """Return states (states, width) whose images tell every kind of passage from the others."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.ones(width)
    signs[torch.randperm(width, generator=generator)[: width // 2]] = -1
    others = torch.randn(_STATES - 2, width, generator=generator)
    sizes = torch.arange(1, _STATES - 1)[:, None] / 2  # of other sizes and means, as norms see them
    # 16 bits hold the states exactly.
    return (_SIZE * torch.stack([signs, -signs, *(sizes * (others + 0.5))])).bfloat16().float()


def _in_turn(layers: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    """Return the layers in groups that have at most one of each block."""
    blocks = by_block(layers)
    most = max(map(len, blocks.values()), default=0)
    return [[own[turn] for own in blocks.values() if turn < len(own)] for turn in range(most)]


def _are_embeddings(model: PreTrainedModel, heard: Heard, misfit: float) -> bool:
    """Return whether differences of states before the first block are those of embeddings, scaled.

    What is added at each position is the same for all these tokens.
    """
    weight = model.get_input_embeddings().get_parameter("weight").detach()
    rows = weight[heard.tokens.to(weight.device)].cpu().double()
    if rows.shape != heard.embedded.shape:
        return False
    rows, states = rows[1:] - rows[0], heard.embedded[1:].double() - heard.embedded[0].double()
    scale = (rows * states).sum() / rows.square().sum()
    return bool((states - scale * rows).norm() < misfit * states.norm())


def _units(
    trial: SilencedModel, reads: Collection[str], writes: Collection[str]
) -> dict[str, list[tuple[str, torch.Tensor]]]:
    """Find which neuron of a layer that reads alone makes each input channel of a layer that writes.

    All layers but those that write say something. Then those neurons of a layer say something else
    whose number has a binary digit that is 1, or 0; each digit and value is a state of its own. A
    channel that one neuron makes changes with the digits of this neuron's number. A layer's halves
    take turns, since one layer may hold both the gate and the up projection.
    """
    silent, generator = torch.zeros(2 * _BITS, trial.width), torch.Generator().manual_seed(0)
    said = {
        one.name: (torch.rand(one.neurons, generator=generator) + 0.5).expand(len(silent), -1)
        for one in trial.layers
        if one.name not in writes
    }
    before = trial.run(silent, said).inputs
    found: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for turn in _in_turn([one for one in trial.layers if one.name in reads]):
        of_block = {one.block: one.name for one in turn}
        for half in (0, 1):
            changed = {one.name: said[one.name] + _digits(one.neurons, half) for one in turn}
            after = trial.run(silent, said | changed).inputs
            for target in trial.layers:
                if target.name in writes and target.block in of_block and target.name in after:
                    made = _numbers(before[target.name] != after[target.name])
                    if (made >= 0).any():
                        found.setdefault(target.name, []).append((of_block[target.block], made))
    return found


def _digits(neurons: int, half: int) -> torch.Tensor:
    """Return each digit's 1 and, below, its 0 (2 · digits, neurons), of one half of the numbers."""
    numbers = torch.arange(neurons)
    digits = (numbers >> torch.arange(_BITS)[:, None]) & 1
    return torch.cat([digits, 1 - digits]) * ((numbers >= neurons // 2) == bool(half))


def _numbers(moved: torch.Tensor) -> torch.Tensor:
    """Return the number (channels,) that the digits which moved spell, or -1.

    ``moved`` (2 · digits, channels) has each digit's 1 and, below, its 0.
    """
    ones, zeros = moved.chunk(2)
    spelled = (ones.long() << torch.arange(_BITS)[:, None]).sum(dim=0)
    return torch.where((ones != zeros).all(dim=0), spelled, -1)
