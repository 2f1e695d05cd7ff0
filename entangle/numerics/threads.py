"""The number of Numba's threads, set to that of OpenMP and torch, whose numbers do not change.

When Numba starts its threads, it sets the number of OpenMP's threads, and so of torch's, to the
number of cores. This module starts them and restores the numbers, whether torch is imported before
or after it, since the last bits of a product depend on the number of threads. Every module that
runs parallel kernels imports this one.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba


def _openmp() -> Any:
    """Return the OpenMP library that Numba and torch share on Linux, or None."""
    try:
        return ctypes.CDLL("libgomp.so.1")
    except OSError:
        return None


def _start() -> None:
    """Start Numba's threads, and restore the numbers of threads of OpenMP and torch."""
    openmp, torch = _openmp(), sys.modules.get("torch")
    before = None if openmp is None else int(openmp.omp_get_max_threads())
    kept = None if torch is None else int(torch.get_num_threads())
    most = int(numba.get_num_threads())
    if before is not None:
        openmp.omp_set_num_threads(before)
    if torch is not None:
        torch.set_num_threads(kept)
    numba.set_num_threads(min(most, *(count for count in (before, kept) if count is not None)))


_start()


@contextmanager
def like_torch() -> Iterator[int]:
    """Give Numba as many threads as torch has, within Numba's maximum, and yield the number.

    More threads than torch has cost time, since a kernel waits for all of them.
    """
    before = numba.get_num_threads()
    threads: int = min(sys.modules["torch"].get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(threads)
    try:
        yield threads
    finally:
        numba.set_num_threads(before)
