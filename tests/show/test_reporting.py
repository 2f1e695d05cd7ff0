"""The report: what the file holds is what the runs hold, and a browser shows it as it is."""

import base64
import dataclasses
import json
import re
import shutil
import signal
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
import xarray as xr
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import entangle
from entangle.__main__ import main
from entangle.runs import store
from entangle.runs.contexts_file import Kept, packed
from entangle.runs.contexts_file import unpacked as levels_of
from entangle.runs.dataset import attributes_of
from entangle.show import reporting
from entangle.show.cut_windows import cut
from entangle.show.sketches import Sketches, sketch
from tests.command_lines import running
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_mixtures import tiny_mixture
from tests.tiny_models import save_tiny, tiny_model

Array = npt.NDArray[Any]

TEXT = (
    "The <b>quick</b> brown\tfox jumps over the lazy dog; <script>alert(1)</script> is 'it' & é.\n"
)
ATTACK = "<script>alert(1)</script>"
LENGTH, BARS = 43, 40
TIMEOUT = 20_000  # ms
FLOATS = ["wasserstein", "wasserstein_error", "mean", "std", "skewness", "kurtosis", "min", "max"]
FLOATS += ["wasserstein_bulk", "far_variance"]
ASKED = ["model.layers.2.mlp.down_proj:7", "model.layers.0.self_attn.q_proj:0"]
UNIT = "model.layers.1.mlp.up_proj:4"  # half of a hidden unit
NUMBERS = {  # on the page
    "wasserstein": "W1 (std)",
    "wasserstein_error": "± bound",
    "wasserstein_bulk": "W1 of the bulk",
    "far_variance": "variance beyond 6 std",
    "mean": "mean",
    "std": "std",
    "skewness": "skewness",
    "kurtosis": "excess kurtosis",
    "modes": "modes",
    "min": "min",
    "max": "max",
}


# --- reading the file


@dataclasses.dataclass
class Element:
    """An element of a page, read by Python's own parser."""

    tag: str
    attributes: dict[str, str | None]
    parts: list["str | Element"] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    def all(self, tag: str) -> list["Element"]:
        found = []
        for part in self.parts:
            if isinstance(part, Element):
                found += [part] if part.tag == tag else []
                found += part.all(tag)
        return found

    def one(self, tag: str) -> "Element":
        (found,) = self.all(tag)
        return found

    def classed(self, name: str) -> list["Element"]:
        own = [p for p in self.parts if isinstance(p, Element)]
        hits = [p for p in own if name in (p.attributes.get("class") or "").split()]
        return hits + [hit for part in own for hit in part.classed(name)]


class Reader(HTMLParser):
    """Make a tree of elements, and refuse what is not closed as it was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].parts.append(element)
        if tag not in {"meta", "link", "img", "br", "input", "hr"}:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)


def read(file: Path) -> Element:
    reader = Reader()
    reader.feed(file.read_text(encoding="utf-8"))
    reader.close()
    (root,) = reader.open
    return root


def sections(page: Element) -> list[Element]:
    return [one for one in page.all("section") if "run" in (one.attributes["class"] or "").split()]


def notes(section: Element) -> list[str]:
    return [
        item.text for box in section.classed("notes") if box.tag == "ul" for item in box.all("li")
    ]


def facts(box: Element) -> dict[str, str]:
    names, values = box.all("dt"), box.all("dd")
    return {name.text: value.text for name, value in zip(names, values, strict=True)}


def rows_of(table: Element) -> list[list[str]]:
    return [
        [cell.text.strip() for cell in row.parts if isinstance(cell, Element)]
        for row in table.all("tr")
    ]


def images(section: Element) -> list[Image.Image]:
    """Return the pictures of a section, decoded."""
    found: list[Image.Image] = []
    for element in section.all("img"):
        kind, _, packed = (element.attributes["src"] or "").partition(";base64,")
        assert kind == "data:image/png"
        image = Image.open(BytesIO(base64.b64decode(packed, validate=True)))
        image.load()
        assert image.format == "PNG"
        assert len(set(image.convert("L").get_flattened_data())) > 10
        found.append(image)
    return found


@dataclasses.dataclass(frozen=True)
class Payload:
    """What the file holds of a measured run: a row per neuron shown, in the file's order."""

    header: dict[str, Any]
    frame: pd.DataFrame
    shares: Array  # (neurons, bars)

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.frame["name"]]


def unpacked(section: Element) -> dict[str, bytes]:
    """Return what is packed in a section, by name."""
    return {
        str(script.attributes["data-name"]): zlib.decompress(
            base64.b64decode(script.text, validate=True)
        )
        for script in section.all("script")
    }


def payload(section: Element) -> Payload:
    held = unpacked(section)
    header = json.loads(held["header"])
    count = sum(layer["shown"] for layer in header["layers"])
    columns: dict[str, Array] = {}
    for name in [*FLOATS, "low", "high", "highest"]:
        whole = np.zeros((count, 4), np.uint8)
        whole[:, 1:] = np.frombuffer(held[name], np.uint8).reshape(3, count).T
        columns[name] = whole.view("<f4")[:, 0].astype(np.float64)
    planes = np.frombuffer(held["index"], np.uint8).reshape(4, count).T
    columns["index"] = np.ascontiguousarray(planes).view("<u4")[:, 0]
    columns["modes"] = np.frombuffer(held["modes"], np.uint8)
    layers = np.repeat(
        [layer["name"] for layer in header["layers"]],
        [layer["shown"] for layer in header["layers"]],
    )
    columns["layer"] = layers
    columns["name"] = np.array([f"{a}:{b}" for a, b in zip(layers, columns["index"], strict=True)])
    steps = np.frombuffer(held["sketch"], np.uint8).reshape(header["bars"], count)
    levels = np.cumsum(steps, axis=0, dtype=np.uint8).astype(np.float64)
    assert levels.max() <= header["levels"]
    shares = (levels / header["levels"] * columns["highest"]).T
    return Payload(header, pd.DataFrame(columns), shares)


# --- the runs


@dataclasses.dataclass(frozen=True)
class Site:
    """A measured run with contexts, a smaller one of two kinds of layers, and the first's report."""

    run: Path
    small: Path
    tree: xr.DataTree
    file: Path

    @property
    def frame(self) -> pd.DataFrame:
        """All neurons, the most entangled of each layer first."""
        return ranked(self.tree)

    @property
    def kept(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "contexts.json").read_text("utf-8"))
        return found

    @property
    def contexts(self) -> dict[str, Any]:
        neurons: dict[str, Any] = self.kept["neurons"]
        return neurons


def ranked(tree: xr.DataTree) -> pd.DataFrame:
    """Return the neurons with a distance to trust, in the order of the file, named."""
    frame = tree.to_dataset().to_dataframe().reset_index(drop=True)
    frame["name"] = frame["layer"].astype(str) + ":" + frame["index"].astype(str)
    frame["row"] = np.arange(len(frame))
    frame = frame[(frame["wasserstein_error"] <= 0.1) & np.isfinite(frame["wasserstein"])]
    layers = [
        part.sort_values("wasserstein", ascending=False, kind="stable")
        for _, part in frame.groupby("layer", sort=False)
    ]
    whole: pd.DataFrame = pd.concat(layers, ignore_index=True)
    return whole


def sketched(tree: xr.DataTree, rows: Array) -> Sketches:
    """Return the sketches of some neurons."""
    held = tree.children["histogram"].to_dataset(inherit=False).isel(neuron=rows)
    data = tree.to_dataset().isel(neuron=rows)
    return sketch(held, data["mean"].to_numpy(), data["std"].to_numpy(), bars=BARS)


