"""Run the same commands by two versions of entangle, and say where their results differ.

``python -m tests.golden --base REV`` compares the commit REV with the working tree, or with the
tree of ``--tree``. The commands run in their own processes, in folders that are alike, on tiny
models and on two blocks of the real one. All that they print and write must be equal to the last
bit. What differs on purpose stands in the tables below, with the reason.

Each version runs from a copy, so that who edits meanwhile changes nothing. The results of REV are
kept in the temporary folder for the next time; those of the other version stay until then.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
import xarray as xr
from filelock import FileLock
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import save_tiny

Name = tuple[str, ...]  # the parts of a file's path, and then those of a key in it
Array = npt.NDArray[Any]

# A name in these tables is a name's parts, or some of them in a row: files:keys, as
# "run.json:windows", "tables/sweep.csv:ratio", "neurons.zarr:coord:neuron" or only "windows".
# All but RENAMED may have wildcards. What base has comes first.
RENAMED: list[tuple[str, str, str]] = []  # (in base, here, why)
OVERLAP = "an evaluation is compared with what was seen by runs of 16 tokens"
ADDED: list[tuple[str, str]] = [  # (only here, why)
    ("text.npy", OVERLAP),
    ("text_hashes", OVERLAP),
    ("overlap", OVERLAP),
    ("dependent_on", "models that are not causal are told"),
]
REMOVED: list[tuple[str, str]] = []  # (only in base, why)
CHANGED: list[tuple[str, str]] = []  # (another value here, why)
WORDS: list[tuple[str, str, str]] = []  # of command lines: (in base, here, why)

IGNORED = {  # what no two runs have in common
    "log.json",
    "stdout:log",
    "stdout:bytes",  # of a report, which holds log.json
    "stdout:first_seconds",
    "stdout:seconds",
    "stdout:tokens_per_second",
}
PRESENT = {"*.png", "*.html"}  # files that need only be there

FAILS = {"measure-wrong"}  # commands that are to fail; of the others none may

WINDOWS = "--text text.txt --length 32 --windows 16"
LLAMA = f"llama {WINDOWS}"
MLP = f"{LLAMA} --layers '*.mlp.*'"
SCORED = "--evaluation other.txt --evaluation-windows 6"
TREAT = f"run {WINDOWS} {SCORED} --layers '*.mlp.*'"
REAL = "--text python-docs --length 128 --windows 8"
HELD = "--evaluation python-docs --evaluation-windows 4 --layers '*.1.mlp.*'"
UP = "model.layers.1.mlp.up_proj"

# None of the folders that they write is named like a word of a command.
COMMANDS = {
    "measure": f"measure {LLAMA} --difficulty 64 --out run --json",
    "measure-1": f"measure {LLAMA} --shard 1/2 --out half-1 --json",
    "measure-2": f"measure {LLAMA} --shard 2/2 --out half-2 --json",
    "merge": "merge half-1 half-2 --out merged --json",
    "measure-offload": f"measure {LLAMA} --offload parts --out offloaded --json",
    "measure-skip": f"measure {LLAMA} --skip-first 1 --bos always --bins 512 --out skipped --json",
    "measure-gpt2": f"measure gpt2 {WINDOWS} --dtype bfloat16 --out run-gpt2 --json",
    "measure-wrong": f"measure {LLAMA} --layers '*.up_prj' --out nothing",
    "sparsify": f"sparsify {LLAMA} --sparsity 0.5 --out pruned --json",
    "sparsify-wanda": (
        f"sparsify {LLAMA} --sparsity 0.5 --method wanda --mask block --out pruned-blocks --json"
    ),
    "sparsify-2:4": (
        f"sparsify mixtral {WINDOWS} --sparsity 2:4 --layers '*.self_attn.*' --out pruned-2-4 --json"
    ),
    "sparsify-experts": f"sparsify {LLAMA} --sparsity 0.8 --experts 4 --out mixture --json",
    "sparsify-random": (
        f"sparsify gpt2 {WINDOWS} --sparsity 0.5 --experts 4 --assign random --components 0 "
        "--shrinkage 0 --propagate dense --out mixture-random --json"
    ),
    "sparsify-budget": (
        f"sparsify {MLP} --sparsity 0.5 --budget run:ranks --strength 0.4 --across entanglement "
        "--out pruned-budget --json"
    ),
    "sparsify-auto": (
        f"sparsify {MLP} --sparsity 0.5 --budget run --strength auto --out pruned-auto --json"
    ),
    "sparsify-owl": f"sparsify {MLP} --sparsity 0.5 --across owl --out pruned-owl --json",
    "sparsify-trim": f"sparsify {MLP} --sparsity 0.5 --budget trim --out pruned-trim --json",
    "sweep": (
        f"sweep {LLAMA} {SCORED} --layers '*.up_proj' '*.q_proj' --sparsity 0.5,2:4 "
        "--mask row,block --propagate sparse,dense --out ways --json"
    ),
    "sweep-experts": (
        f"sweep {MLP} {SCORED} --sparsity 0.6 --method sparsegpt --experts 1,3 "
        "--assign kmeans,random --shrinkage 0,0.5 --propagate sparse,dense --out ways-experts"
    ),
    "sweep-budgets": (
        f"sweep {MLP} {SCORED} --sparsity 0.5 --method sparsegpt "
        "--budget uniform,run,run:shuffled,trim --across uniform,depth,owl --out ways-budgets --json"
    ),
    "ablate": (
        f"ablate {TREAT} --share 0.1,0.3 --sparsity 0.6 --experts 1,3 --seeds 2 "
        "--intervention sparsify,zero,mean,negative --out treated --json"
    ),
    "ablate-blocks": (
        f"ablate {TREAT} --share 0.2 --seeds 2 --sets wasserstein,bottom,random --per-block "
        "--skip-first 1 --intervention zero --out treated-blocks"
    ),
    "disentangle": (
        f"disentangle {TREAT} --experts 2,3 --sparsity 0.5,0.8 --neurons {UP}:3 "
        "--out untangled --json"
    ),
    "perplexity": "perplexity llama --text other.txt --length 32 --windows 16 --json",
    "perplexity-packed": "perplexity mixture --text other.txt --length 32 --windows 8 --json",
    "perplexity-unpacked": (
        "perplexity mixture-random --text other.txt --length 32 --windows 8 --skip-first 1 "
        "--unpacked"
    ),
    "generate": "generate mixture --prompt 'The quick' --tokens 8 --json",
    "rank": "rank run --top 50 --json",
    "rank-csv": "rank run --by difficulty --layers '*.mlp.*' --top 9 --csv ranked.csv",
    "rank-untangled": "rank untangled --by held_out_wasserstein --json",
    "diff": "diff run skipped --csv moved.csv --out moved.png --json",
    "diff-words": "diff merged offloaded",
    "contexts": f"contexts run {UP}:5 {UP}:6 --json",
    "contexts-top": "contexts run-gpt2 --top 1",
    "plot": "plot run heatmap --json",
    "report": "report run ways treated untangled --out report.html --json",
    "real-measure": f"measure real {REAL} --difficulty 256 --out real-run --json",
    "real-sparsify": (
        f"sparsify real {REAL} --sparsity 0.7 --experts 4 --layers '*.1.mlp.*' "
        "--out real-mixture --json"
    ),
    "real-sweep": (
        f"sweep real {REAL} {HELD} --sparsity 0.5 --method sparsegpt,wanda "
        "--budget uniform,real-run --propagate dense --out real-ways --json"
    ),
    "real-ablate": (
        f"ablate real-run {REAL} {HELD} --seeds 2 --sets wasserstein,random,std "
        "--intervention sparsify,negative --out real-treated --json"
    ),
    "real-disentangle": (
        f"disentangle real-run {REAL} {HELD} --experts 4 --out real-untangled --json"
    ),
    "real-contexts": f"contexts real-run {UP}:7 model.layers.0.self_attn.o_proj:9 --json",
}

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 600  # seconds
SHOWN = 20  # differences of a file

# Where all modules come from: one that is missing would come from where entangle is installed.
PROBE = """
import importlib, json, pkgutil, sys, entangle
for module in pkgutil.walk_packages(entangle.__path__, "entangle."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
of_ours = [module for name, module in sys.modules.items() if name.split(".")[0] == "entangle"]
print(json.dumps([module.__file__ for module in of_ours if getattr(module, "__file__", None)]))
"""


@dataclass
class Done:
    """What a command did: ``files`` are those that it wrote or changed."""

    code: int
    stdout: str
    stderr: str
    files: list[str]


@dataclass
class Tally:
    """What was compared so far."""

    commands: int = 0
    files: int = 0
    numbers: int = 0
    differences: int = 0
    used: set[str] = field(default_factory=set)  # entries of the tables


# The inputs, the same for both versions.


def make_inputs(folder: Path) -> None:
    """Make the models and texts of the commands."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    save_tiny(folder / "llama", "llama")
    save_tiny(folder / "gpt2", "gpt2", adds_bos=True)
    save_tiny(folder / "mixtral", "mixtral")
    (folder / "text.txt").write_text(_prose(seed=1, words=1500))
    (folder / "other.txt").write_text(_prose(seed=2, words=500))
    (folder / "python-docs").mkdir()
    for name in ("calibration.txt", "evaluation.txt"):
        shutil.copy(ROOT / "data" / "python-docs" / name, folder / "python-docs" / name)
    _save_two_blocks(ROOT / "data" / "smollm2-135m", folder / "real")


def _prose(seed: int, words: int) -> str:
    """Return sentences of words drawn at random, some of them often."""
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    known = ["".join(draw.choices(letters, range(26, 0, -1), k=1 + n % 9)) for n in range(120)]
    said = draw.choices(known, [1 / (n + 1) for n in range(120)], k=words)
    return "".join(word + draw.choices([" ", ", ", ". ", ".\n"], [12, 2, 2, 1])[0] for word in said)


def _save_two_blocks(source: Path, target: Path) -> None:
    """Save the first two blocks of the real model, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def key_of(inputs: Path) -> str:
    """Return a hash of the commands and of all that they get."""
    digest = hashlib.sha256(json.dumps([COMMANDS, sys.version]).encode())
    threads = {name: os.environ[name] for name in sorted(os.environ) if "THREADS" in name}
    digest.update(json.dumps([threads, os.cpu_count()]).encode())
    for file in sorted(path for path in inputs.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(inputs)} {_sha256(file)}".encode())
    for package in (torch, transformers, np, xr):
        digest.update(package.__version__.encode())
    return digest.hexdigest()[:16]


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# The two versions, and what their commands do.


class Version:
    """A version of entangle: a folder with its copy, its compiled code, and what it wrote."""

    def __init__(self, folder: Path, inputs: Path) -> None:
        self.tree, self.work, self.kept = folder / "tree", folder / "work", folder / "done.json"
        self.folder = folder
        if not self.work.exists():
            shutil.copytree(inputs, self.work)
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(self.tree), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "NUMBA_CACHE_DIR": str(folder / "numba"),
            "HF_HUB_OFFLINE": "1",
        }
        there = json.loads(self.kept.read_text()) if self.kept.exists() else {}
        self.done = {name: Done(**one) for name, one in there.items()}

    def check(self) -> None:
        """See that Python imports this version and no other.

        Raises:
            RuntimeError: it does not, or a module cannot be imported.
        """
        found = self._python(["-c", PROBE])
        if found.returncode:
            raise RuntimeError(f"{self.tree} cannot be imported:\n{found.stderr}")
        for file in json.loads(found.stdout.splitlines()[-1]):
            if not Path(file).resolve().is_relative_to(self.tree.resolve()):
                raise RuntimeError(f"expected all modules of entangle in {self.tree}, got {file}")

    def run(self, commands: Mapping[str, Sequence[str]]) -> None:
        """Run those of the commands that are not done yet."""
        missing = {name: words for name, words in commands.items() if name not in self.done}
        if missing:
            self.check()
        for place, (name, words) in enumerate(missing.items(), start=1):
            start = time.perf_counter()
            self.done[name] = self._command(words)
            self.kept.write_text(json.dumps({name: vars(one) for name, one in self.done.items()}))
            seconds = time.perf_counter() - start
            _say(sys.stderr, f"{self.folder.name} {place}/{len(missing)} {name}: {seconds:.1f} s")

    def _command(self, words: Sequence[str]) -> Done:
        for left in _outs(words):  # of a comparison that was stopped
            for path in (self.work / left, self.work / f"{left}.partial"):
                shutil.rmtree(path, ignore_errors=True)
        before = self._stamps()
        ended = self._python(["-m", "entangle", *words])
        after = self._stamps()
        files = {_whole(name) for name, stamp in after.items() if before.get(name) != stamp}
        stdout, stderr = (
            text.replace(str(self.folder), "FOLDER") for text in (ended.stdout, ended.stderr)
        )
        return Done(ended.returncode, stdout, stderr, sorted(files))

    def _python(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    def _stamps(self) -> dict[str, tuple[int, int]]:
        files = [path for path in self.work.rglob("*") if path.is_file()]
        stats = {str(path.relative_to(self.work)): path.stat() for path in files}
        return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def _outs(words: Sequence[str]) -> list[str]:
    """Return what a command is told to write into."""
    return [words[place + 1] for place, word in enumerate(words) if word in {"--out", "--offload"}]


def _whole(name: str) -> str:
    """Return the data set that a file is of, or else the file."""
    head, ending, _ = name.partition(".zarr/")
    return head + ending.rstrip("/")


def copy_commit(commit: str, tree: Path) -> None:
    """Copy the package as a commit has it."""
    words = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, "entangle"]
    packed = subprocess.run(words, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(tree, filter="data")


def copy_tree(source: Path, tree: Path) -> None:
    """Copy the package as a tree has it now."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source / "entangle", tree / "entangle", ignore=ignored)


def chosen(only: Sequence[str]) -> dict[str, list[str]]:
    """Return the commands to run: those named and those whose results they read, or all.

    Raises:
        LookupError: a name that none has.
    """
    words = {name: shlex.split(line) for name, line in COMMANDS.items()}
    unknown = {*only} - {*words}
    if unknown:
        raise LookupError(f"no command {', '.join(sorted(unknown))}; expected {', '.join(words)}")
    if not only:
        return words
    makers = {out: name for name, some in words.items() for out in _outs(some)}
    needed, ahead = set(), [*only]
    while ahead:
        needed.add(name := ahead.pop())
        read = {part for word in words[name] for part in re.split("[:,]", word)}
        ahead += [makers[part] for part in read if part in makers and makers[part] not in needed]
    return {name: some for name, some in words.items() if name in needed}


def translated(words: Sequence[str]) -> list[str]:
    """Return a command line's words as they are here."""
    names = {old: new for old, new, _ in WORDS}
    return [names.get(word, word) for word in words]


# What files hold, as values with names.


def read(file: Path) -> Iterator[tuple[Name, Any]]:
    """Give all that a file holds."""
    if any(fnmatchcase(file.name, pattern) for pattern in PRESENT):
        return
    if file.suffix == ".zarr":
        yield from _read_dataset(file)
    elif file.suffix == ".json":
        yield from _flat(json.loads(file.read_text(encoding="utf-8")))
    elif file.suffix == ".csv":
        yield from _read_table(file)
    elif file.suffix == ".safetensors":
        yield from _read_tensors(file)
    elif file.suffix in {".md", ".txt"}:
        yield from _lines(file.read_text(encoding="utf-8"))
    else:
        yield ("sha256",), _sha256(file)


def _flat(value: Any, name: Name = ()) -> Iterator[tuple[Name, Any]]:
    """Give the values within a value of JSON; an empty one stands for itself."""
    if isinstance(value, Mapping | list) and value:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _flat(item, (*name, str(key)))
    else:
        yield name, value


def _lines(text: str) -> Iterator[tuple[Name, Any]]:
    for place, line in enumerate(text.split("\n"), start=1):
        yield (f"line {place}",), line


def _read_table(file: Path) -> Iterator[tuple[Name, Any]]:
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.reader(opened))
    if len({len(row) for row in rows}) != 1:
        yield ("text",), file.read_text(encoding="utf-8")
        return
    for place, head in enumerate(rows[0]):
        yield (head,), np.array([row[place] for row in rows[1:]], dtype=object)


