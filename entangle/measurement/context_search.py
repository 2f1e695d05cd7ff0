"""Contexts: the tokens at the ends, at the modes and at quantiles of a neuron's distribution.

They are found in a second pass over the windows that the run was measured on. Only the outputs of
the requested neurons are kept, and for a limited number of neurons at a time, to bound memory.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.measurement.explainers import Examples, check_examples
from entangle.measurement.rerunning import neuron_outputs, setup_again
from entangle.measurement.sign_cases import HiddenUnit, hidden_unit, units_of
from entangle.measurement.token_kinds import (
    CountedTokens,
    LeftOut,
    distances_without,
    frequent_tokens,
)
from entangle.measurement.window_choice import choose_windows
from entangle.model.gating import find_gated
from entangle.model.pieces import pieces_of
from entangle.model.progress import progress_bar
from entangle.model.text import TokenWindows
from entangle.numerics.contributions import bootstrap, distance_parts
from entangle.numerics.levels import Levels
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.runs.contexts_file import add_contexts, packed, read_contexts
from entangle.runs.dataset import check_neuron, dataset_of

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]

ENDS = 8  # tokens shown at either end
NEAR = 4  # tokens shown at a mode
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
DRAWS = 200  # of whole windows, in the bootstrap
VALUES = 2**27  # outputs in memory at a time
BEFORE, AFTER = 24, 8  # tokens of text before and after the token


@dataclasses.dataclass(frozen=True)
class Context:
    """A token in its text, and the neuron's output for it."""

    why: str  # lowest, highest, mode at X, quantile Q
    window: int  # index
    position: int  # in the window
    before: str
    token: str
    after: str
    output: float  # of the neuron at this token
    deviation: float  # from the mean, in std
    share: float  # of the distance, from 0 to 1


@dataclasses.dataclass(frozen=True)
class WindowLevels:
    """A whole window, and the neuron's values in it, as levels of its scale."""

    why: str  # it was chosen: highest, lowest, mode at X, quantile Q
    window: int  # index
    position: int  # of the token that it was chosen for
    levels: str  # of each counted token: signed bytes in base64 (see `numerics.levels`)


@dataclasses.dataclass(frozen=True)
class NeuronContexts:
    """The contexts of one neuron, and the shares that tokens have of its distance."""

    neuron: str  # LAYER:INDEX
    tokens: int
    wasserstein: float  # exact, computed from the outputs, in std
    low: float  # lower end of its 95% bootstrap interval, in std; NaN if one window has all its tokens
    high: float  # upper end
    modes: list[float]  # in output units
    contexts: list[Context]
    positions: list[float]  # each window position's share of the distance
    frequent: list[dict[str, Any]]  # token, count, share of the distance, mean output
    without: list[LeftOut]  # the farthest tokens, one position, one token: `distances_without`
    scale: Levels  # of the values in the windows
    windows: list[WindowLevels]  # at most 8
    unit: HiddenUnit | None  # of a gated MLP, that the neuron is a part of


