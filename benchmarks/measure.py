"""Cost of measuring, as ratios of times that are taken in turns. Run `make bench` (ten minutes).

Prints the tables of `benchmarks/README.md`.
"""

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import ot
import torch
from scipy import stats

import entangle
from benchmarks.timing import forward, machine, side_by_side
from entangle.model.hooks import recording_rows
from entangle.model.layers import find_layers
from entangle.numerics import gaussian, wasserstein
from entangle.numerics.histograms import Histograms
from entangle.numerics.kernels.bins import STEPS

DATA = Path(__file__).parents[1] / "data"


def main() -> None:
    """Run the benchmark and print its tables."""
    print(machine(), end="\n\n")
    recording()
    kernel()
    distances()
    memory()


def table(title: str, seconds: dict[str, float], *, unit: float, name: str, base: str) -> None:
    """Print medians and their ratios to the base."""
    print(f"| {title} | {name} | ratio |\n|---|---|---|")
    for case, value in seconds.items():
        print(f"| {case} | {value / unit:.4g} | {value / seconds[base]:.3f} |")
    print(flush=True)


def recording() -> None:
    """Time one batch of 4 windows of 512 through SmolLM2-135M, recorded and not."""
    model = entangle.load_model(DATA / "smollm2-135m")
    tokenizer = entangle.load_tokenizer(DATA / "smollm2-135m")
    windows = entangle.token_windows(DATA / "python-docs", tokenizer, windows=4)
    tokens = windows.tokens
    twin = copy.deepcopy(model)  # so that the hooks of one do not slow down the other

    def with_hooks() -> None:
        with recording_rows(model, find_layers(model), lambda *_: None):
            forward(model, tokens)

    with entangle.record(twin):
        forward(twin, tokens)  # the pilot
        seconds = side_by_side(
            {
                "plain forward pass": lambda: forward(model, tokens),
                "with hooks that do nothing": with_hooks,
                "recorded": lambda: forward(twin, tokens),
            }
        )
    table(
        "SmolLM2-135M without its output embedding, 2,048 tokens, 210 layers",
        seconds,
        unit=1,
        name="seconds",
        base="plain forward pass",
    )


@numba.njit(parallel=True, nogil=True)
def _count_only(rows, center, inverse, counts):  # type: ignore[no-untyped-def]
    """Count as the recorder does, but without moments and tails."""
    tokens, neurons = rows.shape
    edge = np.float32(STEPS // 2 * counts.shape[1])
    for block in numba.prange((neurons + 63) // 64):
        begin = block * 64
        end = min(begin + 64, neurons)
        numbers = np.empty((128, end - begin), np.uint16)
        c, v = center[begin:end].copy(), inverse[begin:end].copy()
        for first in range(0, tokens, 128):
            length = min(128, tokens - first)
            for t in range(length):
                x, k = rows[first + t, begin:end], numbers[t]
                for j in range(end - begin):
                    y = np.floor((x[j] - c[j]) * v[j]) + edge
                    k[j] = np.uint16(np.int32(min(max(y, np.float32(0)), edge + edge - 1)) >> 6)
            for j in range(end - begin):
                bins = counts[begin + j]
                for t in range(length):
                    bins[numbers[t, j]] += np.int32(1)


def kernel() -> None:
    """Time the recording of given rows, compared with counting alone."""
    rows = torch.randn(2048, 1536, generator=torch.Generator().manual_seed(0))
    histograms = [Histograms.zeros(rows.shape[1]) for _ in range(8)]  # beyond the caches
    for state in histograms:
        state.start(rows)
    center = histograms[0].center.float().numpy()
    inverse = (STEPS / histograms[0].width).float().numpy()

    def plain() -> None:
        for state in histograms:
            _count_only(rows.numpy(), center, inverse, state.counts.numpy())

    def whole() -> None:
        for state in histograms:
            state.add(rows)

    def bincount() -> None:
        for state in histograms[:1]:
            bins = ((rows - state.center.float()) / state.width.float()).floor_().long()
            bins += 512 + 1024 * torch.arange(rows.shape[1])
            torch.bincount(bins.flatten(), minlength=1024 * rows.shape[1])

    seconds = side_by_side({"counts alone": plain, "counts, moments and tails": whole})
    seconds["torch.bincount, counts alone"] = 8 * side_by_side({"": bincount}, 3)[""]
    table(
        "recording 2,048 x 1,536 values",
        seconds,
        unit=8 * rows.numel() * 1e-9,
        name="ns a value",
        base="counts alone",
    )


def distances(tokens: int = 65_536, neurons: int = 32) -> None:
    """Time a neuron's distance on one thread, from its histogram and from its samples."""
    rows = np.random.default_rng(0).standard_t(5, (tokens, neurons)).astype(np.float32)
    columns = np.ascontiguousarray(rows.T)
    histograms = Histograms.from_rows(torch.from_numpy(rows))
    moments = histograms.moments()
    drawn = np.random.default_rng(1).standard_normal(tokens)

    def loop(distance: Callable[[Any, Any], Any]) -> Callable[[], None]:
        def run() -> None:
            for column in columns[:4]:
                distance((column - column.mean()) / column.std(), drawn)

        return run

    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    seconds = side_by_side(
        {
            "from its histogram": lambda: wasserstein.from_histograms(histograms, moments),
            "the sort of its samples alone": lambda: np.sort(columns, axis=1),
            "exact, from its samples": lambda: gaussian.from_samples(columns.T),
            "SciPy": loop(stats.wasserstein_distance),
            "POT": loop(ot.wasserstein_1d),
        }
    )
    numba.set_num_threads(threads)
    per = {
        case: value / (4 if case in {"SciPy", "POT"} else neurons)
        for case, value in seconds.items()
    }
    table(
        f"the distance of one neuron, {tokens:,} tokens, one thread",
        per,
        unit=1e-6,
        name="us",
        base="SciPy",
    )


def memory() -> None:
    """Measure the peak memory of whole runs over 16 and 128 windows."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for windows in (16, 128):
            out = Path(folder) / str(windows)
            line = [sys.executable, "-m", "entangle", "measure", str(DATA / "smollm2-135m")]
            line += ["--text", str(DATA / "python-docs"), "--windows", str(windows)]
            subprocess.run([*line, "--out", str(out)], check=True, capture_output=True)
            log = json.loads((out / "log.json").read_text())
            peaks[f"{windows} windows of 512, {log['seconds']:.0f} s"] = log["peak_memory_bytes"]
    first = next(iter(peaks))
    table("peak memory of entangle measure", peaks, unit=1e9, name="GB", base=first)


if __name__ == "__main__":
    main()
