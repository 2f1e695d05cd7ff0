"""The good inputs that cases begin with: models, texts and results of all commands, all tiny."""

import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

from tests.tiny_models import save_tiny

SIZES = "--windows 4 --length 16 --batch-size 2"
TEXT = f"--text text.txt {SIZES}"
SCORED = f"{TEXT} --evaluation evaluation.txt --evaluation-windows 3"
SOME = "--layers *.0.mlp.*"

# What makes each folder. All names are relative: a copy of the place is as good as the place.
MADE = {
    "run": f"measure model {TEXT} --difficulty 16 --out run",
    "run-2": f"measure model {TEXT} --skip-first 1 --out run-2",
    "run-gpt2": f"measure gpt2 {TEXT} --out run-gpt2",
    "shard-1": f"measure model {TEXT} --shard 1/2 --out shard-1",
    "shard-2": f"measure model {TEXT} --shard 2/2 --out shard-2",
    "pruned": f"sparsify model {TEXT} --sparsity 0.5 --out pruned",
    "expanded": f"sparsify model {TEXT} {SOME} --sparsity 0.5 --experts 2 --out expanded",
    "swept": f"sweep model {SCORED} {SOME} --sparsity 0.5 --out swept",
    "ablated": f"ablate run {SCORED} {SOME} --seeds 2 --share 0.2 --out ablated",
    "untangled": f"disentangle run {SCORED} {SOME} --experts 2 --out untangled",
}
NAMES = ("model", "gpt2", "texts", "text.txt", "evaluation.txt", "short.txt", "told.json", *MADE)


def workplace() -> Path:
    """Make a folder to run cases in, in memory if possible: it is quicker for many small files."""
    memory = Path("/dev/shm")
    fast = memory if os.access(memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="entangle-torture-", dir=fast))


def run_main(words: Sequence[str]) -> int:
    """Run a command in this process. The import is here, so that a fork makes it and not its parent."""
    from entangle.__main__ import main

    return main(words)


def make_sources(folder: Path) -> None:
    """Make the models and texts."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(folder / "model", "llama", num_hidden_layers=2)
    save_tiny(folder / "gpt2", "gpt2", adds_bos=True)
    (folder / "text.txt").write_text(prose(seed=1, words=400))
    (folder / "evaluation.txt").write_text(prose(seed=2, words=100))
    (folder / "short.txt").write_text("too short")
    (folder / "told.json").write_text('{"model.layers.0.mlp.up_proj:3": "names of people"}')
    (folder / "texts").mkdir()
    for name in ("calibration", "evaluation"):
        (folder / "texts" / f"{name}.txt").write_text(prose(seed=len(name), words=100))


def make(folder: Path) -> None:
    """Make all good inputs, by the commands themselves."""
    make_sources(folder)
    with chdir(folder), redirect_stdout(StringIO()):
        for name, words in MADE.items():
            assert run_main(words.split()) == 0, words
            assert any(Path(name).iterdir()), words


def prose(*, seed: int, words: int) -> str:
    """Return random sentences."""
    rng = random.Random(seed)
    letters = "etaoinshrdlcumwfgypbvk"
    known = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(90)]
    return " ".join(rng.choice(known) + rng.choice(["", "", ",", ".\n"]) for _ in range(words))


def copy(place: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy some of the inputs as hard links: to change a file, write a new one in its place."""
    folder.mkdir(parents=True)
    for name in names:
        source, target = place / name, folder / name
        if target.exists() or not source.exists():
            continue
        if source.is_dir():
            shutil.copytree(source, target, copy_function=os.link)
        else:
            os.link(source, target)


Content = dict[str, bytes | str | None]


def contents(folder: Path) -> Content:
    """Return what each name in a folder is: bytes, a link's target, a kind, or None for a folder."""
    return dict(_contents(folder, ""))


def _contents(folder: Path, prefix: str) -> Iterator[tuple[str, bytes | str | None]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_symlink():
                yield name, f"link to {os.readlink(entry.path)}"  # noqa: PTH115  # may loop
            elif entry.is_dir():
                yield name, None
                yield from _contents(Path(entry.path), f"{name}/")
            elif entry.is_file():
                yield name, Path(entry.path).read_bytes()
            else:
                yield name, "neither a file nor a folder"
