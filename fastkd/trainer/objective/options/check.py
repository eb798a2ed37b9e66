"""The options of a term are checked by the loss that takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch

from fastkd.validate import check_choice

GroupName = Literal["global", "local"]
GROUPS = {"global": None, "local": "local"}  # what the losses call them


def loss_options(config: Any, loss: Callable[..., Any]) -> dict[str, Any]:
    """The options of ``config`` that ``loss`` takes. Those that only the trainer reads are left out."""
    options = asdict(config)
    if "group" in options:
        options["group"] = GROUPS[options["group"]]
    known = inspect.signature(loss).parameters
    return {name: value for name, value in options.items() if name in known}


def check_options(term: str, config: Any, loss: Callable[..., Any], *widths: Any) -> None:
    """Raise what the loss says of its options, with the term's name before the argument's: ``kd.temperature: ...``."""
    if hasattr(config, "group"):
        check_choice(f"{term}.group", config.group, GROUPS)
    try:
        # On tensors without memory, which draw no random numbers.
        with torch.device("meta"):
            loss(*widths, **loss_options(config, loss))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{term}.{error}") from None
