"""The source distribution and the wheel hold what they should, and install under every supported Python that is here.

``make dist`` calls this with FASTKD_DIST, the folder in which both then stay.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from itertools import product
from pathlib import Path

import pytest
import setuptools

import fastkd

ROOT = Path(__file__).parents[1]
PYTHONS, KINDS = ("3.11", "3.12", "3.13"), ("wheel", "wheel", "source")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=240,
        env={**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the source distribution, the wheel that was built from it). Without the extension, which takes a minute."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository, for the list of its files")
    folder = tmp_path_factory.mktemp("packages")
    target = Path(os.environ.get("FASTKD_DIST", folder / "dist"))
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\n")
    for name in filter(None, tracked):  # a copy, because setuptools writes beside setup.py
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "copy" / name)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", target, cwd=folder / "copy", FASTKD_EXTENSION="0")
    (source,) = target.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / source.name.removesuffix(".tar.gz")
    run(sys.executable, "setup.py", "-q", "bdist_wheel", "-d", target, cwd=unpacked, FASTKD_EXTENSION="0")
    (wheel,) = target.glob("*.whl")
    return source, wheel


def test_the_source_distribution_holds_what_building_and_testing_need(distributions: tuple[Path, Path]) -> None:
    source, _ = distributions
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).split())
    left_out = {".ci/run", ".gitignore", ".pre-commit-config.yaml", *(n for n in tracked if n.startswith(".github/"))}
    assert tracked - left_out - held == set()


def test_the_wheel_holds_the_package_with_its_kernels_and_pages_and_no_tests(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        held = set(archive.namelist())
        (metadata,) = (name for name in held if name.endswith(".dist-info/METADATA"))
        fields = message_from_bytes(archive.read(metadata))
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastkd").rglob("*.py")}
    kernels = {f"fastkd/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastkd").rglob("*.html")}
    assert pages
    assert {name for name in held if ".dist-info" not in name} == sources | kernels | pages | {"fastkd/py.typed"}
    assert fields["Version"] == fastkd.__version__
    assert set(fields.get_all("Provides-Extra")) == PROJECT["optional-dependencies"].keys()
    assert fields.get_all("Project-URL")
    assert {f"Programming Language :: Python :: {version}" for version in PYTHONS} <= set(fields.get_all("Classifier"))


# All pairs for ``make dist``; otherwise every version and both kinds once, because each costs seconds.
PAIRS = product(("source", "wheel"), PYTHONS) if "FASTKD_DIST" in os.environ else zip(KINDS, PYTHONS, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "version"), [*PAIRS])
def test_it_installs(kind: str, version: str, distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """Every file compiles there. Imported is only what needs no torch, which is not installed there."""
    python = interpreter(version)
    source, wheel = distributions
    package = source if kind == "source" else wheel
    run(python, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    options = (
        "--quiet",
        "--no-index",
        "--no-compile",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
    )
    own = tmp_path / "venv" / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", own, "install", *options, package, cwd=tmp_path,
        PYTHONPATH=str(Path(setuptools.__file__).parents[1]), FASTKD_EXTENSION="0",
    )  # fmt: skip
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    (place,) = run(own, "-c", code, cwd=tmp_path).splitlines()
    run(own, "-m", "compileall", "-q", "-f", "-j", "1", f"{place}/fastkd", cwd=tmp_path)
    version_there = "import importlib.metadata as m; print(m.version('fastkd'))"
    assert run(own, "-c", version_there, cwd=tmp_path).strip() == fastkd.__version__
    assert "train RECIPE" in run(tmp_path / "venv" / "bin" / "fastkd", "--help", cwd=tmp_path)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs Linux and nm")
def test_the_extension_has_no_symbol_table(library: Path) -> None:
    done = subprocess.run(["nm", str(library)], capture_output=True, text=True)
    assert "no symbols" in done.stderr, "built by an earlier setup.py? run: make ext"


def interpreter(version: str) -> Path:
    """A Python of this version: the running one, one on the path, or one of pyenv's; skips where there is none."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return Path(sys.executable)
    found = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")]
    for python in filter(None, found):
        if subprocess.run([python, "-c", "0"], capture_output=True).returncode == 0:  # pyenv's shims may lead nowhere
            return Path(python)
    pytest.skip(f"there is no Python {version}")
