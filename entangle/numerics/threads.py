"""Numba's threads beside torch's: as many, and torch's count left as it is.

Numba's threads, when they are first asked for, tell torch's pool to have as many as there are
cores. That is done here and undone, since a product's last bits depend on the number of threads.
A module with kernels that run beside torch imports this one.
"""

import numba
import torch

_threads = torch.get_num_threads()
numba.get_num_threads()
torch.set_num_threads(_threads)
numba.set_num_threads(min(_threads, numba.get_num_threads()))


def like_torch() -> int:
    """Have as many threads as torch has, and return how many: to wait for one more costs time."""
    threads: int = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(threads)
    return threads
