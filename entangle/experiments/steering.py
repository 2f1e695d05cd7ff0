"""What one neuron does: the model's predictions with the neuron held at a value, or scaled."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entangle.model.causality import check_causal
from entangle.model.divergence import Divergence, mean_over_windows
from entangle.model.generating import generate
from entangle.model.placing import input_device
from entangle.model.progress import progress_bar
from entangle.model.scoring import NotFiniteError, compared
from entangle.model.sides import Recordable
from entangle.model.steering import Setting, changed, find_steerable
from entangle.model.text import TokenWindows, check_one_text, check_windows, token_name
from entangle.numerics.torch_settings import with_torch_defaults
from entangle.runs.dataset import check_neuron, dataset_of
from entangle.runs.setup import Setup
from entangle.runs.shapes import distribution_of

MOVED = 10  # tokens whose probability rises or falls the most
_CHUNK = 64  # tokens whose probabilities are computed at once

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Moved:
    """A token of the vocabulary, and how its mean predicted probability changes."""

    token: str
    id: int
    change: float
    error: float  # standard error over windows, NaN for one window
    before: float  # mean probability of the untouched model


@dataclasses.dataclass(frozen=True, eq=False)
class Steered:
    """What a setting of a neuron does to a model's predictions."""

    setting: str
    value: float | None  # the output that it is held at; None for a scale
    value_error: float  # bound of the error of a quantile; 0 for other settings
    divergence: Divergence  # from the untouched model
    nats: float  # mean change of the text's loss, nats a token
    nats_error: float  # standard error over windows
    up: list[Moved]  # those that rise the most, first
    down: list[Moved]  # those that fall the most, first
    continuation: str | None  # of the prompt

    def told(self) -> dict[str, Any]:
        """Return the numbers as JSON has them."""
        plain: dict[str, Any] = {
            "setting": self.setting,
            "value": self.value,
            "value_error": self.value_error,
            **self.divergence.columns(),
            "nats": self.nats,
            "nats_error": self.nats_error,
        }
        moved = {"up": self.up, "down": self.down}
        plain |= {name: [dataclasses.asdict(x) for x in rows] for name, rows in moved.items()}
        return plain | {"continuation": self.continuation}


@dataclasses.dataclass(frozen=True, eq=False)
class Steering:
    """The settings of a neuron, each compared with the untouched model on the same windows."""

    neuron: str
    tokens: int  # predicted tokens
    settings: list[Steered]
    continuation: str | None  # of the prompt, by the untouched model


@contextmanager
def steer(
    model: PreTrainedModel,
    neuron: str,
    setting: str,
    *,
    run: xr.DataTree | None = None,
) -> Iterator[float | None]:
    """Hold a neuron at a value, or scale it, while the body runs; yield the value, None for a scale.

    ``neuron`` is LAYER:INDEX, or LAYER:input:INDEX for an input of this layer alone. ``setting`` is
    ``zero``; ``mean`` or ``quantile:Q``, of the neuron's distribution in ``run``; or ``scale:X``.
    It is applied to all tokens. The model may be packed or expanded. That the run was measured on
    this model is not checked here: `steered` does so.

    Raises:
        LookupError: the model or the run has no such neuron.
        ValueError: the setting is none of these, needs a run or a part of the distribution that the
            run has not kept, or the layer cannot be heard (see `find_steerable`).
    """
    chosen = Setting.of(setting)
    one, index = find_steerable(model, neuron)
    value, _ = value_of(run, neuron, chosen)
    with _held(one, index, chosen, value):
        yield value


def _held(
    one: Recordable, index: int, setting: Setting, value: float | None
) -> AbstractContextManager[None]:
    if value is None:
        return changed(one, index, scale=setting.number, value=0.0)
    return changed(one, index, scale=0.0, value=value)


