"""Reads pickles of plain data without unpickling them.

Nothing that a pickle names is imported or called. What it would make by a call is written down as a ``Call``.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

VALUES = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"})
BYTES = frozenset({"BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING"})
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = frozenset({"PROTO", "FRAME"})
# The names by which numpy's arrays are pickled, up to protocol 4.
NAMES = frozenset(
    {"numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
)


@dataclass(frozen=True)
class Name:
    """What a pickle refers to by its module and its name."""

    name: str


@dataclass
class Call:
    """A call that a pickle asks for, and the state that it gives to the result."""

    function: Any
    arguments: Any
    state: Any = None


def read_pickle(content: bytes) -> Any:
    """The lists, dicts, numbers and strings of a pickle; a tuple is given as a list, and an array as a ``Call``.

    The strings of Python 2 are given as bytes. ``array_of`` makes an array of a ``Call``.

    Raises:
        ValueError, IndexError, KeyError: the pickle is damaged, or names anything that is not part of an array.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def take(count: int) -> list[Any]:
        if count > len(stack) - (marks[-1] if marks else 0):
            raise ValueError("takes more values than it has")
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    argument: Any
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in VALUES:
            stack.append(argument)
        elif name in BYTES:
            stack.append(argument.encode("latin-1") if isinstance(argument, str) else argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in TUPLES:
            stack.append(take(TUPLES[name]))
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            values = take(len(stack) - marks[-1])
            marks.pop()
            if name == "TUPLE":
                stack.append(values)
            else:
                _extend(stack[-1], values)
        elif name in ("APPEND", "SETITEM"):
            values = take(1 if name == "APPEND" else 2)
            _extend(stack[-1], values)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            what = argument if name == "GLOBAL" else " ".join(part for part in take(2) if isinstance(part, str))
            if what not in NAMES:
                raise ValueError(f"names {what!r:.80}, which is neither data nor an array")
            stack.append(Name(what))
        elif name == "REDUCE":
            stack.append(Call(*take(2)))
        elif name == "BUILD":
            (state,) = take(1)
            if not isinstance(stack[-1], Call):
                raise ValueError(f"gives a state to {type(stack[-1]).__name__}")
            stack[-1].state = state
        elif name == "STOP":
            return stack[-1]
        elif name not in IGNORED:
            raise ValueError(f"has the instruction {name}, which plain data do not need")
    raise ValueError("has no end")


def array_of(value: Any, columns: int) -> np.ndarray:
    """The uint8 array [n, columns] that ``value``, a ``Call`` of ``read_pickle``, stands for. ValueError if it is none.

    The array shares its memory with the pickle and cannot be written.
    """
    state = value.state if isinstance(value, Call) and isinstance(value.function, Name) else None
    if not isinstance(state, list) or len(state) != 5 or not value.function.name.endswith("_reconstruct"):
        raise ValueError("'data' is not an array")
    _, shape, dtype, is_fortran, pixels = state
    kind = dtype.arguments if isinstance(dtype, Call) and dtype.function == Name("numpy dtype") else None
    if not isinstance(kind, list) or not kind or kind[0] not in ("u1", b"u1") or is_fortran not in (False, 0):
        raise ValueError("'data' is not an array of uint8 in C order")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(side) is int for side in shape)
    if not is_shape or not isinstance(pixels, bytes) or shape[1] != columns or len(pixels) != shape[0] * columns:
        raise ValueError(f"'data' does not have the shape [n, {columns}]")
    return np.frombuffer(pixels, np.uint8).reshape(shape)


def _extend(target: Any, values: list[Any]) -> None:
    """Add ``values`` to a list, or as keys and values in turn to a dict."""
    if isinstance(target, list):
        target.extend(values)
        return
    keys = values[::2]
    if not isinstance(target, dict) or len(values) % 2 or not all(isinstance(key, str | bytes) for key in keys):
        raise ValueError(f"adds {len(values)} values to {type(target).__name__}")
    target.update(zip(keys, values[1::2], strict=True))
