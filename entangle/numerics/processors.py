"""Which kernels run on a device."""

import functools
import importlib.util
from typing import Literal

import torch

Kernels = Literal["numba", "triton", "torch"]


def kernels_of(device: torch.device) -> Kernels:
    """Return which kernels run on a device.

    These are Numba's on the CPU, Triton's with CUDA and ROCm, and plain torch elsewhere. Triton
    comes with torch for Linux; where it is missing, as on Windows, torch takes its place.
    """
    if device.type == "cpu":
        return "numba"
    return "triton" if device.type == "cuda" and _has_triton() else "torch"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
