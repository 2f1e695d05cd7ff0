"""Run folders: written whole, opened again, with their tables and figures."""

import json
import math
import platform
import shutil
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
import xarray as xr
from matplotlib.figure import Figure
from numcodecs import Blosc

from entangle.model import folders

CHUNK = 4096  # neurons
_WORDS = {"method", "mask", "propagate", "assign", "components", "pull", "sparsity", "problem"}
_WORDS |= {
    "intervention",
    "block",
    "set",
    "budget",
    "strength",
    "across",
}  # columns of text, where an empty one is no NaN
PACKAGES = ("entangle", "torch", "transformers", "numpy", "numba", "scikit-learn")


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on."""
    return {"python": platform.python_version()} | {p: metadata.version(p) for p in PACKAGES}


class Stopwatch:
    """What a run cost: time from its making, and the process's peak of memory."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.clock = time.strftime("%Y-%m-%dT%H:%M:%S%z")

    def log(self) -> dict[str, Any]:
        """Return log.json: what does not determine a run."""
        return {
            "started": self.clock,
            "seconds": round(time.perf_counter() - self.start, 3),
            "peak_memory_bytes": _peak_memory(),
            "machine": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
        }


def _peak_memory() -> int:
    """Return the largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, whose getrusage also counts the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].removesuffix("kB")) * 1024
    try:
        import resource
    except ImportError:  # Windows, where psutil knows it
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def write_run(
    folder: Path,
    tree: xr.DataTree,
    log: Mapping[str, Any],
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Write a tree and its log into a run's folder (see `folders.new_folder`).

    Its run.json holds the attributes, those of the tree unless told otherwise.
    """
    compressor = Blosc(cname="zstd", clevel=3, shuffle=Blosc.BITSHUFFLE)
    encoding: dict[str, dict[str, dict[str, Any]]] = {}
    for node in tree.subtree:
        encoding[node.path] = {
            str(name): {"compressors": compressor, "chunks": (CHUNK, *variable.shape[1:])}
            for name, variable in node.to_dataset(inherit=False).variables.items()
        }
    tree.to_zarr(
        folder / "neurons.zarr", mode="w", zarr_format=2, encoding=encoding, consolidated=True
    )
    about = tree.attrs if attributes is None else attributes
    write_json(folder / "run.json", {str(name): value for name, value in about.items()})
    write_json(folder / "log.json", {**log, "files": _count_files(folder / "neurons.zarr")})


def _count_files(folder: Path) -> int:
    """Count a dataset's files: xarray reads a missing one as NaN or 0, and says nothing."""
    return sum(path.is_file() for path in folder.rglob("*"))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file for people and programs to read, whole or not at all."""
    save_text(json.dumps(without_nan(content), indent=2, ensure_ascii=False) + "\n", file)


def without_nan(value: Any) -> Any:
    """Return the value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that `write_json` wrote.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged, delete it and run again: {error}") from error
    return content


@contextmanager
def resumed_run(
    target: str | Path | None, attributes: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[Path]:
    """Give a run's folder to fill, with what an unfinished run of the same attributes left in it.

    The attributes are its run.json. After an error what is done stays in ``TARGET.partial``, and
    the same run goes on there. Without a target the folder is gone at the end.

    Raises:
        FileExistsError: an unfinished run of other attributes is in the way and ``overwrite`` is
            false; or as `folders.new_folder` says.
    """
    if target is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return

    def goes_on(partial: Path) -> bool:
        file = partial / "run.json"
        if not file.is_file():
            return False
        left, wanted = read_json(file), json.loads(json.dumps(attributes))
        if left == wanted:
            return True
        if not overwrite:
            names = [key for key in {**left, **wanted} if left.get(key) != wanted.get(key)]
            names = [key for key in names if key != "command"] or names  # it repeats the others
            there = [f"{key} {left.get(key)!r}, not {wanted.get(key)!r}" for key in names]
            raise FileExistsError(
                f"{partial} holds an unfinished run with other settings: it has "
                f"{textwrap.shorten('; '.join(there), 300, placeholder=' ...')}. Run what "
                f"began it ({left.get('command') or 'in Python'}) to finish it, or say --overwrite "
                "to begin anew"
            )
        return False

    with folders.new_folder(target, overwrite=overwrite, goes_on=goes_on) as folder:
        write_json(folder / "run.json", attributes)
        yield folder


def remove_folder(folder: Path) -> None:
    """Remove a folder of a run that is no longer needed, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def open_run(folder: str | Path) -> xr.DataTree:
    """Open a run: its root the dataset, its child ``histogram`` the mergeable state, read lazily.

    Raises:
        FileNotFoundError: no folder there, or none that holds a run.
        ValueError: a run that is damaged.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        there = "holds no run.json" if folder.is_dir() else "is not there"
        raise FileNotFoundError(f"{folder} {there}: expected a folder that a command wrote (--out)")
    others = {
        "tables": "tables: entangle plot RUN sweep or ablation draws them",
        "sparsity.json": "a model",
    }
    for name, what in others.items():
        if (folder / name).exists() and not (folder / "neurons.zarr").exists():
            raise FileNotFoundError(f"{folder} is no measured run, but holds {what}")
    try:
        # chunks=None reads without dask; what is read at once is the coordinates.
        written = json.loads((folder / "log.json").read_text(encoding="utf-8"))["files"]
        found = _count_files(folder / "neurons.zarr")
        if found != written:
            raise ValueError(f"neurons.zarr has {found} files, and {written} were written")
        tree = xr.open_datatree(folder / "neurons.zarr", engine="zarr", chunks=None)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the run {folder} is damaged, measure again: {error}") from error
    return tree


def open_table(folder: str | Path, name: str) -> pd.DataFrame:
    """Return the table of a sweep or an ablation; its ``attrs`` are what it was made of (run.json).

    Raises:
        FileNotFoundError: no table of this name there.
        ValueError: a sweep of a version that did not count multiply-adds.
    """
    folder = Path(folder)
    file = folder / "tables" / f"{name}.csv"
    if not file.is_file():
        a = "an" if name[0] in "aeiou" else "a"
        raise FileNotFoundError(
            f"{folder} holds no tables/{name}.csv: expected the folder of {a} {name}"
        )
    table = pd.read_csv(file, dtype=dict.fromkeys(_WORDS, str))
    if name == "sweep" and "density" not in table:
        raise ValueError(f"{folder} is a sweep of an older version of entangle: run it again")
    table = table.fillna({word: "" for word in _WORDS if word in table})
    table.attrs.update(read_json(folder / "run.json"))
    return table


def save_figure(figure: Figure, file: str | Path) -> Path:
    """Write a figure in the format of the file's ending, or as PNG, and close nothing.

    Raises:
        ValueError: an ending that matplotlib does not know.
    """
    file = Path(file)
    file = file if file.suffix else file.with_suffix(".png")
    with folders.new_file(file) as partial:
        figure.savefig(partial, dpi=160)
    return file


def save_table(table: pd.DataFrame, file: str | Path) -> Path:
    """Write a table as CSV, numbers in full."""
    file = Path(file)
    with folders.new_file(file) as partial:
        table.to_csv(partial, index=False)
    return file


def save_text(text: str, file: str | Path) -> Path:
    """Write a text, such as a table in Markdown."""
    file = Path(file)
    with folders.new_file(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file
