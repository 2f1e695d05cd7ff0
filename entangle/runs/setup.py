"""What a command runs on: model, texts, layers and run, checked once, and what is saved of it.

`Setup` is run.json's beginning, and `Stopwatch` is log.json: what does not determine a result.
"""

import dataclasses
import functools
import platform
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import psutil
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.model.blocks import BlockWalk
from entangle.model.hooks import check_hooks
from entangle.model.layers import LinearLayer, find_layers, skipped_parameters
from entangle.model.loading import weights_hash
from entangle.model.sampling import walk_blocks
from entangle.model.score import Score
from entangle.model.scoring import perplexity
from entangle.model.text import TokenWindows, check_disjoint, check_windows
from entangle.runs.dataset import about, dataset_of, matching, trusted

COMMAND: ContextVar[str | None] = ContextVar("command", default=None)
"""The command line that runs, which run.json keeps; none in Python."""


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A model, the layers and texts that a command is about, and how it runs on them.

    `of` checks them once; the weights are hashed once, when they are first asked for.
    """

    model: PreTrainedModel
    windows: TokenWindows | None  # of the calibration, or what is measured
    evaluation: TokenWindows | None  # what is scored, or measured held out
    run: xr.Dataset | None  # measured of this model
    patterns: list[str]  # of the layers' names
    batch_size: int
    skip_first: int
    progress: bool
    ranked: bool  # the run ranks the neurons

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        windows: TokenWindows | None,
        evaluation: TokenWindows | None = None,
        *,
        run: xr.DataTree | xr.Dataset | None = None,
        layers: str | Sequence[str] = ("*",),
        batch_size: int = 4,
        skip_first: int = 0,
        progress: bool = False,
        ranked: bool = False,
    ) -> Self:
        """Check all that a command runs on, before minutes are spent.

        With ``ranked`` the layers are those of the run that have a neuron to be ranked, and the
        run must not have been measured on what is scored.

        Raises:
            LookupError: a pattern matches no layer.
            ValueError: windows that do not fit the model, a model that is compiled, not loaded or in
                training mode, an evaluation window that is one of the calibration, a run of other
                weights, a number out of range, or with ``ranked`` a run measured on the evaluation,
                or without a neuron to be ranked.
        """
        setup = cls(
            model,
            windows,
            evaluation,
            None if run is None else dataset_of(run),
            [layers] if isinstance(layers, str) else list(layers),
            batch_size,
            skip_first,
            progress,
            ranked,
        )
        if batch_size < 1:
            raise ValueError(f"a batch needs at least one window, got batch size {batch_size}")
        for text in (windows, evaluation):
            if text is not None:
                check_windows(model, text, skip_first)
        check_hooks(model, skip_first)
        if windows is not None and evaluation is not None:
            check_disjoint(windows, evaluation)
        setup._check_run()
        assert setup.layers  # found now, or the pattern is told
        return setup

    def _check_run(self) -> None:
        """See that the run is of this model, and whole; and with ``ranked`` saw no evaluation.

        Raises:
            ValueError: it was measured on other weights or on the evaluation, or is a shard.
        """
        if self.run is None:
            return
        said = about(self.run)
        if "shard" in said:
            raise ValueError(
                f"the run is shard {said['shard']} of one: make it whole first, with entangle merge"
            )
        if said.get("weights") != self.weights:
            raise ValueError(
                f"the run was measured on other weights ({said.get('model', '?')}, "
                f"{str(said.get('weights'))[:12]}) than this model has ({self.model.name_or_path}, "
                f"{self.weights[:12]}): measure this model, or load the one that was measured"
            )
        if self.ranked and self.evaluation is not None:
            _check_unseen(said, self.evaluation)

    @functools.cached_property
    def layers(self) -> list[LinearLayer]:
        """The layers that match a pattern, in model order; with ``ranked`` those it can rank.

        Raises:
            LookupError: a pattern matches no layer.
            ValueError: the run can rank no neuron of them.
        """
        if self.ranked and self.run is not None:
            return _ranked_layers(self.model, self.run, self.patterns)
        return find_layers(self.model, self.patterns)

    @functools.cached_property
    def weights(self) -> str:
        """The SHA-256 of the model's weights."""
        return weights_hash(self.model)

    @property
    def tokens(self) -> int:
        """How many tokens of the windows count."""
        text = self.windows
        return 0 if text is None else len(text) * (text.length - self.skip_first)

    @property
    def batches(self) -> Sequence[torch.Tensor]:
        """The windows (windows, length), as many at a time as run together."""
        assert self.windows is not None
        return self.windows.batches(self.batch_size)

    @property
    def seed(self) -> int:
        """The seed that the windows were drawn with."""
        return 0 if self.windows is None else self.windows.seed

    @property
    def blocks(self) -> dict[int, list[LinearLayer]]:
        """The layers of each block that has some."""
        found: dict[int, list[LinearLayer]] = {}
        for layer in self.layers:
            found.setdefault(layer.block, []).append(layer)
        return found

    @property
    def last_block(self) -> int:
        """The last block that has a layer."""
        return max(layer.block for layer in self.layers)

    def walk(self) -> BlockWalk:
        """Return the windows before the first block."""
        assert self.windows is not None
        return walk_blocks(self.model, self.windows, self.batch_size, self.skip_first)

    def evaluation_walk(self) -> BlockWalk:
        """Return the evaluation's windows before the first block."""
        assert self.evaluation is not None
        return walk_blocks(self.model, self.evaluation, self.batch_size, self.skip_first)

    def score(self) -> Score:
        """Score the model, as it now is, on the evaluation.

        Raises:
            NotFiniteError: its outputs are not finite.
        """
        assert self.evaluation is not None
        return perplexity(
            self.model,
            self.evaluation,
            batch_size=self.batch_size,
            skip_first=self.skip_first,
            progress=self.progress,
        )

    def provenance(self) -> dict[str, Any]:
        """Return what a run of it is made of: the beginning of its run.json."""
        model, text, scored = self.model, self.windows, self.evaluation
        drawn = text if text is not None else scored
        assert drawn is not None
        about = {
            "command": COMMAND.get(),
            "model": model.name_or_path,
            "class": type(model).__name__,
            "revision": getattr(model.config, "_commit_hash", None),
            "weights": self.weights,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "text": None if text is None else text.text,
            "fingerprint": None if text is None else text.fingerprint,
            "windows": 0 if text is None else len(text),
            "length": drawn.length,
            "available_windows": drawn.available,
            "seed": drawn.seed,
            "bos": drawn.bos,
            "skip_first": self.skip_first,
            "batch_size": self.batch_size,
            "layers": self.patterns,
            "skipped_parameters": skipped_parameters(model),
            "versions": versions(),
            "tokens": self.tokens,
        }
        if scored is not None:
            about |= {
                "evaluation": scored.text,
                "evaluation_fingerprint": scored.fingerprint,
                "evaluation_windows": len(scored),
                "evaluation_length": scored.length,
            }
        return about


