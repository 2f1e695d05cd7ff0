"""The documentation: its links, its commands, its figures, and the site made of it."""

import re
import shlex
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import entangle
from benchmarks import solving, tables
from entangle.arguments import parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|\s)(?:\S*/)?entangle (?P<words>[a-z].*)$")


def commands() -> list[str]:
    """Return the words after `entangle` of each command in the code blocks of the pages."""
    found = []
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in {"", "bash", "sh"}:
                lines = block.replace("\\\n", " ").splitlines()
                found += [m["words"] for line in lines if (m := COMMAND.search(line))]
    return sorted(set(found))


@pytest.mark.parametrize("words", commands())
def test_commands_are_those_of_the_command_line(words: str) -> None:
    parser().parse_args(shlex.split(words, comments=True))


def test_every_figure_is_in_the_gallery() -> None:
    shown = re.findall(r"\.\./figures/(\S+\.png)", (ROOT / "docs/gallery.md").read_text("utf-8"))
    assert sorted(shown) == sorted(path.name for path in (ROOT / "figures").glob("*.png"))


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs/api.md").read_text("utf-8")
    functions = set(re.findall(r"autofunction:: (\w+)$", text, re.MULTILINE))
    assert functions == {*entangle.__all__} - {"plots"}
    assert "automodule:: entangle.show.plots" in text


def test_tables_are_those_of_the_evidence() -> None:
    with chdir(ROOT):
        for (page, name), lines in tables.written().items():
            assert tables.parts(page, name)[1].split("\n") == lines


def test_numbers_of_the_evidence_follow_from_its_windows() -> None:
    with chdir(ROOT):
        table = solving.evidence()
    for _, rows in table.groupby("evaluation"):
        nats = np.stack([solving.window_nats(row) for _, row in rows.iterrows()])
        change = nats - nats[(rows["method"] == "dense").to_numpy()]
        assert rows["perplexity"].to_numpy() == pytest.approx(np.exp(nats.mean(1)), rel=2e-6)
        assert rows["difference"].to_numpy() == pytest.approx(change.mean(1), abs=2e-6)
        assert rows["difference_error"].to_numpy() == pytest.approx(
            stats.sem(change, axis=1), abs=2e-6
        )


def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    words = ["-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert 'id="entangle.measure"' in (tmp_path / "docs/api.html").read_text("utf-8")
