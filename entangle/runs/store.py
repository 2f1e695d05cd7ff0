"""Writing and reading of run folders, their tables and their figures."""

import gc
import hashlib
import json
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
import zarr
from numcodecs import Blosc

from entangle.model import folders
from entangle.runs.dataset import upgraded, with_text
from entangle.runs.shapes import with_shapes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK = 4096  # neurons
DATASET = "neurons.zarr"
RESOLVED = "resolved.npz"  # second histograms of some neurons (see `measurement.resolving`)
_TAILS = ("tail_count", "tail_excess", "tail_square")
TEXT = "text.npy"  # hashes of the text that the run was measured on
_ZARR = {".zarray", ".zattrs", ".zgroup", ".zmetadata"}


def write_run(
    folder: Path,
    trees: Iterable[xr.DataTree],
    attributes: Mapping[str, Any],
    log: Callable[[], Mapping[str, Any]],
    text: npt.NDArray[np.uint64] | None = None,
) -> None:
    """Write a run into a folder that `folders.new_folder` made.

    Each of ``trees`` holds some of the neurons and is appended to the dataset. ``attributes`` are
    the content of run.json, ``text`` the hashes (runs,) of the measured text. ``log`` is called
    last; log.json has what it returns, and the SHA-256 sums of the other files.

    Raises:
        OSError: the run cannot be written.
    """
    dataset = folder.absolute() / DATASET  # xarray takes a relative ~ for the home folder
    for number, tree in enumerate(trees):
        try:
            for node in tree.subtree:
                if node.name != "text":  # it has a file of its own
                    _append(node, dataset, begin=number == 0)
        except OSError as error:  # such as a full disk; name the folder
            raise OSError(f"cannot write {folder / DATASET}: {error.strerror or error}") from error
        del node, tree  # they are in reference cycles: collect, to free their memory now
        gc.collect()
    if text is not None:
        with folders.new_file(folder / TEXT) as partial:
            np.save(partial, text)
    zarr.consolidate_metadata(dataset, zarr_format=2)
    write_json(folder / "run.json", attributes)
    sums = folders.sums(folder, _files(folder))
    write_json(folder / "log.json", {**log(), "sha256": _sum(sums), "files": sums})


def _append(node: xr.DataTree, store: Path, *, begin: bool) -> None:
    """Write a node's dataset, or append it along ``neuron`` unless it is the first (``begin``)."""
    compressor = Blosc(cname="zstd", clevel=3, shuffle=Blosc.BITSHUFFLE)
    dataset = node.to_dataset(inherit=False)
    encoding = {
        str(name): {"compressors": compressor, "chunks": (CHUNK, *variable.shape[1:])}
        for name, variable in dataset.variables.items()
    }
    how: dict[str, Any] = {"append_dim": "neuron"}
    if begin:
        how = {"mode": "w" if node.path == "/" else "a", "encoding": encoding}
    with warnings.catch_warnings():  # metadata is consolidated at the end, by write_run
        warnings.filterwarnings("ignore", message=".*consolidated metadata.*")
        dataset.to_zarr(
            store, group=node.path.strip("/") or None, zarr_format=2, consolidated=False, **how
        )


def _files(folder: Path) -> list[str]:
    """Return the names of run.json, of the text's hashes and of the dataset's files.

    Names that begin with a dot are not the run's but for zarr's own: file managers write such files.
    """
    found = (path for path in sorted((folder / DATASET).rglob("*")) if path.is_file())
    names = (path.relative_to(folder) for path in found)
    own = (
        name
        for name in names
        if not any(part.startswith(".") and part not in _ZARR for part in name.parts)
    )
    text = [TEXT] if (folder / TEXT).is_file() else []
    return ["run.json", *text, *(name.as_posix() for name in own)]


def _sum(sums: Mapping[str, str]) -> str:
    """Return the SHA-256 over the sums of a run's files."""
    return hashlib.sha256(repr(dict(sums)).encode()).hexdigest()


def write_log(folder: Path, log: Mapping[str, Any], name: str) -> None:
    """Write log.json beside tables, with the SHA-256 of run.json and tables/NAME.csv."""
    files = folders.sums(folder, ["run.json", f"tables/{name}.csv"])
    write_json(folder / "log.json", {**log, "files": files})