def _read_tensors(file: Path) -> Iterator[tuple[Name, Any]]:
    with safe_open(file, framework="pt") as opened:
        yield from _flat(opened.metadata() or {}, ("metadata",))
        for name in opened.keys():  # noqa: SIM118  # it is no dict
            tensor = opened.get_tensor(name)
            yield (name, "dtype"), str(tensor.dtype)
            bits = tensor.dtype == torch.bfloat16  # which NumPy does not have
            yield (name,), (tensor.view(torch.int16) if bits else tensor).numpy()


def _read_dataset(folder: Path) -> Iterator[tuple[Name, Any]]:
    """Give the variables of all groups; sizes stand at the names of their dimensions."""
    with xr.open_datatree(folder, engine="zarr", chunks=None) as tree:
        for path, node in tree.subtree_with_keys:
            group = () if path == "." else tuple(path.split("/"))
            data = node.to_dataset(inherit=False)
            said = {name: _parsed(value) for name, value in data.attrs.items()}
            yield from _flat(said, (*group, "attrs"))
            for name, variable in data.variables.items():
                of = (*group, "coord" if name in data.coords else "variable", str(name))
                yield of, variable.to_numpy()
                for place, (size, length) in enumerate(variable.sizes.items()):
                    yield (*of, f"dim {place}", str(size)), length
                yield from _flat(dict(variable.attrs), (*of, "attrs"))


