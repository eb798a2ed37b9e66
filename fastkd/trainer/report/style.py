"""How reports look: colours and styles of figures, SVG that follows the page's theme, files written in one piece."""

import io
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Colours that stay apart on white and on near-black, and for the common kinds of colour blindness.
PALETTE = ("#7d8794", "#e08a12", "#2b8fd9", "#c8479c", "#2fa37c", "#9a7be0", "#d9503f", "#8a7a33")


# Written by matplotlib as ordinary colours, then replaced by what the page's style sheet defines.
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


def to_svg(figure: Figure, key: str, description: str) -> str:
    """`figure` as one <svg> element described for screen readers; `key` keeps its ids apart from the other figures'."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the groups' names are the same in every figure, and unused
    for colour, replacement in PAGE_COLOURS.items():
        svg = svg.replace(colour, replacement)
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the whole new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the report from other users
    os.replace(temporary, path)
