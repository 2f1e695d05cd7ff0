"""Run folders that resume the work of a killed command."""

import json
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from entangle.model import folders, ranks
from entangle.runs import store

Arm = TypeVar("Arm")


@contextmanager
def resumed_run(
    target: str | Path | None, attributes: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield a run's folder to fill; it has the files of an unfinished run with the same attributes.

    ``attributes`` are the content of run.json. The folder is ``TARGET.partial`` and is renamed at
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
        left, wanted = store.read_json(file), json.loads(json.dumps(attributes))
        if left == wanted:
            return True
        if not overwrite:
            names = [key for key in {**left, **wanted} if left.get(key) != wanted.get(key)]
            # The command repeats the other settings.
            names = [key for key in names if key != "command"] or names
            there = [f"{key} {left.get(key)!r}, not {wanted.get(key)!r}" for key in names]
            began = left.get("command")
            if began:  # it lacks the flags that change no result
                began += f" --shard {left['shard']}" if "shard" in left else ""
                began += f" --out {target}"
            raise FileExistsError(
                f"{partial} holds an unfinished run with other settings: it has "
                f"{textwrap.shorten('; '.join(there), 300, placeholder=' ...')}. Run what "
                f"began it ({began or 'in Python'}) to finish it, or say --overwrite "
                "to begin anew"
            )
        return False

    with ExitStack() as stack:
        with ranks.rank_zero_runs(attributes):
            folder = stack.enter_context(
                folders.new_folder(target, overwrite=overwrite, can_resume=can_resume)
            )
            store.write_json(folder / "run.json", attributes)
        yield folder
        ranks.all_gather(None)


def unwritten(arms: Mapping[Path, Arm]) -> dict[Path, Arm]:
    """Return the arms whose files do not exist yet; rank 0 looks, so that all ranks agree."""
    there = ranks.from_rank(0, [file.exists() for file in arms])
    return {f: arm for (f, arm), done in zip(arms.items(), there, strict=True) if not done}