def value_of(run: xr.DataTree | None, neuron: str, setting: Setting) -> tuple[float | None, float]:
    """Return the value that a setting holds a neuron at, None for a scale, and the bound of its error.

    A quantile is linear inside a bin of the neuron's finest histogram, and its bound is the distance
    to the farther end of the bin; those of 0 and 1 are the extremes. Other values have no error.

    Raises:
        LookupError: the run has no such neuron.
        ValueError: there is no run, the neuron has no finite mean, or the quantile lies in a tail,
            of which the run has kept only the sum and the extreme.
    """
    if setting.kind in {"zero", "scale"}:
        return (0.0 if setting.kind == "zero" else None), 0.0
    if run is None:
        raise ValueError(f"{setting} needs the run that measured the neuron: give it with run")
    data = dataset_of(run)
    check_neuron(data, neuron)
    row = data.sel(neuron=neuron)
    ends = {0.0: "min", 1.0: "max"}
    name = "mean" if setting.kind == "mean" else ends.get(setting.number)
    if name is None and "histogram" not in run.children:
        raise ValueError(f"{setting} needs a run with histograms: open its folder with open_run")
    value, error = (float(row[name]), 0.0) if name else _quantile(run, neuron, setting.number)
    if not np.isfinite(value):
        raise ValueError(f"{neuron} has no finite {name or setting} in the run: set it to zero")
    return value, error


def _quantile(run: xr.DataTree, neuron: str, share: float) -> tuple[float, float]:
    """Return a quantile of a neuron's histogram, and the bound of its error.

    Raises:
        ValueError: it lies in a tail.
    """
    known = distribution_of(run, neuron)
    first, last = known.below[1], known.below[-2]  # shares below both ends of the bins
    if not first <= share <= last:
        raise ValueError(
            f"the run has not kept quantile {share:g} of {neuron}, since its farthest outputs are "
            f"beyond its histogram: give a quantile from {first:.6f} to {last:.6f}, or 0 or 1, the "
            "smallest and largest output"
        )
    return known.quantile(share)


@with_torch_defaults
def steered(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    run: xr.DataTree,
    neuron: str,
    settings: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | None = None,
    prompt_tokens: int = 40,
    batch_size: int = 4,
    skip_first: int = 0,
    progress: bool | None = None,
) -> Steering:
    """Compare the model with a neuron in each of some settings (see `steer`) with the untouched model.

    The predictions are those that `perplexity` scores: of each window's tokens, given those before.
    The model runs on each batch once for each setting, and once untouched. A token's mean predicted
    probability is over all predictions. With ``prompt``, each goes on for at most ``prompt_tokens``
    tokens, always with the most likely one.

    Raises:
        LookupError: the run or the model has no such neuron.
        NotFiniteError: the outputs of the model are not finite.
        ValueError: as `steer`; or there is no setting, the windows do not fit the model, the model
            is not causal, or the run was measured on other weights.
    """
    names = [settings] if isinstance(settings, str) else list(dict.fromkeys(settings))
    if not names:
        raise ValueError("no setting is given: give at least one, such as zero or scale:2")
    chosen = [Setting.of(name) for name in names]
    one, index = find_steerable(model, neuron)
    known = [value_of(run, neuron, setting) for setting in chosen]
    check_windows(model, windows, skip_first)
    check_one_text(windows)
    check_causal(model, windows)
    Setup.of(model, None, run=run)
    held = [(setting, value) for setting, (value, _) in zip(chosen, known, strict=True)]

    def continuation(setting: Setting | None, value: float | None) -> str | None:
        if prompt is None:
            return None
        with ExitStack() as stack:
            if setting is not None:
                stack.enter_context(_held(one, index, setting, value))
            # All threads, so that continuations differ by nothing but the neuron.
            threads = torch.get_num_threads()
            found = generate(model, tokenizer, prompt, tokens=prompt_tokens, threads=threads)
            return found.text

    untouched = continuation(None, None)  # first: a bad prompt is refused here
    first = max(skip_first, 1)
    sums = [_Sums.of(windows, first) for _ in held]
    batches = windows.batches(batch_size)
    with (
        torch.inference_mode(),
        progress_bar(total=windows.tokens.numel(), unit="token", shown=progress) as bar,
    ):
        for number, batch in enumerate(batches):
            tokens = batch.to(input_device(model))
            dense = model(input_ids=tokens, use_cache=False).logits[:, first - 1 : -1]
            for (setting, value), found in zip(held, sums, strict=True):
                with _held(one, index, setting, value):
                    logits = model(input_ids=tokens, use_cache=False).logits[:, first - 1 : -1]
                for place, window in enumerate(tokens):
                    row = number * batch_size + place
                    found.add(row, logits[place], dense[place], window[first:])
            bar.update(batch.numel())

    return Steering(
        neuron,
        len(windows) * (windows.length - first),
        [
            found.result(str(setting), *own, continuation(setting, own[0]), tokenizer)
            for setting, own, found in zip(chosen, known, sums, strict=True)
        ],
        untouched,
    )


