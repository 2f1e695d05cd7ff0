"""Numba's threads and torch's: neither changes the other's number."""

import os
import subprocess
import sys
from contextlib import nullcontext

import numba
import pytest
import torch

from entangle.numerics.sparse import slice_rows
from entangle.numerics.threads import TorchThreads

PRUNE = """
import torch
from entangle.numerics.moments import InputMoments
from entangle.numerics.masks import prune
from entangle.numerics.sparsity import Sparsity
before = torch.get_num_threads()
rows = torch.randn(500, 64)
moments = InputMoments.zeros(64)
moments.add(rows)
prune(torch.randn(70, 64), moments, Sparsity(0.5))
print(before, torch.get_num_threads())
"""


def ran(code: str, *words: str, torchs: int, numbas: int) -> list[str]:
    """Return what a new process prints: each of the libraries starts its threads once."""
    environment = {"OMP_NUM_THREADS": str(torchs), "NUMBA_NUM_THREADS": str(numbas)}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | environment
    ).stdout.split()


def test_torch_keeps_its_number_of_threads() -> None:
    # If not, the first layer that a process prunes has other bits than a later one.
    assert ran(PRUNE, torchs=1, numbas=2) == ["1", "1"]


DISTANCES = """
import sys
if sys.argv[1] == "torch first":
    import torch
import numpy as np
from entangle.numerics.gaussian import from_samples
from_samples(np.random.default_rng(0).standard_normal((1000, 64)))
import torch
print(torch.get_num_threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch has an OpenMP of its own")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch has an OpenMP of its own")
@pytest.mark.parametrize(("order", "threads"), [("torch first", 2), ("torch last", 1)])
def test_distances_leave_torch_its_number_of_threads(order: str, threads: int) -> None:
    assert ran(DISTANCES, order, torchs=threads, numbas=3 - threads) == [str(threads)]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("torchs", [1, 2])
@pytest.mark.parametrize("numbas", [1, 2])
def test_numba_has_torchs_number_of_threads_and_then_its_own(
    numbas: int, torchs: int, fails: bool
) -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:  # type: ignore[attr-defined]
        pytest.skip("needs two cores")
    numba.set_num_threads(numbas)
    torch.set_num_threads(torchs)
    with pytest.raises(KeyError) if fails else nullcontext(), TorchThreads() as found:
        assert found == numba.get_num_threads() == torchs
        if fails:
            raise KeyError
    assert (numba.get_num_threads(), torch.get_num_threads()) == (numbas, torchs)


def test_a_product_leaves_numba_its_number_of_threads() -> None:
    sliced = slice_rows(torch.randn(1, 20, 30))
    numba.set_num_threads(1)
    torch.set_num_threads(2)
    for tokens in (1, 5):
        sliced.product(torch.randn(tokens, 30), 0)
    sliced.dense(0)
    assert numba.get_num_threads() == 1