@with_torch_defaults
def contexts(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset,
    neurons: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path | None = None,
    delphi: str | Path | None = None,
    progress: bool | None = None,
) -> list[NeuronContexts]:
    """Find the contexts of ``neurons``, written LAYER:INDEX; return them in this order.

    An input channel, LAYER:input:INDEX, has contexts like a neuron; its ``output`` is its value.
    A neuron of a gated MLP's gate or up layer, and an input channel that is their product, also have
    the four sign cases of their hidden unit (`NeuronContexts.unit`).

    ``windows`` must be those that ``run`` was measured on. A token's share of the distance is the
    integral over its own quantile bin (see `distance_parts`). The interval is a basic bootstrap
    interval from 200 draws of whole windows, without the draws in which a trained expert has no
    token; it is NaN if one window has all of the neuron's tokens. Noise only adds to a
    distance, so the interval may lie below it. A few massive outputs raise the std and so squeeze
    all other standardised outputs, which then carry the shares: compare the distance without them
    (`NeuronContexts.without`). With ``out``, the run's folder, the contexts are added to its
    contexts.json. With ``delphi``, a new folder, the ends of the neurons' distributions are written
    there in the form that this explainer reads (`measurement.explainers`).

    Raises:
        FileExistsError: the folder ``delphi`` has files.
        LookupError: the run has no such neuron.
        OSError: the run's contexts.json is damaged.
        ValueError: the windows cannot be cut into delphi's examples; the run was measured on other
            weights or other windows, a neuron has no distance, the model is in training mode, or
            the run's contexts.json has another form than this writes.
    """
    neurons = [neurons] if isinstance(neurons, str) else neurons
    data = dataset_of(run)
    names = list(dict.fromkeys(neurons))
    _check_distances(data, names)
    blocks = {int(data["block"].sel(neuron=name)) for name in names}
    parts_of = units_of(find_gated(model, blocks))
    heard = [*names, *(part for name in names for part in parts_of(name).values())]
    setup = setup_again(model, windows, run=run, neurons=heard, progress=progress)
    if out is not None:
        read_contexts(Path(out))  # before the long computation: a file of another form is refused
    examples = Examples(windows, setup.skip_first)
    if delphi is not None:
        check_examples(delphi, windows)
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    found = []
    counted = CountedTokens.of(windows.tokens[:, setup.skip_first :].numpy())
    columns = 3 if any(map(parts_of, names)) else 1  # of a hidden unit also its other parts
    size = max(1, VALUES // (columns * setup.tokens))
    groups = [names[first : first + size] for first in range(0, len(names), size)]
    bar = progress_bar(groups, unit="pass", shown=progress)
    for group in bar:
        units = [parts_of(name) for name in group]
        wanted = list(dict.fromkeys([*group, *(part for one in units for part in one.values())]))
        held = neuron_outputs(setup, wanted, setup.batches)
        column = {name: held[:, place] for place, name in enumerate(wanted)}
        if delphi is not None:
            for name, values in zip(group, held.T, strict=False):  # parts of hidden units follow
                examples.add(name, values)
        described = {}
        for rows, places in _alike(held[:, : len(group)]):
            own = counted.only(rows)
            outputs = held[rows][:, places]  # (tokens, neurons)
            parts = distance_parts(outputs)
            in_windows = own.rows // own.length
            draws = bootstrap(outputs, in_windows, len(windows), draws=DRAWS, seed=windows.seed)
            for at, place in enumerate(places):
                described[place] = _describe(
                    group[place],
                    held[:, place],
                    parts[:, at],
                    draws[:, at],
                    windows,
                    own,
                    tokenizer,
                    {part: column[neuron][rows] for part, neuron in units[place].items()},
                    units[place],
                )
        found += [described[place] for place in range(len(group))]
    if out is not None:
        shown = sorted({one.window for neuron in found for one in neuron.windows})
        texts = {one: pieces_of(windows.tokens[one].tolist(), decode) for one in shown}
        add_contexts(Path(out), {one.neuron: dataclasses.asdict(one) for one in found}, texts)
    if delphi is not None:
        examples.write(delphi, str(data.attrs["model"]))
    return found


def _check_distances(data: xr.Dataset, names: Sequence[str]) -> None:
    """Check that neurons have a distance.

    Raises:
        LookupError: the run has no such neuron.
        ValueError: one has none.
    """
    for name in names:
        check_neuron(data, name)
        if np.isfinite(float(data["wasserstein"].sel(neuron=name))):
            continue
        if not int(data["count"].sel(neuron=name)):
            raise ValueError(
                f"no token was sent to the expert of {name}, so it has no distance: choose a neuron of "
                "another expert"
            )
        raise ValueError(
            f"{name} is dead or not finite, so it has no distance: choose another neuron"
        )


def _alike(outputs: Floats) -> Iterator[tuple[npt.NDArray[np.int64], list[int]]]:
    """Yield the tokens at which neurons have outputs (tokens, neurons), and which neurons these are."""
    groups: dict[bytes, list[int]] = {}
    here = ~np.isnan(outputs.T)
    for place, mask in enumerate(here):
        groups.setdefault(np.packbits(mask).tobytes(), []).append(place)
    for places in groups.values():
        yield np.flatnonzero(here[places[0]]), places


def _describe(
    name: str,
    values: Floats,
    parts: Array,
    draws: Array,
    windows: TokenWindows,
    counted: CountedTokens,
    tokenizer: PreTrainedTokenizerBase,
    unit: Mapping[str, Floats],
    unit_names: Mapping[str, str],
) -> NeuronContexts:
    """Return the contexts of a neuron.

    ``values`` are its outputs at all counted tokens, NaN where it has none. ``counted`` are the tokens
    at which it has, ``parts`` their parts of the distance (tokens,), and ``draws`` the bootstrap's
    distances. ``unit`` has the values (tokens,) of its hidden unit's parts, if any.
    """
    outputs = values[counted.rows]
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    distance = float(parts.sum())
    mean, std = float(outputs.mean(dtype=np.float64)), float(outputs.std(dtype=np.float64))
    low = high = math.nan
    if len(np.unique(counted.rows // counted.length)) > 1:
        low, high = (2 * distance - np.nanquantile(draws, [0.975, 0.025])).tolist()
    length = counted.length
    skip_first = windows.length - length
    shares = parts / distance
    text = windows.tokens.numpy()

    def text_of(row: int) -> dict[str, Any]:
        window, position = divmod(int(counted.rows[row]), length)
        position += skip_first
        texts = _texts(text[window].tolist(), position, decode)
        place = {"window": window, "position": position}
        return place | dict(zip(("before", "token", "after"), texts, strict=True))

    def context(why: str, row: int) -> Context:
        return Context(
            why=why,
            **text_of(row),
            output=float(outputs[row]),
            deviation=(float(outputs[row]) - mean) / std,
            share=float(shares[row]),
        )

    modes = _modes(outputs, mean, std)
    contexts = [context(why, row) for why, row in _chosen(outputs, modes)]
    scale, by_window = Levels.of(outputs), values.reshape(-1, length)
    levels = scale.levels(by_window)
    return NeuronContexts(
        neuron=name,
        tokens=len(outputs),
        wasserstein=distance,
        low=low if math.isnan(low) else max(low, 0.0),
        high=high,
        modes=modes,
        contexts=contexts,
        positions=np.bincount(counted.position, weights=shares, minlength=length).tolist(),
        frequent=frequent_tokens(counted, outputs, shares, tokenizer),
        without=distances_without(counted, outputs, skip_first, tokenizer),
        scale=scale,
        windows=[
            WindowLevels(why, window, position + skip_first, packed(levels[window]))
            for why, window, position in choose_windows(by_window, modes)
        ],
        unit=hidden_unit(unit_names, unit, text_of) if unit else None,
    )


def _texts(line: list[int], position: int, decode: Any) -> tuple[str, str, str]:
    """Return the text before a token, the token's own text and the text after it.

    All three are cut from one decoded text, since a token decoded alone may be part of a character
    or lose its space. If the decoded text is not a prefix of the longer one, as when it ends inside
    a character, each part is decoded alone.
    """
    first, last = max(position - BEFORE, 0), position + 1 + AFTER
    parts = line[first:position], line[position : position + 1], line[position + 1 : last]
    before, both, whole = (decode(line[first:end]) for end in (position, position + 1, last))
    if both.startswith(before) and whole.startswith(both):
        return before, both[len(before) :], whole[len(both) :]
    before, token, after = map(decode, parts)
    return before, token, after


def _chosen(outputs: Floats, modes: Sequence[float]) -> Iterator[tuple[str, int]]:
    """Yield the tokens to show: the reason and the row of each."""
    order = np.argsort(outputs, kind="stable")
    count = min(ENDS, len(order))
    yield from (("lowest", int(row)) for row in order[:count])
    yield from (("highest", int(row)) for row in order[: -count - 1 : -1])
    for mode in modes:
        near = np.argsort(np.abs(outputs - mode), kind="stable")[:NEAR]
        yield from ((f"mode at {mode:.3g}", int(row)) for row in near)
    for quantile in QUANTILES:
        yield f"quantile {quantile:g}", int(order[round(quantile * (len(order) - 1))])


def _modes(outputs: Floats, mean: float, std: float) -> list[float]:
    """Return the modes, in output units: the peaks that `Histograms.modes` counts."""
    edges = mean + std * np.linspace(-8, 8, 321)
    counts = np.histogram(outputs, edges)[0].astype(np.float64)
    smooth = np.pad(gaussian_filter1d(counts, sigma=4, mode="constant"), 1)
    peaks, _ = find_peaks(smooth, prominence=0.05 * smooth.max())
    middles = (edges[1:] + edges[:-1]) / 2
    return [float(middles[peak - 1]) for peak in peaks]