def _parsed(value: Any) -> Any:
    """Return an attribute, a mapping that is written as JSON as a mapping."""
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


def said(done: Done, words: Sequence[str]) -> Iterator[tuple[Name, Any]]:
    """Give what a command printed; what it complained of only if it failed."""
    is_json = "--json" in words and done.code == 0
    found = _flat(json.loads(done.stdout)) if is_json else _lines(done.stdout)
    yield from ((("stdout", *name), value) for name, value in found)
    if done.code:
        yield from ((("stderr", *name), value) for name, value in _lines(done.stderr))


# The comparison.


def _parts(pattern: str) -> Name:
    return tuple(re.split("[/:]", pattern))


def _place(name: Name, parts: Name, wildcards: bool = True) -> int | None:
    """Return where in a name the parts of a pattern stand in a row."""
    for start in range(len(name) - len(parts) + 1):
        pairs = list(zip(name[start:], parts, strict=False))
        if all(fnmatchcase(one, part) if wildcards else one == part for one, part in pairs):
            return start
    return None


def _fits(name: Name, patterns: Iterable[str], tally: Tally) -> bool:
    for pattern in patterns:
        if _place(name, _parts(pattern)) is not None:
            tally.used.add(pattern)
            return True
    return False


def renamed(name: Name, tally: Tally) -> Name:
    """Return what a name of base is here."""
    for old, new, _ in RENAMED:
        parts, start = _parts(old), 0
        while (place := _place(name[start:], parts, wildcards=False)) is not None:
            head, tail = name[: start + place], name[start + place + len(parts) :]
            name = (*head, *_parts(new), *tail)
            start = len(name) - len(tail)
            tally.used.add(old)
    return name


