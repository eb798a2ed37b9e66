"""Objects named as ``package.module:attribute`` in a config."""

from __future__ import annotations

import importlib
from typing import Any


def import_object(name: str, argument: str) -> Any:
    """The object that ``package.module:attribute`` names; ``argument`` is the config field, for the message.

    Raises ValueError when the name is malformed, the module cannot be found or the attribute is missing.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise ValueError(f"{argument}: got {name!r}, expected 'package.module:attribute'")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{argument}: cannot import {name!r}: {error}") from error
    return found