def read_log(folder: Path) -> dict[str, Any]:
    """Return a folder's log.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged: what every log has is missing, or of another type.
    """
    file = folder / "log.json"
    log = read_json(file)
    kinds = {"seconds": int | float, "peak_memory_bytes": int, "machine": str, "started": str}
    for name, kind in kinds.items():
        if not isinstance(log.get(name), kind):
            raise ValueError(
                f"{file} is damaged ({name} is {str(log.get(name))[:40]!r}): run the command that "
                f"wrote {folder} again, with --overwrite"
            )
    return log


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON file, whole or not at all; NaN and infinity become null."""
    save_text(json.dumps(without_nan(content), indent=2, ensure_ascii=False) + "\n", file)


def without_nan(value: Any) -> Any:
    """Return the value with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that `write_json` wrote.

    Raises:
        OSError: another file is damaged. The message says to delete it; the work beside it stays.
        ValueError: run.json or log.json is damaged.
    """
    try:
        return _parsed(file)
    except ValueError as error:
        # The other files of a run are of no use without these two.
        whole = file.name in {"run.json", "log.json"}
        advice = f"delete {file}, and run the command that wrote it again"
        if whole:
            advice = f"run the command that wrote {file.parent} again, with --overwrite"
        kind = ValueError if whole else OSError
        raise kind(f"{file} is damaged ({error}): {advice}") from error


def _parsed(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        ValueError: the file is empty, is nested too deeply or has no JSON object.
    """
    text = file.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{file.name} is empty")
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{file.name} is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} has no JSON object")
    return content


def open_run(folder: str | Path) -> xr.DataTree:
    """Open a run: its root is the dataset, its child ``histogram`` the mergeable state.

    Both are read lazily. The shapes of bulks that an older run lacks are computed at the first
    reading (see `runs.shapes`). The child ``text`` has the hashes of the measured text. The files are
    checked against the SHA-256 in log.json.

    Raises:
        FileNotFoundError: there is no folder, or it holds no finished run.
        ValueError: the run is damaged.
    """
    folder = Path(folder)
    _check_finished(folder)
    if not (folder / "run.json").is_file():
        problem = "holds no run.json" if folder.is_dir() else "is not a folder"
        problem = problem if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"{folder} {problem}: expected a folder that a command wrote (--out)"
        )
    others = {
        "tables": "the tables of a sweep or an ablation: draw them with entangle plot RUN sweep "
        "or ablation",
        "sparsity.json": "a pruned model: give the folder of a run of measure",
    }
    for name, content in others.items():
        if (folder / name).exists() and not (folder / DATASET).exists():
            raise FileNotFoundError(f"{folder} holds no measured neurons, but {content}")
    try:
        # chunks=None reads without dask; only the coordinates are read at once.
        _check_sum(folder)
        tree = xr.open_datatree(folder.absolute() / DATASET, engine="zarr", chunks=None)
        tree.dataset = upgraded(tree.to_dataset())
        for held in tree.children.values():
            if "side" in held.dims:  # the name of `tail` before a neuron had a side
                held.dataset = held.to_dataset(inherit=False).rename(side="tail")
        if "histogram" in tree.children:
            resolved = _resolved(folder)
            if resolved is not None:
                tree["resolved"] = xr.DataTree(resolved)
            histograms = tree.children["histogram"].to_dataset(inherit=False)
            tree.dataset = with_shapes(tree.to_dataset(), histograms, resolved)
        if (folder / TEXT).is_file():
            with_text(tree, np.load(folder / TEXT))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the run {folder} is damaged ({error}): run the command that wrote it again, with "
            "--overwrite"
        ) from error
    return tree


def write_resolved(
    folder: str | Path, rows: npt.NDArray[np.int64], state: Mapping[str, Any]
) -> None:
    """Add second histograms of the neurons in these rows to a run, or replace those it has.

    ``state`` is that of `Histograms`, and ``passes`` (rows,), how many passes made each.
    """
    folder = Path(folder)
    of = np.array(_parsed(folder / "log.json")["sha256"])
    kept = _resolved(folder)
    arrays = {name: np.asarray(array) for name, array in state.items()} | {"row": rows}
    if kept is not None:
        older = ~np.isin(kept["row"].to_numpy(), rows)
        arrays = {
            name: np.concatenate([kept[name].to_numpy()[older], array])
            for name, array in arrays.items()
        }
    with folders.new_file(folder / RESOLVED) as partial:
        np.savez_compressed(partial, run=of, **arrays)  # type: ignore[arg-type]  # not allow_pickle


