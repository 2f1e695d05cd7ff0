"""The notebooks run on a tiny model and show what is so; the ones we keep were run on the real one."""

import ast
import html
import itertools
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
import xarray as xr

import entangle
from entangle.model.text import TokenWindows
from entangle.numerics.gaussian import from_samples
from notebooks.execute import NOTEBOOKS, execute, read, write
from tests.tiny_mixtures import tiny_mixture
from tests.tiny_models import save_tiny, tiny_tokenizer
from tests.torture.place import prose

ROOT = Path(__file__).parent.parent
LAYERS = ["model.layers.1.mlp.*"]
NEURON = "model.layers.1.mlp.up_proj:5"
FIRST = "model.layers.1.mlp.down_proj:7"
SIZES = {"WINDOWS": 40, "LENGTH": 32}
SMALL: dict[str, dict[str, Any]] = {
    "1": {"PAIRS": 64},
    "2": {"ENTANGLED": NEURON, "GAUSSIAN": "model.layers.1.mlp.up_proj:6", "FIRST_TOKEN": FIRST},
    "3": {
        "LAYERS": LAYERS[0],
        "LAYER": "model.layers.1.mlp.up_proj",
        "SHARE": 0.1,
        "SPARSITY": 0.5,
        "SEEDS": 2,
        "EVALUATION_WINDOWS": 6,
    },
    "4": {
        "LAYERS": LAYERS,
        "NEURON": NEURON,
        "EXPERTS": [2, 3],
        "SPARSITY": 0.5,
        "EVALUATION_WINDOWS": 8,
    },
    "5": {"MIXTURES": ["mixture"] * 2, "DENSE": ["model"] * 2},
    "6": {},
}
REAL: dict[str, dict[str, Any]] = {
    "1": {"PAIRS": 4096},
    "2": {
        "ENTANGLED": "model.layers.5.mlp.up_proj:816",
        "GAUSSIAN": "model.layers.5.mlp.up_proj:501",
        "FIRST_TOKEN": "model.layers.11.mlp.down_proj:443",
    },
    "3": {
        "LAYERS": "*.mlp.*",
        "LAYER": "model.layers.5.mlp.up_proj",
        "SHARE": 0.03,
        "SPARSITY": 0.9,
        "SEEDS": 3,
        "WINDOWS": 64,
        "EVALUATION_WINDOWS": 16,
    },
    "4": {
        "OUT": "../runs/notebooks/disentangled",
        "LAYERS": ["*.5.mlp.*", "*.14.mlp.*"],
        "NEURON": "model.layers.5.mlp.up_proj:816",
        "EXPERTS": [4, 16],
        "SPARSITY": 0.8,
        "EVALUATION_WINDOWS": 32,
    },
    "5": {
        "MIXTURES": [f"../data/dense-and-mixture/mixture-{seed}" for seed in range(3)],
        "DENSE": [f"../data/dense-and-mixture/dense-{seed}" for seed in range(3)],
        "WINDOWS": 256,
        "LENGTH": 256,
    },
    "6": {},
}
PLACES = {
    "MODEL": "../data/smollm2-135m",
    "TEXT": "../data/python-docs",
    "RUN": "../runs/notebooks/measured",
    "WINDOWS": 128,
    "LENGTH": 512,
}
PICTURES = {"1": 3, "2": 3, "3": 1, "4": 3, "5": 1, "6": 2}
BELONGS = {  # what only the outputs of the real model have
    "1": ["155520.0", "65536.0", "model.layers.11.mlp.down_proj:507"],
    "2": ["smollm2-135m · python-docs/calibration · 65,536 tokens"],
    "3": ["3270"],  # 3% of 30 x (1536 + 1536 + 576) neurons
    "4": ["7296", "8192"],  # neurons of two MLPs, held-out tokens
    "5": ["16384.0"],  # the mean number of an expert's tokens: 65,536 times 2 of 8
    "6": ["7.mlp.up_proj:943"],
}

Row = dict[str, str]


def parameters_of(notebook: Any) -> Any:
    """Return the one cell that is tagged so."""
    (cell,) = [x for x in notebook.cells if "parameters" in x.metadata.get("tags", [])]
    return cell


def assignments(source: str) -> dict[str, Any]:
    """Return what a cell of plain assignments sets."""
    found: dict[str, Any] = {}
    for line in ast.parse(source).body:
        assert isinstance(line, ast.Assign), "parameters are plain assignments"
        (target,), value = line.targets, ast.literal_eval(line.value)
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        values = value if isinstance(target, ast.Tuple) else [value]
        for name, one in zip(names, values, strict=True):
            assert isinstance(name, ast.Name)
            found[name.id] = one
    return found


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def texts_of(notebook: Any) -> str:
    """Return all text that a notebook's outputs show, without pictures."""
    found = [str(output.get("text", "")) for output in outputs_of(notebook)]
    for output in outputs_of(notebook):
        found += [str(v) for k, v in output.get("data", {}).items() if not k.startswith("image/")]
    return "\n".join(found)


