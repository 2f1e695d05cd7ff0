"""What a command runs on: model, windows and run, checked, and saved as run.json."""

import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
import xarray as xr
from transformers import PreTrainedModel

from entangle.model.layers import LinearLayer, find_layers, skipped_parameters
from entangle.model.loading import weights_hash
from entangle.model.text import TokenWindows
from entangle.runs.dataset import dataset_of, matching, trusted


def check_run(
    model: PreTrainedModel, run: xr.DataTree | xr.Dataset, evaluation: TokenWindows
) -> None:
    """See that a run is of this model, and was not measured on what the model is scored on.

    Raises:
        ValueError: if not.
    """
    check_weights(model, run)
    about = dataset_of(run).attrs
    known = set(about.get("window_hashes", []))
    shared = sum(one in known for one in evaluation.hashes)
    if shared or about.get("fingerprint") == evaluation.fingerprint:
        raise ValueError(
            f"the run was measured on {shared or len(evaluation)} of the {len(evaluation)} windows "
            f"that are to be scored ({evaluation.text}): its neurons would be chosen by what is "
            "scored, evaluate on another text"
        )


def layers_of(
    model: PreTrainedModel, run: xr.DataTree | xr.Dataset, patterns: str | Sequence[str]
) -> list[LinearLayer]:
    """Return the model's layers that match a pattern and have neurons that the run can rank.

    Raises:
        LookupError: a pattern matches no layer of the run.
        ValueError: there are none.
    """
    names = dataset_of(run)["layer"].to_numpy().astype(str)
    wanted = set(names[matching(names, patterns) & trusted(run)])
    chosen = [layer for layer in find_layers(model) if layer.name in wanted]
    if not chosen:
        raise ValueError(
            f"no neuron of {patterns} has a distance to be ranked by: all are dead, broken or "
            "beyond their error bound"
        )
    return chosen


def check_weights(model: PreTrainedModel, run: xr.DataTree | xr.Dataset) -> None:
    """See that a run is of this model, and whole.

    Raises:
        ValueError: it was measured on other weights, or is a shard.
    """
    attributes, weights = dataset_of(run).attrs, weights_hash(model)
    if "shard" in attributes:
        raise ValueError(
            f"the run is shard {attributes['shard']} of one: make it whole first, with entangle merge"
        )
    if attributes.get("weights") != weights:
        raise ValueError(
            f"the run was measured on other weights ({attributes.get('model', '?')}, "
            f"{str(attributes.get('weights'))[:12]}) than this model has ({model.name_or_path}, "
            f"{weights[:12]}): measure this model, or load the one that was measured"
        )


def provenance(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    layers: str | Sequence[str],
    batch_size: int,
    skip_first: int,
    command: str | None,
    evaluation: TokenWindows | None = None,
) -> dict[str, Any]:
    """Return what a run of a model on windows is made of: the beginning of its run.json."""
    scored: dict[str, Any] = {}
    if evaluation is not None:
        scored = {
            "tokens": len(windows) * (windows.length - skip_first),
            "evaluation": evaluation.text,
            "evaluation_fingerprint": evaluation.fingerprint,
            "evaluation_windows": len(evaluation),
            "evaluation_length": evaluation.length,
        }
    return {
        "command": command,
        "model": model.name_or_path,
        "class": type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": weights_hash(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "text": windows.text,
        "fingerprint": windows.fingerprint,
        "windows": len(windows),
        "length": windows.length,
        "available_windows": windows.available,
        "seed": windows.seed,
        "bos": windows.bos,
        "skip_first": skip_first,
        "batch_size": batch_size,
        "layers": [layers] if isinstance(layers, str) else list(layers),
        "skipped_parameters": skipped_parameters(model),
        "versions": versions(),
        **scored,
    }


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
