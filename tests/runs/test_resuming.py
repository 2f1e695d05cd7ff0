"""Messages about an unfinished run that was begun with other settings."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from entangle.model import folders
from entangle.runs.resuming import resumed_run

OLD: dict[str, Any] = {
    "command": "entangle measure model",
    "bins": 128,
    "weights": "0" * 64,
    "layers": ["*.q_proj", "*.k_proj"],
    "arms": [{"sparsity": 0.5}],
    "run": {"path": "a", "weights": "b"},
    "text": "t" * 60 + "/a",
    "versions": {"torch": "2.6", "numpy": "2.0"},
}


def other(tmp_path: Path, **changes: Any) -> str:
    """Return the message about an unfinished run whose settings were OLD before these changes."""
    partial = folders.partial_of(tmp_path / "run")
    partial.mkdir()
    for name in (".lock", folders.RESUMABLE, "work"):
        (partial / name).touch()
    (partial / "run.json").write_text(json.dumps(OLD))
    with pytest.raises(FileExistsError, match="unfinished") as caught:
        resumed_run(tmp_path / "run", OLD | changes).__enter__()
    assert (partial / "work").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bins": 256}, "bins: 128, now 256"),
        ({"bins": None, "command": "entangle measure other"}, "bins: 128, now none"),
        ({"shard": "1/2"}, "shard: none, now 1/2"),
        ({"command": None}, "command: entangle measure model, now none"),
        ({"layers": ["*.q_proj"]}, "layers: *.q_proj, *.k_proj, now *.q_proj"),
        ({"versions": {"torch": "2.7", "numpy": "2.0"}}, "versions.torch: 2.6, now 2.7"),
        ({"bins": 1, "versions": {}}, "bins: 128, now 1; versions.torch: 2.6, now none; "),
        ({"arms": [{"sparsity": 0.6}, {"sparsity": 0.7}]}, "arms.0.sparsity: 0.5, now 0.6; arms.1"),
        ({"run": None}, "run: path a, weights b, now none"),
        ({"text": "t" * 60 + "/b"}, "text: ...ttttttttt/a, now ...ttttttttt/b"),
        ({"weights": "1" * 64}, f"weights: {'0' * 37}..., now {'1' * 37}...)"),
    ],
)
def test_the_settings_that_differ_are_told_with_their_old_and_new_values(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    message = other(tmp_path, **changes)
    assert f"({expected}" in message
    assert f"(entangle measure model --out {tmp_path / 'run'})" in message
    assert not re.search(r"[{}\[\]']", message)


def test_of_many_settings_that_differ_five_are_told(tmp_path: Path) -> None:
    message = other(tmp_path, **{f"s{number}": number for number in range(9)})
    assert "s4: none, now 4; and 4 more)" in message
    assert "s5" not in message