class Comparison:
    """Compares names and values, says what differs and counts."""

    def __init__(self, base: Version, here: Version) -> None:
        self.base, self.here, self.tally = base, here, Tally()

    def command(self, name: str, words: Sequence[str]) -> None:
        """Compare what a command printed and wrote."""
        old, new = self.base.done[name], self.here.done[name]
        self.tally.commands += 1
        if old.code != new.code or (old.code and name not in FAILS):
            ends = f"exit code {old.code} -> {new.code}"
            self._differs(f"{name}: {ends}: {_short(old.stderr)} -> {_short(new.stderr)}")
            return
        self._values(name, (), self._renamed(said(old, words)), dict(said(new, words)))
        before = {renamed(_parts(file), self.tally): file for file in old.files}
        after = {_parts(file): file for file in new.files}
        for file in self._both(name, before, after):
            if not _fits(file, IGNORED, self.tally):
                self._file(name, file, before[file], after[file])

    def _file(self, command: str, file: Name, before: str, after: str) -> None:
        """Compare what a file of this name holds."""
        self.tally.files += 1
        try:
            old = self._renamed(read(self.base.work / before), _parts(before), len(file))
            new = dict(read(self.here.work / after))
        except (ValueError, OSError) as error:
            self._differs(f"{command} {'/'.join(file)}: cannot be read: {error}")
            return
        self._values(command, file, old, new)

    def _renamed(
        self, values: Iterable[tuple[Name, Any]], file: Name = (), start: int = 0
    ) -> dict[Name, Any]:
        """Return values of base by their names here, from where that of the file ends."""
        return {renamed(file + name, self.tally)[start:]: value for name, value in values}

    def _values(self, command: str, file: Name, old: dict[Name, Any], new: dict[Name, Any]) -> None:
        """Compare the values of a file, or of what a command printed."""
        where = " ".join(filter(None, [command, "/".join(file)]))
        names, found = self._both(where, old, new, file), []
        if where.endswith(".csv") and names != [name for name in new if name in old]:
            found.append(f"{where}: the columns are in another order")
        for name in names:
            if _fits(file + name, IGNORED, self.tally):
                continue
            one, other = old[name], new[name]
            self.tally.numbers += _numbers(other)
            if name[-1] == "command":
                one, other = _spoken(one), _spoken(other, again=True)
            if not _same(one, other) and not _fits(file + name, _entries(CHANGED), self.tally):
                found.append(f"{where} {':'.join(name)}: {_shown(one, other)}")
        self.tally.differences += len(found)
        more = [f"{where}: {len(found) - SHOWN} more values differ"] if found[SHOWN:] else []
        for line in [*found[:SHOWN], *more]:
            _say(sys.stdout, line)

    def _both(
        self, where: str, old: Iterable[Name], new: Iterable[Name], file: Name = ()
    ) -> list[Name]:
        """Return the names of both, and say which one of them lacks."""
        old, new = list(old), list(new)
        for some, others, table, what in (
            (old, new, REMOVED, "only in base"),
            (new, old, ADDED, "only here"),
        ):
            allowed = [*_entries(table), *IGNORED]
            missing = [name for name in some if not _fits(file + name, allowed, self.tally)]
            for name in _lacking(missing, others):
                self._differs(f"{where} {':'.join(name)}: {what}")
        there = {*new}
        return [name for name in old if name in there]

    def _differs(self, line: str) -> None:
        self.tally.differences += 1
        _say(sys.stdout, line)


