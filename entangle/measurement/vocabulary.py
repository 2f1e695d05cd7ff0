"""Words: the tokens of the vocabulary that a neuron's weights read, and those that they write.

A row of a layer that reads the residual stream is multiplied by the tokens' input embeddings, and
what a neuron writes to the stream by their output embeddings. Which layers do so, and through which
norm, is found by trial (`model.stream`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import xarray as xr
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.model.fused import FusedMatrix
from entangle.model.layers import LinearLayer, dequantised, find_layers
from entangle.model.patterns import INPUT
from entangle.model.sides import LayerInputs, Recordable, find_channel, layer_of
from entangle.model.stream import Passage, Stream, find_stream
from entangle.model.text import token_name
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.runs import store
from entangle.runs.setup import Setup
from entangle.runs.words_file import FILE, read_words

SHOWN = 12  # tokens at either end
_NORMS = {"rms": "RMS norm", "layer": "layer norm"}
_AT_ONCE = 64  # directions that are multiplied by an embedding together
_CHUNK = 8192  # tokens of the vocabulary whose embeddings are in float32 at a time


@dataclasses.dataclass(frozen=True)
class Word:
    """A token of the vocabulary, and its product with a neuron's weights."""

    token: str
    id: int
    value: float
    deviation: float  # from the mean over the vocabulary, in std


@dataclasses.dataclass(frozen=True)
class Words:
    """The tokens with the largest and the smallest products with some weights."""

    side: str  # reads or writes
    neuron: str  # LAYER:INDEX, whose row it is, or LAYER:input:INDEX, whose column it is
    what: str  # the weights: row, column, or coordinate of the stream
    through: list[str]  # the norms whose weights are multiplied in
    mean: float  # over the vocabulary
    std: float
    top: list[Word]  # the largest first
    bottom: list[Word]  # the smallest first


@dataclasses.dataclass(frozen=True)
class NeuronWords:
    """What a neuron reads and writes, and why something else is missing."""

    neuron: str
    words: list[Words]
    missing: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class _Asked:
    """A direction in the stream, to be multiplied by the tokens' embeddings."""

    side: str
    neuron: str
    what: str
    through: list[str]
    direction: torch.Tensor  # (width,) float32, on the CPU


@with_torch_defaults
def words(
    model: PreTrainedModel,
    neurons: str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    run: xr.DataTree | xr.Dataset | None = None,
    out: str | Path | None = None,
) -> list[NeuronWords]:
    """Return which tokens of the vocabulary the weights of ``neurons`` read and write.

    A neuron LAYER:INDEX of a layer that reads the residual stream reads E · r: E (vocabulary,
    width) is the input embedding, and r its row times the weight of the norm before the layer;
    through a layer norm the mean of r is taken off. A layer that writes to the stream writes U · w:
    U is the output embedding, its rows times the weight of the final norm (through a layer norm
    without their means), and w is the column of LAYER:input:INDEX, or for LAYER:INDEX the
    coordinate INDEX of the stream, times the weight of a norm behind the layer, if there is one.
    Divisions by the size of a state are left out: they are the same for the whole vocabulary.

    A hidden unit is shown as a whole, whichever of its neurons is asked for: the rows of its gate
    and up projection, and its column of the down projection. Likewise a channel of attention: the
    row of its value, and its column of the output projection.

    With ``run``, its weights must be the model's. With ``out``, the run's folder, the words are
    added to its words.json.

    Raises:
        LookupError: the model has no such neuron.
        OSError: words.json is damaged.
        ValueError: a neuron neither reads the stream nor writes to it, so that its weights say nothing
            of words; its layer has several experts, or a quantised weight that torch cannot decode; the
            run was measured on other weights; or words.json has another form than this writes.
    """
    names = [*dict.fromkeys([neurons] if isinstance(neurons, str) else neurons)]
    layers = find_layers(model)
    places = {name: find_channel(layers, name) for name in names}
    if out is not None:
        read_words(Path(out))  # one of another form is refused before the work
    if run is not None:
        Setup.of(model, None, run=run)
    stream = find_stream(model, {one.block for one, _ in places.values()})
    embeddings, missing = _embeddings(model, stream)
    asked: list[_Asked] = []
    owners: list[str] = []
    lacking: dict[str, list[str]] = {}
    for name, place in places.items():
        found = list(_directions(stream, *place))
        lacking[name] = [
            reason for side, reason in missing.items() if any(x.side == side for x in found)
        ]
        usable = [one for one in found if one.side in embeddings]
        if not usable:
            layer = layer_of(place[0])
            own = _TRAINED if isinstance(layer.module, FusedMatrix) else _NEITHER
            reason = (lacking[name] or [own.format(place[0].name)])[0]
            raise ValueError(f"{name} has no words: {reason}")
        asked += usable
        owners += [name] * len(usable)
    lists = _multiplied(asked, embeddings, tokenizer)
    results = [
        NeuronWords(
            name, [one for one, of in zip(lists, owners, strict=True) if of == name], lacking[name]
        )
        for name in names
    ]
    if out is not None:
        kept = read_words(Path(out))  # another command may have added to it
        store.write_json(
            Path(out) / FILE, kept | {one.neuron: dataclasses.asdict(one) for one in results}
        )
    return results


_TRAINED = "{} is a matrix of a trained expert, and the words of these are not known yet"
_NEITHER = (
    "{} neither reads the residual stream nor writes to it, so no token can be multiplied by its "
    "weights. Name a neuron of a layer that does, such as the gate, up and down projection of an MLP"
)


