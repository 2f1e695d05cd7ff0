"""Before any import of what reads them: no progress bars, and no hub."""

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd"))):
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU, Triton's kernels run on a CPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the real model first: at the end one process would run it while the others wait."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


@pytest.fixture(scope="session", autouse=True)
def _session() -> None:
    """Keep what is imported out of garbage collections: each run that is written starts one.

    Beside other processes of the suite, use one thread: on busy cores two wait for each other.
    """
    import entangle

    for name in entangle.__all__:
        getattr(entangle, name)
    gc.freeze()
    if "PYTEST_XDIST_WORKER" in os.environ:
        _set_threads(1, 1)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> "torch.device":
    """Each device to count, prune and score on; a machine without a GPU skips cuda."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run all but the real model on one thread."""
    import numba
    import torch

    threads = torch.get_num_threads(), numba.get_num_threads()
    if request.node.get_closest_marker("real") is None:
        _set_threads(1, 1)
    yield
    _set_threads(*threads)


def _set_threads(torchs: int, numbas: int) -> None:
    import numba
    import torch

    torch.set_num_threads(torchs)
    numba.set_num_threads(numbas)
