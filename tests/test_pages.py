"""The code blocks of README.md and docs/, page by page, on tiny models in the place of the real ones.

A block's words stay as they are, but for names of files and of the hub, and neurons that a tiny model
lacks. What needs several processes or minutes is only parsed; `tests/test_docs.py` parses all commands.
"""

import ast
import itertools
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

import entangle
from entangle.__main__ import main
from tests.test_docs import COMMAND, FENCE, PAGES, ROOT
from tests.tiny_mixtures import tiny_mixture
from tests.tiny_models import save_tiny, tiny_tokenizer
from tests.torture.place import prose

MODEL, TEXT = "data/smollm2-135m", "data/python-docs"
ON = f"--text {TEXT} --evaluation {TEXT} --layers *.5.mlp.*"
DEMO = f"measure {MODEL} --text {TEXT} --out runs/demo"
DRAWN = (  # the runs that the gallery draws
    f"measure {MODEL} --text {TEXT} --difficulty 64 --out runs/difficult",
    f"ablate runs/demo {ON} --seeds 2 --out runs/ablation",
    f"ablate runs/demo {ON} --seeds 2 --per-block --out runs/blocks",
    f"sweep {MODEL} {ON} --sparsity 0.5 --out runs/sweep",
    f"disentangle runs/demo {ON} --experts 2 --out runs/disentangled",
)
BLOCKS, WIDTH = 6, 8
LONG = {"max_position_embeddings": 1024}
SIZES: dict[str, Any] = LONG | {"intermediate_size": 40}  # which groups of four divide
WORDS = {  # what the words that stand for a user's own are on all pages, and on single ones
    "": {"MODEL": MODEL, "TEXT": TEXT, "OTHER": "data/fortunes", "BEFORE": MODEL, "AFTER": MODEL}
    | {"EleutherAI/pythia-70m": MODEL, "facebook/opt-125m": MODEL},
    "api.md": {"up_proj:0": "up_proj:21"},  # the most entangled: `disentangle` keeps its outputs
    "ablation.md": {" '*.1[147].mlp.*' '*.2[0369].mlp.*'": ""},
    "cookbook.md": {"--length 2048": "--length 512"},
    "measuring.md": {"RUN": "runs/own"},
    "mixtures.md": {"FOLDER": "mixture", "experts.17": "experts.1", "layers.3": "layers.1"},
    "neurons.md": {"RUN": "runs/demo", "FOLDER": "cache"},
    "pruning.md": {"0.4,0.5": "0.5"},  # half of the slowest arms
    "scale.md": {"FOLDER": "parts", "RUN": "runs/own", "OUT": "pruned", "3/8": "1/1"}
    | {"RUN-3": "shards/1", "RUN-* --out RUN": "shards/* --out runs/merged"},
}
SLOW = {"plan"}  # starts ten processes
NEURON = re.compile(r"(model\.layers\.)(\d+)(\.[\w.]+:)(\d+)")
HUB = re.compile(r"hub:\S+")
COMMENT = re.compile(r"\s+#.*$", re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models and texts, under the names of the real ones."""
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / MODEL, "llama", num_hidden_layers=BLOCKS, **SIZES)
    tiny_mixture("qwen3_moe", **LONG).save_pretrained(place / "mixture")
    tiny_tokenizer().save_pretrained(place / "mixture")
    for first, name in ((1, TEXT), (3, "data/fortunes")):
        (place / name).mkdir()
        for seed, part in enumerate(("calibration", "evaluation"), start=first):
            (place / name / f"{part}.txt").write_text(prose(seed=seed, words=220))
    with chdir(place):
        assert main(DEMO.split()) == 0
    return place


@pytest.fixture
def here(place: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the place, as the current folder."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    with chdir(tmp_path):
        yield tmp_path
    plt.close("all")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the language and text of each block that has commands or Python."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [
        (kind, text)
        for kind, text in found
        if kind == "python" or any(map(COMMAND.search, text.splitlines()))
    ]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name
)
def test_each_block_of_a_page_runs(page: Path, here: Path) -> None:
    for line in DRAWN if page.name == "gallery.md" else ():
        assert main(line.split()) == 0
    names = names_of_a_reader() if "```python" in page.read_text(encoding="utf-8") else {}
    for kind, text in blocks(page):
        text = own(text, page.name)
        if kind == "python":
            run_python(text, names)
        else:
            for line in COMMENT.sub("", text.replace("\\\n", " ")).splitlines():
                run_line(line)


def own(text: str, page: str) -> str:
    """Return a block with a user's own names, and with neurons that a tiny layer has."""
    text = HUB.sub(TEXT, text.replace("LAYER:INDEX", "model.layers.5.mlp.up_proj:3"))
    text = NEURON.sub(
        lambda found: f"{found[1]}{int(found[2]) % BLOCKS}{found[3]}{int(found[4]) % WIDTH}", text
    )
    words = WORDS[""] | WORDS.get(page, {})
    for word, value in sorted(words.items(), key=lambda pair: -len(pair[0])):
        text = re.sub(rf"(?<![\w/-]){re.escape(word)}(?![\w:])", value, text)
    return text


def run_line(line: str) -> None:
    """Run the line if it is a command of entangle for this process; see that its files exist."""
    match = COMMAND.search(line)
    if match is None:
        targets = re.findall(r"^make (\S+)", line)
        made = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", made, re.MULTILINE) for target in targets), line
        return
    command, *others = shlex.split(match["words"])
    if command in SLOW or "torchrun" in line:
        return
    if command == "describe":  # the explainer has run meanwhile
        Path(others[-1]).mkdir()
        file = Path(others[-1]) / "model.layers.5.mlp.up_proj.high_latent3.txt"
        file.write_text("ends of lines")
    words = [command, *itertools.chain.from_iterable(map(expand, others))]
    assert main(words) == 0, line


def expand(word: str) -> list[str]:
    """Return what a shell makes of a word; without a file that matches it stays."""
    return sorted(map(str, Path().glob(word))) if "*" in word and "/" in word else [word]


def names_of_a_reader() -> dict[str, Any]:
    """Return what a page's Python takes for granted."""
    model, tokenizer = entangle.load_model(MODEL), entangle.load_tokenizer(MODEL)
    texts: Callable[..., Any] = entangle.token_windows
    return {
        "entangle": entangle,
        "model": model,
        "tokenizer": tokenizer,
        "windows": texts(TEXT, tokenizer),
        "held_out": texts(TEXT, tokenizer, purpose="evaluation"),
        "run": entangle.open_run("runs/demo"),
        "name": "model.layers.1.mlp.up_proj:3",
    }


def run_python(text: str, names: dict[str, Any]) -> None:
    """Run the block; one for lm-eval, whose tasks come from the hub, is only parsed."""
    ast.parse(text)
    if "lm_eval" not in text:
        exec(compile(text, "block", "exec"), names)  # noqa: S102
