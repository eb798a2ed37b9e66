"""Reads a run folder: ``run.json``, ``metrics.jsonl`` and the newest checkpoint's manifest, but never weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastkd.trainer.run.saved.checkpoint import MANIFEST, CheckpointError, last_stage, list_checkpoints
from fastkd.trainer.run.saved.log import CLASSES, METRICS, RUN, SEED_FOLDER, SPEED
from fastkd.trainer.strict_json import check_fields, parse_json, read_json_object
from fastkd.validate import check_int

_RUN_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("student", "loss_weights", "versions", "config"), dict),
    **dict.fromkeys(("train_samples", "eval_samples", "global_batch", "ranks", "steps", "seed"), int),
    **dict.fromkeys(("learning_rate", "precision", "device"), str),
    "teacher": (dict, type(None)),
    "teacher_sha256": (str, type(None)),
    "given_as_objects": list,
}
_NOT_A_QUANTITY = {"kind", "step", "epoch"}


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """One run, as its files describe it.

    Attributes:
        info: ``run.json``.
        manifest: the manifest of the newest checkpoint. None if there is no checkpoint.
        steps, epochs: the records of ``metrics.jsonl`` in the order of their steps, with NaN for null. ``epochs`` also
            have the values of ``speed.jsonl``.
        cut: the last line of ``metrics.jsonl`` is incomplete.
        classes: ``classes.json``: what the last evaluation found for every class, ``classes`` being their names. Beside
            them are ``samples``, and ``right`` ones or ``scores`` in [0, 1]. None if there are none yet.
    """

    name: str
    folder: Path
    info: dict[str, Any]
    manifest: dict[str, Any] | None
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    cut: bool
    classes: dict[str, Any] | None = None

    @property
    def metric(self) -> str:
        """The name of the value by which epochs are compared. Runs of earlier versions are all of classifiers."""
        return str(self.info.get("metric", "accuracy"))

    @property
    def steps_per_epoch(self) -> float:
        return float(self.info["steps"] / self.info["config"]["epochs"])

    @property
    def last_step(self) -> int:
        """The step of the last record, and 0 if there is none."""
        return max((records[-1]["step"] for records in (self.steps, self.epochs) if records), default=0)

    @property
    def finished(self) -> bool:
        """Whether the last step is in a checkpoint, or in the records if there are no checkpoints here."""
        at = self.manifest["step"] if self.manifest is not None else self.epochs[-1]["step"] if self.epochs else 0
        return bool(at >= self.info["steps"])

    @property
    def evaluated(self) -> dict[str, Any] | None:
        """The record of the last evaluated epoch."""
        return next((record for record in reversed(self.epochs) if self.metric in record), None)

    @property
    def best(self) -> dict[str, Any] | None:
        """The record of the first epoch with the highest value of the metric."""
        known = [record for record in self.epochs if math.isfinite(record.get(self.metric, math.nan))]
        return max(known, key=lambda record: record[self.metric], default=None)

    @property
    def teacher_accuracy(self) -> float | None:
        """The teacher's value of the metric, in [0, 1]. None without a teacher, or if it is unknown."""
        value = self.info.get("teacher_accuracy")
        return value if isinstance(value, float) and math.isfinite(value) else None

    @cached_property
    def quantities(self) -> list[str]:
        """The names of all recorded values, in the order in which they first appear."""
        found: dict[str, None] = {}
        for record in (*self.steps, *self.epochs):
            found.update(dict.fromkeys(record))
        return [name for name in found if name not in _NOT_A_QUANTITY]


@dataclass(frozen=True)
class Group:
    """What has one row and one colour on the page: a run, or the runs of ``--seeds``."""

    name: str
    folder: Path
    runs: list[RecordedRun]