def _lacking(names: Iterable[Name], others: Iterable[Name]) -> list[Name]:
    """Return the names that others lack, or of several what they begin with that others lack."""
    known = {name[:end] for name in others for end in range(1, len(name) + 1)}
    ends = {name: range(1, len(name) + 1) for name in names}
    first = (next((n[:end] for end in ends[n] if n[:end] not in known), None) for n in ends)
    return list(dict.fromkeys(name for name in first if name is not None))


def _entries(table: Sequence[tuple[str, str]]) -> list[str]:
    return [pattern for pattern, _ in table]


def _spoken(value: Any, again: bool = False) -> Any:
    """Return the words of a command line, in no order if some words are others now."""
    if not WORDS or not isinstance(value, str):
        return value
    words = shlex.split(value)
    return sorted(words if again else translated(words))


def _same(old: Any, new: Any) -> bool:
    """Say whether two values are equal to the last bit; all NaN are."""
    if not isinstance(old, np.ndarray) or not isinstance(new, np.ndarray):
        return type(old) is type(new) and repr(old) == repr(new)
    if old.dtype != new.dtype or old.shape != new.shape:
        return False
    return not _unequal(old, new).any()


def _unequal(old: Array, new: Array) -> npt.NDArray[np.bool_]:
    """Say where two arrays of a shape and a type differ."""
    if old.dtype.kind != "f":
        return np.atleast_1d(np.asarray(old != new, dtype=np.bool_))
    bits = np.dtype(f"u{old.dtype.itemsize}")
    pair = [np.atleast_1d(np.ascontiguousarray(array)) for array in (old, new)]
    other = pair[0].view(bits) != pair[1].view(bits)
    return np.asarray(other & ~(np.isnan(pair[0]) & np.isnan(pair[1])))


