"""The tokens behind a neuron's distribution: at its ends, at its modes and in between.

A second pass over the run's own windows. Of its outputs only those of the neurons asked for are
kept, and of so many neurons at a time that memory is bounded.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.model.hooks import backbone_of, listening
from entangle.model.layers import LinearLayer
from entangle.model.placing import home_of
from entangle.model.text import TokenWindows
from entangle.numerics.contributions import bootstrap, distance_parts
from entangle.numerics.gaussian import from_samples
from entangle.runs import store
from entangle.runs.dataset import check_neuron, dataset_of
from entangle.runs.setup import Setup

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]

ENDS = 8  # tokens shown at either end
NEAR = 4  # tokens shown at a mode
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
FARTHEST = 0.01  # share of the tokens that are left out as the farthest from the mean
FREQUENT = 200  # kinds of tokens whose share is looked at, the most frequent ones
SHOWN = 20  # of these, those with the largest share
DRAWS = 200  # of the bootstrap
VALUES = 2**27  # outputs held at a time
BEFORE, AFTER = 24, 8  # tokens of text around one


@dataclasses.dataclass(frozen=True)
class Context:
    """A token in its text, and what the neuron says to it."""

    why: str  # lowest, highest, mode at X, quantile Q
    window: int
    position: int  # in the window
    before: str
    token: str
    after: str
    output: float
    deviation: float  # from the mean, in std
    share: float  # of the distance


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What a distribution is without some of its tokens."""

    what: str
    tokens: int  # left out
    variance: float  # their share of the sum of squared deviations
    wasserstein: float  # exact, of the others; NaN where they are constant


@dataclasses.dataclass(frozen=True)
class NeuronContexts:
    """What is behind the distribution of one neuron."""

    neuron: str  # LAYER:INDEX
    tokens: int
    wasserstein: float  # exact, of the outputs themselves
    low: float  # its 95% interval, by a bootstrap of whole windows
    high: float
    modes: list[float]  # in output units
    contexts: list[Context]
    positions: list[float]  # each window position's share of the distance
    frequent: list[dict[str, Any]]  # token, count, share of the distance, mean output
    without: list[LeftOut]  # the farthest tokens; the position and the token of most variance


@dataclasses.dataclass(frozen=True, eq=False)
class _CountedTokens:
    """The tokens that count, by their kind and place: the same for every neuron."""

    length: int  # of a window
    position: npt.NDArray[np.int64]  # (tokens,) in the window, from the first that counts
    kind: npt.NDArray[np.int64]  # (tokens,) each one's place among kinds
    kinds: npt.NDArray[np.int64]  # ids
    counts: npt.NDArray[np.int64]
    frequent: npt.NDArray[np.int64]  # places of the most frequent kinds, those first

    @classmethod
    def of(cls, tokens: npt.NDArray[np.int64]) -> Self:
        """Sort out tokens (windows, length)."""
        kinds, kind, counts = np.unique(tokens.ravel(), return_inverse=True, return_counts=True)
        length = tokens.shape[1]
        position = np.tile(np.arange(length), len(tokens))
        frequent = np.argsort(-counts, kind="stable")[:FREQUENT]
        return cls(length, position, kind, kinds, counts, frequent)


