"""A run's folder that a killed command goes on with."""

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
    """Give a run's folder to fill, with what an unfinished run of the same attributes left in it.

    The attributes are its run.json. After an error what is done stays in ``TARGET.partial``, and
    the same run goes on there. Without a target the folder is gone at the end.

    Under torchrun rank 0 makes the folder and gives it to all.

    Raises:
        FileExistsError: an unfinished run of other attributes is in the way and ``overwrite`` is
            false; or as `folders.new_folder` says.
        RuntimeError: the ranks do not have the same attributes.
        StoppedError: on another rank than 0, which has an error.
    """
    if target is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(ranks.from_rank(0, temporary))
            ranks.everyone(None)
        return
    if ranks.rank() > 0:
        ranks.agree(attributes)
        yield folders.shared_partial(Path(target))
        ranks.everyone(None)  # none reads there any more
        return

    def goes_on(partial: Path) -> bool:
        file = partial / "run.json"
        if not file.is_file():
            return False
        left, wanted = store.read_json(file), json.loads(json.dumps(attributes))
        if left == wanted:
            return True
        if not overwrite:
            names = [key for key in {**left, **wanted} if left.get(key) != wanted.get(key)]
            names = [key for key in names if key != "command"] or names  # it repeats the others
            there = [f"{key} {left.get(key)!r}, not {wanted.get(key)!r}" for key in names]
            began = left.get("command")
            if began:  # which does not say what determines no result
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
        with ranks.leading(attributes):
            folder = stack.enter_context(
                folders.new_folder(target, overwrite=overwrite, goes_on=goes_on)
            )
            store.write_json(folder / "run.json", attributes)
        yield folder
        ranks.everyone(None)


def unwritten(arms: Mapping[Path, Arm]) -> dict[Path, Arm]:
    """Return the arms whose files are not written yet, as rank 0 sees them."""
    there = ranks.from_rank(0, [file.exists() for file in arms])
    return {f: arm for (f, arm), done in zip(arms.items(), there, strict=True) if not done}
