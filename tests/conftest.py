"""Before any import of what reads them: no progress bars, no hub, and Triton's kernels on the CPU."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first: at the end one process would run them while the others wait.

    They are those of the real model, and then those of whole commands, which lie in no room.
    """
    here = Path(__file__).parent
    items.sort(key=lambda one: (one.get_closest_marker("real") is None, one.path.parent != here))


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
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that tests start
        _set_threads(1, 1)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device to count, prune and score on; a machine without a GPU skips cuda."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU; without one the CPU, on which layers run the GPU's kernels by Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    for module in ("numerics.device_weights", "model.experts", "model.packing", "model.loading"):
        monkeypatch.setattr(f"entangle.{module}.kernels_of", lambda _: "triton")
    _multiply_bfloat16(monkeypatch)
    return torch.device("cpu")


def _multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply matrices of bfloat16: it takes their bits for whole numbers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def float32(tensor: Any) -> Any:
        if tensor.dtype != tl.bfloat16:
            return tensor
        return TensorHandle((tensor.data.astype("u4") << 16).view("f4"), tl.float32)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *others: dot(self, float32(a), float32(b), *others),
    )


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run all but the real model on one thread."""
    import numba

    threads = torch.get_num_threads(), numba.get_num_threads()
    if request.node.get_closest_marker("real") is None:
        _set_threads(1, 1)
    yield
    _set_threads(*threads)


def _set_threads(torchs: int, numbas: int) -> None:
    import numba

    torch.set_num_threads(torchs)
    numba.set_num_threads(numbas)
