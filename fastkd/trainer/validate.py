"""Checks shared by the config dataclasses. Every message names the argument, what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {sorted(allowed)}")


def check_int(name: str, value: Any, minimum: int) -> None:
    """Raise TypeError / ValueError unless ``value`` is an int (not a bool) >= ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected an int >= {minimum}")
    if value < minimum:
        raise ValueError(f"{name}: got {value}, expected an int >= {minimum}")


def check_number(name: str, value: Any, minimum: float, maximum: float = math.inf, *, exclusive: bool = False) -> None:
    """Raise TypeError / ValueError unless ``value`` is finite, in [minimum, maximum] (``exclusive``: > minimum)."""
    interval = f"{'(' if exclusive else '['}{minimum}, {maximum}{')' if math.isinf(maximum) else ']'}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected a number in {interval}")
    if not math.isfinite(value) or value < minimum or value > maximum or (exclusive and value == minimum):
        raise ValueError(f"{name}: got {value}, expected a finite number in {interval}")


def check_type(name: str, value: Any, expected: type | tuple[type, ...]) -> None:
    """Raise TypeError unless ``value`` is an instance of ``expected``."""
    if not isinstance(value, expected):
        kinds = expected if isinstance(expected, tuple) else (expected,)
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name}: got {value!r} of type {type(value).__name__}, expected {names}")
