"""Descriptions of neurons in words, which people or automated explainers wrote; kept in a run."""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import xarray as xr

from entangle.model.patterns import INPUT
from entangle.runs import store
from entangle.runs.dataset import check_neuron, dataset_of
from entangle.runs.forms import TEXT, read_added

FILE = "descriptions.json"
_OF_DELPHI = re.compile(r"(?P<module>.+)_latent(?P<index>\d+)\.txt")
_ENDS = ("high", "low")


def describe(folder: str | Path, source: str | Path) -> dict[str, str]:
    """Add descriptions of neurons to a run; return them by neuron.

    ``source`` is a JSON file of texts by neuron (LAYER:INDEX), or the folder of explanations that
    delphi wrote about files of `contexts --delphi`. The descriptions of a neuron's ends, high and
    low, are joined. A neuron that had a description gets the new one.

    Raises:
        LookupError: the run lacks one of the neurons.
        OSError: a file cannot be read.
        ValueError: the source has no description, or something else, or the run's descriptions.json
            has another form than this writes.
    """
    folder, source = Path(folder), Path(source)
    run, kept = store.open_run(folder), read_descriptions(folder)
    found = _of_folder(source, run) if source.is_dir() else _of_file(source)
    if not found:
        raise ValueError(
            f"{source} has no description: expected a JSON file of texts by neuron, such as "
            '{"LAYER:INDEX": "text"}, or a folder with delphi\'s files LAYER.high_latentINDEX.txt'
        )
    data = dataset_of(run)
    for neuron in found:
        check_neuron(data, neuron)
    store.write_json(folder / FILE, kept | found)
    return found


def read_descriptions(folder: str | Path) -> dict[str, str]:
    """Return the descriptions of a run's neurons, by neuron.

    Raises:
        OSError: the file is damaged.
        ValueError: it has another form than `describe` writes.
    """
    return read_added(Path(folder) / FILE, {...: TEXT}, "describe")


def _of_file(source: Path) -> dict[str, str]:
    """Return the texts of a JSON file.

    Raises:
        ValueError: it has no texts by name.
    """
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no JSON file ({error}): expected texts by neuron") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} has a {type(content).__name__}: expected texts by neuron")
    for name, text in content.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{source} has no text for {name}, but {str(text)[:40]!r}")
    return {name: text.strip() for name, text in content.items()}


def _of_folder(source: Path, run: xr.DataTree) -> dict[str, str]:
    """Return the texts of delphi's files; those of a neuron's ends are joined.

    Raises:
        ValueError: a file has no text.
    """
    layers = {*dataset_of(run)["layer"].to_numpy().astype(str)}
    found: dict[str, list[str]] = {}
    for file in sorted(source.glob("*.txt")):
        match = _OF_DELPHI.fullmatch(file.name)
        if match is None:
            continue
        module, _, end = match["module"].rpartition(".")
        if end not in _ENDS:
            module, end = match["module"], ""
        dotted = INPUT.replace(":", ".")
        if module not in layers and module.endswith(dotted):
            module = module.removesuffix(dotted) + INPUT
        text = file.read_text(encoding="utf-8")
        with contextlib.suppress(ValueError):  # it may be plain text
            text = json.loads(text)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{file} has no text, but {str(text)[:40]!r}")
        told = f"{end}: {text.strip()}" if end else text.strip()
        found.setdefault(f"{module}:{match['index']}", []).append(told)
    return {neuron: "; ".join(texts) for neuron, texts in found.items()}