def _numbers(value: Any) -> int:
    """Return how many numbers a value has."""
    if isinstance(value, np.ndarray):
        return sum(map(_is_number, value.flat)) if value.dtype.kind in "OTU" else value.size
    return int(isinstance(value, int | float) and not isinstance(value, bool))


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True


def _shown(old: Any, new: Any) -> str:
    """Say how two values differ."""
    if not isinstance(old, np.ndarray) or not isinstance(new, np.ndarray):
        return f"{_short(old)} -> {_short(new)}"
    if old.dtype != new.dtype or old.shape != new.shape:
        return f"{old.dtype} {old.shape} -> {new.dtype} {new.shape}"
    unequal = _unequal(old, new)
    first = tuple(int(index) for index in np.argwhere(unequal)[0])
    values = [_short(np.atleast_1d(array)[first]) for array in (old, new)]
    count = f"{int(unequal.sum()):,} of {unequal.size:,}"
    return f"{count}, first at {list(first)}: {values[0]} -> {values[1]}"


def _short(value: Any) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 100 else f"{text[:48]} ... {text[-48:]}"


def _say(stream: Any, line: str) -> None:
    stream.write(line + "\n")
    stream.flush()


def compare(commit: str, tree: Path, only: Sequence[str], *, fresh: bool, jobs: int) -> Tally:
    """Run the commands by both versions, and say what differs."""
    commands = chosen(only)
    place = Path(tempfile.gettempdir()) / "entangle-golden"
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        inputs = Path(temporary)
        make_inputs(inputs)
        folder = place / f"{commit}-{key_of(inputs)}"
        folder.mkdir(exist_ok=True)
        with FileLock(folder / ".lock"):
            for name in ("base", "here") if fresh else ("here",):
                shutil.rmtree(folder / name, ignore_errors=True)
            base, here = (Version(folder / name, inputs) for name in ("base", "here"))
            if not base.tree.exists():
                copy_commit(commit, base.tree)
            copy_tree(tree, here.tree)
            with ThreadPoolExecutor(jobs) as pool:
                runs = [pool.submit(base.run, commands)]
                runs.append(pool.submit(here.run, {n: translated(w) for n, w in commands.items()}))
            for run in runs:
                run.result()
            comparison = Comparison(base, here)
            for name, words in commands.items():
                comparison.command(name, words)
    return comparison.tally


def main() -> int:
    """Compare, and return 1 if something differs."""
    parser = argparse.ArgumentParser(prog="tests.golden", description=__doc__)
    parser.add_argument("--base", required=True, metavar="REV", help="the commit to compare with")
    parser.add_argument("--tree", type=Path, default=ROOT, help="what to compare [this tree]")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="commands [all]")
    parser.add_argument("--fresh", action="store_true", help="run the commit's commands again")
    parser.add_argument("--jobs", type=int, default=2, help="1: a version after the other [2]")
    args = parser.parse_args()
    words = ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{args.base}^{{commit}}"]
    commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    tally = compare(commit, args.tree, args.only, fresh=args.fresh, jobs=args.jobs)
    tables = [*((old, why) for old, _, why in RENAMED), *ADDED, *REMOVED, *CHANGED]
    for pattern, _ in tables:
        if not args.only and pattern not in tally.used:
            _say(sys.stdout, f"note: nothing is named {pattern} any more")
    _say(
        sys.stdout,
        f"{tally.commands} commands, {tally.files} files, {tally.numbers:,} numbers compared, "
        f"{tally.differences} differences",
    )
    return int(tally.differences > 0)


if __name__ == "__main__":
    sys.exit(main())
