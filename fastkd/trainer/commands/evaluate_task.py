"""``fastkd eval`` for the tasks that are no classification: the values of their own metric."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.trainer.commands.reopen import reopen
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.datasets import names_of_classes
from fastkd.trainer.data.labels import normalization_of
from fastkd.trainer.data.loader import eval_loader
from fastkd.trainer.models.build import count_parameters
from fastkd.trainer.models.features import are_bytes
from fastkd.trainer.precision import choose_device
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.run.saved.checkpoint import find_checkpoint, read_manifest
from fastkd.trainer.tasks.base import find_task
from fastkd.trainer.text import printable


@dataclass
class TaskResult:
    """What ``evaluate_task`` found.

    Attributes:
        metric: what people call the value by which checkpoints are compared: accuracy, mAP, recall@1.
        values: that value first, and the others, by their names in the records of a run. All are in [0, 1] or nats.
        per_class: what ``classes.json`` of a run holds: ``classes``, and a list for each class beside it. Empty for
            tasks without classes.
        parameters: of the student.
        samples: of the evaluation data.
        step: of the checkpoint.
        path: the checkpoint.

    Example:
        >>> evaluate_task("runs/detection").values["map_50"]  # doctest: +SKIP
        0.71
    """

    metric: str
    values: dict[str, float]
    parameters: int
    samples: int
    step: int
    path: Path
    per_class: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "path": str(self.path)}

    def lines(self) -> list[str]:
        """What ``fastkd eval`` prints."""
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.values.items())
        found = [f"{self.path}: step {self.step}, {shown} on {self.samples} samples ({self.parameters:,} parameters)"]
        scores = self.per_class.get("scores")
        if scores is not None:
            each = zip(map(printable, self.per_class["classes"]), scores, self.per_class["samples"], strict=True)
            found += [
                f"  {name}: {'no boxes' if score is None else f'AP {score:.4f} on {count} boxes'}"
                for name, score, count in each
            ]
        return found


def task_of(path: str | Path, best: bool = False) -> str:
    """The task of a checkpoint, or of a run folder's newest (or ``best``) one."""
    config = read_manifest(find_checkpoint(path, best=best)).get("config")
    return str(config.get("task", "classification")) if isinstance(config, dict) else "classification"


def evaluate_task(
    path: str | Path,
    *,
    best: bool = False,
    model: nn.Module | None = None,
    data: DataConfig | None = None,
    eval_data: Any = None,
    device: str = "auto",
    trust_code: bool = False,
) -> TaskResult:
    """Evaluate the student of a checkpoint by the metric of its run's task; arguments as in ``evaluate_checkpoint``.

    Raises:
        CheckpointError: as ``evaluate_checkpoint`` does.
        ValueError: the data have other classes than the run.

    Example:
        >>> found = evaluate_task("runs/detection", best=True)  # doctest: +SKIP
        >>> dict(zip(found.per_class["classes"], found.per_class["scores"]))  # doctest: +SKIP
    """
    reopened = reopen(path, best=best, model=model, data=data, eval_data=eval_data, trust_code=trust_code)
    config = reopened.config
    task = find_task(replace(config, data=reopened.data))
    known, found = reopened.checkpoint.manifest.get("classes"), names_of_classes(reopened.eval_data)
    if known is not None and found is not None and known != found:
        raise ValueError(f"data: has the classes {found[:10]}, expected those of {path} in their order: {known[:10]}")
    place = choose_device(device, config.precision)
    named = config.student
    names = {} if named is None else {name: getattr(named, name) for name in ("classifier", "feature_map", "taps")}
    wrapped = task.wrap(reopened.model, names, True).to(place)
    is_bytes = are_bytes(task.sample(reopened.eval_data))
    wrapped.take_images("bytes" if is_bytes else None, normalization_of(reopened.eval_data))
    loader = eval_loader(reopened.eval_data, reopened.data, place, collate=task.collate)
    per_class: dict[str, Any] = {}
    values = task.evaluate(wrapped, loader, place, config.precision, Ranks(), per_class=per_class)
    return TaskResult(
        metric=task.title,
        values={task.metric: values[task.metric], **values},
        parameters=count_parameters(wrapped),
        samples=len(reopened.eval_data),
        step=reopened.checkpoint.manifest["step"],
        path=reopened.checkpoint.path,
        per_class=per_class,
    )
