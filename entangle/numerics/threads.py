"""The number of Numba's threads, set to that of OpenMP and torch, whose numbers do not change.

When Numba starts its threads, it sets the number of OpenMP's threads, and so of torch's, to the
number of cores. This module starts them and restores the numbers, whether torch is imported before
or after it, since the last bits of a product depend on the number of threads. Every module that
runs parallel kernels imports this one.
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
    """Start Numba's threads, and restore the numbers of threads of OpenMP and torch."""
    openmp, torch = _openmp(), sys.modules.get("torch")
    of_openmp = None if openmp is None else int(openmp.omp_get_max_threads())
    of_torch = None if torch is None else int(torch.get_num_threads())
    of_numba = int(numba.get_num_threads())  # starts them
    if of_openmp is not None:
        openmp.omp_set_num_threads(of_openmp)
    if torch is not None:
        torch.set_num_threads(of_torch)
    limits = (count for count in (of_openmp, of_torch) if count is not None)
    numba.set_num_threads(min(of_numba, *limits))


_start()


class TorchThreads:
    """A context in which Numba has as many threads as torch, within Numba's maximum.

    ``with`` yields their number. More threads than torch has cost time, since a kernel waits for all of
    them.
    """

    __slots__ = ("_before", "_threads")  # entered for each product of a token: it must be quick

    def __enter__(self) -> int:
        self._before: int = numba.get_num_threads()
        torchs: int = sys.modules["torch"].get_num_threads()
        self._threads: int = min(torchs, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        if self._threads != self._before:
            numba.set_num_threads(self._threads)
        return int(self._threads)

    def __exit__(self, *_: object) -> None:
        if self._threads != self._before:
            numba.set_num_threads(self._before)
