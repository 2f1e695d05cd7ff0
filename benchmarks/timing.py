"""Timing of cases in turns, and the forward pass that is timed."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from entangle.model.hooks import backbone_of
from entangle.runs.setup import versions

ROUNDS = 7


def machine() -> str:
    """Return a line with the processor, the threads and the versions of packages."""
    processor = [line for line in _processor() if line] or [platform.processor()]
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{processor[0]}, {torch.get_num_threads()} threads; {packages}"


def _processor() -> list[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return [line.split(":")[1].strip() for line in lines if line.startswith("model name")]


def side_by_side(
    cases: dict[str, Callable[[], Any]],
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return each case's median seconds; the cases take turns, after one turn to warm up.

    A case ends when its work on a GPU has ended too. The clock may be `time.process_time`, which does
    not count what other processes do.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            start = clock()
            case()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def forward(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Run the model without its output embedding, as `measure` does."""
    with torch.inference_mode():
        backbone_of(model)(input_ids=tokens, use_cache=False)