def _embeddings(
    model: PreTrainedModel, stream: Stream
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the embedding (vocabulary, width) of each side, and why one cannot be used."""
    found, missing = {}, {}
    if stream.embedded:
        found["reads"] = model.get_input_embeddings().get_parameter("weight").detach()
    else:
        missing["reads"] = (
            "what it reads is no sum with the tokens' embeddings, since the model changes these by more "
            "than a scale before its first block"
        )
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight = None if head is None else dequantised(LinearLayer("", -1, "", head))
    if stream.output is not None and weight is not None:
        found["writes"] = weight
    else:
        missing["writes"] = (
            "what it writes cannot be multiplied by the output embedding, since more than a norm is "
            "between the last block and a plain output embedding"
        )
    return found, missing


def _directions(stream: Stream, one: Recordable, index: int) -> Iterator[_Asked]:
    """Yield what a neuron or an input channel reads, and what it writes; its own weights first."""
    layer = layer_of(one).name
    if isinstance(one, LayerInputs):
        if layer in stream.writes:  # the channel is a hidden unit
            yield from (_row(stream, *fed) for fed in stream.feeding(layer, index))
            yield _column(stream, layer, index)
        elif layer in stream.reads:
            yield _coordinate(stream, "reads", layer, index, stream.reads[layer])
        return
    if layer in stream.reads:
        unit = stream.fed_by(layer, index)
        rows = [] if unit is None else stream.feeding(*unit)
        yield from (_row(stream, *fed) for fed in dict.fromkeys([(layer, index), *rows]))
        if unit is not None:
            yield _column(stream, *unit)
    if layer in stream.writes:
        yield _coordinate(stream, "writes", layer, index, stream.writes[layer])


def _row(stream: Stream, layer: str, index: int) -> _Asked:
    passage = stream.reads[layer]
    row = _weight(stream, layer)[index].float().cpu()
    through = [f"the {_NORMS[passage.norm]} before it"] if passage.norm else []
    return _Asked("reads", f"{layer}:{index}", "row", through, passage.read(row))


def _column(stream: Stream, layer: str, index: int) -> _Asked:
    passage = stream.writes[layer]
    column = passage.written(_weight(stream, layer)[:, index].float().cpu())
    through = _behind(stream, passage)
    return _Asked("writes", f"{layer}{INPUT}:{index}", "column", through, _final(stream, column))


def _coordinate(stream: Stream, side: str, layer: str, index: int, passage: Passage) -> _Asked:
    """Return the direction of one number of the stream, which a weight of one layer alone says."""
    unit = nn.functional.one_hot(torch.tensor(index), len(passage.gain)).float()
    if side == "reads":
        through = [f"the {_NORMS[passage.norm]} before it"] if passage.norm else []
        return _Asked(side, f"{layer}{INPUT}:{index}", "coordinate", through, passage.read(unit))
    through, direction = _behind(stream, passage), _final(stream, passage.written(unit))
    return _Asked(side, f"{layer}:{index}", "coordinate", through, direction)


def _behind(stream: Stream, passage: Passage) -> list[str]:
    """Return the norms between a layer and the output embedding."""
    after = [f"the {_NORMS[passage.norm]} behind it"] if passage.norm else []
    final = stream.output.norm if stream.output is not None else ""
    return [*after, *([f"the final {_NORMS[final]}"] if final else [])]


def _final(stream: Stream, direction: torch.Tensor) -> torch.Tensor:
    """Return what the output embedding multiplies of a direction in the stream.

    The final norm is applied to the direction, which is the same as its weight in the rows of U.
    """
    passage = stream.output
    return direction if passage is None else passage.written(direction)


def _weight(stream: Stream, layer: str) -> torch.Tensor:
    """Return a layer's weight (neurons, inputs).

    Raises:
        ValueError: it has several, or torch cannot decode it.
    """
    weight = dequantised(stream.layers[layer])
    if weight is None:
        raise ValueError(
            f"the weight of {layer} is quantised in a way that torch cannot decode: take the model that "
            "is not quantised"
        )
    if weight.ndim > 2 and len(weight) > 1:
        raise ValueError(
            f"{layer} has {len(weight)} experts, and each has weights of its own: take the model that "
            "was expanded"
        )
    return weight[0] if weight.ndim > 2 else weight


def _multiplied(
    asked: Sequence[_Asked],
    embeddings: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Words]:
    """Return the words of each direction: its products with all embeddings of its side."""
    found: dict[int, Words] = {}
    for side, embedding in embeddings.items():
        places = [place for place, one in enumerate(asked) if one.side == side]
        for first in range(0, len(places), _AT_ONCE):
            part = places[first : first + _AT_ONCE]
            matrix = torch.stack([asked[place].direction for place in part]).to(embedding.device)
            chunks = embedding[: len(tokenizer)].split(_CHUNK)
            values = torch.cat([(matrix @ rows.float().T).cpu() for rows in chunks], dim=1)
            for place, row in zip(part, values, strict=True):
                found[place] = _described(asked[place], row, tokenizer)
    return [found[place] for place in range(len(asked))]


def _described(asked: _Asked, values: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> Words:
    """Return the tokens with the largest and smallest of these values (vocabulary,)."""
    mean, std = float(values.double().mean()), float(values.double().std(correction=0))

    def named(largest: bool) -> list[Word]:
        found = values.topk(min(SHOWN, len(values)), largest=largest)
        return [
            Word(token_name(tokenizer, token), token, value, (value - mean) / std if std else 0.0)
            for value, token in zip(found.values.tolist(), found.indices.tolist(), strict=True)
        ]

    return Words(
        asked.side, asked.neuron, asked.what, asked.through, mean, std, named(True), named(False)
    )
