"""What the site needs beyond Markdown: pages from outside of docs/, links between all of them, formulas, docstrings.

MkDocs calls the functions by their names. mkdocstrings loads ``PlainMarkup``.
"""

import ast
import fnmatch
import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Beside docs/, these files of the repository are pages or images of the site, at the same place.
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "bench/NOTES.md",
    "bench/results/*.md",
    "bench/results/*.png",
    "examples/*.md",
)
# What is found elsewhere on the site: the repository's path -> the site's path.
MOVED = {"README.md": "index.md", "bench/results": "benchmarks.md", "examples": "examples/README.md",
         "examples/first_steps.ipynb": "first_steps.md"}  # fmt: skip


def on_files(files: Files, config: MkDocsConfig) -> Files:
    found = sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern))
    for path in found:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    notebook = (ROOT / "examples" / "first_steps.ipynb").read_text()
    files.append(File.generated(config, "first_steps.md", content=markdown_of(notebook)))
    return files


def markdown_of(notebook: str) -> str:
    """The cells of a Jupyter notebook, each with the output that is stored in it."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join(line for output in cell.get("outputs", ()) for line in output["text"])
        parts += [f"```text\n{printed.rstrip()}\n```"] if printed else []
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files become links between pages, and ``::: fastkd.*Loss`` all such names of ``fastkd.__all__``."""
    site_path = page.file.src_uri
    moved_back = {site: repository for repository, site in MOVED.items()}
    outside = site_path in moved_back or not (ROOT / "docs" / site_path).exists()
    repository_path = moved_back.get(site_path, site_path) if outside else f"docs/{site_path}"

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path), target))
        place = MOVED.get(place, place.removeprefix("docs/"))
        if files.get_file_from_path(place) is not None:
            return f"{text}({posixpath.relpath(place, posixpath.dirname(site_path) or '.')}{anchor})"
        # A file that is no page is named and not linked. What is nowhere stays, and MkDocs reports it.
        return text[1:-1] if (ROOT / place).exists() else match[0]

    markdown = re.sub(r"^::: fastkd\.(\S*\*\S*)$", public_names, markdown, flags=re.M)
    return re.sub(r"(\[[^\]\n]*\])\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, markdown)


def public_names(match: re.Match[str]) -> str:
    listed = re.search(r"^__all__ = (\[.*?\])", (ROOT / "fastkd" / "__init__.py").read_text(), flags=re.M | re.S)
    assert listed
    return "\n".join(f"::: fastkd.{name}" for name in fnmatch.filter(ast.literal_eval(listed[1]), match[1]))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas, written as GitHub reads them, become MathML: ```math blocks, and $`...`$ within a line."""
    content = re.sub(r'<div class="math">(.*?)</div>', lambda match: formula(match, "block"), content, flags=re.S)
    return re.sub(r"\$<code>(.*?)</code>\$", lambda match: formula(match, "inline"), content)


def formula(match: re.Match[str], display: str) -> str:
    mathml = convert(html.unescape(match[1]), display=display)
    return f'<div style="overflow: auto hidden; padding: 0.4em 0">{mathml}</div>' if display == "block" else mathml


class PlainMarkup(griffe.Extension):
    """Docstrings are written for Sphinx's roles and code blocks. This makes Markdown of both."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r"^[ ]*\.\. code-block:: \w+\n", "", obj.docstring.value, flags=re.M)
            text = re.sub(r":\w+:`~?(fastkd\.\w+)`", r"[`\1`][\1]", text)
            text = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", text)
            text = re.sub(r"^(\s*)>=", r"\1\\>=", text, flags=re.M)  # a line that begins with it is no quotation
            text = re.sub(r"^Example:\n", "Examples:\n", text, flags=re.M)  # the only heading whose prompts are code
            obj.docstring.value = re.sub(r"(?<=\w)::\n", ":\n", text)
