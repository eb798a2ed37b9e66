"""The options of a term are checked by the loss that takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch


def check_options(term: str, config: Any, loss: Callable[..., Any], *widths: Any) -> None:
    """Raise what the loss says of its options, with the term's name before the argument's: ``kd.temperature: ...``."""
    try:
        # On tensors without memory, which draw no random numbers.
        with torch.device("meta"):
            loss(*widths, **asdict(config))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{term}.{error}") from None
