"""The model, windows, layers and run that a command uses, checked once, and their provenance.

`Setup` makes the beginning of run.json, which determines a result. `Stopwatch` makes log.json,
which does not.
"""

import dataclasses
import functools
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numba
import psutil
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.model import ranks
from entangle.model.blocks import BlockWalk
from entangle.model.causality import check_causal, dependences
from entangle.model.hashing import KIND, kind_of, weights_hash
from entangle.model.hooks import check_hooks, unheard_layers
from entangle.model.kept_logits import KeptLogits, keep_logits
from entangle.model.layers import LinearLayer, find_layers, skipped_parameters
from entangle.model.overlap import SeenText, shared_share
from entangle.model.patterns import INPUT, as_list
from entangle.model.prunable import unprunable_layers
from entangle.model.sampling import walk_blocks
from entangle.model.score import Score
from entangle.model.scoring import score_of
from entangle.model.sides import (
    LayerInputs,
    Recordable,
    by_block,
    find_both,
    in_order,
    without_skipped,
)
from entangle.model.text import TokenWindows, check_evaluation, check_windows, evenly_spaced
from entangle.runs.dataset import TRUSTED_ERROR, about, matching, outputs_of, runs_of, trusted

COMMAND: ContextVar[str | None] = ContextVar("command", default=None)
"""The command line, which is written to run.json; None in Python."""

_HASHES: ContextVar[dict[str, str] | None] = ContextVar("hashes", default=None)
_SHOWN = 21  # characters of a hash in a message: its kind and 12 digits


