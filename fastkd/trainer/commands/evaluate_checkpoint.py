"""Evaluates a checkpoint, whose model is rebuilt from the checkpoint's own config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.trainer.commands.reopen import reopen
from fastkd.trainer.data.loader import eval_loader, first_images
from fastkd.trainer.models.build import count_parameters
from fastkd.trainer.models.features import FeatureModel, measure_shapes
from fastkd.trainer.precision import choose_device
from fastkd.trainer.run.evaluate import evaluate


@dataclass
class EvalResult:
    """What ``evaluate_checkpoint`` found.

    ``accuracy``, ``top5``: in [0, 1] (``top5`` among all classes where there are fewer). ``loss``: mean cross-entropy
    in nats. ``confusion``: [C, C], how many samples of a class (row) were taken for which (column). ``classes``: their
    names, the numbers where the data has none. ``step``: of the checkpoint at ``path``.
    """

    accuracy: float
    top5: float
    loss: float
    confusion: Tensor
    classes: list[str]
    parameters: int
    samples: int
    step: int
    path: Path

    def per_class(self) -> list[float]:
        """The accuracy on each class's samples; NaN for a class without any."""
        return (self.confusion.diagonal() / self.confusion.sum(1)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; a class without samples has the accuracy None."""
        values = {name: getattr(self, name) for name in ("accuracy", "top5", "loss", "parameters", "samples", "step")}
        per_class = {
            name: value if value == value else None for name, value in zip(self.classes, self.per_class(), strict=True)
        }
        return {**values, "path": str(self.path), "per_class": per_class, "confusion": self.confusion.tolist()}


def evaluate_checkpoint(
    path: str | Path,
    *,
    best: bool = False,
    model: nn.Module | None = None,
    eval_data: Any = None,
    device: str = "auto",
    trust_code: bool = False,
) -> EvalResult:
    """Evaluate the student of a checkpoint (or of the newest, or ``best``, one of a run folder).

    Model and data are rebuilt from the config in the checkpoint unless given. A config may name any
    ``package.module:callable``, which would be imported and called: from a checkpoint that needs ``trust_code=True``,
    except for timm, torchvision and fastkd's own.

    Raises CheckpointError: missing, damaged, needs ``trust_code``, or its student or data were given to ``train`` as
    objects, which no config names, and are not given here.
    """
    reopened = reopen(path, best=best, model=model, eval_data=eval_data, trust_code=trust_code)
    config, eval_data = reopened.config, reopened.eval_data
    target = choose_device(device, config.precision)
    wrapped = FeatureModel(reopened.model, optional=True).to(target)
    if len(eval_data) == 0:
        raise ValueError("eval_data: got an empty dataset, expected at least one sample")
    count = measure_shapes(wrapped, first_images(eval_data)).classes
    confusion = torch.zeros((count, count), dtype=torch.long)
    loader = eval_loader(eval_data, config.data, target)
    values = evaluate(wrapped, loader, target, config.precision, confusion=confusion)
    return EvalResult(
        accuracy=values["accuracy"],
        top5=values["top5"],
        loss=values["eval_loss"],
        confusion=confusion,
        classes=class_names(eval_data, count),
        parameters=count_parameters(reopened.model),
        samples=len(eval_data),
        step=reopened.checkpoint.manifest["step"],
        path=reopened.checkpoint.path,
    )


def hardest(result: EvalResult, count: int = 5) -> list[str]:
    """The classes with the lowest accuracy and the most frequent confusions, a line each."""
    known = [
        (accuracy, name) for name, accuracy in zip(result.classes, result.per_class(), strict=True) if accuracy < 1
    ]
    wrong = result.confusion.clone().fill_diagonal_(0)
    most, places = wrong.flatten().topk(min(count, wrong.numel()))
    confusions = [
        f"{result.classes[place // len(wrong)]} as {result.classes[place % len(wrong)]} {number}"
        for number, place in zip(most.tolist(), places.tolist(), strict=True)
        if number > 0
    ]
    lines = []
    if known:
        lines.append(
            "lowest accuracy: " + ", ".join(f"{name} {accuracy:.3f}" for accuracy, name in sorted(known)[:count])
        )
    if confusions:
        lines.append("most confused: " + ", ".join(confusions))
    return lines


def class_names(dataset: Any, count: int) -> list[str]:
    """The names of ``count`` classes: the dataset's, if it has as many, else their numbers."""
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and len(names) == count:
        return [str(name) for name in names]
    return [str(number) for number in range(count)]
