"""What the documents say is there: paths, modules, make targets, and one version."""

import importlib.util
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

import fastkd

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "bench/NOTES.md", "examples/README.md", *PAGES)
FOLDERS = ("fastkd", "kernels", "bench", "tests", "csrc", "docs", "examples", ".ci")


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_in_a_document_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    paths = [(ROOT / document).parent / link for link in links if "://" not in link]
    words = [word for code in in_backticks(text) for word in code.split()]
    paths += [ROOT / word for word in words if re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./-]*", word)]
    paths += [ROOT / word for word in words if re.fullmatch(r"[\w.-]+\.(md|cff|toml|txt)", word)]
    assert [str(path) for path in paths if not path.exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_that_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    for name in re.findall(r"-m (bench[\w.]*|fastkd[\w.]*)", text):
        assert importlib.util.find_spec(name), name
    for name in in_backticks(text):
        if re.fullmatch(r"fastkd(\.\w+)+", name):
            assert pkgutil.resolve_name(name) is not None


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[0] for line in shown.splitlines()] == [
        name for name in re.findall(r"^([a-z-]+):", makefile, re.MULTILINE) if name in targets.split()
    ]
    assert set(targets.split()) == {line.split()[0] for line in shown.splitlines()}


def test_every_make_target_in_a_document_exists() -> None:
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = "\n".join((ROOT / document).read_text() for document in DOCUMENTS)
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= set(targets.split())


def test_the_version_is_written_once() -> None:
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == fastkd.__version__
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
