"""Run folders that resume the work of a killed command."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from entangle.model import folders, ranks
from entangle.model.text import TokenWindows
from entangle.runs import own_text, store

Arm = TypeVar("Arm")

_SHOWN, _WIDTH = 5, 40  # settings, and characters of a value, in the message of other settings


@contextmanager
def resumed_run(
    target: str | Path | None,
    attributes: Mapping[str, Any],
    windows: TokenWindows | None = None,
    *,
    overwrite: bool = False,
) -> Iterator[Path]:
    """Yield a run's folder to fill; it has the files of an unfinished run with the same attributes.

    ``attributes`` are the content of run.json. What a model wrote itself among the ``windows`` is
    kept beside it, for the next run to read. The folder is ``TARGET.partial`` and is renamed at
    the end. After an error its files stay there, and the next run with the same attributes resumes.
    Without a target, yield a temporary folder that is deleted at the end. Under torchrun rank 0
    makes the folder and all ranks use it.

    Raises:
        FileExistsError: ``TARGET.partial`` holds an unfinished run with other attributes and
            ``overwrite`` is false, or for a reason of `folders.new_folder`.
        RuntimeError: the ranks have different attributes.
        StoppedError: rank 0 has an error; raised on the other ranks.
    """
    if target is None:
        with tempfile.TemporaryDirectory() as temporary:
            store.write_json(Path(temporary) / "run.json", attributes)
            yield Path(ranks.from_rank(0, temporary))
            ranks.all_gather(None)
        return
    if ranks.rank() > 0:
        ranks.wait_for_rank_zero(attributes)
        yield folders.shared_partial(Path(target))
        ranks.all_gather(None)  # rank 0 renames the folder only when no rank uses it
        return

    def can_resume(partial: Path) -> bool:
        file = partial / "run.json"
        if not file.is_file():
            return False
        try:
            old, new = store.read_json(file), json.loads(json.dumps(attributes))
        except ValueError:
            if overwrite:
                return False
            raise
        if old == new:
            return True
        if not overwrite:
            command = old.get("command")
            if command:  # it lacks the flags that change no result
                command += f" --shard {old['shard']}" if "shard" in old else ""
                command += f" --out {target}"
            raise FileExistsError(
                f"{partial} is unfinished and has other settings ({_changes(old, new)}). To resume "
                f"it, run its command again ({command or 'in Python'}); to begin anew, use "
                "--overwrite"
            )
        return False

    with ExitStack() as stack:
        with ranks.rank_zero_runs(attributes):
            folder = stack.enter_context(
                folders.new_folder(target, overwrite=overwrite, can_resume=can_resume)
            )
            store.write_json(folder / "run.json", attributes)
            own_text.keep(folder, windows)
        yield folder
        ranks.all_gather(None)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the settings that differ, as ``name: old value, now new value``."""
    changed = _changed(old, new)
    # The command repeats the other settings.
    changed = {name: values for name, values in changed.items() if name != "command"} or changed
    texts = [f"{name}: {a}, now {b}" for name, (a, b) in changed.items()]
    return "; ".join(texts[:_SHOWN]) + (
        f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    )


def _changed(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[str, str]]:
    """Return the values that differ by name; a name in a mapping is ``MAPPING.NAME``."""
    found: dict[str, tuple[str, str]] = {}
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, list) and isinstance(b, list) and any(isinstance(x, dict) for x in a + b):
            a, b = ({str(number): item for number, item in enumerate(one)} for one in (a, b))
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= _changed(a, b, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = _short(_text(a), _text(b))
    return found


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{name} {item}" for name, item in value.items()]
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return "none" if value in {None, ""} else str(value)


def _short(a: str, b: str) -> tuple[str, str]:
    """Return two texts, cut to the part around their first difference if one is long."""
    pairs = enumerate(zip(a, b, strict=False))
    alike = next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))
    start = max(alike - _WIDTH // 4, 0)
    if max(len(a), len(b)) <= _WIDTH:
        return a, b
    first, second = (f"{'...' if start else ''}{text[start:]}" for text in (a, b))
    cut = [text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..." for text in (first, second)]
    return cut[0], cut[1]


def unwritten(arms: Mapping[Path, Arm]) -> dict[Path, Arm]:
    """Return the arms whose files do not exist yet; rank 0 looks, so that all ranks agree."""
    finished = ranks.from_rank(0, [file.exists() for file in arms])
    return {f: arm for (f, arm), done in zip(arms.items(), finished, strict=True) if not done}
