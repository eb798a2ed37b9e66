"""Objects that a config names as ``package.module:attribute``."""

from __future__ import annotations

import importlib
from typing import Any

# Modules that were renamed. Configs of runs from before then still say the old name.
MOVED_MODULES = {
    "fastkd.trainer.nets": "fastkd.trainer.models.small",
    "fastkd.trainer.cifar_nets": "fastkd.trainer.models.cifar",
    "fastkd.trainer.data.cifar": "fastkd.trainer.data.readers.cifar",
    "fastkd.trainer.data.memory": "fastkd.trainer.data.readers.memory",
}


def current_name(name: str) -> str:
    """``package.module:attribute`` with the module's present name; any other string comes back unchanged."""
    module, colon, attribute = name.partition(":")
    return MOVED_MODULES.get(module, module) + colon + attribute if colon else name


def import_object(name: str, argument: str) -> Any:
    """The object that ``package.module:attribute`` names; ``argument`` is the config field, for the message.

    Raises ValueError when the name is malformed, the module cannot be found or the attribute is missing.
    """
    module_name, _, attribute = current_name(name).partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise ValueError(f"{argument}: got {name!r}, expected 'package.module:attribute'")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{argument}: cannot import {name!r}: {error}") from error
    return found