def _ranked_layers(
    model: PreTrainedModel, run: xr.Dataset, patterns: Sequence[str]
) -> list[LinearLayer]:
    """Return the model's layers that match a pattern and have neurons that the run can rank.

    Raises:
        LookupError: a pattern matches no layer of the run.
        ValueError: there are none.
    """
    names = run["layer"].to_numpy().astype(str)
    wanted = set(names[matching(names, patterns) & trusted(run)])
    chosen = [layer for layer in find_layers(model) if layer.name in wanted]
    if not chosen:
        raise ValueError(
            f"no neuron of {patterns} has a distance to be ranked by: all are dead, broken or "
            "beyond their error bound"
        )
    return chosen


def _check_unseen(said: Mapping[str, Any], evaluation: TokenWindows) -> None:
    """See that a run was not measured on what is scored.

    Raises:
        ValueError: it was.
    """
    known = set(said.get("window_hashes", []))
    shared = sum(one in known for one in evaluation.hashes)
    if shared or said.get("fingerprint") == evaluation.fingerprint:
        raise ValueError(
            f"the run was measured on {shared or len(evaluation)} of the {len(evaluation)} windows "
            f"that are to be scored ({evaluation.text}): its neurons would be chosen by what is "
            "scored, evaluate on another text"
        )


PACKAGES = ("entangle", "torch", "transformers", "numpy", "numba", "scikit-learn")


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on."""
    return {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES}


class Stopwatch:
    """What a run cost: time from its making, and the process's peak of memory."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.clock = time.strftime("%Y-%m-%dT%H:%M:%S%z")

    def log(self) -> dict[str, Any]:
        """Return log.json: what does not determine a run."""
        return {
            "started": self.clock,
            "seconds": round(time.perf_counter() - self.start, 3),
            "peak_memory_bytes": _peak_memory(),
            **({"peak_device_bytes": torch.cuda.max_memory_allocated()} if _has_cuda() else {}),
            "machine": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
        }


def _has_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _peak_memory() -> int:
    """Return the largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, whose getrusage also counts the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].removesuffix("kB")) * 1024
    try:
        import resource
    except ImportError:  # Windows, where psutil knows it
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
