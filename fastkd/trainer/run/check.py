"""Checks before the first step: whether data, student and teacher fit together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.labels import labels_of
from fastkd.trainer.data.loader import GlobalBatches
from fastkd.trainer.data.options import TransformOptions
from fastkd.trainer.models.features import FeatureModel, evaluating
from fastkd.trainer.models.weights import Origin, origin_of_file
from fastkd.trainer.run.distiller import Distiller
from fastkd.trainer.run.evaluate import evaluate
from fastkd.trainer.run.ranks import Ranks
from fastkd.trainer.run.saved.checkpoint import find_checkpoint, read_manifest
from fastkd.trainer.text import printable
from fastkd.validate import NO_LABEL


def check_fit(
    config: TrainConfig, distiller: Distiller, images: Tensor, batches: GlobalBatches, train_set: Any, eval_set: Any
) -> int:
    """The number of the student's outputs.

    Raises ValueError, before anything is written, for what would end the run in its first or last batch.

    That is a label that the student has no class for, as far as the datasets expose their labels, a chunk of one row,
    of which batch norm would get a single value per channel, or a batch of one row for a term that needs two. Called
    before ``prepare``, with images that the student can take.
    """
    last = batches.rows(len(batches) - 1)
    rows = last // batches.world_size  # the fewest of any rank
    for name, term in distiller.objective.terms.items():
        if getattr(term, "needs_two_rows", False) and (last if getattr(term, "spans_ranks", False) else rows) < 2:
            raise ValueError(
                f"data.batch_size: got {batches.batch_size} for {batches.length} samples with drop_last="
                f"{batches.drop_last} on {batches.world_size} rank(s), whose smallest batch has one row; the term "
                f"{name!r} needs at least two"
            )
    rows //= min(config.chunks, rows)
    classes, single = _classes_and_single_values(distiller.student, images[:1])
    if rows == 1 and single and not config.sync_batchnorm:
        raise ValueError(
            f"data.batch_size: got {batches.batch_size} for {batches.length} samples with chunks={config.chunks} and "
            f"drop_last={batches.drop_last} on {batches.world_size} rank(s), whose smallest chunk has one row, of "
            f"which batch norm ({single[0]!r} of the student) gets one value per channel; expected at least two rows"
        )
    labelled = {"train_data": train_set, "eval_data": eval_set}
    if "ce" not in distiller.objective.weights:
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
    return classes


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


def range_of_labels(dataset: Any) -> tuple[int, int] | None:
    """The smallest and the largest label; None where labels are not exposed, or are changed when they are read."""
    whole = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    if getattr(whole, "target_transform", None) is not None:
        return None
    try:
        labels = labels_of(dataset)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None
    if labels.ndim != 1 or labels.numel() == 0 or labels.is_floating_point():
        return None
    return int(labels.min()), int(labels.max())


def origin_of(weights: str | Path) -> Origin:
    """What the weights in a file, a checkpoint or a run were trained with, as far as it says."""
    weights = Path(weights)
    if not weights.is_dir():
        return origin_of_file(weights)
    manifest = read_manifest(find_checkpoint(weights))
    return Origin(manifest.get("classes"), input_of(manifest))


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


def check_teacher(
    distiller: Distiller, config: TrainConfig, loader: Any, device: torch.device, precision: str, ranks: Ranks
) -> float | None:
    """The teacher's top-1 accuracy on ``loader``'s data, computed as in training; None without a teacher.

    Raises ValueError on every rank when the accuracy is below ``config.teacher.min_accuracy``. The usual reasons are
    other weights, other classes, or another normalisation than the data's.
    """
    if distiller.teacher is None:
        return None
    floor = None if config.teacher is None else config.teacher.min_accuracy
    accuracy = evaluate(distiller.teacher, loader, device, precision, ranks)["accuracy"]
    if floor is not None and accuracy < floor:
        raise ValueError(
            f"teacher.min_accuracy: the teacher reaches {accuracy:.4f} on the evaluation set, expected at least "
            f"{floor}; are its weights those of these classes, in this order, and of this normalization?"
        )
    if ranks.is_main and not config.quiet:
        print(f"teacher accuracy {accuracy:.4f}" + (f" (at least {floor})" if floor is not None else ""))
    return accuracy


def report_broken(dataset: Any, tell: Callable[[str], None]) -> None:
    """Tell how many images this rank could not read, if there are any and the dataset counts them."""
    broken = getattr(dataset, "broken", 0)
    if broken:
        tell(f"{broken} of {len(dataset)} training images cannot be read; others took their places")