@contextmanager
def hashed_once() -> Iterator[None]:
    """Hash the weights of a model once for all functions that are called on it in the body.

    Only the last of them may change the weights.
    """
    token = _HASHES.set({})
    try:
        yield
    finally:
        _HASHES.reset(token)


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The model, windows, run and layers of a command, and the settings of its forward passes.

    `of` checks them once. The weights are hashed once, at the first use of `weights`.
    """

    model: PreTrainedModel
    windows: TokenWindows | None  # calibration windows, or those to measure
    evaluation: TokenWindows | None  # windows to score, or to measure as held-out data
    run: xr.Dataset | None  # measured on this model; only its outputs
    patterns: list[str]  # of layers' names
    input_patterns: list[str]  # of the names of layers whose inputs are recorded
    exclude: list[str]  # of the names of layers to leave out
    batch_size: int
    skip_first: int
    progress: bool | None
    ranked: bool  # use only layers with a neuron that the run ranks
    pruned: bool  # use only layers that can be pruned
    seen: SeenText | None  # the run's text, unless the evaluation was set aside from it
    set_aside: bool  # the evaluation was set aside from the windows
    scored: bool  # the model is to be scored on the evaluation

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        windows: TokenWindows | None,
        evaluation: TokenWindows | None = None,
        *,
        run: xr.DataTree | xr.Dataset | None = None,
        layers: str | Sequence[str] = ("*",),
        input_layers: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        batch_size: int = 4,
        skip_first: int = 0,
        progress: bool | None = None,
        ranked: bool = False,
        pruned: bool = False,
        set_aside: bool = False,
        scored: bool = True,
    ) -> Self:
        """Return a checked setup, before any long computation.

        Without ``ranked``, one window runs through the model on trial, to find layers that cannot
        be heard. Then the model is checked to be causal.

        With ``ranked``, the layers are those in which the run ranks a neuron (see
        `runs.dataset.trusted`). With ``set_aside``, the evaluation was set aside from the
        calibration windows, so that the run may have been measured on it. With ``pruned``, layers
        that cannot be pruned are left out. With ``scored`` and an evaluation, the model must be
        causal.

        Raises:
            LookupError: a pattern matches no layer, or all layers are excluded.
            TypeError: the windows or the evaluation are not windows of a text.
            ValueError: the windows do not fit the model, or slide; the model is compiled, not loaded or in
                training mode; there is an evaluation and the model is not causal; the windows or
                the run's text have 4% or more of the evaluation's tokens; the run was measured on
                other weights or is a shard; a number is out of range; a layer that a pattern names
                cannot be used, or none can; or, with ``ranked``, the run ranks no neuron of the
                layers.
        """
        setup = cls(
            model,
            windows,
            evaluation,
            None if run is None else outputs_of(run),
            as_list(layers),
            as_list(input_layers),
            as_list(exclude),
            batch_size,
            skip_first,
            progress,
            ranked,
            pruned,
            None if run is None or set_aside else seen_text(run),
            set_aside,
            scored,
        )
        if batch_size < 1:
            raise ValueError(f"a batch needs at least one window, got batch size {batch_size}")
        for text in (windows, evaluation):
            if text is not None and not isinstance(text, TokenWindows):
                raise TypeError(
                    f"expected windows of a text, as token_windows returns them, got a "
                    f"{type(text).__name__}: the order of arguments is model, windows, evaluation"
                )
            if text is not None:
                check_windows(model, text, skip_first)
            if text is not None and text.stride:
                raise ValueError(
                    f"windows that slide by {text.stride} tokens have the same tokens several times, and "
                    "are for perplexity only: give those of token_windows"
                )
        if evaluation is not None and not set_aside:
            check_evaluation(evaluation)
        check_hooks(model, skip_first)
        setup._check_run()
        # Their errors are raised now, and not after hours.
        _ = setup.recorded, setup.overlaps, setup.dependent_on
        return setup

    def _check_run(self) -> None:
        """Check that the run was measured on this model and is not a shard.

        Raises:
            ValueError: it was measured on other weights, it is a shard, or the kind of its hash is
                unknown.
        """
        if self.run is None:
            return
        attributes = about(self.run)
        if "shard" in attributes:
            raise ValueError(
                f"the run is only shard {attributes['shard']}: merge all shards first with "
                "entangle merge"
            )
        measured = str(attributes.get("weights"))
        ours = self._hash(kind_of(measured))
        if measured != ours:
            raise ValueError(
                f"the run was measured on other weights ({attributes.get('model', '?')}, "
                f"{measured[:_SHOWN]}) than those of this model ({self.model.name_or_path}, "
                f"{ours[:_SHOWN]}): measure this model, or load the measured one"
            )

    @functools.cached_property
    def layers(self) -> list[LinearLayer]:
        """Return the layers that match a pattern and are not `skipped`, in model order.

        With ``ranked``, return only those in which the run ranks a neuron.

        Raises:
            LookupError: a pattern matches no layer, or all layers are excluded.
            ValueError: a layer that a pattern names is skipped, all are, or the run ranks no neuron
                of the layers.
        """
        return without_skipped(self._matched, self.skipped, self.patterns)

    @functools.cached_property
    def recorded(self) -> list[Recordable]:
        """Return what `measure` records, block by block: `layers`, and inputs that are not `skipped`.

        Raises:
            LookupError: as `layers`, also for the patterns of input layers.
            ValueError: likewise.
        """
        names = [name + INPUT for name in self.input_patterns]
        return in_order(self.layers, without_skipped(self._inputs, self.skipped, names))

    @functools.cached_property
    def _matched(self) -> list[LinearLayer]:
        if self.ranked and self.run is not None:
            return _ranked_layers(self.model, self.run, self.patterns, self.exclude)
        return self._both[0]

    @functools.cached_property
    def _inputs(self) -> list[LayerInputs]:
        return self._both[1] if self.input_patterns else []

    @functools.cached_property
    def _both(self) -> tuple[list[LinearLayer], list[LayerInputs]]:
        return find_both(self.model, self.patterns, self.input_patterns, self.exclude)

    @functools.cached_property
    def skipped(self) -> dict[str, str]:
        """Return, by name, why layers, or inputs, that match a pattern are not used.

        With ``ranked`` no trial is needed: the run heard these layers.
        """
        found, matched = {}, in_order(self._matched, self._inputs)
        if self.windows is not None and matched and not self.ranked:
            found = unheard_layers(self.model, matched, self.batches[0][:1])
        unused = unprunable_layers(self._matched) if self.pruned else {}
        return ranks.from_rank(0, unused | found)

    @functools.cached_property
    def overlaps(self) -> list[dict[str, float | None]]:
        """Return, for each text of the evaluation, the shares of its tokens that were seen before.

        ``windows`` is the share that the calibration windows have, ``run`` the share of the run's
        text. The latter is None if the run has no hashes of its runs of tokens.

        Raises:
            ValueError: a share is 4% or more.
        """
        texts = [] if self.evaluation is None else self.evaluation.by_text()
        shares: list[dict[str, float | None]] = [{} for _ in texts]
        if texts and self.windows is not None:
            seen = SeenText.of(self.windows)
            # Windows set aside are other windows of the same text, which may repeat itself.
            seen = dataclasses.replace(seen, runs=None) if self.set_aside else seen
            for text, found in zip(texts, shares, strict=True):
                found["windows"] = shared_share(seen, text)
        if self.seen is not None:
            for text, found in zip(texts, shares, strict=True):
                share = shared_share(self.seen, text)
                found["run"] = None if self.seen.runs is None else share
        return shares

    @functools.cached_property
    def dependent_on(self) -> list[str]:
        """Return what a token's outputs depend on besides this token and those before it.

        Raises:
            ValueError: the model is to be scored, and the outputs depend on something else.
        """
        if self.evaluation is not None and self.scored:
            check_causal(self.model, self.evaluation)
            return []
        return [] if self.windows is None else dependences(self.model, self.windows)

    @functools.cached_property
    def weights(self) -> str:
        """Return the hash of the model's weights."""
        return self._hash(KIND)

    def _hash(self, kind: str) -> str:
        if kind not in self._hashes:
            self._hashes[kind] = weights_hash(self.model, kind)
        return self._hashes[kind]

    @functools.cached_property
    def _hashes(self) -> dict[str, str]:
        shared = _HASHES.get()
        return {} if shared is None else shared

    @property
    def tokens(self) -> int:
        """Return how many tokens of the windows are counted."""
        text = self.windows
        return 0 if text is None else len(text) * (text.length - self.skip_first)

    @property
    def batches(self) -> Sequence[torch.Tensor]:
        """Return the batches, each (windows, length) with at most ``batch_size`` windows."""
        assert self.windows is not None
        return self.windows.batches(self.batch_size)

    @property
    def seed(self) -> int:
        """Return the seed that the windows were drawn with."""
        return 0 if self.windows is None else self.windows.seed

    @property
    def blocks(self) -> dict[int, list[LinearLayer]]:
        """Return the layers by block; blocks without a layer are left out."""
        return by_block(self.layers)

    @property
    def last_block(self) -> int:
        """Return the index of the last block that has a layer."""
        return max(layer.block for layer in self.layers)

    def walk(self, batch_size: int | None = None) -> BlockWalk:
        """Return a walk of the windows through the blocks, before the first block."""
        assert self.windows is not None
        size = self.batch_size if batch_size is None else batch_size
        return walk_blocks(self.model, self.windows, size, self.skip_first)

    def evaluation_walk(self, most: int | None = None) -> BlockWalk:
        """Return a walk of the evaluation's windows through the blocks, before the first block.

        With ``most`` it takes at most so many, evenly spaced in each text, but a batch per process.
        """
        assert self.evaluation is not None
        windows = self.evaluation
        if most is not None:
            windows = evenly_spaced(windows, max(most, ranks.count() * self.batch_size))
        return walk_blocks(self.model, windows, self.batch_size, self.skip_first)

    @property
    def texts(self) -> dict[str, list[int]]:
        """Return, by name, the places of each text's windows among those of the evaluation."""
        assert self.evaluation is not None
        windows = self.evaluation
        origins = torch.zeros(len(windows)) if windows.origins is None else windows.origins
        names = enumerate(windows.names)
        return {name: (origins == place).nonzero().flatten().tolist() for place, name in names}

    def keep_logits(self) -> KeptLogits | None:
        """Keep the logits of the model, with its present weights, on the evaluation.

        Return None if they cannot be made again (see `kept_logits`).
        """
        assert self.evaluation is not None
        return keep_logits(
            self.model, self.evaluation, batch_size=self.batch_size, progress=self.progress
        )

    def score(self, against: KeptLogits | None = None) -> Score:
        """Score the model, with its present weights, on the evaluation.

        ``against`` are the logits that it had when it was dense.

        Raises:
            NotFiniteError: the model's outputs are not finite.
        """
        assert self.evaluation is not None
        return score_of(
            self.model,
            self.evaluation,
            against=against,
            batch_size=self.batch_size,
            skip_first=self.skip_first,
            progress=self.progress,
        )

    def provenance(self) -> dict[str, Any]:
        """Return the beginning of run.json: command, model, weights, windows, layers, versions."""
        model, text, held_out = self.model, self.windows, self.evaluation
        drawn = text if text is not None else held_out
        assert drawn is not None
        about: dict[str, Any] = {
            "command": COMMAND.get(),
            "model": model.name_or_path,
            "class": type(model).__name__,
            "revision": getattr(model.config, "_commit_hash", None),
            "weights": self.weights,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "text": None if text is None else text.text,
            "fingerprint": None if text is None else text.fingerprint,
            **({"texts": texts_of(text)} if text is not None and text.parts else {}),
            "windows": 0 if text is None else len(text),
            "length": drawn.length,
            "available_windows": drawn.available,
            "seed": drawn.seed,
            "bos": drawn.bos,
            "skip_first": self.skip_first,
            "batch_size": self.batch_size,
            "layers": self.patterns,
            **({"input_layers": self.input_patterns} if self.input_patterns else {}),
            **({"exclude": self.exclude} if self.exclude else {}),
            "skipped_parameters": skipped_parameters(model),
            **({"skipped_layers": self.skipped} if self.skipped else {}),
            **({"dependent_on": self.dependent_on} if self.dependent_on else {}),
            "versions": versions(),
            "tokens": self.tokens,
        }
        notes = [note for part in (text, held_out) if part is not None for note in part.notes]
        if notes:
            about["notes"] = list(dict.fromkeys(notes))
        if held_out is not None:
            about |= {
                "evaluation": held_out.text,
                "evaluation_fingerprint": held_out.fingerprint,
                "evaluation_windows": len(held_out),
                "evaluation_length": held_out.length,
            }
            facts = texts_of(held_out)
            for one, shares in zip(facts.values(), self.overlaps, strict=True):
                one["overlap"] = shares
            if held_out.parts:
                about["evaluation_texts"] = facts
            else:
                about["overlap"] = self.overlaps[0]
        return about


def texts_of(windows: TokenWindows) -> dict[str, dict[str, Any]]:
    """Return, by name, what was drawn of each text."""
    return {
        name: {
            "windows": len(part),
            "available_windows": part.available,
            "fingerprint": part.fingerprint,
        }
        for name, part in zip(windows.names, windows.by_text(), strict=True)
    }


def _ranked_layers(
    model: PreTrainedModel, run: xr.Dataset, patterns: Sequence[str], exclude: Sequence[str]
) -> list[LinearLayer]:
    """Return the model's layers that match a pattern and in which the run ranks a neuron.

    Raises:
        LookupError: a pattern matches no layer of the run.
        ValueError: there is no such layer.
    """
    names = run["layer"].to_numpy().astype(str)
    wanted = set(names[matching(names, patterns, exclude) & trusted(run)])
    chosen = [layer for layer in find_layers(model) if layer.name in wanted]
    if not chosen:
        raise ValueError(
            f"the run ranks no neuron of the layers {', '.join(patterns)}: all are dead, have "
            f"outputs that are not finite, or have an error bound above {TRUSTED_ERROR}"
        )
    return chosen


def seen_text(run: xr.DataTree | xr.Dataset) -> SeenText:
    """Return the hashes of the text that a run was measured on."""
    attributes = about(run)
    what, text = "the text that the run was measured on", attributes.get("text", "?")
    return SeenText(what, text, attributes.get("window_hashes", []), runs_of(run))


PACKAGES = ("entangle", "torch", "transformers", "numpy", "numba", "scikit-learn")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run's numbers depend on."""
    return {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES}


class Stopwatch:
    """The duration of a run since this object was made, and the process's peak memory.

    The seconds that the model took to write its own text before are told beside it.
    """

    def __init__(self, windows: TokenWindows | None = None) -> None:
        self.written = 0.0 if windows is None else windows.seconds
        self.start = time.perf_counter()
        self.clock = time.strftime("%Y-%m-%dT%H:%M:%S%z")

    def log(self) -> dict[str, Any]:
        """Return the content of log.json: duration (seconds), peak memory (bytes), machine."""
        return {
            "started": self.clock,
            "seconds": round(time.perf_counter() - self.start, 3),
            **({"own_text_seconds": round(self.written, 3)} if self.written else {}),
            "peak_memory_bytes": _peak_memory(),
            **({"peak_device_bytes": _peak_device_memory()} if _has_cuda() else {}),
            "machine": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "kernel_threads": numba.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
        }


def _has_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _peak_device_memory() -> int:
    """Return the largest memory in use so far on any GPU of this process, in bytes."""
    return max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))


def _peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux getrusage also counts the parent process
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].removesuffix("kB")) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
