"""The wheel and the archive of sources: all of the package, and nothing else."""

import email
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import entangle

ROOT = Path(entangle.__file__).parents[1]
BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # both change argv
build_meta.build_wheel(folder)
build_meta.build_sdist(folder)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both from a copy of the sources, beside which a build would leave files."""
    place = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, place)
    for name in ("entangle", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    line = [sys.executable, "-c", BUILD, str(place / "dist")]
    done = subprocess.run(line, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return place / "dist"


def own_files() -> set[str]:
    """Return the files of the package, in folders of the working tree."""
    files = (path for path in (ROOT / "entangle").rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = email.message_from_bytes(wheel.read(metadata))
    assert {name for name in names if ".dist-info/" not in name} == own_files()
    assert own_files() > {"entangle/py.typed", "entangle/show/page/report.js"}
    assert about["Version"] == entangle.__version__
    needed = [line.split(">=")[0] for line in about.get_all("Requires-Dist") or ()]
    assert {"POT", "torch", "zarr"} <= {*needed}
    assert {*(about.get_all("Provides-Extra") or ())} == {"hub", "lm-eval", "docs", "dev"}


def test_the_archive_of_sources_has_what_the_wheel_is_built_from(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    own = {name for name in names if not name.startswith("entangle.egg-info/")}
    others = {"LICENSE", "README.md", "PKG-INFO", "pyproject.toml", "setup.cfg", "MANIFEST.in"}
    assert own == own_files() | others