def _resolved(folder: Path) -> xr.Dataset | None:
    """Return the second histograms of a run's neurons, with their rows, or None.

    Raises:
        ValueError: the file is damaged, or of another run.
    """
    file = folder / RESOLVED
    if not file.is_file():
        return None
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        of, _ = str(arrays.pop("run")), arrays["passes"]
        dimensions = {"counts": ("bin",)} | dict.fromkeys(_TAILS, ("tail",))
        found = xr.Dataset(
            {
                name: (("resolved", *dimensions.get(name, ("moment",)[: array.ndim - 1])), array)
                for name, array in arrays.items()
            }
        )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{RESOLVED} ({error}): delete it and resolve the run again") from error
    if of != _parsed(folder / "log.json")["sha256"]:
        raise ValueError(f"{RESOLVED} is of another run: delete it and resolve the run again")
    return found


def _check_finished(folder: Path) -> None:
    """Check that a folder is not that of a command which was stopped.

    Raises:
        FileNotFoundError: it is.
    """
    begun = (folders.partial_of(folder) / folders.RESUMABLE).exists() and not folder.exists()
    if begun or ((folder / folders.RESUMABLE).exists() and not (folder / "log.json").exists()):
        raise FileNotFoundError(f"{folder} is unfinished: run the same command again to resume it")


def _check_sum(folder: Path) -> None:
    """Check a run's files against the SHA-256 in its log.json: a missing chunk is read as NaN or 0.

    Raises:
        OSError: a file cannot be read.
        ValueError: log.json is missing or has no sum, or the sum of the files is another one.
    """
    if not (folder / "log.json").is_file():
        raise ValueError("log.json is missing")
    log = _parsed(folder / "log.json")
    if log.get("sha256") is None:
        raise ValueError("log.json has no SHA-256 sum: an old version of entangle wrote it")
    sums = folders.sums(folder, _files(folder))
    written = log.get("files", sums)  # 0.1.0 wrote only the sum over all files
    if not isinstance(written, Mapping):
        raise ValueError("log.json has no sums of files")
    for name in sorted({*written, *sums}):
        if name not in sums:
            raise ValueError(f"{name} is missing")
        if name not in written:
            raise ValueError(f"{name} is not one of its files: remove it")
        if sums[name] != written[name]:
            raise ValueError(f"{name} does not match its SHA-256 sum")
    if _sum(sums) != log["sha256"]:
        raise ValueError("its files do not match the SHA-256 sum that was written to log.json")


def read_table(folder: str | Path, name: str, text: Collection[str]) -> pd.DataFrame:
    """Return tables/NAME.csv of a folder that a command wrote, with its run.json as ``attrs``.

    ``text`` names the columns of text, in which an empty cell is an empty string. In other columns
    it is NaN.

    Raises:
        FileNotFoundError: the folder has no table of this name.
        ValueError: the table or run.json is damaged.
    """
    folder = Path(folder)
    file = folder / "tables" / f"{name}.csv"
    _check_finished(folder)
    if not file.is_file():
        article = "an" if name[0] in "aeiou" else "a"
        raise FileNotFoundError(
            f"{folder} holds no tables/{name}.csv: expected the folder of {article} {name}"
        )
    sums = read_log(folder).get("files", {})  # 0.1.0 wrote none
    if not isinstance(sums, Mapping):
        raise ValueError(f"{folder} is damaged: its log.json has no sums of files. Make it again")
    folders.check_sums(folder, sums, "Run the command that wrote it again, with --overwrite")
    table = pd.read_csv(file.absolute(), dtype=dict.fromkeys(text, str))
    table = table.fillna({column: "" for column in text if column in table})
    table.attrs.update(read_json(folder / "run.json"))
    return table


def save_figure(figure: "Figure", file: str | Path) -> Path:
    """Write a figure in the format of the file's suffix, by default PNG; return the path.

    The figure stays open.

    Raises:
        ValueError: matplotlib does not know the suffix.
    """
    file = Path(file)
    if not file.suffix and file.name not in {"", ".."}:  # those are folders
        file = file.with_suffix(".png")
    with folders.new_file(file) as partial:
        figure.savefig(partial, dpi=160)
    return file


def save_table(table: pd.DataFrame, file: str | Path) -> Path:
    """Write a table as CSV, with numbers in full precision; return the path."""
    file = Path(file)
    with folders.new_file(file) as partial:
        # Absolute: pandas takes a relative http:/a/b for an address.
        table.to_csv(partial.absolute(), index=False)
    return file


def save_text(text: str, file: str | Path) -> Path:
    """Write a text, such as a table in Markdown; return the path."""
    file = Path(file)
    with folders.new_file(file) as partial:
        # Names of files may not be UTF-8. What stands for their bytes is escaped, as JSON does it.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return file
