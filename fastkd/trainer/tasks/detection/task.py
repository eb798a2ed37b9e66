"""Detection: a row is a region of an image, a detector's own losses come first, the mean average precision counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from fastkd.trainer.batches import DetectionBatch, collate_detection
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.datasets import names_of_classes
from fastkd.trainer.data.loader import GlobalBatches, fetch
from fastkd.trainer.models.detection.model import DetectorModel
from fastkd.trainer.models.detection.output import DetectorOutput
from fastkd.trainer.models.features import FeatureModel, ModelOutput
from fastkd.trainer.objective.objective import Objective
from fastkd.trainer.objective.terms.registry import TERMS
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.signals import StopRequest
from fastkd.trainer.tasks.base import Rows, Task
from fastkd.trainer.tasks.detection.evaluate import evaluate


class Detection(Task):
    """Images with boxes. A batch is a ``DetectionBatch``; its rows are the regions that the student samples in it."""

    metric = "map"
    title = "mAP"

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        for setting, reason in _refused(config):
            raise ValueError(f"{setting} with the task 'detection': {reason}")

    def collate(self, samples: Any) -> DetectionBatch:
        return collate_detection(samples)

    def rows(self, batch: DetectionBatch) -> int:
        return len(batch)

    def to(self, batch: DetectionBatch, device: torch.device) -> DetectionBatch:
        return batch.to(device, non_blocking=True)

    def sample(self, dataset: Any) -> DetectionBatch:
        """The first two images."""
        samples = fetch(dataset, [0, 1 % len(dataset)])
        try:
            return collate_detection(samples)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(
                f"data.name: {self.config.data.name!r} does not give images with boxes ({error}), expected 'coco' or "
                "another set of DetectionSamples for the task 'detection'"
            ) from error

    def outputs(self, train_set: Any, eval_set: Any) -> int | None:
        """One for each class, and one for the background."""
        names = names_of_classes(train_set)
        return None if names is None else len(names) + 1

    def wrap(self, model: nn.Module, names: dict[str, Any], optional: bool) -> FeatureModel:
        return DetectorModel(model, **names, optional=optional)

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
        expected = self.outputs(train_set, eval_set)
        assert isinstance(student.classifier, nn.Linear)
        got = student.classifier.out_features
        if expected is not None and got != expected:
            raise ValueError(
                f"student.num_classes: got {got} for {expected - 1} classes of the data, expected {expected}, of which "
                "the first one is the background"
            )

    def forward(
        self,
        student: Callable[[Any], ModelOutput],
        teach: Callable[[Any], ModelOutput | None],
        batch: DetectionBatch,
        wanted: Collection[str],
    ) -> Rows:
        """The regions that ``detection.regions`` names, as the student sees them, and as the teacher does."""
        output = student(batch)
        assert isinstance(output, DetectorOutput)
        output, count = output.chosen(self.config.detection.regions)
        assert output.labels is not None
        return Rows(output, teach(output.regions), output.labels, weight=_weight(count))

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
        """COCO's average precision: see ``fastkd.trainer.tasks.detection.evaluate``."""
        return evaluate(model, loader, device, precision, ranks, stop=stop, per_class=per_class)


def _weight(regions: int) -> float:
    """W R_r / R: this rank's number of regions times the number of ranks, over the number of all regions."""
    ranks = Ranks.present()
    return ranks.weight(regions, max(ranks.total(regions), 1))


def _refused(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """The settings that do not go with detection, and why."""
    data, teacher = config.data, config.teacher
    for wrong, setting, reason in (
        (config.chunks > 1, f"chunks: got {config.chunks}", "regions are sampled in one pass of a batch; expected 1"),
        (config.compile, "compile: got True", "the number of boxes changes with every batch; expected False"),
        (data.mixup, f"data.mixup: got {data.mixup}", "boxes cannot be mixed; expected 0"),
        (data.cutmix, f"data.cutmix: got {data.cutmix}", "boxes cannot be mixed; expected 0"),
        (data.unlabelled, "data.unlabelled: got True", "without boxes no region has a label; expected False"),
        (
            data.labelled is not None,
            f"data.labelled: got {data.labelled}",
            "an image has more than one class to balance; expected None, or --data.options.limit N",
        ),
        (teacher is not None and teacher.fold, "teacher.fold: got True", "only classifiers are folded; expected False"),
    ):
        if wrong:
            yield setting, reason
    for name in config.objective.weights:
        term, setting = TERMS.get(name), f"objective.terms: got {name!r}"
        reads = getattr(term, "needs_maps", False)
        if hasattr(term, "extend_student") or (reads(config.objective) if callable(reads) else reads):
            yield setting, "it reads the last map of a classifier, which a region does not have"
        if getattr(term, "additions", ()):
            yield setting, "it reads the number or a second view of a sample, which a region does not have"
