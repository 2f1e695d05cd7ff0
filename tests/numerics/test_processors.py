"""Which kernels run on which device."""

from collections.abc import Iterator

import pytest
import torch

from entangle.numerics import processors
from entangle.numerics.processors import kernels_of

CARD = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _first_time() -> Iterator[None]:
    processors._runs_triton.cache_clear()
    yield
    processors._runs_triton.cache_clear()


def test_each_kind_of_device_has_its_kernels() -> None:
    assert kernels_of(torch.device("cpu")) == "numba"
    assert kernels_of(torch.device("meta")) == "torch"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_runs_triton() -> None:
    assert kernels_of(CARD) == "triton"


def test_a_gpu_without_triton_runs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert kernels_of(CARD) == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("capability", "reason"), [((6, 1), r"7\.0.*\b6\.1\b"), ((9, 0), r"C compiler")]
)
def test_a_gpu_for_which_triton_cannot_compile_runs_torch(
    capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here Triton finds no driver, which is the error that it also raises without a compiler."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")
    with pytest.warns(UserWarning, match=rf"Some Card.*{reason}.*slower"):
        assert kernels_of(CARD) == "torch"
    assert kernels_of(CARD) == "torch"  # warned of once
