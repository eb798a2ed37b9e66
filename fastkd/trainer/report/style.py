"""How all reports look: one HTML template, figures that follow the page's colours, files written in one piece."""

from __future__ import annotations

import html
import io
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastkd.trainer.text import printable

# These colours stay apart on white and on near-black, and for the common kinds of colour blindness.
PALETTE = ("#7d8794", "#e08a12", "#2b8fd9", "#c8479c", "#2fa37c", "#9a7be0", "#d9503f", "#8a7a33")
# matplotlib writes these as ordinary colours. They are then replaced by what the page's style sheet defines.
INK, FAINT, PAPER = "#010203", "#040506", "#070809"
PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--faint)", PAPER: "var(--paper)"}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.45,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
WIDTH = 5.4  # inches: at a phone's width ten-point text stays about nine pixels high


def render_page(folder: Path, **values: Any) -> str:
    """The HTML text of ``folder``'s template ``page.html``, which extends ``base.html`` beside this file.

    Every text that the template shows is escaped and printable, unless it is marked safe.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(**values)


@contextmanager
def drawing(height: float, width: float = WIDTH, style: dict[str, Any] | None = None) -> Iterator[Axes]:
    """The axes of a new figure, in inches. Draw on them and call ``to_svg`` within this context."""
    with matplotlib.rc_context(STYLE | (style or {})):
        # An SVG has 72 points per inch: with as many dots, transData gives its coordinates.
        yield Figure(figsize=(width, height), dpi=72, layout="constrained").subplots()


def to_svg(axes: Axes, key: str, description: str, hover: Sequence[tuple[float, float, str]] = ()) -> str:
    """The figure of ``axes`` as one <svg> element, with ``description`` for screen readers.

    ``key`` keeps the ids in it apart from the ids of other figures. ``hover``: texts that appear over a point (x, y).
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)  # decides where points lie
    figure.set_layout_engine("none")
    height = figure.get_figheight() * 72
    circles = ""
    for x, y, text in hover:
        across, up = axes.transData.transform((x, y))
        title = html.escape(printable(text))
        circles += f'<circle cx="{across:.1f}" cy="{height - up:.1f}" r="6"><title>{title}</title></circle>'
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the groups' names are the same in every figure, and unused
    for colour, replacement in PAGE_COLOURS.items():
        svg = svg.replace(colour, replacement)
    label = html.escape(printable(description))
    svg = svg.replace("</svg>", f'<g class="hover">{circles}</g></svg>') if circles else svg
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees either the old one or the whole new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the report from other users
    os.replace(temporary, path)
