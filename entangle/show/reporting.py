"""Report of runs in one HTML file, to be read offline in a browser."""

import base64
import dataclasses
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr
from markdown_it import MarkdownIt
from plotly.offline import get_plotlyjs

from entangle.experiments import ablation_table, sweep_table
from entangle.runs import store
from entangle.runs.contexts_file import read_contexts
from entangle.runs.dataset import disentangled, kinds_of, summary, trusted
from entangle.runs.descriptions import read_descriptions
from entangle.runs.shapes import finer
from entangle.runs.words_file import read_words
from entangle.show import plots
from entangle.show.cut_windows import cut
from entangle.show.panels import experts_together, held_out_subject, subject_of
from entangle.show.sketches import sketch

MOST = 200_000  # neurons of a run in the file, with an equal limit per layer
_BARS, _LEVELS = 40, 63  # bars of a sketch, levels of a bar
_BEFORE, _AFTER = 60, 25  # characters around a token
_FREQUENT = 8  # tokens whose share is shown
_PLACES = 32  # groups of window positions whose shares are shown
_FLOATS = (
    *("wasserstein", "wasserstein_error", "mean", "std"),
    *("skewness", "kurtosis", "min", "max", "wasserstein_bulk", "far_variance"),
)
_MADE_OF = (
    *("command", "model", "class", "revision", "weights", "dtype", "device", "text", "windows"),
    *("length", "tokens", "seed", "bos", "skip_first", "evaluation", "evaluation_windows"),
    *("fingerprint", "layers", "input_layers", "versions"),
)
_KINDS = ("", "outliers", "shape")  # in the order of report.js
READERS = {"sweep": sweep_table.read_table, "ablation": ablation_table.read_table}
_SCRIPTS = ("report.js", "windows.js", "words.js")
_FIGURES = {  # by kind of run, besides the interactive ones
    "measure": ("layers", "difficulty"),
    "disentangle": ("improvement", "clusters", "sparse"),
    "sweep": ("sweep",),
    "ablation": ("ablation",),
}


@dataclasses.dataclass(frozen=True)
class Section:
    """The part of the page on one run."""

    name: str
    kind: str
    subject: str
    made_of: dict[str, str]
    notes: list[str]
    figures: dict[str, str]  # name -> a PNG in base64
    tables: str = ""  # HTML; empty for a measured run
    found: dict[str, str] = dataclasses.field(default_factory=dict)  # for a measured run
    data: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> deflated, in base64


def report(folders: str | Path | Sequence[str | Path], out: str | Path) -> Path:
    """Write a report of runs, in the given order, into one HTML file, and return its path.

    A measured run is shown as heatmaps and a table of neurons to search and sort, with the contexts
    that were found. Sweeps, ablations and runs of `disentangle` are shown as tables and figures. A
    run with more than 200,000 neurons is shown with each layer's most entangled ones. A folder that
    is named twice is shown once.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: there is no folder, a run is damaged, or ``out`` is no name of an HTML file.
    """
    out = Path(out)
    if out.suffix.lower() not in {".html", ".htm"} or out.is_dir():
        raise ValueError(f"a report is an HTML file: expected a name that ends in .html, got {out}")
    folders = [folders] if isinstance(folders, str | Path) else folders
    if not folders:
        raise ValueError("a report needs at least one run: give a folder that a command wrote")
    paths = {os.path.realpath(folder): Path(folder) for folder in folders}
    sections = [_section(folder) for folder in paths.values()]
    names = [section.name for section in sections]
    sections = [  # the folder's name if it is unique, else its path
        section
        if names.count(section.name) == 1
        else dataclasses.replace(section, name=str(folder))
        for section, folder in zip(sections, paths.values(), strict=True)
    ]
    loader = jinja2.PackageLoader("entangle.show", "page")
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    interactive = any(section.data for section in sections)
    text = page.get_template("report.html").render(
        sections=sections,
        style=loader.get_source(page, "report.css")[0],
        script="".join(loader.get_source(page, name)[0] for name in _SCRIPTS),
        plotly=_packed(get_plotlyjs().encode()) if interactive else "",
    )
    return store.save_text(text, out)


