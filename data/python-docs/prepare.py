"""Write `calibration.txt` and `evaluation.txt` from the documentation that comes with CPython.

It is the language reference (`pydoc_data.topics`) and the longer docstrings of the standard library,
which are parsed from the sources and never imported. Run as `python data/python-docs/prepare.py`.
"""

import ast
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LEFT_OUT = {"idlelib", "lib2to3", "test", "tests", "turtledemo"}
SHORTEST_DOCSTRING = 100  # characters; those below are mostly "Return the name."
RUN = 8  # words; a shorter paragraph ("For example:") may be in many documents


class Document(NamedTuple):
    """A text and its name: of a topic, or the dotted name of the object that has the docstring."""

    name: str
    text: str

    @property
    def group(self) -> str:
        """The topic or top-level module; all its documents go into one file."""
        return self.name.split(".")[0]


def main() -> None:
    """Write both files, and print their sizes."""
    sources = Path(sysconfig.get_path("stdlib"))
    docstrings = [document for path in modules(sources) for document in read(path, sources)]
    if not docstrings:
        sys.exit(
            f"{HERE.name}: {sources} has no sources of the standard library: run this with a CPython "
            "that has them"
        )
    documents = without_repeats([Document(*item) for item in topics.items()] + docstrings)
    held_out = fifth(documents)
    files: dict[str, list[Document]] = {"calibration.txt": [], "evaluation.txt": []}
    for document in documents:
        name = "evaluation.txt" if document.group in held_out else "calibration.txt"
        files[name].append(document)
    for name, documents in files.items():
        texts = [f"{document.name}\n\n{document.text}\n" for document in documents]
        content = "\n".join(texts).encode()
        partial = HERE / f"{name}.partial"
        partial.write_bytes(content)
        partial.replace(HERE / name)
        print(f"{HERE.name}: {name}, {len(documents)} documents, {len(content):,} bytes")


def modules(sources: Path) -> Iterator[Path]:
    """Yield the files of the standard library's public modules, without tests."""
    for path in sorted(sources.rglob("*.py")):
        parts = path.relative_to(sources).with_suffix("").parts
        private = parts[0].startswith("_")  # copies of built-in modules, files of the build
        if parts[0] in sys.stdlib_module_names and not private and LEFT_OUT.isdisjoint(parts):
            yield path


def read(path: Path, sources: Path) -> Iterator[Document]:
    """Yield the longer docstrings of a module in the order of its source."""
    parts = path.relative_to(sources).with_suffix("").parts

    def walk(node: ast.AST, name: str) -> Iterator[Document]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= SHORTEST_DOCSTRING:
                yield Document(name, text)
        for child in ast.iter_child_nodes(node):
            inner = getattr(child, "name", None) if isinstance(child, ast.stmt) else None
            yield from walk(child, f"{name}.{inner}" if inner else name)

    name = ".".join(part for part in parts if part != "__init__")
    return walk(ast.parse(path.read_bytes()), name)


def without_repeats(documents: list[Document]) -> list[Document]:
    """Return the documents, sorted by name, without the paragraphs that a longer document has.

    A quarter of the topics' text is in two topics ("with" is also a section of "compound"), so with
    a split by name alone calibration and evaluation would share text. A paragraph is left out if
    most of its runs of words were seen before, and a document if most of its text is left out.
    """
    seen: set[tuple[str, ...]] = set()
    kept = []
    different = {document.text: document for document in documents}.values()
    for name, text in sorted(different, key=lambda document: (-len(document.text), document)):
        new = []
        for paragraph in re.split(r"\n\s*\n", text.strip()):
            words = paragraph.split()
            runs = {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}
            if len(runs & seen) <= len(runs) / 2:
                new.append(paragraph)
            seen |= runs
        rest = "\n\n".join(new)
        if len(rest) >= len(text) / 2:
            kept.append(Document(name, rest))
    return sorted(kept)


def fifth(documents: list[Document]) -> set[str]:
    """Return a fifth of the topics and modules: sorted by size, the middle one of every five.

    So both files have large and small ones, with about four fifths and one fifth of the bytes.
    """
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.group] += len(document.text.encode())
    return set(sorted(sizes, key=lambda name: (-sizes[name], name))[2::5])


if __name__ == "__main__":
    main()
