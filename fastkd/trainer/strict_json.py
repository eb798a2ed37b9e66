"""The one reader of JSON for files that may come from a stranger: limited in size and depth, one line per refusal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 32


def read_json_object(
    file: Path,
    fields: Mapping[str, type | tuple[type, ...]] | None = None,
    most: int | None = None,
    each: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """The JSON object in ``file``, whose ``fields`` must be there and of these types. ValueError that names the file.

    FileNotFoundError if there is no such file. It may have ``most`` bytes, MAX_BYTES if not given. ``each``: see
    ``parse_json``.
    """
    most = MAX_BYTES if most is None else most
    if file.stat().st_size > most:
        raise ValueError(f"{file}: has {file.stat().st_size} bytes, expected at most {most} of JSON")
    try:
        values = parse_json(file.read_bytes(), each)
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON: truncated or corrupted ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: holds {type(values).__name__}, expected an object")
    check_fields(values, fields or {}, str(file))
    return values


def parse_json(data: bytes | str, each: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value that ``data`` is the JSON of. ValueError for no JSON, deep nesting, or an integer of over 64 bits.

    What ``each`` gives for an object takes its place, as soon as it is read.
    """
    try:
        value = json.loads(data, parse_int=_int64, object_hook=each)
    except RecursionError:
        value = None
        too_deep = True
    else:
        level = [value]
        for _ in range(MAX_DEPTH):
            nested = [part for part in level if isinstance(part, dict | list)]
            level = [item for part in nested for item in (part.values() if isinstance(part, dict) else part)]
        too_deep = bool(level)
    if too_deep:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return value


def check_fields(values: Mapping[str, Any], fields: Mapping[str, type | tuple[type, ...]], name: str) -> None:
    """ValueError with ``name`` unless ``values`` has all ``fields``, each of its types. A bool is no int."""
    if missing := sorted(fields.keys() - values.keys()):
        raise ValueError(f"{name}: lacks {', '.join(missing)}")
    for key, expected in fields.items():
        kinds = expected if isinstance(expected, tuple) else (expected,)
        if not isinstance(values[key], kinds) or (isinstance(values[key], bool) and bool not in kinds):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{name}: {key} is of type {type(values[key]).__name__}, expected {names}")


def _int64(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 2**63:
        raise ValueError(f"the integer {text[:20]}... has more than 64 bits")
    return int(text)
