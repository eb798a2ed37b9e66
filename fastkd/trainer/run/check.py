"""Checks before the first step: whether the teacher fits to the data, and what its weights were trained with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastkd.trainer.data.options import TransformOptions
from fastkd.trainer.models.weights import Origin, origin_of_file
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.run.distiller import Distiller
from fastkd.trainer.run.saved.checkpoint import find_checkpoint, read_manifest
from fastkd.trainer.tasks.base import Task
from fastkd.trainer.text import printable


def origin_of(weights: str | Path) -> Origin:
    """What the weights in a file, a checkpoint or a run were trained with, as far as it says."""
    weights = Path(weights)
    if not weights.is_dir():
        return origin_of_file(weights)
    manifest = read_manifest(find_checkpoint(weights))
    return Origin(manifest.get("classes"), input_of(manifest))


def outputs_of(weights: str | Path | None) -> int | None:
    """``num_classes`` of the student that a checkpoint or a run trained. None where that is not known."""
    if weights is None or not Path(weights).is_dir():
        return None
    student = read_manifest(find_checkpoint(weights))["config"].get("student") or {}
    outputs: int | None = student.get("num_classes")
    return outputs


def input_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """How the images of a checkpoint's run were made for its student, as ``Origin.input``."""
    found: dict[str, Any] = dict(zip(("mean", "std"), manifest.get("normalization") or (), strict=False))
    data = manifest["config"].get("data") or {}
    if data.get("name") == "images":
        defaults = TransformOptions()
        found |= {name: data["options"].get(name, getattr(defaults, name)) for name in ("image_size", "crop")}
    return found


def check_classes(weights: str, origin: Origin, names: list[str] | None) -> None:
    """Raise ValueError for a teacher whose outputs stand for other classes than the data's, or in another order.

    Where one side has numbers for names, as labels in shards are, nothing can be compared.
    """
    known = [classes for classes in (origin.classes, names) if classes and not all(map(str.isdecimal, classes))]
    if origin.classes is None or names is None or len(known) < 2 or origin.classes == names:
        return
    place = next((i for i, pair in enumerate(zip(origin.classes, names, strict=False)) if pair[0] != pair[1]), 0)
    theirs, ours = (printable(classes[place]) for classes in (origin.classes, names))
    raise ValueError(
        f"teacher.weights: {weights} was trained on other classes, its class {place} is {theirs!r} and the data's is "
        f"{ours!r}; expected the same classes in the same order (a file of weights without names is not checked)"
    )


def check_teacher(distiller: Distiller, task: Task, loader: Any, device: torch.device, ranks: Ranks) -> float | None:
    """The teacher's value of the task's metric on ``loader``'s data, computed as in training; None without a teacher.

    Raises ValueError on every rank when the value is below ``config.teacher.min_accuracy``. The usual reasons are
    other weights, other classes, or another normalisation than the data's.
    """
    if distiller.teacher is None:
        return None
    config = task.config
    floor = None if config.teacher is None else config.teacher.min_accuracy
    accuracy = task.evaluate(distiller.teacher, loader, device, config.precision, ranks)[task.metric]
    if floor is not None and accuracy < floor:
        raise ValueError(
            f"teacher.min_accuracy: the teacher reaches {accuracy:.4f} on the evaluation set, expected at least "
            f"{floor}; are its weights those of these classes, in this order, and of this normalization?"
        )
    if ranks.is_main and not config.quiet:
        print(f"teacher {task.title} {accuracy:.4f}" + (f" (at least {floor})" if floor is not None else ""))
    return accuracy


def report_broken(dataset: Any, tell: Callable[[str], None]) -> None:
    """Tell how many images this rank could not read, if there are any and the dataset counts them."""
    broken = getattr(dataset, "broken", 0)
    if broken:
        tell(f"{broken} of {len(dataset)} training images cannot be read; others took their places")
