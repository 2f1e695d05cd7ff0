"""torch's global settings as our functions need them, whatever the user has set.

The default dtype, the default device, the precision of float32 products and autocast change the
results of code that does not name them. A public function sets them to torch's own defaults while
it runs, and restores what the user has set.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


# Of products on a GPU, with torch's own values; those that a version of torch lacks are left out.
_PRODUCTS = {
    "allow_fp16_reduced_precision_reduction": True,
    "allow_bf16_reduced_precision_reduction": True,
    "allow_fp16_accumulation": False,
}
_SPLIT_K = "_split_k"  # ends the name of the second half of a setting, which the first half resets


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Set torch's own defaults in the body, and restore the present settings after it."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":  # a mode that costs time in each call
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_products())
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def _products() -> Iterator[None]:
    """Compute products of float32 in float32, and those of 16 bits as torch does by default.

    torch has an old and a new setting of the precision of float32. Where a user has set the new one,
    torch refuses to read the old one, and writing the old one changes the new one.
    """
    precision = None
    with suppress(RuntimeError):
        precision = torch.get_float32_matmul_precision()
    gpu = torch.backends.cuda.matmul
    both: tuple[Any, Any] = gpu, getattr(torch.backends.mkldnn, "matmul", None)
    of_backends = [backend for backend in both if hasattr(backend, "fp32_precision")]
    precisions = [backend.fp32_precision for backend in of_backends]
    reductions: dict[str, Any] = {}
    for name in (name for name in _PRODUCTS if hasattr(gpu, name)):
        halves = [getattr(gpu, one) for one in (name, name + _SPLIT_K) if hasattr(gpu, one)]
        reductions[name] = tuple(halves) if len(halves) > 1 else halves[0]
    torch.set_float32_matmul_precision("highest")
    for name in reductions:
        setattr(gpu, name, _PRODUCTS[name])
    try:
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for backend, one in zip(of_backends, precisions, strict=True):
            backend.fp32_precision = one
        for name, value in reductions.items():
            setattr(gpu, name, value)


def float32_is_exact() -> bool:
    """Return whether torch computes products of float32 in float32, not in a shorter format."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the user has set torch's new setting, see `_products`
        return False


def with_torch_defaults(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return the function with `torch_defaults` around each call."""

    @functools.wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with torch_defaults():
            return function(*args, **kwargs)

    return wrapped
