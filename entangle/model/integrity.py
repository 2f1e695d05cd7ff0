"""Whether a model's folder still holds the files that were written to it.

Sizes and headers cost nothing and are checked each time that a model is loaded. SHA-256 sums need
every byte, so they are checked on demand.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from entangle.model import folders

LOG = "log.json"  # beside other things it has `files` (SHA-256 sums) and `bytes` (sizes), by name
_AGAIN = "Make or copy the folder again"


def described_files(folder: Path, ignored: str) -> dict[str, Any]:
    """Return the SHA-256 sums and the sizes of a folder's files, for its log.json.

    Names that begin with a dot, log.json itself and the subfolder ``ignored`` are left out.

    Raises:
        OSError: a file cannot be read.
    """
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    names = [
        path.as_posix()
        for path in paths
        if path.parts[0] not in {ignored, LOG} and not path.name.startswith(".")
    ]
    sizes = {name: (folder / name).stat().st_size for name in names}
    return {"files": folders.sums(folder, names), "bytes": sizes}


def check_weights(folder: Path) -> None:
    """Check the files of a model's weights: they exist, and have the written sizes and whole data.

    Raises:
        ValueError: a file is missing, was cut or has no safetensors header; the message names it.
    """
    sizes = _written(folder, "bytes")
    for name in dict.fromkeys([*_weights(folder), *(n for n in sizes if _has_weights(n))]):
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing. {_AGAIN}")
        size, written = file.stat().st_size, sizes.get(name)
        if written is not None and size != written:
            raise ValueError(
                f"{folder} is damaged: {name} has {size:,} bytes, but {written:,} were written. "
                f"{_AGAIN}, or delete its {LOG} if you changed the file on purpose"
            )
        try:
            with safe_open(file, framework="pt"):
                pass  # compares the header's offsets with the size of the file
        except SafetensorError as error:
            raise ValueError(
                f"{folder} is damaged: {name} was cut or is no safetensors file ({error}). {_AGAIN}"
            ) from error


def check_files(folder: Path) -> None:
    """Check the SHA-256 sums of all files that were written into a model's folder.

    Raises:
        ValueError: there are no sums, or a file is missing or has another sum; the message names it.
    """
    sums = _written(folder, "files")
    if not sums:
        raise ValueError(
            f"cannot verify {folder}: it has no SHA-256 sums, which entangle writes to the {LOG} of "
            "a pruned model. Leave out --verify (verify=True)"
        )
    advice = f"{_AGAIN}, or leave out --verify if you changed the file on purpose"
    folders.check_sums(folder, sums, advice)


def has_sums(folder: Path) -> bool:
    """Return whether a folder's log.json has the sums of its files."""
    return bool(_written(folder, "files"))


def _written(folder: Path, kind: str) -> dict[str, Any]:
    """Return the sums or the sizes of the files of a model in log.json; empty if it has none."""
    try:
        log = json.loads((folder / LOG).read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        RecursionError,
    ):  # of another program, or damaged: there is nothing to compare
        return {}
    found = log.get(kind) if isinstance(log, dict) else None
    return found if isinstance(found, dict) else {}


def _weights(folder: Path) -> Iterator[str]:
    """Yield the names of the safetensors files that transformers reads.

    Raises:
        ValueError: the index of the files is damaged.
    """
    single, index = "model.safetensors", folder / "model.safetensors.index.json"
    if (folder / single).is_file() or not index.is_file():
        yield from [single] if (folder / single).is_file() else []
        return
    try:
        names = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        yield from sorted(str(Path(name)) for name in names)  # raises if one is no text
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder} is damaged: {index.name} cannot be read ({error!r}). {_AGAIN}"
        ) from error


def _has_weights(name: str) -> bool:
    return name.endswith(".safetensors")
