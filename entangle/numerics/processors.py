"""Which kernels run on a device."""

import functools
import importlib.util
import subprocess
import warnings
from typing import Literal

import torch

Kernels = Literal["numba", "triton", "torch"]

_OLDEST = (7, 0)  # compute capability of a card of NVIDIA that Triton compiles for


def kernels_of(device: torch.device) -> Kernels:
    """Return which kernels run on a device.

    These are Numba's on the CPU, Triton's with CUDA and ROCm, and plain torch elsewhere. Triton
    comes with torch for Linux. Where it is missing, as on Windows, or cannot compile, torch takes
    its place; a warning says why it cannot.
    """
    if device.type == "cpu":
        return "numba"
    if device.type != "cuda":
        return "torch"
    index = torch.cuda.current_device() if device.index is None else device.index
    return "triton" if _runs_triton(index) else "torch"


@functools.cache  # each batch asks for each layer
def _runs_triton(index: int) -> bool:
    """Return whether Triton is installed and can compile for a card; warn if it cannot."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    problem = None
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < _OLDEST:
        problem = (
            f"it needs compute capability 7.0, and the card has {'.'.join(map(str, capability))}"
        )
    else:
        try:
            triton.runtime.driver.active.get_current_target()  # compiles a part in C
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            problem = f"{error}. Install a C compiler (gcc) and the headers of Python"
    if problem:
        warnings.warn(
            f"Triton cannot be used on {torch.cuda.get_device_name(index)}: {problem}. Plain torch "
            "takes its place, which is many times slower",
            stacklevel=2,
        )
    return problem is None
