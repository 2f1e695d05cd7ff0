"""The documentation site: the Markdown of this repository and the docstrings. Run `make docs`.

The source folder is the repository, so that links and pictures are the same here and in the files.
"""

from entangle import __version__

project, author, release = "entangle", "the authors of entangle", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "benchmarks/README.md",
    "notebooks/README.md",
    "data/*/README.md",
]
html_theme = "furo"
html_title = f"entangle {release}"
myst_heading_anchors = 4  # as GitHub names them
default_role = "py:obj"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
