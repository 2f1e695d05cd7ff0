"""A command line that runs, as the command line itself says it to what writes run.json."""

from collections.abc import Iterator
from contextlib import contextmanager

from entangle.runs.setup import COMMAND


@contextmanager
def running(command: str) -> Iterator[None]:
    """Let what is called be what a command line calls."""
    token = COMMAND.set(command)
    try:
        yield
    finally:
        COMMAND.reset(token)
