"""Classification: a row is an image, cross-entropy is the student's own loss, accuracy is what counts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.datasets import names_of_classes
from fastkd.trainer.data.labels import range_of_labels
from fastkd.trainer.data.loader import GlobalBatches, first_images
from fastkd.trainer.data.mix import BatchMix
from fastkd.trainer.models.features import FeatureModel, ModelOutput, evaluating
from fastkd.trainer.objective.objective import Objective
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.signals import StopRequest
from fastkd.trainer.tasks.base import Rows, Task
from fastkd.trainer.tasks.evaluate import evaluate
from fastkd.validate import NO_LABEL


class Classification(Task):
    """Images with a class each. A batch is (images, labels), with the terms' additions as a third part."""

    metric = "accuracy"
    title = "accuracy"
    classes = 0  # the student's outputs, from ``check_fit`` on
    mix: BatchMix | None = None

    def rows(self, batch: Any) -> int:
        return len(batch[1])

    def to(self, batch: Any, device: torch.device) -> Any:
        images, labels, *more = super().to(batch, device)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        return images, labels, *more

    def sample(self, dataset: Any) -> Tensor:
        return first_images(dataset)

    def outputs(self, train_set: Any, eval_set: Any) -> int | None:
        """As many as the training set names, else the largest label and one. None if it tells neither."""
        names = names_of_classes(train_set)
        if names is not None:
            return len(names)
        largest = [found[1] for found in map(range_of_labels, (train_set, eval_set)) if found is not None]
        return max(largest) + 1 if largest and max(largest) > 0 else None

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
        check_rows(objective, batches)
        self.classes = check_chunks(self.config, student, sample, batches)
        check_label_range(self.config, self.classes, objective, train_set, eval_set)
        if not resumed:
            check_outputs(self.classes, names_of_classes(train_set))
        self.mix = BatchMix(self.config.data, self.classes)

    def forward(
        self,
        student: Callable[[Any], ModelOutput],
        teach: Callable[[Any], ModelOutput | None],
        batch: Any,
        wanted: Collection[str],
    ) -> Rows:
        return rows_of_images(student, teach, batch, wanted)

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
        counts = None if per_class is None else torch.zeros((2, self.classes), dtype=torch.long, device=device)
        values = evaluate(model, loader, device, precision, ranks, stop=stop, per_class=counts)
        if per_class is not None and counts is not None:
            right, samples = counts.tolist()
            names = names_of_classes(loader.dataset)
            known = names if names is not None and len(names) == self.classes else map(str, range(self.classes))
            per_class |= {"classes": list(known), "right": right, "samples": samples}
        return values


def rows_of_images(
    student: Callable[[Any], ModelOutput],
    teach: Callable[[Any], ModelOutput | None],
    batch: Any,
    wanted: Collection[str],
) -> Rows:
    """The rows of a batch (images, labels, additions); the arguments are those of ``Task.forward``."""
    images, labels, *more = batch
    additions = dict(more[0]) if more else {}
    teacher, strong = teach(images), additions.get("strong")
    if strong is not None and "strong_teacher" in wanted:
        additions["strong_teacher"] = teach(strong)
    output = student(images)
    if strong is not None:
        additions["strong"] = student(strong)
    return Rows(output, teacher, labels, additions)


def check_rows(objective: Objective, batches: GlobalBatches) -> None:
    """Raise ValueError for a batch of one row if a term needs two."""
    last = batches.rows(len(batches) - 1)
    fewest = last // batches.world_size
    for name, term in objective.terms.items():
        if getattr(term, "needs_two_rows", False) and (last if getattr(term, "spans_ranks", False) else fewest) < 2:
            raise ValueError(
                f"data.batch_size: got {batches.batch_size} for {batches.length} samples with drop_last="
                f"{batches.drop_last} on {batches.world_size} rank(s), whose smallest batch has one row; the term "
                f"{name!r} needs at least two"
            )


def check_chunks(config: TrainConfig, student: FeatureModel, images: Tensor, batches: GlobalBatches) -> int:
    """The number of the student's outputs.

    Raises ValueError for a chunk of one row, of which batch norm would get a single value per channel. Called with
    images that the student can take, before its input, its precision and its layout are those of the run.
    """
    rows = batches.rows(len(batches) - 1) // batches.world_size  # the fewest of any rank
    rows //= min(config.chunks, rows)
    classes, single = _classes_and_single_values(student, images[:1])
    if rows == 1 and single and not config.sync_batchnorm:
        raise ValueError(
            f"data.batch_size: got {batches.batch_size} for {batches.length} samples with chunks={config.chunks} and "
            f"drop_last={batches.drop_last} on {batches.world_size} rank(s), whose smallest chunk has one row, of "
            f"which batch norm ({single[0]!r} of the student) gets one value per channel; expected at least two rows"
        )
    return classes


def check_label_range(config: TrainConfig, classes: int, objective: Objective, train_set: Any, eval_set: Any) -> None:
    """Raise ValueError for a label that the student has no class for, as far as the datasets expose their labels."""
    labelled = {"train_data": train_set, "eval_data": eval_set}
    if "ce" not in objective.weights:
        del labelled["train_data"]  # without cross-entropy its labels may mean anything
    for name, dataset in labelled.items():
        smallest, largest = range_of_labels(dataset) or (0, None)
        if smallest == NO_LABEL and name == "train_data" and not config.data.unlabelled:
            raise ValueError(
                f"data.unlabelled: got False, but {name} has the label {NO_LABEL}, which stands for none; expected True"
            )
        if largest is not None and largest >= classes:
            raise ValueError(
                f"student.num_classes: the student has {classes} classes, but {name} has the label {largest}; expected "
                f"labels in [0, {classes}), or --student.num-classes {largest + 1}"
            )


def check_outputs(outputs: int, names: list[str] | None) -> None:
    """Raise ValueError for a student with more outputs than there are classes, where the data name their classes."""
    if names is not None and outputs > len(names):
        raise ValueError(
            f"student.num_classes: the student has {outputs} outputs and the data have {len(names)} classes, expected "
            f"as many; give --student.num-classes {len(names)}"
        )


def _classes_and_single_values(model: FeatureModel, image: Tensor) -> tuple[int, list[str]]:
    """The logits' width, and the names of the batch norms that get one value per channel of one image [1, C, H, W]."""
    single: list[str] = []

    def look(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs and inputs[0].numel() == inputs[0].shape[1]:
            single.append(name)

    hooks = [
        module.register_forward_pre_hook(partial(look, name))
        for name, module in model.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    ]
    try:
        with evaluating(model):
            logits = model(image.to(next(model.parameters(), image).device)).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits.shape[1], single
