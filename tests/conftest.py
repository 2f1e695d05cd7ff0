"""Before any import of what reads them: no progress bars, and no hub."""

import os
from collections.abc import Iterator

import pytest

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run all but the real model on one thread: on busy cores two wait for each other."""
    import numba
    import torch

    threads = torch.get_num_threads(), numba.get_num_threads()
    if request.node.get_closest_marker("real") is None:
        torch.set_num_threads(1)
        numba.set_num_threads(1)
    yield
    torch.set_num_threads(threads[0])
    numba.set_num_threads(threads[1])