def changed(run: Path, out: Path, attributes: Mapping[str, Any] = {}, **values: Array) -> Path:
    """Write a run again, with other values and attributes."""
    tree = store.open_run(run)
    data = tree.to_dataset().load().copy(deep=True)
    data = data.assign({name: ("neuron", value) for name, value in values.items()})
    data.attrs |= attributes_of(attributes)
    histogram = tree.children["histogram"].to_dataset(inherit=False).load()
    both = xr.DataTree.from_dict({"/": data, "/histogram": histogram})
    about = store.read_json(run / "run.json") | dict(attributes)
    store.write_run(out, [both], about, lambda: store.read_json(run / "log.json"))
    return out


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    save_tiny(folder / "model", "llama")
    (folder / "text.txt").write_text(TEXT * 60, encoding="utf-8")
    model, tokenizer = (
        entangle.load_model(folder / "model"),
        entangle.load_tokenizer(folder / "model"),
    )
    windows = entangle.token_windows(folder / "text.txt", tokenizer, windows=20, length=LENGTH)
    out = folder / "tiny"
    command = "entangle measure model --text text.txt"
    with running(command):
        entangle.measure(model, windows, difficulty=100, out=out)
    tree = entangle.open_run(out)
    frame = ranked(tree)
    most = str(top_of(frame))
    entangle.contexts(
        model, windows, run=tree, neurons=[*ASKED, UNIT, most], tokenizer=tokenizer, out=out
    )
    kinds = ["*.mlp.down_proj", "*.self_attn.q_proj"]
    entangle.measure(model, windows, layers=kinds, out=folder / "small")
    shutil.copy(out / "contexts.json", folder / "small")
    return Site(out, folder / "small", tree, entangle.report([out], folder / "report.html"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sweep, an ablation and what disentangle wrote."""
    folder = tmp_path_factory.mktemp("tables")
    windows, held_out = random_windows(12), random_windows(5, seed=7)
    run = entangle.measure(tiny_model("llama"), random_windows(10, seed=11))
    some: dict[str, Any] = {"layers": ["*.mlp.*"], "batch_size": 2}
    entangle.sweep(
        tiny_model("llama"),
        windows,
        held_out,
        sparsity=["0.5", "0.7"],
        method=["magnitude", "wanda"],
        out=folder / "sweep",
        **some,
    )
    entangle.ablate(
        tiny_model("llama"),
        None,
        held_out,
        run=run,
        share=[0.2],
        intervention=["zero"],
        sets=["wasserstein", "random"],
        seeds=2,
        out=folder / "ablation",
        **some,
    )
    entangle.disentangle(
        tiny_model("llama"),
        windows,
        held_out,
        run=run,
        experts=[3],
        sparsity=["0.5"],
        out=folder / "disentangle",
        **some,
    )
    return {kind: folder / kind for kind in ("sweep", "ablation", "disentangle")}


@pytest.fixture(scope="module")
def all_kinds(
    site: Site, tables: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    file = tmp_path_factory.mktemp("kinds") / "report.html"
    folders = [tables["sweep"], site.run, tables["disentangle"], tables["ablation"]]
    return entangle.report(folders, file)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


# --- what the file holds of a measured run


def test_neurons_are_all_there_the_most_entangled_of_each_layer_first(site: Site) -> None:
    (section,) = sections(read(site.file))
    found, frame = payload(section), site.frame
    assert found.names == frame["name"].tolist()
    assert len(found.names) == site.tree.sizes["neuron"] > 400
    for layer, (name, part) in zip(
        found.header["layers"], frame.groupby("layer", sort=False), strict=True
    ):
        assert layer["name"] == name
        assert layer["neurons"] == layer["shown"] == len(part)
        assert layer["tokens"] == 20 * LENGTH
        assert {layer["block"]} == {*part["block"]}
        assert {layer["role"]} == {*part["role"]}
    assert notes(section) == []


def test_numbers_are_the_runs_to_15_bits_after_the_point(site: Site) -> None:
    found, frame = payload(sections(read(site.file))[0]), site.frame
    unknown = frame["wasserstein_bulk_error"] > 0.1
    frame["wasserstein_bulk"] = frame["wasserstein_bulk"].mask(unknown)
    for name in FLOATS:
        np.testing.assert_allclose(found.frame[name], frame[name], rtol=2.0**-16 * 1.001)
    assert found.frame["modes"].tolist() == frame["modes"].tolist()
    assert found.frame["index"].tolist() == frame["index"].tolist()


def test_sketches_are_the_neurons_own_to_half_a_level(site: Site) -> None:
    found, rows = payload(sections(read(site.file))[0]), site.frame["row"].to_numpy()
    truth = sketched(site.tree, rows)
    for name, values in (("low", truth.low), ("high", truth.high)):
        np.testing.assert_allclose(found.frame[name], values, rtol=2.0**-16 * 1.001)
    highest = truth.shares.max(axis=1, keepdims=True)
    np.testing.assert_allclose(found.frame["highest"], highest[:, 0], rtol=2.0**-16 * 1.001)
    assert (np.abs(found.shares - truth.shares) <= highest * (0.5 / 63 + 2.0**-15)).all()


def test_contexts_are_those_found_with_less_text(site: Site) -> None:
    held = payload(sections(read(site.file))[0]).header["contexts"]
    assert held.keys() == site.contexts.keys() > {*ASKED}
    cut = 0
    for name, found in site.contexts.items():
        shown = held[name]
        for key in ("tokens", "wasserstein", "low", "high", "without"):
            assert shown[key] == found[key]
        assert len(shown["contexts"]) == len(found["contexts"]) > 10
        for one, whole in zip(shown["contexts"], found["contexts"], strict=True):
            for key in ("why", "window", "position", "token"):
                assert one[key] == whole[key]
            assert whole["before"].endswith(one["before"])
            assert whole["after"].startswith(one["after"])
            assert len(one["before"]) == min(60, len(whole["before"]))
            assert len(one["after"]) == min(25, len(whole["after"]))
            cut += one["before"] != whole["before"]
            assert one["output"] == pytest.approx(whole["output"], rel=6e-4)
            assert one["deviation"] == pytest.approx(whole["deviation"], abs=0.051)
        assert 0 < len(shown["frequent"]) <= 8
        for one, whole in zip(shown["frequent"], found["frequent"], strict=False):
            assert one["token"] == whole["token"]
            assert one["share"] == pytest.approx(whole["share"], abs=6e-5)
        assert len(shown["positions"]) == 32
        assert sum(shown["positions"]) == pytest.approx(1, abs=32 * 6e-5)
        assert shown["positions"][0] == pytest.approx(sum(found["positions"][:2]), abs=6e-5)
    assert "<script>" in "".join(one["before"] for one in site.contexts[ASKED[0]]["contexts"])


def test_texts_longer_than_the_page_shows_are_cut_next_to_the_token(
    site: Site, tmp_path: Path
) -> None:
    run = changed(site.small, tmp_path / "long")
    found = site.contexts
    for one in found[ASKED[0]]["contexts"]:
        one["before"], one["after"] = "x" * 90 + "y" * 60, "y" * 25 + "z" * 90
    file = site.kept | {"neurons": found}
    (run / "contexts.json").write_text(json.dumps(file), encoding="utf-8")
    held = payload(sections(read(entangle.report([run], tmp_path / "a.html")))[0])
    for one in held.header["contexts"][ASKED[0]]["contexts"]:
        assert (one["before"], one["after"]) == ("y" * 60, "y" * 25)


def test_neurons_without_a_distance_to_trust_are_named_and_not_shown(tmp_path: Path) -> None:
    model, layer = tiny_model("llama"), "model.layers.2.mlp.down_proj"
    module: Any = model.get_submodule(layer)
    with torch.no_grad():
        module.weight[3], module.bias[3] = 0, 7  # dead
        module.weight[4, 0] = torch.nan  # broken
    tree = entangle.measure(model, random_windows(20), out=tmp_path / "whole")
    bound = tree["wasserstein_error"].to_numpy().copy()
    first = int(np.nanargmax(tree["wasserstein"].to_numpy()))
    bound[first] = 0.2
    worst = str(ranked(tree).set_index("row").loc[first, "name"])
    run = changed(tmp_path / "whole", tmp_path / "run", wasserstein_error=bound)
    (section,) = sections(read(entangle.report([run], tmp_path / "report.html")))
    found = payload(section)
    assert found.names == ranked(entangle.open_run(run))["name"].tolist()
    left_out = {f"{layer}:3": "dead", f"{layer}:4": "NaN", worst: "0.1"}
    assert not {*found.names} & {*left_out}
    assert len(found.names) == tree.sizes["neuron"] - 3
    for name, why in left_out.items():
        (note,) = (note for note in notes(section) if name in note)
        assert why in note
    shown = {one["name"]: (one["neurons"], one["shown"]) for one in found.header["layers"]}
    assert shown[layer][0] - shown[layer][1] >= 2


def test_of_too_many_neurons_as_many_of_each_layer_are_shown(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "MOST", 330)
    (section,) = sections(read(entangle.report([site.run], tmp_path / "report.html")))
    found = payload(section)
    frame, sizes = site.frame, site.frame.groupby("layer", sort=False).size()
    counts = found.frame.groupby("layer", sort=False).size()
    most = int(counts.max())
    assert counts.tolist() == np.minimum(sizes, most).tolist()
    assert counts.sum() <= 330 < np.minimum(sizes, most + 2).sum()
    top = frame.groupby("layer", sort=False).head(most)
    assert found.names == top["name"].tolist()
    shown, whole = len(found.names), len(frame)
    cut = rf"\b{most} most entangled.*\b{shown} of {whole}\b"
    assert [note for note in notes(section) if re.search(cut, note)]


def test_without_any_distance_the_page_says_so(site: Site, tmp_path: Path) -> None:
    nothing = np.full(entangle.open_run(site.small).sizes["neuron"], np.nan)
    run = changed(site.small, tmp_path / "run", wasserstein=nothing, wasserstein_error=nothing)
    page = read(entangle.report([run], tmp_path / "report.html"))
    (section,) = sections(page)
    assert any(re.search("no neuron.*distance", note) for note in notes(section))
    assert page.all("script") == []
    assert any(re.search(r"figure layers\b.*missing", note) for note in notes(section))


def test_what_was_found_and_what_made_it_stand_above(site: Site) -> None:
    (section,) = sections(read(site.file))
    made = facts(section.classed("made-of")[0].one("dl"))
    about, log = (store.read_json(site.run / f"{name}.json") for name in ("run", "log"))
    assert made["command"] == "entangle measure model --text text.txt"
    assert made["weights"] == about["weights"]
    assert len(about["weights"]) > 8
    assert made["fingerprint"] == about["fingerprint"]
    assert made["tokens"] == f"{20 * LENGTH:,}"
    assert made["layers"] == "*"
    assert f"torch {about['versions']['torch']}" in made["versions"]
    assert f"on {log['cores']} cores" in made["cost"]
    found, frame = facts(section.classed("found")[0]), site.frame
    assert found["neurons"] == f"{len(frame)} in 21 layers"
    assert found["tokens"] == f"{20 * LENGTH} (20 windows of {LENGTH})"
    assert found["median distance"] == f"{frame['wasserstein'].median():.4f} std"
    assert found["95% of neurons below"] == f"{frame['wasserstein'].quantile(0.95):.4f} std"
    top = frame.to_dict("records")[int(frame["wasserstein"].to_numpy().argmax())]
    assert top["name"] in found["largest"]
    assert found["largest"].startswith(f"{top['wasserstein']:.4f} ± ")
    captions = [caption.text for caption in section.all("figcaption")]
    assert captions == ["layers", "difficulty"]
    assert len(images(section)) == 2


# --- several runs


def markdown_tables(words: str) -> list[list[list[str]]]:
    """Return the tables of a text in Markdown, cell by cell."""
    found: list[list[list[str]]] = [[]]
    for line in words.splitlines():
        if not line.startswith("|"):
            found.append([])
        elif not re.fullmatch(r"[|:\- ]+", line):
            cells = line.strip().strip("|").split("|")
            found[-1].append([cell.strip().replace("`", "") for cell in cells])
    return [table for table in found if table]


def test_each_run_has_its_section_in_the_order_given(
    site: Site, tables: dict[str, Path], all_kinds: Path
) -> None:
    folders = [tables["sweep"], site.run, tables["disentangle"], tables["ablation"]]
    page = read(all_kinds)
    assert [section.attributes["id"] for section in sections(page)] == [
        f"run-{place}" for place in range(4)
    ]
    for section, folder in zip(sections(page), folders, strict=True):
        assert section.one("h2").text.startswith(folder.name)
    links = [link.attributes["href"] for link in page.one("nav").all("a")]
    assert links == ["#run-0", "#run-1", "#run-2", "#run-3"]
    assert payload(sections(page)[1]).names == site.frame["name"].tolist()
    assert all(not sections(page)[place].all("script") for place in (0, 2, 3))


@pytest.mark.parametrize(
    ("kind", "figures"),
    [
        ("sweep", ["sweep"]),
        ("ablation", ["ablation"]),
        ("disentangle", ["improvement", "clusters", "sparse"]),
    ],
)
def test_tables_and_figures_of_the_other_runs(
    tables: dict[str, Path], tmp_path: Path, kind: str, figures: list[str]
) -> None:
    page = read(entangle.report([tables[kind]], tmp_path / "report.html"))
    (section,) = sections(page)
    words = (tables[kind] / "tables" / f"{kind}.md").read_text(encoding="utf-8")
    expected = markdown_tables(words)
    assert [rows_of(table) for table in section.all("table")] == expected
    assert sum(len(row) for table in expected for row in table) > 20
    # Patterns of layers keep their stars, and the words around the tables are there.
    assert "*.mlp.*" in words
    assert "*.mlp.*" in section.text
    assert section.all("em") == section.all("strong") == []
    first = next(line for line in words.splitlines() if line and not line.startswith("|"))
    assert first.replace("`", "") in section.text
    drawn = [caption.text for caption in section.all("figcaption")]
    missing = [note for note in notes(section) if "missing" in note]
    assert drawn == figures
    assert missing == []
    assert len(images(section)) == len(figures)
    made = facts(section.classed("made-of")[0].one("dl"))
    about = json.loads((tables[kind] / "run.json").read_text("utf-8"))
    about = about.get("disentangled", about)
    assert made["weights"] == about["weights"]
    assert made["layers"] == "*.mlp.*"
    assert "tokens" in made
    assert page.all("script") == []


def test_tables_scroll_by_the_keyboard_too(tables: dict[str, Path], tmp_path: Path) -> None:
    page = read(entangle.report([tables["sweep"]], tmp_path / "report.html"))
    boxes = page.classed("scroll")
    assert len(boxes) == len(page.all("table")) > 0
    for box in boxes:
        assert box.attributes["tabindex"] == "0"
        assert box.attributes["aria-label"]
        assert len(box.all("table")) == 1


# --- text that looks like HTML


def attacked(site: Site, tmp_path: Path) -> Path:
    """Return a run in which all that is text is HTML, in a folder whose name is HTML too."""
    folder = changed(
        site.small,
        tmp_path / "<img src=x onerror=alert(2)>",
        {"model": ATTACK, "text": f"'\"&{ATTACK}", "command": f"entangle {ATTACK}"},
    )
    found = site.contexts
    for one in found[ASKED[0]]["contexts"]:
        one |= dict.fromkeys(("before", "token", "after"), ATTACK)
        one["why"] = f"lowest {ATTACK}"
    for one in found[ASKED[0]]["frequent"]:
        one["token"] = ATTACK
    found[ASKED[0]]["without"][-1]["what"] = f"token {ATTACK}"
    for one in found[ASKED[0]]["windows"]:
        one["why"] = f"highest {ATTACK}"
    windows = {name: [ATTACK] * len(tokens) for name, tokens in site.kept["windows"].items()}
    file = {"neurons": found, "windows": windows}
    (folder / "contexts.json").write_text(json.dumps(file), encoding="utf-8")
    return folder


def test_text_that_looks_like_html_is_text(site: Site, tmp_path: Path) -> None:
    run = attacked(site, tmp_path)
    file = entangle.report([run], tmp_path / "report.html")
    usual = read(entangle.report([site.small], tmp_path / "usual.html"))
    page = read(file)
    (section,) = sections(page)
    assert ATTACK not in file.read_text(encoding="utf-8").replace(" ", "")
    for tag in ("script", "img", "style"):
        assert len(page.all(tag)) == len(usual.all(tag))
    made = facts(section.classed("made-of")[0].one("dl"))
    assert made["model"] == ATTACK
    assert made["text"] == f"'\"&{ATTACK}"
    assert made["command"] == f"entangle {ATTACK}"
    assert section.one("h2").text.startswith("<img src=x onerror=alert(2)>")
    assert page.one("title").text.endswith("<img src=x onerror=alert(2)>")
    held = payload(section).header["contexts"][ASKED[0]]
    assert held["contexts"][0]["token"] == ATTACK


def test_tables_that_look_like_html_are_text(tables: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tables["ablation"], run)
    file = run / "tables" / "ablation.md"
    words = file.read_text(encoding="utf-8")
    file.write_text(words.replace("dense", ATTACK) + f"\n\n[a](javascript:alert(1)) {ATTACK}\n")
    page = read(entangle.report([run], tmp_path / "report.html"))
    assert page.all("script") == []
    assert sum(
        ATTACK in cell for table in page.all("table") for row in rows_of(table) for cell in row
    )
    assert all(not (link.attributes["href"] or "").startswith("java") for link in page.all("a"))


# --- refusals and the command line


def broken(site: Site, tables: dict[str, Path], folder: Path, kind: str) -> Path:
    """Return a folder that is wrong in some way."""
    if kind in {"empty", "absent"}:
        if kind == "empty":
            folder.mkdir()
        return folder
    if kind.startswith("table"):
        shutil.copytree(tables["sweep"], folder)
        if kind == "table unread":
            (folder / "run.json").write_text('{"model": ', encoding="utf-8")
        else:
            (folder / "tables" / "sweep.md").unlink()
        return folder
    shutil.copytree(site.small, folder)
    if kind == "contexts":
        (folder / "contexts.json").write_text('{"model.layers', encoding="utf-8")
    else:
        next(file for file in (folder / "neurons.zarr" / "wasserstein").iterdir()).unlink()
    return folder


WRONG = {
    "absent": r"/bad .*--out",
    "empty": r"/bad .*run\.json.*--out",
    "contexts": r"contexts\.json.*damaged",
    "run": r"/bad .*damaged",
    "table unread": r"damaged.*run\.json",
    "table lost": r"sweep\.md",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_folder_is_refused_and_nothing_written(
    site: Site,
    tables: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    bad, out = broken(site, tables, tmp_path / "bad", kind), tmp_path / "out" / "report.html"
    with pytest.raises((ValueError, OSError), match=WRONG[kind]):
        entangle.report([tables["sweep"], bad], out)
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())
    out.parent.mkdir(exist_ok=True)
    out.write_text("an older report")
    words = ["report", str(bad), str(site.small), "--out", str(out)]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert re.search(WRONG[kind], printed.err)
    assert printed.err.startswith("entangle: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]
    assert out.read_text() == "an older report"


def test_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"report.*\brun\b"):
        entangle.report([], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(["report"])
    assert stopped.value.code == 2
    assert "RUN" in capsys.readouterr().err


def test_contexts_of_another_kind_are_refused_by_name(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON that `entangle contexts` never wrote."""
    run = changed(site.small, tmp_path / "run")
    for content in ('{"model.layers.0.mlp.up_proj:0": {}}', "[1]"):
        (run / "contexts.json").write_text(content, encoding="utf-8")
        assert main(["report", str(run)]) == 2
        assert "contexts.json" in capsys.readouterr().err
        assert not (run / "report.html").exists()


def test_the_command_writes_into_the_first_run(
    tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    shutil.copytree(tables["sweep"], first)
    assert main(["report", str(first), str(tables["ablation"])]) == 0
    file = first / "report.html"
    assert str(file) in capsys.readouterr().out
    assert len(sections(read(file))) == 2
    out = tmp_path / "elsewhere.html"
    words = ["report", str(tables["ablation"]), "--out", str(out), "--json"]
    for _ in range(2):  # the second time over the first
        assert main(words) == 0
        said = json.loads(capsys.readouterr().out)
        assert said == {"report": str(out), "bytes": out.stat().st_size}


def test_the_same_runs_give_the_same_bytes(
    site: Site, tables: dict[str, Path], tmp_path: Path
) -> None:
    assert entangle.report([site.run], tmp_path / "c.html").read_bytes() == site.file.read_bytes()
    folders = [tables["ablation"], tables["sweep"]]
    files = [entangle.report(folders, tmp_path / name) for name in ("a.html", "b.html")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", ["run.json", "contexts.json", "report", "a.png"])
def test_only_a_name_of_an_html_file_is_written(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A slip in --out must not cost a run."""
    (tmp_path / name).write_text("kept")
    assert main(["report", str(site.small), "--out", str(tmp_path / name)]) == 2
    assert re.search(rf"\.html\b.*{tmp_path / name}", capsys.readouterr().err)
    assert (tmp_path / name).read_text() == "kept"
    with pytest.raises(ValueError, match=rf"\.html\b.*{tmp_path}"):
        entangle.report(site.small, tmp_path)


def test_runs_of_one_name_are_told_apart_and_one_run_is_shown_once(
    site: Site, tmp_path: Path
) -> None:
    other = changed(site.small, tmp_path / "b" / site.small.name)
    file = entangle.report([site.small, other, site.small], tmp_path / "a.html")
    titles = [section.all("h2")[0].text.split()[0] for section in sections(read(file))]
    assert titles == [str(site.small), str(other)]
    (alone,) = sections(read(entangle.report(str(site.small), tmp_path / "b.html")))
    assert alone.all("h2")[0].text.split()[0] == site.small.name


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser to read the report with: none of {', '.join(names)} is on PATH")
    expect.set_options(timeout=TIMEOUT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: Browser, file: Path, name: str = "", **options: Any) -> Iterator[Page]:
    """Open a report; on leaving it nothing was said, broke or was asked of anyone."""
    words: dict[str, Any] = {
        "viewport": {"width": 1280, "height": 900},
        "reduced_motion": "reduce",
        "color_scheme": "light",
    }
    context = browser.new_context(**words | options)
    context.set_default_timeout(TIMEOUT)
    page = context.new_page()
    problems: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri() + (f"#{name}" if name else ""))
    if page.locator(".explorer").count():
        page.wait_for_selector("html[data-ready]")
    try:
        yield page
        page.wait_for_timeout(100)  # for what an event still has to do
        assert problems == []
        assert [one.partition("#")[0] for one in requests if not one.startswith("data:")] == [
            file.as_uri()
        ]
    finally:
        context.close()


@pytest.fixture(scope="module")
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """One page for the tests that leave it as good as they found it."""
    with visit(browser, site.file) as page:
        yield page


def heatmap(page: Page, role: str) -> Any:
    return page.locator(f'[aria-roledescription="heatmap"][aria-label^="{role}:"]')


def layer_of(site: Site, role: str, block: int) -> list[dict[Any, Any]]:
    """Return the neurons of a layer, the most entangled first."""
    frame = site.frame
    return frame[(frame["role"] == role) & (frame["block"] == block)].to_dict("records")


def top_of(frame: pd.DataFrame) -> str:
    """Return the neuron with the largest distance of its bulk, of those that outliers do not make."""
    shapes = of_kind(frame, "shape").sort_values("wasserstein_bulk", ascending=False)
    return str(shapes["name"].iloc[0])


def of_kind(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return the neurons whose distance outliers make, or their shape."""
    outliers = frame["wasserstein_bulk"] < frame["wasserstein"] / 2
    outliers |= frame["far_variance"] > 0.5
    return frame[outliers if kind == "outliers" else ~outliers]


def point_at(page: Page, role: str, block: int, rank: int, *, wide: int) -> tuple[float, float]:
    """Return where a cell of three blocks is on the screen: ranks go by their square roots."""
    plot = heatmap(page, role)
    plot.evaluate("plot => plot.scrollIntoView({block: 'center'})")
    box = plot.locator(".nsewdrag").first.bounding_box()
    across = (np.sqrt(rank / wide) + np.sqrt((rank + 1) / wide)) / 2
    x = box["x"] + across * box["width"]
    return float(x), float(box["y"] + (block + 0.5) / 3 * box["height"])


def status(page: Page) -> Any:
    return page.locator(".status")


def says(page: Page, neuron: Mapping[Any, Any]) -> None:
    """The line below the heatmaps names a neuron and its distance."""
    name = re.escape(neuron["name"])
    expect(status(page)).to_have_text(re.compile(rf"^{name}\s+W1 "))
    number = re.search(r"W1 ([\d.]+) std$", status(page).inner_text())
    assert number is not None
    assert float(number.group(1)) == pytest.approx(neuron["wasserstein"], abs=7e-5)


def number_of(text: str) -> float:
    return float(text.replace(",", ""))


def is_open(page: Page, site: Site, name: str) -> None:
    """The panel shows one neuron: its numbers, its bars over its Gaussian, and its place."""
    expect(page.locator(".neuron h3")).to_have_text(name)
    (neuron,) = site.frame[site.frame["name"] == name].to_dict("records")
    shown = {
        item.locator("dt").inner_text(): item.locator("dd").inner_text()
        for item in page.locator(".neuron dl > div").all()
    }
    assert list(shown) == list(NUMBERS.values())
    for key, label in NUMBERS.items():
        four = key.startswith("wasserstein")
        tolerance: dict[str, Any] = {"abs": 7e-5} if four else {"rel": 6e-4, "abs": 1e-9}
        assert number_of(shown[label]) == pytest.approx(float(neuron[key]), **tolerance), key
    part = site.frame[site.frame["layer"] == neuron["layer"]]
    rank = part["name"].tolist().index(name) + 1
    expect(page.locator(".neuron p.quiet").first).to_have_text(
        re.compile(rf"\b{rank} of .*\b{len(part)} neurons.*\b860 tokens")
    )
    drawn = page.evaluate(
        "() => document.querySelector('.picture').data.map(({x, y, width}) => "
        "({x: [...x], y: [...y], width}))"
    )
    truth = sketched(site.tree, np.array([neuron["row"]]))
    low, high, shares = truth.low[0], truth.high[0], truth.shares[0]
    width, spread = (high - low) / BARS, abs(low) + abs(high)
    bars, line = drawn
    assert len(bars["y"]) == BARS
    assert bars["width"] == pytest.approx(width, rel=1e-3)
    middles = low + (np.arange(BARS) + 0.5) * width
    assert bars["x"] == pytest.approx(middles, abs=2.0**-15 * spread)
    level = shares.max() / width / 63
    np.testing.assert_allclose(bars["y"], shares / width, atol=0.55 * level, rtol=1e-3)
    density = np.exp(-(((np.array(line["x"]) - neuron["mean"]) / neuron["std"]) ** 2) / 2)
    density /= neuron["std"] * np.sqrt(2 * np.pi)
    np.testing.assert_allclose(line["y"], density, atol=2e-3 * density.max())
    marked = page.locator('tr[aria-current="true"] td:first-child button').all_inner_texts()
    assert marked in ([], [name])


@pytest.mark.parametrize(
    ("role", "block", "rank"),
    [("mlp.up_proj", 0, 0), ("mlp.up_proj", 2, 5), ("mlp.gate_proj", 1, 36)],
)
def test_hovering_tells_the_neuron_and_a_click_opens_it(
    page: Page, site: Site, role: str, block: int, rank: int
) -> None:
    neuron = layer_of(site, role, block)[rank]
    x, y = point_at(page, role, block, rank, wide=37)
    page.mouse.move(x - 2, y - 2)
    page.mouse.move(x, y)
    says(page, neuron)
    hover = page.locator(".hoverlayer text").all_text_contents()
    assert any(neuron["name"] in text for text in hover)
    page.mouse.click(x, y)
    is_open(page, site, neuron["name"])
    assert page.evaluate("location.hash") == f"#{neuron['name']}"
    assert page.evaluate("document.activeElement.className") == "neuron"
    (shape,) = heatmap(page, role).evaluate("plot => plot.layout.shapes")
    assert (shape["y0"], shape["y1"]) == (block - 0.5, block + 0.5)
    assert [37 * shape["x0"] ** 2, 37 * shape["x1"] ** 2] == pytest.approx([rank, rank + 1])


def test_colours_are_the_square_roots_of_the_distances(page: Page, site: Site) -> None:
    for role, part in site.frame.groupby("role"):
        wide = int(part.groupby("layer").size().max())
        z = heatmap(page, str(role)).evaluate("plot => plot.data[0].z.map(row => [...row])")
        layers = [layer["wasserstein"].to_numpy() for _, layer in part.groupby("block")]
        expected = [np.sqrt(np.pad(one, (0, wide - len(one)))) for one in layers]
        np.testing.assert_allclose(np.array(z, float), expected, rtol=1e-4)
    scale = page.evaluate("[...document.querySelectorAll('.ticks span')].map(e => e.textContent)")
    tops = {
        page.evaluate("plot => plot.data[0].zmax", heatmap(page, str(role)).element_handle())
        for role in site.frame["role"].unique()
    }
    assert len(tops) == 1
    (top,) = tops
    assert number_of(scale[-1]) == pytest.approx(top**2, rel=0.05)
    assert top**2 <= site.frame["wasserstein"].max() * 1.001


def test_a_link_opens_its_neuron(browser: Browser, site: Site) -> None:
    with visit(browser, site.file, ASKED[1]) as page:
        is_open(page, site, ASKED[1])
        assert page.evaluate("location.hash") == f"#{ASKED[1]}"


@pytest.mark.parametrize("name", ["", "50%"])
def test_any_other_link_opens_the_neuron_of_the_most_conspicuous_shape(
    browser: Browser, site: Site, name: str
) -> None:
    with visit(browser, site.file, name) as page:
        is_open(page, site, top_of(site.frame))
        assert page.evaluate("location.hash") == (f"#{name}" if name else "")


def test_shapes_and_outliers_are_told_apart(page: Page, site: Site) -> None:
    for kind, by in (("shape", "wasserstein_bulk"), ("outliers", "wasserstein")):
        rows = of_kind(site.frame, kind).sort_values(by, ascending=False, kind="stable").head(8)
        title = "shapes" if kind == "shape" else kind
        table = page.get_by_role("region", name=f"{title}, largest first").locator("tbody")
        assert table.locator("td:first-child button").all_inner_texts() == rows["name"].tolist()
        for column, key in ((2, "wasserstein"), (3, "wasserstein_bulk")):
            cells = table.locator(f"td:nth-child({column})").all_inner_texts()
            assert [*map(float, cells)] == pytest.approx(rows[key].tolist(), abs=7e-5)
    name = of_kind(site.frame, "shape").sort_values("wasserstein_bulk")["name"].iloc[-2]
    page.locator("table.kind").first.get_by_role("button", name=name, exact=True).click()
    expect(page.locator(".neuron h3")).to_have_text(name)


def made_visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥")


def open_by_table(page: Page, name: str) -> None:
    page.get_by_label("search by layer and index").fill(name)
    page.get_by_role("button", name=name, exact=True).click()
    page.get_by_label("search by layer and index").fill("")


def test_contexts_are_shown_and_what_finds_others_is_said(page: Page, site: Site) -> None:
    for name in ASKED:
        open_by_table(page, name)
        truth = site.contexts[name]
        lines = page.locator(".texts li")
        assert lines.count() == len(truth["contexts"])
        texts, marks = (
            page.locator(".texts li code").all_text_contents(),
            page.locator(".texts li mark").all_text_contents(),
        )
        for line, text, mark, one in zip(
            lines.all_text_contents(), texts, marks, truth["contexts"], strict=True
        ):
            assert mark == made_visible(one["token"])
            whole = made_visible(one["before"] + one["token"] + one["after"])
            assert text.startswith("…")
            assert text.endswith("…")
            assert text.strip("…") in whole
            number, deviation = re.findall(r"^(\S+) \(([-+][\d.]+) std\)", line)[0]
            assert number_of(number) == pytest.approx(one["output"], rel=1e-3, abs=1e-9)
            assert float(deviation) == pytest.approx(one["deviation"], abs=0.051)
            assert line.endswith(f" window {one['window']}, position {one['position']}")
        whys = list(dict.fromkeys(one["why"] for one in truth["contexts"]))
        assert page.locator(".texts h5").all_text_contents() == whys
        words = page.locator(".neuron").inner_text()
        assert f"Exact W1 {truth['wasserstein']:.4f}" in words
        assert f"95% interval {truth['low']:.4f} to {truth['high']:.4f}" in words
        for left in truth["without"]:
            what = f"W1 {left['wasserstein']:.4f} without {made_visible(left['what'])}"
            assert what in words
        shares = page.locator(".neuron p", has_text="Shares of the distance").first
        assert shares.text_content() == "Shares of the distance by frequent tokens: " + ", ".join(
            f"{made_visible(one['token']) or '∅'} {100 * round(one['share'], 4):.1f}%"
            for one in truth["frequent"][:8]
        )
        assert "are missing" not in words
    name = "model.layers.1.mlp.gate_proj:11"
    open_by_table(page, name)
    words = page.locator(".neuron").inner_text()
    assert f"entangle contexts RUN {name}" in words
    assert page.locator(".texts").count() == 0


def test_text_that_looks_like_html_is_shown_as_it_is(
    browser: Browser, site: Site, tmp_path: Path
) -> None:
    file = entangle.report([attacked(site, tmp_path)], tmp_path / "report.html")
    with visit(browser, file, ASKED[0]) as page:
        assert page.locator(".texts mark").all_text_contents()[0] == ATTACK
        expect(page.locator("h2")).to_contain_text("<img src=x onerror=alert(2)>")
        assert page.locator("h2 img, .neuron script, .neuron img").count() == 0
        assert (
            page.evaluate("[...document.scripts].some(s => s.textContent == 'alert(1)')") is False
        )


TOKENS = """() => [...document.querySelectorAll('.coloured li')].map((line) =>
  [...line.querySelectorAll('code span')].map((token) => {
    const style = getComputedStyle(token);
    return [token.textContent, token.dataset.value ?? null, style.backgroundColor,
      token.classList.contains('chosen')];
  }))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_windows_have_the_models_values_in_colour(
    browser: Browser, site: Site, scheme: Literal["light", "dark"]
) -> None:
    """The values and shades are computed from those that a plain hook hears."""
    model = entangle.load_model(site.run.parent / "model")
    tokenizer = entangle.load_tokenizer(site.run.parent / "model")
    windows = entangle.token_windows(site.run.parent / "text.txt", tokenizer, windows=20, length=43)
    layer, _, index = UNIT.rpartition(":")
    heard: list[torch.Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda *a: heard.append(a[2]))
    with torch.no_grad():
        model(windows.tokens)
    hook.remove()
    own = heard[0][..., int(index)].numpy()
    median = np.median(own)
    reach = float(np.quantile(np.abs(own - median), 0.99))
    tints = {"light": ([255, 176, 77], [130, 186, 245]), "dark": ([143, 74, 0], [29, 87, 150])}
    with visit(browser, site.file, UNIT, color_scheme=scheme) as page:
        lines = page.evaluate(TOKENS)
        truth = site.contexts[UNIT]["windows"]
        assert len(lines) == len(truth) == 8
        for line, one in zip(lines, truth, strict=True):
            texts, values, colours, chosen = zip(*line, strict=True)
            text = str(tokenizer.decode(windows.tokens[one["window"]]))
            assert "".join(texts) == made_visible(text)
            assert [place for place, there in enumerate(chosen) if there] == [one["position"]]
            for value, colour, exact in zip(values, colours, own[one["window"]], strict=True):
                assert float(value) == pytest.approx(exact, abs=0.02 * reach)
                *tint, alpha = [float(x) for x in re.findall(r"[\d.]+", colour)]
                shade = float(np.clip((exact - median) / reach, -1, 1))
                assert (alpha if len(tint) == 3 else 1) == pytest.approx(abs(shade), abs=0.025)
                if abs(shade) > 0.05:
                    assert (tint if len(tint) == 3 else [*tint, alpha]) == tints[scheme][shade < 0]


def test_windows_are_read_by_the_keyboard_and_by_touch(browser: Browser, site: Site) -> None:
    with visit(browser, site.file, UNIT) as page:
        said = page.locator(".said")
        page.locator(".coloured").focus()
        first = site.contexts[UNIT]["windows"][0]
        for key, position in (("ArrowDown", first["position"]), ("ArrowRight", None), ("Home", 0)):
            page.keyboard.press(key)
            place = position if position is not None else first["position"] + 1
            expect(said).to_contain_text(f"window {first['window']}, position {place}")
        assert page.locator(".coloured .current").count() == 1
        page.locator(".coloured li").nth(2).locator("span[data-value]").nth(5).click()
        third = site.contexts[UNIT]["windows"][2]
        expect(said).to_contain_text("output")
        expect(said).to_contain_text(f"window {third['window']}, position 5")


def test_sign_cases_stand_with_their_examples(page: Page, site: Site) -> None:
    open_by_table(page, UNIT)
    unit = site.contexts[UNIT]["unit"]
    rows = page.locator(".unit tbody tr").all()
    for row, case in zip(rows, unit["cases"], strict=True):
        gate, up, share, mean = row.locator("td").all_text_contents()
        assert (gate, up) == (case["gate"], case["up"])
        assert share == f"{100 * case['share']:.1f}%"
        assert number_of(mean) == pytest.approx(case["mean"], rel=1e-3)
    words = page.locator(".unit").inner_text()
    for part in ("gate", "up", "product"):
        assert f"{unit[part]}" in words
        assert f"W1 {unit['wasserstein'][part]:.4f}" in words
    marks = page.locator(".unit mark").all_text_contents()
    examples = [one for case in unit["cases"] for one in case["examples"]]
    assert marks == [made_visible(one["token"]) or "∅" for one in examples]
    open_by_table(page, ASKED[1])
    assert page.locator(".unit").count() == 0


def test_contexts_of_an_older_version_are_shown_without_windows(
    browser: Browser, site: Site, tmp_path: Path
) -> None:
    run = changed(site.run, tmp_path / "run")
    newer = ("scale", "windows", "unit")
    older = {
        name: {key: value for key, value in one.items() if key not in newer}
        for name, one in site.contexts.items()
    }
    (run / "contexts.json").write_text(json.dumps(older), encoding="utf-8")
    with visit(browser, entangle.report([run], tmp_path / "a.html"), UNIT) as page:
        assert page.locator(".coloured, .unit").count() == 0
        assert "older version" in page.locator(".neuron").inner_text()
        assert page.locator(".texts li").count() == len(older[UNIT]["contexts"])


def test_of_a_long_window_the_tokens_around_the_chosen_one_are_shown() -> None:
    levels = np.arange(300, dtype=np.uint16).astype(np.int8)[10:]  # the first ten are not counted
    texts = [f"t{place}" for place in range(300)]
    for position, first in ((10, 0), (150, 86), (299, 172)):
        one = {"why": "", "window": 0, "position": position, "levels": packed(levels)}
        kept = Kept({"n": {"scale": {"step": 0.1}, "windows": [one]}}, {"0": texts})
        (shown,) = cut(kept, "n")["shown"]
        assert (shown["first"], shown["end"]) == (first, first + 128)
        places = np.arange(max(first, 10), first + 128)
        assert levels_of(shown["levels"]).tolist() == places.astype(np.int8).tolist()


# the table


def table_names(page: Page) -> list[str]:
    return page.locator("table.neurons tbody td:first-child button").all_inner_texts()


@pytest.mark.parametrize(
    "words",
    [
        *("1.mlp.up_proj", "up_proj:3", "UP_PROJ  model.layers.2", ":7 ", "contexts"),
        *("no such neuron", "0.self_attn contexts", ".", ".*"),
    ],
)
def test_searching_leaves_the_neurons_whose_names_hold_all_words(
    page: Page, site: Site, words: str
) -> None:
    frame = payload(sections(read(site.file))[0]).frame
    names = frame["name"].str.lower()
    kept = pd.Series(True, index=frame.index)
    for word in words.lower().split():
        with_contexts = frame["name"].isin([*site.contexts]) & (word in "contexts")
        kept &= names.str.contains(word, regex=False) | with_contexts
    expected = frame[kept].sort_values("wasserstein", ascending=False, kind="stable")["name"]
    page.get_by_label("search by layer and index").fill(words)
    try:
        assert table_names(page) == expected.head(50).tolist()
        count = f"{len(expected)} neurons, {min(len(expected), 50)} in the table"
        expect(page.locator(".ask output")).to_have_text(count)
        expect(page.locator("table.neurons + p button, .scroll + p button")).to_be_visible(
            visible=len(expected) > 50
        )
    finally:
        page.get_by_label("search by layer and index").fill("")


@pytest.mark.parametrize("key", NUMBERS)
def test_sorting_by_a_column_is_that_of_pandas(
    browser: Browser, page: Page, site: Site, key: str
) -> None:
    frame = payload(sections(read(site.file))[0]).frame
    place = 2 + [*NUMBERS].index(key)
    head = page.locator(f"table.neurons th:nth-child({place})")
    assert head.inner_text().startswith(NUMBERS[key])
    if head.get_attribute("aria-sort") is not None:  # the first column at first
        page.locator("table.neurons th button", has_text="max").click()
    for way in ("descending", "ascending", "descending"):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == way
        assert page.locator("table.neurons th[aria-sort]").count() == 1
        rows = frame.sort_values(key, ascending=way == "ascending", kind="stable").head(50)
        assert table_names(page) == rows["name"].tolist()
        cells = page.locator(f"table.neurons tbody td:nth-child({place})").all_inner_texts()
        found = [number_of(cell) for cell in cells]
        assert found == pytest.approx(rows[key].tolist(), rel=6e-4, abs=7e-5)
    page.locator("table.neurons th button", has_text="W1 (std)").click()


def test_more_rows_come_by_fifty_until_all_are_there(page: Page, site: Site) -> None:
    more, whole = page.get_by_role("button", name="50 more"), len(site.frame)
    seen = 50
    while more.is_visible():
        assert len(table_names(page)) == seen < whole
        more.click()
        seen = min(seen + 50, whole)
    assert seen == whole
    assert sorted(table_names(page)) == sorted(site.frame["name"])
    search = page.get_by_label("search by layer and index")
    search.fill("nothing")
    search.fill("")
    assert len(table_names(page)) == 50


def test_a_row_of_the_table_opens_its_neuron_and_has_its_histogram(page: Page, site: Site) -> None:
    page.get_by_label("search by layer and index").fill("2.mlp.down_proj")
    name = table_names(page)[3]
    row = page.locator("table.neurons tbody tr").nth(3)
    outline = row.locator("path.bar").get_attribute("d") or ""
    row.get_by_role("button").click()
    is_open(page, site, name)
    assert row.get_attribute("aria-current") == "true"
    (neuron,) = site.frame[site.frame["name"] == name].to_dict("records")
    shares = sketched(site.tree, np.array([neuron["row"]])).shares[0]
    heights = 22 - np.array([float(y) for y in re.findall(r"V([\d.]+)", outline)])
    assert len(heights) == BARS + 1  # and back to the line below
    scale = heights.max() / shares.max()
    np.testing.assert_allclose(heights[:BARS], scale * shares, atol=0.06 + 22 / 63)
    page.keyboard.press("Escape")  # back to the button
    assert page.evaluate("document.activeElement.textContent") == name
    page.get_by_label("search by layer and index").fill("")


# by the keyboard alone


def test_tab_reaches_all_that_can_be_used(page: Page) -> None:
    assert page.locator('[tabindex]:not([tabindex="0"]):not([tabindex="-1"])').count() == 0
    marked = page.evaluate(
        """() => {
          const all = [...document.querySelectorAll('a[href], button, input, summary, [tabindex="0"]')]
            .filter((e) => e.checkVisibility());
          all.forEach((e, place) => { e.dataset.place = place; });
          return all.map((e) => e.tagName + ' ' + (e.getAttribute('aria-label') ?? e.textContent));
        }"""
    )
    assert sum("arrow keys move" in name for name in marked) == 7
    assert sum("ranked neurons" in name for name in marked) == 1
    page.evaluate(
        "() => { document.activeElement.blur(); window.getSelection().removeAllRanges(); }"
    )
    page.evaluate("() => { document.body.tabIndex = -1; document.body.focus(); }")
    order: list[int] = []
    for _ in range(2 * len(marked)):
        page.keyboard.press("Tab")
        place = page.evaluate("document.activeElement.dataset.place")
        if place is not None:
            order.append(int(place))
        if len({*order}) == len(marked):
            break
    assert [marked[place] for place in range(len(marked)) if place not in order] == []
    assert order == sorted(order)
    page.evaluate("() => document.body.removeAttribute('tabindex')")


def test_arrows_move_enter_opens_and_escape_goes_back(page: Page, site: Site) -> None:
    role = "mlp.up_proj"
    plot = heatmap(page, role)
    plot.focus()
    layers = [layer_of(site, role, block) for block in range(3)]
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("ArrowUp")
    says(page, layers[0][0])
    moves = [
        *[("ArrowRight", 0, 1), ("ArrowRight", 0, 2), ("ArrowDown", 1, 2), ("ArrowLeft", 1, 1)],
        *[("ArrowDown", 2, 1), ("ArrowDown", 2, 1), ("Shift+ArrowRight", 2, 5), ("End", 2, 36)],
        *[("ArrowRight", 2, 36), ("Shift+ArrowLeft", 2, 32), ("ArrowUp", 1, 32), ("Home", 1, 0)],
        *[("ArrowLeft", 1, 0), ("ArrowRight", 1, 1)],
    ]
    opened = page.locator(".neuron h3").inner_text()
    for key, block, rank in moves:
        page.keyboard.press(key)
        says(page, layers[block][rank])
    assert page.locator(".neuron h3").inner_text() == opened  # nothing yet
    page.keyboard.press("Enter")
    is_open(page, site, layers[1][1]["name"])
    assert page.evaluate("document.activeElement.className") == "neuron"
    page.keyboard.press("Escape")
    assert plot.evaluate("plot => plot === document.activeElement")
    page.keyboard.press("ArrowDown")  # from where it was
    says(page, layers[2][1])
    page.keyboard.press("Space")
    is_open(page, site, layers[2][1]["name"])
    page.keyboard.press("Escape")
    assert plot.evaluate("plot => plot === document.activeElement")


def test_the_arrows_pass_over_a_layer_without_neurons(
    browser: Browser, site: Site, tmp_path: Path
) -> None:
    tree = entangle.open_run(site.small)
    dead = "model.layers.1.mlp.down_proj"
    distance = tree["wasserstein"].where(tree["layer"] != dead)
    run = changed(site.small, tmp_path / "run", wasserstein=distance.to_numpy())
    down = distance.to_dataframe()["wasserstein"].groupby(tree["layer"].to_numpy()).max()
    with visit(browser, entangle.report([run], tmp_path / "a.html")) as page:
        heatmap(page, "mlp.down_proj").focus()
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowUp")
        for key, block in (("ArrowDown", 2), ("ArrowDown", 2), ("ArrowUp", 0)):
            page.keyboard.press(key)
            said = status(page).inner_text()
            layer = f"model.layers.{block}.mlp.down_proj"
            assert said.startswith(f"{layer}:")
            assert f"W1 {down[layer]:.4f} std" in said


def test_a_link_names_the_run_where_there_are_two(
    browser: Browser, site: Site, tmp_path: Path
) -> None:
    other = changed(site.small, tmp_path / "other")
    file = entangle.report([site.small, other], tmp_path / "a.html")
    name, section = ASKED[1], "#run-1"
    with visit(browser, file) as page:
        page.locator(f"{section} input[type=search]").fill(name)
        page.locator(f"{section} table.neurons tbody button").first.click()
        assert page.url.endswith(f"#run-1/{name}")
        first = page.locator("#run-0 .neuron h3").inner_text()
    with visit(browser, file, f"run-1/{name}") as page:
        expect(page.locator(f"{section} .neuron h3")).to_have_text(name)
        assert page.locator("#run-0 .neuron h3").inner_text() == first != name
        assert page.evaluate("document.activeElement.closest('section').id") == "run-1"


def test_a_link_to_what_is_not_there_says_so(browser: Browser, site: Site) -> None:
    with visit(browser, site.file, "model.layers.0.mlp.up_proj:9999") as page:
        expect(status(page)).to_have_text(re.compile("link.*model.layers.0.mlp.up_proj:9999"))


def test_a_panel_without_any_neuron_tells_and_opens_none(
    browser: Browser, site: Site, tmp_path: Path
) -> None:
    tree, dead = entangle.open_run(site.small), "mlp.down_proj"
    distance = tree["wasserstein"].where(tree["role"] != dead).to_numpy()
    run = changed(site.small, tmp_path / "run", wasserstein=distance)
    name = "model.layers.0.self_attn.q_proj:23"
    with visit(browser, entangle.report([run], tmp_path / "a.html"), name) as page:
        page.locator("a.skip").focus()
        before = status(page).inner_text()
        assert before.startswith(name)
        for key in ("ArrowRight", "ArrowDown", "End", "Enter"):
            heatmap(page, dead).focus()
            page.keyboard.press(key)
            assert status(page).inner_text() == before
        expect(page.locator(".neuron h3")).to_have_text(name)


# on every screen


WIDE: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
NARROW: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
}


@pytest.mark.parametrize("screen", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_page_is_no_wider_than_the_screen(
    browser: Browser, all_kinds: Path, screen: dict[str, Any]
) -> None:
    width = screen["viewport"]["width"]
    with visit(browser, all_kinds, ASKED[0], **screen) as page:
        for summary in page.locator("summary").all():
            summary.click()
        found = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert found == [width, width]
        wide = page.evaluate(
            """(width) => [...document.querySelectorAll('body *')]
              .filter((e) => !e.closest('.scroll, svg, .skip, figure img') && e.checkVisibility())
              .filter((e) => e.getBoundingClientRect().right > width + 1)
              .map((e) => e.tagName + '.' + e.className)""",
            width,
        )
        assert wide == []


def test_a_tap_opens_a_neuron_and_the_way_back_is_a_button(browser: Browser, site: Site) -> None:
    with visit(browser, site.file, **NARROW) as page:
        neuron = layer_of(site, "mlp.up_proj", 1)[2]
        x, y = point_at(page, "mlp.up_proj", 1, 2, wide=37)
        page.touchscreen.tap(x, y)
        is_open(page, site, neuron["name"])
        says(page, neuron)
        expect(page.locator(".neuron h3")).to_be_in_viewport()
        back = page.get_by_role("button", name="back to where it was opened")
        back.tap()
        expect(heatmap(page, "mlp.up_proj")).to_be_in_viewport()
        row = page.locator("table.neurons tbody button").nth(4)
        name = row.inner_text()
        row.tap()
        is_open(page, site, name)
        expect(page.locator(".neuron h3")).to_be_in_viewport()


TEXTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return rgba(getComputedStyle(document.body).backgroundColor);
  };
  const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility() || e.closest('script, style, noscript')) continue;
    const svg = e.closest('svg');
    if (svg ? e.tagName !== 'text' : !own(e) && e.tagName !== 'INPUT') continue;
    const style = getComputedStyle(e, e.tagName === 'INPUT' ? '::placeholder' : null);
    const path = [];
    for (let p = e; p !== document.body; p = p.parentElement) path.unshift(p.localName);
    found.push({
      what: path.join(' '), tag: e.localName, kind: String(e.className?.baseVal ?? e.className),
      text: rgba(svg ? style.fill : style.color), ground: ground(svg ? svg.parentElement : e),
    });
  }
  return found;
}"""


def contrast(one: list[int], other: list[int]) -> float:
    """Return the contrast of two colours as WCAG defines it."""

    def luminance(colour: list[int]) -> float:
        parts = np.array(colour[:3]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    first, second = luminance(one), luminance(other)
    return (max(first, second) + 0.05) / (min(first, second) + 0.05)


def test_all_text_can_be_read(browser: Browser, all_kinds: Path) -> None:
    with visit(browser, all_kinds, ASKED[0]) as page:
        for summary in page.locator("summary").all():
            summary.click()
        page.locator(".skip").focus()
        found = {}
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            page.wait_for_timeout(300)  # for the pictures
            found[scheme] = page.evaluate(TEXTS)
    grounds = {scheme: {tuple(one["ground"]) for one in found[scheme]} for scheme in found}
    assert not grounds["light"] & grounds["dark"]
    poor = set()
    for scheme, texts in found.items():
        tags = {one["tag"] for one in texts}
        assert tags >= {"p", "a", "td", "th", "small", "dt", "dd", "summary", "button", "h3", "h5"}
        assert tags >= {"mark", "code", "text", "figcaption", "li", "input"}
        assert any("quiet" in one["kind"] for one in texts)
        assert any("output" in one["kind"] for one in texts)
        poor |= {
            f"{scheme}: {one['what']}.{one['kind']} {one['text']} on {one['ground']}"
            for one in texts
            if one["text"][3] != 255 or contrast(one["text"], one["ground"]) < 4.5
        }
    assert poor == set()


PICTURE = """() => {
  const picture = document.querySelector('.picture'), plot = document.querySelector('.panel > div');
  const root = getComputedStyle(document.documentElement);
  const fill = (e) => getComputedStyle(e).fill;
  return {
    wanted: ['--bar', '--fit', '--ink', '--none'].map((name) => root.getPropertyValue(name).trim()),
    found: [picture.data[0].marker.color, picture.data[1].line.color, picture.layout.font.color,
      plot.layout.plot_bgcolor],
    drawn: [fill(picture.querySelector('.bars path')), fill(picture.querySelector('.xtick text')),
      fill(plot.querySelector('.xtick text')), fill(document.querySelector('td svg .bar'))],
    shapes: [...document.querySelectorAll('.panel > div')].map((e) => e.layout.shapes.length),
  };
}"""


def test_pictures_follow_the_colour_scheme(browser: Browser, site: Site) -> None:
    with visit(browser, site.file, ASKED[0], color_scheme="dark") as page:
        seen: dict[str, Any] = {}
        for scheme in ("dark", "light", "dark"):
            page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            page.wait_for_timeout(300)
            found = page.evaluate(PICTURE)
            assert found["found"] == found["wanted"]
            bar, _, ink, _ = found["wanted"]
            drawn = [
                "#" + "".join(f"{int(x):02x}" for x in re.findall(r"\d+", one)[:3])
                for one in found["drawn"]
            ]
            assert drawn == [bar, ink, ink, bar]
            assert sum(found["shapes"]) >= 1  # the mark of what is open
            assert seen.setdefault(scheme, found) == found
            expect(page.locator(".neuron h3")).to_have_text(ASKED[0])
        for light, dark in zip(seen["light"]["wanted"], seen["dark"]["wanted"], strict=True):
            assert light != dark


# several runs


def test_experts_of_a_mixture_share_a_panel(browser: Browser, tmp_path: Path) -> None:
    entangle.measure(
        tiny_mixture(),
        random_windows(12, seed=0),
        layers=["*.experts.*", "*.q_proj"],
        out=tmp_path / "a",
    )
    file = entangle.report([tmp_path / "a"], tmp_path / "report.html")
    layers = payload(sections(read(file))[0]).header["layers"]
    found = {(layer["panel"], layer["block"], layer["expert"]) for layer in layers}
    expected = {
        (f"mlp.experts.{role}", block, expert)
        for role in ("gate_up_proj", "down_proj")
        for block in range(2)
        for expert in range(4)
    }
    assert found == expected | {("self_attn.q_proj", block, None) for block in range(2)}
    with visit(browser, file) as page:
        heads = page.locator(".panel h4").all_inner_texts()
        assert [head.split(" ")[0] for head in heads] == [
            "self_attn.q_proj",
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
        ]
        ticks = page.locator(".panel").nth(1).locator(".ytick text").all_text_contents()
        assert ticks == ["0.0", "0.1", "0.2", "0.3", "1.0", "1.1", "1.2", "1.3"]


def test_two_measured_runs_are_apart(browser: Browser, site: Site, tmp_path: Path) -> None:
    tree = entangle.open_run(site.small)
    distances = ("wasserstein", "wasserstein_bulk")
    turned: dict[str, Any] = {
        name: tree[name].to_numpy()[::-1].copy() for name in distances
    }  # another order
    other = changed(site.small, tmp_path / "other", **turned)
    file = entangle.report([site.small, other], tmp_path / "report.html")
    names = [top_of(ranked(entangle.open_run(run))) for run in (site.small, other)]
    assert names[0] != names[1]
    with visit(browser, file) as page:
        heads = page.locator(".neuron h3")
        assert heads.all_inner_texts() == names
        second = page.locator("#run-1")
        second.get_by_label("search by layer and index").fill("0.mlp.down_proj:5")
        second.locator("table.neurons tbody button").first.click()
        assert heads.all_inner_texts() == [names[0], "model.layers.0.mlp.down_proj:5"]
        expect(page.locator("#run-0 .ask output")).to_have_text("144 neurons, 50 in the table")


def test_a_page_of_tables_alone_has_no_script(
    browser: Browser, tables: dict[str, Path], tmp_path: Path
) -> None:
    file = entangle.report([tables["ablation"]], tmp_path / "report.html")
    with visit(browser, file, java_script_enabled=True) as page:
        assert page.evaluate("document.scripts.length") == 0
        widths = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
        assert len(widths) == 1
        assert min(widths) > 500
        expect(page.locator("table").first).to_be_visible()


def test_words_and_descriptions_are_shown_and_found(
    browser: Browser, site: Site, tmp_path: Path
) -> None:
    run = changed(site.small, tmp_path / "small")
    word = {"token": ATTACK, "id": 3, "value": 0.12345, "deviation": 4.21}
    least = {"token": " low", "id": 4, "value": -2.5, "deviation": -3.04}
    found: dict[str, Any] = {"side": "reads", "neuron": ASKED[0], "what": "row"}
    found |= {"through": ["the norm"]}
    found |= {"mean": 0.0, "std": 1.0, "top": [word], "bottom": [least]}
    words = {ASKED[0]: {"neuron": ASKED[0], "words": [found], "missing": []}}
    (run / "words.json").write_text(json.dumps(words), encoding="utf-8")
    told = {ASKED[0]: f"{ATTACK} and line breaks"}
    (run / "descriptions.json").write_text(json.dumps(told), encoding="utf-8")
    file = entangle.report([run], tmp_path / "report.html")
    with visit(browser, file, ASKED[0]) as page:
        box = page.locator(".neuron .words")
        text = box.inner_text()
        assert told[ASKED[0]] in text
        assert f"reads (row {ASKED[0]}, through the norm)" in text
        assert f"most: {json.dumps(ATTACK)} 0.1235 (+4.2)" in text
        assert 'least: " low" -2.5 (-3.0)' in text
        page.get_by_label("search by layer and index").fill("line breaks")
        assert page.locator(".neurons tbody tr").count() == 1
        assert page.locator(".neurons .told").all_text_contents() == [told[ASKED[0]]]
    (run / "words.json").write_text(json.dumps({ASKED[0]: {"words": [{}]}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"words\.json was not written by this version"):
        entangle.report([run], tmp_path / "report.html")
