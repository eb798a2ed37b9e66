"""What ``fastkd shards`` notes beside the shards of a part: their names, their classes, and how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastkd.trainer.data.readers.files import content_of
from fastkd.trainer.strict_json import MAX_BYTES, check_fields, parse_json

MANIFEST = "fastkd-shards.json"
_FIELDS = {"complete": bool, "settings": dict, "classes": list, "shards": dict}
_SHARD = {"images": int, "bytes": int, "sha256": str, "broken": dict}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in ``folder``, with checked types; None where there is none. ValueError for one that is damaged.

    ``shards`` has for the name of every finished shard the number of its ``images``, its ``bytes`` and its ``sha256``,
    and for every image that is left out in it (``broken``) the reason. ``complete`` says whether they are all.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    content = content_of(path, MAX_BYTES)
    try:
        manifest = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: truncated or corrupted ({error})") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: holds {type(manifest).__name__}, expected an object")
    check_fields(manifest, _FIELDS, str(path))
    if not all(isinstance(name, str) for name in manifest["classes"]):
        raise ValueError(f"{path}: got a class whose name is no string")
    for name, shard in manifest["shards"].items():
        check_fields(shard if isinstance(shard, dict) else {}, _SHARD, f"{path}: {name}")
    return manifest


def classes_of_shards(folder: Path, sizes: dict[str, int]) -> list[str] | None:
    """The names of the classes; None where there is no manifest.

    ``sizes`` are the bytes of the shards in ``folder``, by name. ValueError if the manifest tells of other shards, or
    of a writer that has not finished.
    """
    manifest, path = read_manifest(folder), folder / MANIFEST
    if manifest is None:
        return None
    if not manifest["complete"]:
        raise ValueError(f"{path}: the shards are not complete; the same fastkd shards command goes on with them")
    written = {name: shard["bytes"] for name, shard in manifest["shards"].items()}
    if differing := sorted(name for name in sizes.keys() | written.keys() if sizes.get(name) != written.get(name)):
        raise ValueError(
            f"{path}: {len(differing)} shards are not what was written, such as {differing[0]!r:.80} with "
            f"{sizes.get(differing[0], 'no')} bytes, expected {written.get(differing[0], 'no such shard')}"
        )
    return manifest["classes"]