def _section(folder: Path) -> Section:
    """Return the section on a run of any kind."""
    for kind, read in READERS.items():
        if (folder / "tables" / f"{kind}.csv").is_file():
            table = read(folder)  # its attrs are run.json
            return _table_section(
                folder, kind, table, table.attrs, str(table.attrs.get("model", ""))
            )
    run = store.open_run(folder)
    about = disentangled(run)
    if about:
        subject = held_out_subject(run.to_dataset())
        return _table_section(folder, "disentangle", run, about, subject)
    found = summary(run)
    data, left_out = _interactive(run, _contexts(folder) | _in_words(folder))
    figures, not_drawn = _drawn(run, "measure")
    return Section(
        name=folder.resolve().name,
        kind="measure",
        subject=subject_of(run.to_dataset()),
        found=_findings(found),
        made_of=_made_of(store.read_json(folder / "run.json"), folder),
        notes=[*found["warnings"], *left_out, *not_drawn],
        figures=figures,
        data=data,
    )


def _table_section(
    folder: Path,
    kind: str,
    run: xr.DataTree | pd.DataFrame,
    about: Mapping[Any, Any],
    subject: str,
) -> Section:
    """Return the section on a run that is shown as tables and figures."""
    figures, notes = _drawn(run, kind)
    return Section(
        name=folder.resolve().name,
        kind=kind,
        subject=subject,
        made_of=_made_of(about, folder),
        notes=notes,
        tables=_tables((folder / "tables" / f"{kind}.md").read_text(encoding="utf-8")),
        figures=figures,
    )


def _findings(about: Mapping[str, Any]) -> dict[str, str]:
    """Return the summary of a measured run, as text with units."""
    found = {
        "neurons": f"{about['neurons_measured']:,} in {about['layers']:,} layers",
        "tokens": f"{about['tokens']:,} ({about['windows']} windows of {about['length']})",
        "median distance": f"{about['median']:.4f} std",
        "95% of neurons below": f"{about['quantile_95']:.4f} std",
        "largest": f"{about['largest']:.4f} ± {about['largest_error']:.4f} std, "
        f"{about['largest_neuron']}",
        "noise floor": f"{about['noise_floor']:.4f} std",
    }
    if "bulk" in about and np.isfinite(about["bulk"]["largest"]):
        bulk = about["bulk"]
        found |= {
            "largest of a bulk": f"{bulk['largest']:.4f} ± {bulk['largest_error']:.4f} of its std, "
            f"{bulk['largest_neuron']}"
        }
    if "inputs" in about:
        inputs = about["inputs"]
        found |= {
            "inputs": f"{inputs['neurons_measured']:,} of {inputs['layers']:,} layers",
            "median distance of inputs": f"{inputs['median']:.4f} std",
            "95% of inputs below": f"{inputs['quantile_95']:.4f} std",
            "largest of inputs": f"{inputs['largest']:.4f} ± {inputs['largest_error']:.4f} std, "
            f"{inputs['largest_neuron']}",
        }
    return found


def _made_of(about: Mapping[Any, Any], folder: Path) -> dict[str, str]:
    """Return a run's settings and its cost, as text."""
    texts = {}
    for name in _MADE_OF:
        value = about.get(name)
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        if value is not None:
            texts[name.replace("_", " ")] = f"{value:,}" if name == "tokens" else str(value)
    log = store.read_log(folder)
    texts["cost"] = (
        f"{log['seconds']:,.0f} s on {log.get('cores')} cores ({log['machine']}), peak memory "
        f"{log['peak_memory_bytes'] / 1e9:.2f} GB, begun {log['started']}"
    )
    return texts


