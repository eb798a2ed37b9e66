"""What became of a cell, as the file ``result.json`` in its folder says."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastkd.study.grid import Cell, Job, Study
from fastkd.trainer.config import FREE_TO_CHANGE, differences
from fastkd.trainer.files import replace_text
from fastkd.trainer.strict_json import check_fields, read_json_object
from fastkd.trainer.text import flatten

RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class Record:
    """The end of a cell: its values, or the one line that says why it failed; what it computed, and when."""

    status: Literal["finished", "failed"]
    values: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    at: float = field(default_factory=time.time)

    def write(self, folder: Path) -> None:
        """Write the record into the folder of the cell, in one piece."""
        replace_text(folder / RESULT, json.dumps(asdict(self), indent=1) + "\n")


def read_record(folder: Path) -> Record | None:
    """The record in the folder of a cell, None if there is none yet. ValueError for a file that is no record."""
    file = folder / RESULT
    try:
        found = read_json_object(file)
    except FileNotFoundError:
        return None
    kinds: dict[str, Any] = {"status": str, "values": dict, "error": str, "settings": dict, "at": (int, float)}
    check_fields(found, kinds, str(file))
    if found["status"] not in ("finished", "failed"):
        raise ValueError(f"{file}: got the status {found['status']!r}, expected finished or failed")
    if not all(isinstance(value, int | float) for value in found["values"].values()):
        raise ValueError(f"{file}: its values are not all numbers")
    return Record(**{name: found[name] for name in kinds})


def records(study: Study, folder: Path) -> dict[str, Record]:
    """The records of all cells that have one, by the cells' places."""
    found = {cell.place: read_record(folder / cell.place) for cell in study.in_order_of_need()}
    return {place: record for place, record in found.items() if record is not None}


def check_same_settings(study: Study, folder: Path) -> None:
    """Raise ValueError if a finished cell in ``folder`` was made with other settings than ``study`` has now."""
    for cell in study.in_order_of_need():
        record = read_record(folder / cell.place)
        if record is None or record.status != "finished":
            continue
        job = job_of(cell, folder)
        changed = [] if isinstance(job, str) else changes(record.settings, job.settings())  # str: it is gone
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"out: {folder / cell.place} was made with other settings ({'; '.join(changed[:3])}{more}), expected "
                "the same, or another --out"
            )


def changes(saved: Mapping[str, Any], now: dict[str, Any]) -> list[str]:
    """``name: saved -> now`` of every setting that changes what a job computes."""
    if "epochs" in now and "student" in now:  # a run: its device, folders and the like may differ
        saved, now = ({key: value for key, value in side.items() if key != "stages"} for side in (saved, now))
        found = differences(saved, now)
        epochs = (saved.get("epochs"), now["epochs"])
        return found + ([] if epochs[0] == epochs[1] else [f"epochs: {epochs[0]} -> {epochs[1]}"])
    old, new = flatten(json.loads(json.dumps(dict(saved)))), flatten(json.loads(json.dumps(now)))
    names = [name for name in sorted({*old, *new}) if name.rpartition("step.")[2] not in FREE_TO_CHANGE]
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def job_of(cell: Cell, folder: Path) -> Job | str:
    """The job of a cell, or the line that says why it is not available."""
    try:
        return cell.make(folder)
    except (ValueError, TypeError, ImportError, LookupError) as error:
        return one_line(error)


def one_line(error: BaseException) -> str:
    """An error as one line, with its type where that is not said by the message."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | TypeError | OSError) and text else f"{type(error).__name__}: {text}"
