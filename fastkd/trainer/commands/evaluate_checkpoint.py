"""``fastkd eval``: the accuracy of a checkpoint, whose model and data are rebuilt from its own config."""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import torch
import tyro
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

    Attributes:
        accuracy, top5: in [0, 1]. With fewer than five classes, ``top5`` is 1.
        loss: the mean cross-entropy in nats.
        confusion: [C, C], the number of samples of the row's class that were taken for the column's class.
        classes: the names of the classes, or their numbers where the data have no names.
        parameters: of the student.
        samples: of the evaluation data.
        step, path: of the checkpoint.

    Example:
        >>> result = evaluate_checkpoint("runs/digits")  # doctest: +SKIP
        >>> weakest = min(zip(result.per_class(), result.classes))  # doctest: +SKIP
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
        """The accuracy on the samples of each class. NaN for a class without any."""
        return (self.confusion.diagonal() / self.confusion.sum(1)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. A class without samples has the accuracy None."""
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
    """Evaluate the student of a checkpoint, or of a run folder's newest (or ``best``) checkpoint.

    Model and data are rebuilt from the config in the checkpoint, unless they are given. ``trust_code`` allows that
    config to import and call any ``package.module:callable``. The models of timm, torchvision and fastkd and the data
    sets of fastkd do not need it.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or it needs ``trust_code``; or its student or data were
            given to ``train`` as objects, which no config names, and are not given here.

    Example:
        >>> accuracy = evaluate_checkpoint("runs/digits").accuracy  # doctest: +SKIP
        >>> best = evaluate_checkpoint("runs/mine", model=MyNet(), eval_data=my_test_set)  # doctest: +SKIP
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
    """At most two lines: the ``count`` classes with the lowest accuracy, and the most frequent confusions."""
    names = result.classes
    lowest = sorted((accuracy, name) for name, accuracy in zip(names, result.per_class(), strict=True) if accuracy < 1)
    wrong = result.confusion.clone().fill_diagonal_(0)
    most, places = wrong.flatten().topk(min(count, wrong.numel()))
    found = {
        "lowest accuracy": [f"{name} {accuracy:.3f}" for accuracy, name in lowest[:count]],
        "most confused": [
            f"{names[place // len(wrong)]} as {names[place % len(wrong)]} {number}"
            for number, place in zip(most.tolist(), places.tolist(), strict=True)
            if number > 0
        ],
    }
    return [f"{title}: {', '.join(items)}" for title, items in found.items() if items]


def class_names(dataset: Any, count: int) -> list[str]:
    """The names of the ``count`` classes if the dataset has as many, else their numbers."""
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and len(names) == count:
        return [str(name) for name in names]
    return [str(number) for number in range(count)]


def eval_command(
    checkpoint: tyro.conf.Positional[str], device: str = "auto", trust_code: bool = False, json: str | None = None
) -> None:
    """Accuracy of a checkpoint, its model and data rebuilt from its own config.

    Args:
        checkpoint: a checkpoint folder, or a run folder for its newest one.
        device: auto, cpu, cuda, ...
        trust_code: allow the config in the checkpoint to import and call package.module:callable.
        json: a file to write everything to, the accuracy of every class and the confusion matrix included.
    """
    result = evaluate_checkpoint(checkpoint, device=device, trust_code=trust_code)
    print(
        f"{result.path}: step {result.step}, accuracy {result.accuracy:.4f}, top-5 {result.top5:.4f}, "
        f"loss {result.loss:.4f} on {result.samples} samples ({result.parameters:,} parameters)"
    )
    for line in hardest(result):
        print(line)
    if json is not None:
        Path(json).write_text(dumps(result.to_dict(), indent=1) + "\n")
