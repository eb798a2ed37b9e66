"""How values from outside are shown: names that a terminal and a page can hold, settings as flat names."""

from __future__ import annotations

import unicodedata
from typing import Any

_JOINERS = "\u200c\u200d"  # the invisible letters that Persian, Indic scripts and emoji need


def printable(text: str) -> str:
    """``text`` on one line, with blanks for white space and U+FFFD for what has no glyph: safe on a terminal or page.

    File names, class names and settings come from others. Control characters in them could move a terminal's cursor,
    and marks of direction could show a name as another. (HTML is escaped where a page is made.)

    Example:
        >>> printable("cat\\x1b[2J\\tdog")
        'cat\ufffd[2J dog'
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in _JOINERS
        else " "
        if character in "\t\n\r" or unicodedata.category(character) == "Zs"
        else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"optim.lr": "0.05", ...}``: the names that are flags of ``fastkd train``."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat
