"""Numba's threads, as many as OpenMP and torch have, whose own counts are left as they are.

When Numba's threads are first asked for, it tells OpenMP, and so torch, to use as many threads as
there are cores. That is done here and undone, whether torch is imported already or comes later,
since the last bits of a product depend on the number of threads. Every module that runs parallel
kernels imports this one.
"""

import ctypes
import sys
from typing import Any

import numba


def _openmp() -> Any:
    """Return the OpenMP library that Numba and torch share on Linux, or None."""
    try:
        return ctypes.CDLL("libgomp.so.1")
    except OSError:
        return None


def _start() -> None:
    """Start Numba's threads, and give OpenMP and torch their counts back."""
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


def like_torch() -> int:
    """Have as many threads as torch has, and return how many: to wait for one more costs time."""
    threads: int = min(sys.modules["torch"].get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(threads)
    return threads