def contexts(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    run: xr.DataTree | xr.Dataset,
    neurons: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path | None = None,
    progress: bool = False,
) -> list[NeuronContexts]:
    """Find the tokens behind the distributions of neurons, written LAYER:INDEX.

    ``windows`` are those that ``run`` was measured on. A token's share of the distance is the
    integral over its own quantile bin (see `distance_parts`). The interval is a basic bootstrap
    interval of 200 draws of whole windows: since noise only adds to a distance, it may lie below it;
    of one window there is none. A few massive outputs raise the distance by squeezing all others,
    which then have the shares: what the distance is `without` them says so. With ``out``, the run's folder, they are written into its
    contexts.json, beside what is there.

    Raises:
        LookupError: the run has no such neuron.
        ValueError: the run is of other weights or of other windows, a neuron has no distance, or the
            model is in training mode.
    """
    neurons = [neurons] if isinstance(neurons, str) else neurons
    data = dataset_of(run)
    names = list(dict.fromkeys(neurons))
    for name in names:
        check_neuron(data, name)
        if not np.isfinite(float(data["wasserstein"].sel(neuron=name))):
            raise ValueError(f"{name} is dead or broken: it has no distribution to look at")
    setup = Setup.of(
        model,
        windows,
        run=run,
        layers=sorted({name.rpartition(":")[0] for name in names}),
        batch_size=int(data.attrs["batch_size"]),
        skip_first=int(data.attrs["skip_first"]),
        progress=progress,
    )
    if data.attrs.get("fingerprint") != windows.fingerprint:
        raise ValueError(
            f"the run was measured on other windows than these ({windows.text}): its text is "
            f"{data.attrs.get('text')}, {data.attrs.get('windows')} windows of "
            f"{data.attrs.get('length')}, seed {data.attrs.get('seed')}"
        )
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    found = []
    counted = _CountedTokens.of(windows.tokens[:, setup.skip_first :].numpy())
    size = max(1, VALUES // setup.tokens)
    groups = [names[first : first + size] for first in range(0, len(names), size)]
    bar = tqdm(groups, unit="pass", disable=not progress)
    for group in bar:
        outputs = _outputs(setup, group)  # (tokens, neurons)
        parts = distance_parts(outputs)
        draws = bootstrap(outputs, counted.length, draws=DRAWS, seed=windows.seed)
        for place, name in enumerate(group):
            found.append(
                _describe(
                    name,
                    outputs[:, place],
                    parts[:, place],
                    draws[:, place],
                    windows,
                    counted,
                    decode,
                )
            )
    if out is not None:
        file = Path(out) / "contexts.json"
        kept = store.read_json(file) if file.is_file() else {}
        kept |= {one.neuron: dataclasses.asdict(one) for one in found}
        store.write_json(file, kept)
    return found


def _outputs(setup: Setup, neurons: Sequence[str]) -> Floats:
    """Run the model and return the outputs (tokens, neurons) of some neurons."""
    wanted: dict[str, list[int]] = {}
    for neuron in neurons:
        layer, _, index = neuron.rpartition(":")
        wanted.setdefault(layer, []).append(int(index))
    layers = [layer for layer in setup.layers if layer.name in wanted]
    kept: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}

    def on_outputs(layer: LinearLayer, rows: torch.Tensor) -> None:
        kept[layer.name].append(rows[:, wanted[layer.name]].float().cpu())

    model, device, skip_first = setup.model, home_of(setup.model), setup.skip_first
    with torch.inference_mode(), listening(model, layers, on_outputs, skip_first=skip_first):
        for batch in setup.batches:
            backbone_of(model)(input_ids=batch.to(device), use_cache=False)
    columns = {
        f"{name}:{index}": rows[:, place]
        for name, parts in kept.items()
        for rows in [torch.cat(parts)]
        for place, index in enumerate(wanted[name])
    }
    return torch.stack([columns[neuron] for neuron in neurons], dim=1).numpy()


def _describe(
    name: str,
    outputs: Floats,
    parts: Array,
    draws: Array,
    windows: TokenWindows,
    counted: "_CountedTokens",
    decode: Any,
) -> NeuronContexts:
    """Describe a neuron by its outputs (tokens,) and their parts of its distance."""
    distance = float(parts.sum())
    mean, std = float(outputs.mean(dtype=np.float64)), float(outputs.std(dtype=np.float64))
    low = high = math.nan
    if len(windows) > 1:
        low, high = (2 * distance - np.nanquantile(draws, [0.975, 0.025])).tolist()
    length = counted.length
    skip_first = windows.length - length
    shares = parts / distance
    text = windows.tokens.numpy()

    def context(why: str, row: int) -> Context:
        window, position = row // length, row % length + skip_first
        line = text[window].tolist()
        before, token, after = _texts(line, position, decode)
        return Context(
            why=why,
            window=int(window),
            position=int(position),
            before=before,
            token=token,
            after=after,
            output=float(outputs[row]),
            deviation=(float(outputs[row]) - mean) / std,
            share=float(shares[row]),
        )

    modes = _modes(outputs, mean, std)
    contexts = [context(why, row) for why, row in _chosen(outputs, modes)]
    return NeuronContexts(
        neuron=name,
        tokens=len(outputs),
        wasserstein=distance,
        low=low if math.isnan(low) else max(low, 0.0),
        high=high,
        modes=modes,
        contexts=contexts,
        positions=shares.reshape(-1, length).sum(axis=0).tolist(),
        frequent=_frequent(counted, outputs, shares, decode),
        without=_without(counted, outputs, skip_first, decode),
    )