def read_groups(folders: Sequence[str | Path]) -> tuple[list[Group], list[str]]:
    """The runs of the folders, and a line for every folder that cannot be read.

    A folder is that of a run, or holds stages, of which the last is read, or the runs of ``--seeds`` in its folders
    ``seed-N``.

    Raises:
        ValueError: there are no folders, one is given twice, or none of them can be read.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if not paths:
        raise ValueError("runs: got none, expected at least one run folder")
    for path, given in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"runs: got {str(given)!r} twice, expected different run folders")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    groups, problems = [], []
    for given, path in zip(map(Path, folders), paths, strict=True):
        runs = []
        name = "/".join(path.parts[-depth:])
        seeds = {} if (given / RUN).exists() else _seeds(given)
        for suffix, folder in (seeds or {"": given}).items():
            try:
                runs.append(read_run(last_stage(folder), f"{name}{suffix}"))
            except (ValueError, CheckpointError) as error:
                problems.append(str(error))
        groups += [Group(name, given, runs)] if runs else []
    if not groups:
        raise ValueError(problems[0])
    metrics = {run.metric: run.name for group in groups for run in group.runs}
    if len(metrics) > 1:
        shown = ", ".join(f"{name} has {metric}" for metric, name in metrics.items())
        raise ValueError(f"runs: got runs of different tasks ({shown}), expected those of one")
    return groups, problems


def _seeds(folder: Path) -> dict[str, Path]:
    """The run folders of ``--seeds`` in ``folder``, in the order of the seeds, by what their names add to its own."""
    numbers = {path: path.name.removeprefix(SEED_FOLDER) for path in folder.glob(f"{SEED_FOLDER}*") if path.is_dir()}
    found = sorted((int(number), path) for path, number in numbers.items() if number.isdecimal() and number.isascii())
    return {f", seed {number}": path for number, path in found}


def read_run(folder: Path, name: str) -> RecordedRun:
    """Read one run folder. ValueError that names the file if one is missing or cannot be understood."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    info = _json_object(folder / RUN, _RUN_FIELDS)
    check_fields(info["config"], {"epochs": int, "data": dict, "optim": dict}, f"{folder / RUN}: its config")
    check_int(f"{folder / RUN}: steps", info["steps"], 1)
    check_int(f"{folder / RUN}: config.epochs", info["config"]["epochs"], 1)
    manifest = _newest_manifest(folder)
    # A run that has just begun has not written its first record.
    begun = manifest is not None or (folder / METRICS).exists()
    records, cut = read_metrics(folder / METRICS) if begun else ([], False)
    by_kind: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "epoch": {}}
    for record in records:
        by_kind.get(record["kind"], {})[record["step"]] = record
    for record in read_metrics(folder / SPEED)[0] if (folder / SPEED).exists() else []:
        # An epoch that was broken off has a line too, and no record.
        if record["step"] in by_kind["epoch"]:
            by_kind["epoch"][record["step"]] |= {key: record[key] for key in record if key not in _NOT_A_QUANTITY}
    ordered = {kind: [found[step] for step in sorted(found)] for kind, found in by_kind.items()}
    return RecordedRun(
        name=name,
        folder=folder,
        info=info,
        manifest=manifest,
        steps=ordered["step"],
        epochs=ordered["epoch"],
        cut=cut,
        classes=_classes(folder / CLASSES),
    )


def read_metrics(file: Path) -> tuple[list[dict[str, Any]], bool]:
    """The records of ``metrics.jsonl``, and whether its last line is incomplete, as a run leaves it that is writing.

    An incomplete last line is left out. Anything else that is no record raises ValueError with the file and the line.
    """
    lines = _read(file).split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
        except ValueError:
            if number == len(lines):
                return records, True
            raise ValueError(f"{file}: line {number} is not JSON") from None
        if not (isinstance(record, dict) and isinstance(record.get("kind"), str) and _is_count(record.get("step"))):
            raise ValueError(f"{file}: line {number} is not a record with a kind and a step")
        if record["kind"] == "epoch" and not _is_count(record.get("epoch")):
            raise ValueError(f"{file}: line {number} is the record of an epoch, but does not say which")
        records.append({key: value for key, value in map(_plain, record.items()) if value is not None})
    return records, False


def _plain(item: tuple[str, Any]) -> tuple[str, Any]:
    """The item, with NaN for a value that is not finite (null in the file) and None for one that is no number."""
    name, value = item
    if name in _NOT_A_QUANTITY:
        return item
    if value is None:
        return name, math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return name, None
    return name, value if math.isfinite(value) else math.nan


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _newest_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint. The checkpoint's other files are not read."""
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        return None
    file = found[-1] / MANIFEST
    # A run that is going on may have replaced it by a newer one since.
    if not file.exists() and list_checkpoints(folder / "checkpoints")[-1:] != found[-1:]:
        return _newest_manifest(folder)
    manifest = _json_object(file, {"step": int, "labels_sha256": (str, type(None)), "config": dict})
    check_int(f"{file}: step", manifest["step"], 0)
    return manifest


def _classes(file: Path) -> dict[str, Any] | None:
    """The values per class, checked. None if there is no such file, as in runs of earlier versions."""
    if not file.exists():
        return None
    found = _json_object(file)
    values = "scores" if "scores" in found else "right"
    columns = [found.get(key) for key in ("classes", values, "samples")]
    if (
        not all(isinstance(column, list) for column in columns)
        or len({len(column) for column in columns if column}) > 1
    ):
        raise ValueError(f"{file}: has no lists classes, {values} and samples of one length")
    if not all(map(_is_count, [*found.get("right", ()), *found["samples"]])) or not _is_count(found.get("step")):
        raise ValueError(f"{file}: right, samples and step must be counts")
    if not all(score is None or (isinstance(score, float) and 0 <= score <= 1) for score in found.get("scores", ())):
        raise ValueError(f"{file}: scores must be null or numbers in [0, 1]")
    return found | {"classes": list(map(str, found["classes"]))}


def _json_object(file: Path, fields: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        return read_json_object(file, fields)
    except FileNotFoundError:
        raise ValueError(f"{file}: is missing") from None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{file}: is missing") from None
