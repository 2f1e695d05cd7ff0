"""Execute the notebooks in order and keep their outputs: ``python notebooks/execute.py [FILE...]``.

Each notebook runs in its own kernel, in this folder. What changes from run to run (times, the
kernel's name and version) is left out, so that the same outputs give the same file.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
NOTEBOOKS = sorted(HERE.glob("[0-9]-*.ipynb"))


def read(file: Path) -> nbformat.NotebookNode:
    """Read a notebook.

    Raises:
        nbformat.ValidationError: the file is not a valid notebook.
    """
    notebook: nbformat.NotebookNode = nbformat.read(file, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    return notebook


def write(notebook: nbformat.NotebookNode, file: Path) -> None:
    """Write a notebook."""
    nbformat.write(notebook, file)  # type: ignore[no-untyped-call]


def execute(file: Path, *, folder: Path = HERE) -> nbformat.NotebookNode:
    """Run a notebook's cells in ``folder`` and return it with their outputs; no file is written.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises.
        RuntimeError: a cell writes to standard error.
    """
    notebook = read(file)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        record_timing=False,
        timeout=None,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # no message about its address
        resources={"metadata": {"path": str(folder)}},
    )
    # No progress bar of loading a model, and no warning about how bars are shown.
    quiet = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    client.execute(env=os.environ | quiet)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise RuntimeError(
                    f"a cell of {file.name} writes to standard error: {output['text']}"
                )
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main(names: list[str]) -> None:
    """Execute the named notebooks, or all of them, and write each with its outputs."""
    for file in map(Path, names) if names else NOTEBOOKS:
        write(execute(file), file)


if __name__ == "__main__":
    main(sys.argv[1:])