def _texts(line: list[int], position: int, decode: Any) -> tuple[str, str, str]:
    """Return a token's text and that around it, cut out of the text of all of them.

    A token alone may be half a character, or lack its space. Where the texts do not lie in each
    other, as where one ends within a character, each is decoded by itself.
    """
    first, last = max(position - BEFORE, 0), position + 1 + AFTER
    parts = line[first:position], line[position : position + 1], line[position + 1 : last]
    before, both, whole = (decode(line[first:end]) for end in (position, position + 1, last))
    if both.startswith(before) and whole.startswith(both):
        return before, both[len(before) :], whole[len(both) :]
    before, token, after = map(decode, parts)
    return before, token, after


def _chosen(outputs: Floats, modes: Sequence[float]) -> Iterator[tuple[str, int]]:
    """Give the tokens to show, and why."""
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
    """Return where the modes are: the peaks that `Histograms.modes` counts (see there)."""
    edges = mean + std * np.linspace(-8, 8, 321)
    counts = np.histogram(outputs, edges)[0].astype(np.float64)
    smooth = np.pad(gaussian_filter1d(counts, sigma=4, mode="constant"), 1)
    peaks, _ = find_peaks(smooth, prominence=0.05 * smooth.max())
    middles = (edges[1:] + edges[:-1]) / 2
    return [float(middles[peak - 1]) for peak in peaks]


def _frequent(
    counted: _CountedTokens, outputs: Floats, shares: Array, decode: Any
) -> list[dict[str, Any]]:
    """Return the frequent tokens that have the largest shares of the distance."""
    share = np.bincount(counted.kind, weights=shares)
    total = np.bincount(counted.kind, weights=outputs.astype(np.float64))
    usual = counted.frequent
    largest = usual[np.argsort(-share[usual], kind="stable")[:SHOWN]]
    return [
        {
            "token": _named(int(counted.kinds[kind]), decode),
            "count": int(counted.counts[kind]),
            "share": float(share[kind]),
            "mean_output": float(total[kind] / counted.counts[kind]),
        }
        for kind in largest
    ]


def _named(token: int, decode: Any) -> str:
    """Return a token's text; parts of characters, which all look alike, with their number."""
    text = str(decode([token]))
    return f"{text}<{token}>" if "\ufffd" in text else text


def _without(
    counted: _CountedTokens, outputs: Floats, skip_first: int, decode: Any
) -> list[LeftOut]:
    """Leave out the 1% farthest from the mean, then a window position, then a frequent token.

    Those two are the ones whose share of the squared deviations exceeds their share of the tokens
    most.
    """
    deviations = np.square(outputs - outputs.mean(dtype=np.float64))
    positions = np.arange(counted.length)
    far = np.zeros(len(outputs), dtype=bool)
    far[np.argsort(-deviations, kind="stable")[: round(FARTHEST * len(outputs))]] = True
    groups = {f"the {FARTHEST:.0%} farthest from the mean": far}
    for group, candidates in (
        (counted.position, positions),
        (counted.kind, counted.frequent),
    ):
        variance = np.bincount(group, weights=deviations) / deviations.sum()
        excess = variance - np.bincount(group) / len(group)
        worst = int(candidates[np.argmax(excess[candidates])])
        place = f"position {worst + skip_first}"
        token = _named(int(counted.kinds[worst]), decode) if group is counted.kind else None
        what = place if token is None else f"token {token!r}"
        groups[what] = group == worst
    return [
        LeftOut(
            what=what,
            tokens=int(left.sum()),
            variance=float(deviations[left].sum() / deviations.sum()),
            wasserstein=math.nan if left.all() else float(from_samples(outputs[~left, None])[0]),
        )
        for what, left in groups.items()
    ]
