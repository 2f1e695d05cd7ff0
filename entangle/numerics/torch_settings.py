"""torch's global settings as our functions need them, whatever the user has set.

The default dtype, the default device, the precision of float32 products and autocast change the
results of code that does not name them. A public function sets them to torch's own defaults while
it runs, and restores what the user has set.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Set torch's own defaults in the body, and restore the present settings after it."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":  # a mode that costs time in each call
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)


def with_torch_defaults(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return the function with `torch_defaults` around each call."""

    @functools.wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with torch_defaults():
            return function(*args, **kwargs)

    return wrapped