@dataclasses.dataclass(eq=False)
class _Sums:
    """Sums over the windows of one setting's differences."""

    rows: torch.Tensor  # (5, windows, tokens): losses, KL, agreement, lost, gained
    losses: torch.Tensor  # (windows,) of the untouched model
    change: torch.Tensor  # (2, vocabulary): sums over windows of the mean change, and of its square
    before: (
        torch.Tensor
    )  # (vocabulary,): sums over windows of the untouched model's mean probability

    @classmethod
    def of(cls, windows: TokenWindows, first: int) -> "_Sums":
        """Return sums of no windows yet."""
        rows = torch.zeros(5, len(windows), windows.length - first)
        empty = torch.zeros(0, dtype=torch.float64)
        return cls(rows, torch.zeros(len(windows), dtype=torch.float64), empty, empty)

    def add(
        self, row: int, logits: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor
    ) -> None:
        """Add a window's logits (tokens, vocabulary), and those of the untouched model."""
        self.rows[:, row] = compared(logits, targets, dense).cpu()
        self.losses[row] = float(compared(dense, targets, None).double().mean())
        after, before = (_mean_probability(one) for one in (logits, dense))
        if not len(self.before):
            self.before = torch.zeros_like(before)
            self.change = torch.zeros(2, len(before), dtype=torch.float64)
        self.before += before
        self.change += torch.stack([after - before, (after - before).square()])

    def result(
        self,
        setting: str,
        value: float | None,
        value_error: float,
        continuation: str | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Steered:
        """Return the means over windows, and their errors.

        Raises:
            NotFiniteError: they are not finite.
        """
        if not self.rows.isfinite().all():
            raise NotFiniteError(
                f"the model's outputs are not finite with {setting}: set the neuron to a value that it "
                "has in the text"
            )
        nats, kl, *shares = self.rows.numpy()
        means = [one.astype(np.float64).mean(axis=1) for one in shares]
        change, error = mean_over_windows(
            nats.astype(np.float64).mean(axis=1) - self.losses.numpy()
        )
        up, down = self._moved(tokenizer)
        divergence = Divergence(kl, *means)
        return Steered(
            setting, value, value_error, divergence, change, error, up, down, continuation
        )

    def _moved(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Moved], list[Moved]]:
        """Return the tokens whose mean probability rises, and falls, the most."""
        count = self.rows.shape[1]
        mean = self.change[0] / count
        variance = (self.change[1] / count - mean.square()).clamp(min=0) * count / max(count - 1, 1)
        error = (variance / count).sqrt() if count > 1 else torch.full_like(mean, torch.nan)
        size = min(MOVED, len(mean))

        def moved(places: torch.Tensor) -> list[Moved]:
            return [
                Moved(
                    token_name(tokenizer, place),
                    place,
                    float(mean[place]),
                    float(error[place]),
                    float(self.before[place]) / count,
                )
                for place in places.tolist()
                if place < len(tokenizer)
            ]

        ups, downs = mean.topk(size), mean.topk(size, largest=False)
        return (
            moved(ups.indices[ups.values > 0]),
            moved(downs.indices[downs.values < 0]),
        )


def _mean_probability(logits: torch.Tensor) -> torch.Tensor:
    """Return the mean probability (vocabulary,) float64 of logits (tokens, vocabulary), on the CPU."""
    total = torch.zeros(logits.shape[1], dtype=torch.float64)
    for part in logits.split(_CHUNK):
        total += part.float().softmax(dim=-1).sum(dim=0, dtype=torch.float64).cpu()
    return total / len(logits)
