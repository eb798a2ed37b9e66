"""A task says what is distilled: how a batch looks, what rows it gives, which loss is the student's own, what counts.

The loop, the terms and the run's folder are the same for every task. A term reads rows (``ModelOutput``) and does not
know whether a row is an image, a region of an image or a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.loader import GlobalBatches, collate
from fastkd.trainer.imports import import_object
from fastkd.trainer.models.features import FeatureModel, ModelOutput
from fastkd.trainer.objective.objective import Objective
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.signals import StopRequest


@dataclass
class Rows:
    """What the objective reads of a batch: the outputs of both models, the rows' labels, and the terms' additions.

    ``weight``: this rank's W n / N where n and N do not count samples. None leaves it to the loop.
    """

    student: ModelOutput
    teacher: ModelOutput | None
    labels: Tensor
    additions: dict[str, Any] = field(default_factory=dict)
    weight: float | None = None


class Task:
    """The base of all tasks; ``fastkd.trainer.tasks.classification`` is the default one.

    ``metric`` is the key of ``evaluate``'s values by which checkpoints are compared. ``title`` is what people call it.
    ``teacher`` is the run's frozen teacher, once the models are built.
    """

    metric: ClassVar[str]
    title: ClassVar[str]
    teacher: nn.Module | None = None

    def __init__(self, config: TrainConfig) -> None:
        """Raises ValueError for settings that do not go with the task."""
        self.config = config

    def collate(self, samples: Any) -> Any:
        """The batch of these samples, or the batch that the dataset has made of them."""
        return collate(samples)

    def rows(self, batch: Any) -> int:
        """The number of samples in the batch."""
        raise NotImplementedError

    def to(self, batch: Any, device: torch.device) -> Any:
        """The training batch on ``device``, ready for ``forward``."""
        return tree_map(lambda part: part.to(device, non_blocking=True) if isinstance(part, Tensor) else part, batch)

    def sample(self, dataset: Any) -> Any:
        """A small input of the models, by which they are measured."""
        raise NotImplementedError

    def outputs(self, train_set: Any, eval_set: Any) -> int | None:
        """``num_classes`` of the models for which the config does not say it. None leaves it to their builders."""
        raise NotImplementedError

    def wrap(self, model: nn.Module, names: dict[str, Any], optional: bool) -> FeatureModel:
        """``model`` as the run takes it. ``names`` and ``optional`` are arguments of ``FeatureModel``."""
        return FeatureModel(model, **names, optional=optional)

    def check_fit(
        self,
        student: FeatureModel,
        objective: Objective,
        sample: Any,
        batches: GlobalBatches,
        train_set: Any,
        eval_set: Any,
        *,
        resumed: bool,
    ) -> None:
        """Raise ValueError for what would end the run later: called once, before anything is written."""

    def forward(
        self,
        student: Callable[[Any], ModelOutput],
        teach: Callable[[Any], ModelOutput | None],
        batch: Any,
        wanted: Collection[str],
    ) -> Rows:
        """The rows of a batch. ``teach`` gives the teacher's output, without a graph; None without a teacher.

        ``wanted`` are the names of the additions that the terms read.
        """
        raise NotImplementedError

    def evaluate(
        self,
        model: nn.Module,
        loader: Any,
        device: torch.device,
        precision: str,
        ranks: Ranks,
        *,
        stop: StopRequest | None = None,
        per_class: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """The values of the evaluation set, the same on every rank, ``metric`` among them. All are in [0, 1] or nats.

        ``per_class`` gets what ``classes.json`` holds: ``classes``, and a list for each class beside it. Once ``stop``
        is requested the remaining batches are left out, and the values mean nothing.
        """
        raise NotImplementedError


# Named and not imported, so that a run does not load what other tasks need.
TASKS = {
    "classification": "fastkd.trainer.tasks.classification:Classification",
    "detection": "fastkd.trainer.tasks.detection.task:Detection",
    "embeddings": "fastkd.trainer.tasks.embeddings:Embeddings",
}


def find_task(config: TrainConfig) -> Task:
    """The task that ``config.task`` names. ValueError for settings that do not go with it."""
    task: Task = import_object(TASKS[config.task], "task")(config)
    return task