def tables_of(notebook: Any) -> list[list[Row]]:
    """Return the tables that a notebook shows, their rows by column; the index has no name."""
    tables = []
    for output in outputs_of(notebook):
        text = str(output.get("data", {}).get("text/html", ""))
        if 'class="dataframe"' not in text:
            continue
        lines = [
            [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.S)]
            for line in re.findall(r"<tr.*?</tr>", text, re.S)
        ]
        tables.append([dict(zip(lines[0], line, strict=True)) for line in lines[1:]])
    return tables


def pictures_of(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs_of(notebook))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a text of random words, one half to calibrate, one to evaluate."""
    folder = tmp_path_factory.mktemp("notebooks")
    save_tiny(folder / "model")
    tiny_mixture("qwen3_moe").save_pretrained(folder / "mixture")
    tiny_tokenizer().save_pretrained(folder / "mixture")
    text = prose(seed=6, words=4000)[:21_000]  # on which three neurons have outliers
    (folder / "text").mkdir()
    (folder / "text" / "calibration.txt").write_text(text[: len(text) // 2], encoding="utf-8")
    # Of letters, the halves have 8% in common: the second is written backwards.
    other = text[len(text) // 2 :][::-1]
    (folder / "text" / "evaluation.txt").write_text(other, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def executed(folder: Path) -> dict[str, Any]:
    """All notebooks, by number, run in order on the tiny model.

    A kernel needs seconds to start, so one runs them all and forgets its names between them.
    """
    places = {"MODEL": "model", "TEXT": "text", "RUN": "runs/measured", "OUT": "runs/disentangled"}
    books = {file.name[0]: read(file) for file in NOTEBOOKS}
    joined = read(NOTEBOOKS[0])
    joined.cells = []
    for number, book in books.items():
        cell = parameters_of(book)
        settings = places | SIZES | SMALL[number]
        known = assignments(cell.source)
        cell.source = "\n".join(f"{name} = {settings[name]!r}" for name in known)
        for one in book.cells:
            one.id = f"{number}-{one.id}"
        joined.cells += [*book.cells, nbformat.v4.new_code_cell("%reset -f")]  # type: ignore[no-untyped-call]
    write(joined, folder / "joined.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            patch.setenv(name, "1")
        cells = iter(execute(folder / "joined.ipynb", folder=folder).cells)
    for book in books.values():
        book.cells = [*itertools.islice(cells, len(book.cells))]
        next(cells)  # which forgets
    return books


@pytest.fixture(scope="module")
def run(folder: Path, executed: dict[str, Any]) -> xr.DataTree:
    return entangle.open_run(folder / "runs" / "measured")


def windows_of(folder: Path, **options: Any) -> TokenWindows:
    tokenizer = entangle.load_tokenizer(folder / "model")
    return entangle.token_windows(folder / "text", tokenizer, length=32, **options)


def test_each_draws_its_pictures(executed: dict[str, Any]) -> None:
    assert list(executed) == [*PICTURES]
    assert {number: pictures_of(one) for number, one in executed.items()} == PICTURES


def test_the_neurons_found_are_those_with_the_largest_distances(
    executed: dict[str, Any], run: xr.DataTree
) -> None:
    described, top, top_up, *_ = tables_of(executed["1"])
    data = run.to_dataset()
    names = [f"{a}:{i}" for a, i in zip(data["layer"].values, data["index"].values, strict=True)]
    distances = data["wasserstein"].to_numpy()
    order = np.argsort(-distances)
    assert [row["neuron"] for row in top] == [names[place] for place in order[:8]]
    assert float(top[0]["wasserstein"]) == pytest.approx(distances.max(), abs=1e-6)
    up = [names[place] for place in order if data["role"].values[place] == "mlp.up_proj"]
    assert [row["neuron"] for row in top_up] == up[:8]
    shown = {row[""]: row for row in described}
    assert float(shown["count"]["wasserstein"]) == len(names)
    assert {shown[end]["count"] for end in ("min", "max")} == {"1280.0"}  # tokens
    assert float(shown["50%"]["wasserstein"]) == pytest.approx(np.median(distances), abs=6e-5)


def test_a_neurons_outputs_and_shares_are_its_own(
    executed: dict[str, Any], folder: Path, run: xr.DataTree
) -> None:
    model, windows = entangle.load_model(folder / "model"), windows_of(folder, windows=40)
    kept: dict[str, list[torch.Tensor]] = {NEURON: [], FIRST: []}
    for name, rows in kept.items():
        layer, _, index = name.rpartition(":")
        model.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, rows=rows, index=int(index): rows.append(
                output[..., index]
            )
        )
    with torch.inference_mode():
        model(windows.tokens)
    outputs = {name: rows[0].double().numpy() for name, rows in kept.items()}  # (windows, length)
    contexts, _frequent, _neurons, without = tables_of(executed["2"])
    ends = {row["why"]: float(row["output"]) for row in reversed(contexts)}  # the first of each
    assert ends["lowest"] == pytest.approx(outputs[NEURON].min(), abs=1e-5)
    assert ends["highest"] == pytest.approx(outputs[NEURON].max(), abs=1e-5)
    distance = float(from_samples(outputs[NEURON].reshape(-1, 1))[0])
    bound = float(run.entangle.neuron(NEURON).values["wasserstein_error"])
    said = re.search(r"<td>([\d.]+)</td>", texts_of(executed["2"]))
    assert said is not None
    assert float(said.group(1)) == pytest.approx(distance, abs=bound)
    left_out = next(row for row in without if row["what"].startswith("position "))
    place = int(left_out["what"].removeprefix("position "))
    rest = np.delete(outputs[FIRST], place, axis=1).reshape(-1, 1)
    assert float(left_out["wasserstein"]) == pytest.approx(from_samples(rest)[0], abs=1e-5)
    squares = np.square(outputs[FIRST] - outputs[FIRST].mean())
    variance = squares[:, place].sum() / squares.sum()
    assert float(left_out["variance"]) == pytest.approx(variance, abs=1e-5)
    shares = run.entangle.neuron(FIRST).contexts.attrs["positions"]
    assert sum(shares) == pytest.approx(1)
    shown = re.findall(r"^\d+ +([\d.]+)$", texts_of(executed["2"]), re.M)
    assert np.allclose([float(one) for one in shown[:4]], shares[:4], atol=1e-6)


def test_the_ablation_scores_the_dense_model_and_treats_so_many(
    executed: dict[str, Any], folder: Path, run: xr.DataTree
) -> None:
    chosen, table = tables_of(executed["3"])
    held_out = windows_of(folder, windows=6, purpose="evaluation")
    dense = entangle.perplexity(entangle.load_model(folder / "model"), held_out).perplexity
    rows = {row["set"]: row for row in table}
    assert float(table[0]["perplexity"]) == pytest.approx(dense, abs=1e-4)
    assert {*rows} == {"", "wasserstein", "kurtosis", "std", "random", "bottom"}
    count = 2 * round(0.1 * 37) + round(0.1 * 24)
    assert {row["neurons"] for name, row in rows.items() if name} == {str(count)}
    data = run.to_dataset()
    here = np.sort(data["wasserstein"].values[data["layer"].values == SMALL["3"]["LAYER"]])
    shown = {row[""]: row for row in chosen}
    assert float(shown["min"]["top"]) == pytest.approx(here[-4], abs=6e-4)
    assert float(shown["max"]["bottom"]) == pytest.approx(here[3], abs=6e-4)


def test_clusters_split_the_held_out_tokens_and_the_table_is_of_all_neurons(
    executed: dict[str, Any], folder: Path
) -> None:
    clusters, quantiles = tables_of(executed["4"])
    counted: dict[tuple[str, str], int] = {}
    for row in clusters:
        key = row["experts"], row["assign"]
        counted[key] = counted.get(key, 0) + int(row["tokens"])
    assert counted == dict.fromkeys([("1", "kmeans"), ("2", "kmeans"), ("2", "random")], 8 * 32)
    every = next(row for row in quantiles if (float(row["from"]), float(row["to"])) == (0, 1))
    assert every["neurons"] == str(37 + 37 + 24)
    found = entangle.open_run(folder / "runs" / "disentangled").to_dataset()
    assert found["experts"].values.tolist() == [1, 2, 2, 3, 3]
    for column, values in {
        "wasserstein": found["held_out_wasserstein"].values,
        "wasserstein_within": found["wasserstein_within"].values[:, 3],
        "wasserstein_random": found["wasserstein_within"].values[:, 4],
        "improvement": found["improvement"].values[:, 0, 3],
    }.items():
        layers = found["layer"].values
        means = [np.nanmean(values[layers == layer]) for layer in dict.fromkeys(layers)]
        assert float(every[column]) == pytest.approx(np.mean(means), abs=6e-4)


def test_experts_are_compared_with_dense_layers_and_random_tokens(
    executed: dict[str, Any], folder: Path
) -> None:
    losses, compared, routed, _clusters = tables_of(executed["5"])
    mixture, dense = (entangle.load_model(folder / name) for name in ("mixture", "model"))
    held_out = windows_of(folder, windows=40, purpose="evaluation")
    for name, model in {"mixture": mixture, "dense": dense}.items():
        nats = entangle.perplexity(model, held_out).nats
        assert [float(row[name]) for row in losses] == pytest.approx([nats] * 2, abs=6e-4)
    run = entangle.measure(mixture, held_out, layers="*.experts.*").to_dataset()
    down = run["role"].str.contains("down").to_numpy()
    median = np.nanmedian(run["wasserstein"].to_numpy()[down])
    row = next(one for one in compared if "down" in one.values())
    assert float(row["mixture"]) == pytest.approx(median, abs=6e-4)
    assert float(row["difference"]) == pytest.approx(
        float(row["mixture"]) - float(row["dense"]), abs=1.1e-3
    )
    own = np.nanmedian(run["wasserstein"].to_numpy()[~down])
    assert float(routed[-1]["own tokens"]) == pytest.approx(own, abs=6e-4)


def test_kinds_are_counted_and_the_first_of_each_told(
    executed: dict[str, Any], run: xr.DataTree
) -> None:
    counts, outliers, shapes = tables_of(executed["6"])
    data = run.to_dataset()
    bulk = data["wasserstein_bulk"].to_numpy()
    order = np.argsort(-bulk)[:10]
    far = (bulk < data["wasserstein"].to_numpy() / 2) | (data["far_variance"].to_numpy() > 0.5)
    row = next(one for one in counts if (one["by"], one["top"]) == ("wasserstein_bulk", "10"))
    assert int(row.get("shape", 0)) == int((~far[order]).sum())
    expected = np.flatnonzero(~far)[np.argmax(bulk[~far])]
    name = f"{data['layer'].values[expected]}:{data['index'].values[expected]}"
    assert f"model.layers.{shapes[0]['neuron']}" == name
    exact = float(data["wasserstein"].values[expected])
    bound = float(data["wasserstein_error"].values[expected])
    assert float(shapes[0]["distance"]) == pytest.approx(exact, abs=bound + 5e-4)
    assert len(outliers) == min(10, int(far.sum()))


def test_a_cell_that_writes_to_standard_error_is_refused(tmp_path: Path) -> None:
    notebook = read(NOTEBOOKS[0])
    cell = parameters_of(notebook)
    cell.source = "import sys\nprint('careful', file=sys.stderr)"
    notebook.cells = [cell]
    write(notebook, tmp_path / "loud.ipynb")
    with pytest.raises(RuntimeError, match=r"loud\.ipynb.*standard error.*careful"):
        execute(tmp_path / "loud.ipynb", folder=tmp_path)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name[0])
def test_what_is_kept_was_run_in_order_on_the_real_model(file: Path) -> None:
    number, size = file.name[0], file.stat().st_size
    notebook = read(file)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code if cell is not parameters_of(notebook))
    assert not [x for x in outputs_of(notebook) if x.output_type == "error"]
    assert not [x for x in outputs_of(notebook) if x.get("name") == "stderr"]
    assert pictures_of(notebook) == PICTURES[number]
    assert size < 1.5e6
    found = assignments(parameters_of(notebook).source)
    settings = PLACES | REAL[number]
    assert found == {name: settings[name] for name in found}
    assert {*REAL[number]} <= {*found}
    texts = texts_of(notebook)
    for words in BELONGS[number]:
        assert words in texts
    sources = "\n".join(cell.source for cell in notebook.cells)
    places = (
        rf"{re.escape(str(ROOT))}|{re.escape(str(Path.home()))}/|/home/|/root/|/Users/|/pytest-"
    )
    assert not re.search(places, f"{sources}\n{texts}\n{notebook.metadata}")
    assert "TODO" not in sources
    assert not [cell for cell in notebook.cells if "execution" in cell.metadata]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name[0])
def test_the_prose_quotes_no_decimal_that_the_outputs_do_not_show(file: Path) -> None:
    notebook = read(file)
    shown = {float(x) for x in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", texts_of(notebook))}
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for quoted in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]|/√)", prose):
        digits = len(quoted.partition(".")[2])
        assert float(quoted) in {round(one, digits) for one in shown}, f"{quoted} in {file.name}"