def _tables(markdown: str) -> str:
    """Return Markdown as HTML, each table in a box that scrolls, also by keyboard.

    Emphasis is off, since stars belong to patterns of layers.
    """
    page = str(MarkdownIt("zero").enable(["table", "backticks"]).render(markdown))
    box = '<div class="scroll" role="region" aria-label="table" tabindex="0"><table>'
    return page.replace("<table>", box).replace("</table>", "</table></div>")


def _drawn(run: xr.DataTree | pd.DataFrame, kind: str) -> tuple[dict[str, str], list[str]]:
    """Return a run's figures as PNGs in base64, and the reasons why others are missing."""
    figures, notes = {}, []
    for name in _FIGURES[kind]:
        if name == "difficulty" and "difficulty" not in run:
            continue
        try:
            figure = getattr(plots, name)(run)
        except (ValueError, LookupError) as error:
            notes.append(f"the figure {name} is missing: {error}")
            continue
        figure.savefig(buffer := BytesIO(), format="png", dpi=160)
        figures[name] = base64.b64encode(buffer.getvalue()).decode()
    return figures, notes


def _interactive(run: xr.DataTree, found: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return the packed data of the interactive figures, and notes on neurons that are left out.

    ``found`` is what `_contexts` returns. Neurons are ordered by layer, the most entangled first.
    Numbers are floats of 3 bytes, with a mantissa of 15 bits. A sketch has 40 bars with 63 levels,
    relative to the highest bar. Both are stored column by column, since similar neighbours compress
    well.
    """
    data = run.to_dataset().load()
    histograms = run.children["histogram"].to_dataset(inherit=False)
    names, known = data["layer"].to_numpy().astype(str), trusted(data)
    starts = np.flatnonzero(np.append(True, names[1:] != names[:-1]))
    ends = np.append(starts[1:], len(names))
    counts = np.add.reduceat(known.astype(np.int64), starts).tolist()
    if not any(counts):
        return {}, ["no neuron has a distance, so no neuron is shown"]
    most = _most_of_each(counts)
    layers, rows, bars = [], [], []
    for start, end, count in zip(starts, ends, counts, strict=True):
        distance = np.where(known[start:end], data["wasserstein"].to_numpy()[start:end], -np.inf)
        ranked = np.argsort(-distance, kind="stable")[: min(most, count)]
        layers.append(
            {
                "name": str(names[start]),
                "block": int(data["block"].to_numpy()[start]),
                "role": str(data["role"].to_numpy()[start]),
                "side": str(data["side"].to_numpy()[start]),
                "neurons": int(end - start),
                "tokens": int(data["count"].to_numpy()[start:end].max()),
                "shown": len(ranked),
            }
        )
        if not len(ranked):
            continue
        part = data.isel(neuron=slice(start, end))
        held = histograms.isel(neuron=slice(start, end)).load()
        held = finer(held, run, np.arange(start, end))
        drawn = sketch(held, part["mean"].to_numpy(), part["std"].to_numpy(), bars=_BARS)
        bars.append(np.column_stack([drawn.low, drawn.high, drawn.shares])[ranked])
        rows.append(start + ranked)
    panels = experts_together(pd.DataFrame({"role": [layer["role"] for layer in layers]}))
    for layer, panel, expert in zip(layers, panels["role"], panels["expert"], strict=True):
        layer |= {"panel": panel, "expert": None if expert < 0 else int(expert)}
    row, drawn_bars = np.concatenate(rows), np.concatenate(bars)
    highest = drawn_bars[:, 2:].max(axis=1)
    levels = np.round(_LEVELS * drawn_bars[:, 2:] / highest[:, None]).astype(np.uint8)
    columns = {name: data[name].to_numpy()[row] for name in _FLOATS}
    untrusted = ~trusted(data, "wasserstein_bulk")[row]
    columns["wasserstein_bulk"] = np.where(untrusted, np.nan, columns["wasserstein_bulk"])
    columns |= {"low": drawn_bars[:, 0], "high": drawn_bars[:, 1], "highest": highest}
    header = {
        "layers": layers,
        "bars": _BARS,
        "levels": _LEVELS,
        **found,
    }
    packed = {"header": _packed(_json(header))}
    packed |= {name: _packed(_three_bytes(values)) for name, values in columns.items()}
    packed["index"] = _packed(_planes(data["index"].to_numpy()[row].astype("<u4")))
    kinds = kinds_of(data)[row]
    packed["kind"] = _packed(np.array([_KINDS.index(kind) for kind in kinds], np.uint8))
    packed["modes"] = _packed(data["modes"].to_numpy()[row].clip(0, 255).astype(np.uint8))
    packed["sketch"] = _packed(np.diff(levels.T, axis=0, prepend=np.uint8(0)))  # (bars, neurons)
    shown = len(row)
    cut = (
        f"only each layer's {most:,} most entangled neurons are shown, {shown:,} of {sum(counts):,}"
    )
    return packed, [cut] if shown < sum(counts) else []


def _most_of_each(counts: Sequence[int]) -> int:
    """Return a limit of neurons per layer such that all layers together have at most MOST."""
    most = max(counts)
    while np.minimum(counts, most).sum() > MOST:
        most = int(most * 0.98)
    return most


def _contexts(folder: Path) -> dict[str, Any]:
    """Return the contexts of neurons by name, and the texts of their windows, as the page shows them."""
    kept = read_contexts(folder)
    found = {name: _shortened(one) | cut(kept, name) for name, one in kept.neurons.items()}
    return {"contexts": found, "windows": kept.windows}


def _in_words(folder: Path) -> dict[str, Any]:
    """Return the descriptions of neurons, and the words that they read and write, by name."""
    words = {
        name: [
            {key: one[key] for key in ("side", "neuron", "what", "through")}
            | {end: [_word(word) for word in one[end]] for end in ("top", "bottom")}
            for one in found["words"]
        ]
        for name, found in read_words(folder).items()
    }
    return {"words": words, "descriptions": read_descriptions(folder)}


def _word(word: Mapping[str, Any]) -> list[Any]:
    return [word["token"], float(f"{word['value']:.4g}"), round(word["deviation"], 1)]


def _shortened(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a neuron's contexts, cut to the text that the page shows."""
    positions = np.array_split(np.array(found["positions"]), _PLACES)
    keys = ("tokens", "wasserstein", "low", "high", "without")
    return {key: found[key] for key in keys} | {
        "contexts": [
            {key: one[key] for key in ("why", "window", "position", "token")}
            | {"before": one["before"][-_BEFORE:], "after": one["after"][:_AFTER]}
            | {"output": float(f"{one['output']:.4g}"), "deviation": round(one["deviation"], 1)}
            for one in found["contexts"]
        ],
        "frequent": [
            {"token": one["token"], "share": round(one["share"], 4)}
            for one in found["frequent"][:_FREQUENT]
        ],
        "positions": [round(float(part.sum()), 4) for part in positions if len(part)],
    }


def _three_bytes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the upper three bytes of each number as float32, rounded: (3, neurons)."""
    bits = values.astype("<f4").view("<u4").astype(np.uint64) + 0x80
    return _planes(np.minimum(bits, 0xFFFFFFFF).astype("<u4"))[1:]


def _planes(values: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """Return the four bytes of each number: (4, neurons)."""
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, 4).T)


def _json(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(store.without_nan(content), ensure_ascii=False, separators=(",", ":"))
    return text.encode()


def _packed(content: bytes | npt.NDArray[np.uint8]) -> str:
    raw = content if isinstance(content, bytes) else np.ascontiguousarray(content).tobytes()
    return base64.b64encode(zlib.compress(raw, 9)).decode()
