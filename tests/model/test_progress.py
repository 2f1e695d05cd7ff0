import sys
from types import SimpleNamespace
from typing import Any

import pytest

from entangle.model import progress


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the last bar was made with."""
    found: dict[str, Any] = {}

    def made(work: Any, **options: Any) -> Any:
        found.update({"disable": "by the environment"} | options)
        return work

    monkeypatch.setattr(progress, "tqdm", made)
    return found


@pytest.mark.parametrize(
    ("shown", "kernel", "disable"),
    [
        (None, True, "by the environment"),
        (None, False, True),
        (True, False, "by the environment"),
        (False, True, True),
    ],
)
def test_a_bar_is_seen_if_asked_for_or_in_a_notebook(
    shown: bool | None,
    kernel: bool,
    disable: object,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shell = SimpleNamespace(kernel=1) if kernel else SimpleNamespace()  # a kernel's, a terminal's
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert progress.progress_bar([1], unit="token", shown=shown) == [1]
    assert options["disable"] == disable


def test_without_ipython_no_bar_is_seen(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    progress.progress_bar(unit="token", total=3, shown=None)
    assert options["disable"] is True
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    progress.progress_bar(unit="token", total=3, shown=None)
    assert options["disable"] is True


def test_the_environment_hides_a_bar_that_is_asked_for() -> None:
    """TQDM_DISABLE is set for all tests, before tqdm is imported."""
    assert progress.progress_bar([1], unit="token", shown=True).disable
