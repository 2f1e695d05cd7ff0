"""Write `calibration.txt` and `evaluation.txt` from the documentation that every CPython carries.

The language reference (`pydoc_data.topics`) and the longer docstrings of the standard library, the
latter parsed from the sources and never imported. Run as `python data/python-docs/prepare.py`.
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
RUN = 8  # words; a paragraph of fewer ("For example:") may stand in many documents


class Document(NamedTuple):
    """A text and its name: that of a topic, or the dotted one of what a docstring describes."""

    name: str
    text: str

    @property
    def group(self) -> str:
        """The topic or top-level module: what goes into one file as a whole."""
        return self.name.split(".")[0]


def main() -> None:
    """Write both files, and say how long they are."""
    sources = Path(sysconfig.get_path("stdlib"))
    docstrings = [document for path in modules(sources) for document in read(path, sources)]
    if not docstrings:
        sys.exit(f"{HERE.name}: this Python has no sources of its standard library in {sources}")
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
    """Yield the standard library's public modules, without tests and what lies beside it."""
    for path in sorted(sources.rglob("*.py")):
        parts = path.relative_to(sources).with_suffix("").parts
        private = parts[0].startswith("_")  # twins of built-in modules, traces of the build
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
    """Sort documents by name, without the paragraphs that a longer one has.

    A quarter of the topics' text stands in two of them ("with" is also a section of "compound"),
    so a split by name alone would show evaluation what calibration has seen. A paragraph goes where
    most of its runs of words are known already, and a document goes where most of its text would.
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
    """Choose a fifth of the topics or modules: sorted by size, the middle one of every five.

    Both files get large and small ones alike, and about four fifths and one fifth of the bytes.
    """
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.group] += len(document.text.encode())
    return set(sorted(sizes, key=lambda name: (-sizes[name], name))[2::5])


if __name__ == "__main__":
    main()
