"""What is done to the models between building them and the first step: layout, precision, input, torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data import GlobalBatches, labels_of
from fastkd.trainer.distiller import Distiller
from fastkd.trainer.evaluation import DTYPES, evaluate
from fastkd.trainer.models import FeatureModel, Normalization, check_normalization, trained_normalization
from fastkd.trainer.ranks import Ranks


def prepare(
    distiller: Distiller,
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks,
    data_normalization: Normalization | None = None,
) -> list[str]:
    """Apply what ``config`` says of the models to ``distiller``, which is on ``device``; lines for the user.

    Called once, before the optimiser and DistributedDataParallel see the parameters. ``data_normalization``: that of
    the images, None if the data do not say. State dicts keep their names.

    Raises ValueError: ``sync_batchnorm`` without several ranks on CUDA; a teacher with a normalisation of its own on
    data that do not say theirs, or of another number of channels.
    """
    lines: list[str] = []
    student, frozen = distiller.student, distiller.teacher
    if config.sync_batchnorm:
        if ranks.world_size == 1 or device.type != "cuda":
            raise ValueError(
                f"sync_batchnorm: got True with {ranks.world_size} rank(s) on {device.type}, expected several on CUDA"
            )
        student.model = nn.SyncBatchNorm.convert_sync_batchnorm(student.model)
    if config.student is not None and ranks.is_main:
        own = trained_normalization(config.student, student.model)
        if own is not None and data_normalization is not None and not _same(own, data_normalization):
            warnings.warn(
                f"student: its weights were trained with normalization {own}, the data have {data_normalization}",
                RuntimeWarning,
                stacklevel=2,
            )
    models = [student]
    if frozen is not None:
        models.append(frozen.model)
        if config.teacher is not None:
            lines += _convert_input(distiller, config, data_normalization)
            if config.teacher.dtype != "fp32":
                frozen.model.to(DTYPES[config.teacher.dtype])
                lines.append(f"teacher in {config.teacher.dtype}")
    for model in models:
        _place(model, config)
    chosen = [name for name in ("channels_last", "compile", "sync_batchnorm") if getattr(config, name)]
    return lines + ([f"models: {', '.join(chosen)}"] if chosen else [])


def _place(model: FeatureModel, config: TrainConfig) -> None:
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.channels_last = True
    if config.compile:
        model.compile()


def _convert_input(distiller: Distiller, config: TrainConfig, data: Normalization | None) -> list[str]:
    """Give the teacher its own normalisation where it differs from the data's."""
    assert distiller.teacher is not None
    assert config.teacher is not None
    own = trained_normalization(config.teacher, distiller.teacher.model.model)
    if own is None or (data is not None and _same(own, data)):
        return []
    if data is None:
        raise ValueError(
            f"teacher.normalization: its weights were trained with {own}, but the data do not say how they are "
            "normalised, expected an attribute 'normalization' (means, standard deviations) of the dataset"
        )
    check_normalization("data.normalization", data)
    if len(own[0]) != len(data[0]):
        raise ValueError(
            f"teacher.normalization: got {len(own[0])} channels, expected {len(data[0])}, as the data have"
        )
    distiller.teacher.convert_input(data, own)
    shown = [f"mean {_numbers(mean)}, std {_numbers(std)}" for mean, std in (data, own)]
    return [f"teacher input: the data's normalization ({shown[0]}) is converted to its own ({shown[1]})"]


def _same(left: Normalization, right: Normalization) -> bool:
    return all(tuple(map(float, a)) == tuple(map(float, b)) for a, b in zip(left, right, strict=True))


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def check_fit(
    config: TrainConfig, distiller: Distiller, images: Tensor, batches: GlobalBatches, train_set: Any, eval_set: Any
) -> None:
    """Raise ValueError, before anything is written, for what would end the run in its first or last batch.

    Labels that the student has no class for, as far as the datasets expose theirs; a chunk of one row, of which batch
    norm gets a single value per channel. Called before ``prepare``, with images that the student can take.
    """
    rows = batches.rows(len(batches) - 1) // batches.world_size  # the fewest of any rank
    rows //= min(config.chunks, rows)
    classes, single = _classes_and_single_values(distiller.student, images[:1])
    if rows == 1 and single and not config.sync_batchnorm:
        raise ValueError(
            f"data.batch_size: got {batches.batch_size} for {batches.length} samples with chunks={config.chunks} and "
            f"drop_last={batches.drop_last} on {batches.world_size} rank(s), whose smallest chunk has one row, of "
            f"which batch norm ({single[0]!r} of the student) gets one value per channel; expected at least two rows"
        )
    # Without cross-entropy the labels of the training set may mean anything.
    for name, dataset in (("train_data", train_set), ("eval_data", eval_set)):
        largest = _largest_label(dataset) if name == "eval_data" or "ce" in distiller.objective.weights else None
        if largest is not None and largest >= classes:
            raise ValueError(
                f"student.num_classes: the student has {classes} classes, but {name} has the label {largest}; expected "
                f"labels in [0, {classes})"
            )


def _classes_and_single_values(model: FeatureModel, image: Tensor) -> tuple[int, list[str]]:
    """The logits' width, and the names of the batch norms that get one value per channel of one image [1, C, H, W]."""
    single: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs and inputs[0].numel() == inputs[0].shape[1]:
                single.append(name)

        return look

    modes = [(module, module.training) for module in model.modules()]
    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    ]
    try:
        with torch.no_grad():
            logits = model.eval()(image.to(next(model.parameters(), image).device)).logits
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return logits.shape[1], single


def _largest_label(dataset: Any) -> int | None:
    """None for a dataset that does not expose its labels, or changes them on the way."""
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
    return int(labels.max())


def check_teacher(
    distiller: Distiller, config: TrainConfig, loader: Any, device: torch.device, precision: str, ranks: Ranks
) -> float | None:
    """The teacher's top-1 accuracy on ``loader``'s data, computed as in training; None where no floor asks for it.

    Raises ValueError on every rank when it is below ``config.teacher.min_accuracy``: other weights, other classes or
    another normalisation than the data's are the usual reasons.
    """
    if distiller.teacher is None or config.teacher is None or config.teacher.min_accuracy is None:
        return None
    floor = config.teacher.min_accuracy
    accuracy = evaluate(distiller.teacher, loader, device, precision, ranks)["accuracy"]
    if accuracy < floor:
        raise ValueError(
            f"teacher.min_accuracy: the teacher reaches {accuracy:.4f} on the evaluation set, expected at least "
            f"{floor}; are its weights those of these classes, in this order, and of this normalization?"
        )
    if ranks.is_main and not config.quiet:
        print(f"teacher accuracy {accuracy:.4f} (at least {floor})")
    return accuracy


def report_broken(dataset: Any, tell: Callable[[str], None]) -> None:
    """Tell how many images of a dataset that counts them could not be read, by this rank, if there are any."""
    broken = getattr(dataset, "broken", 0)
    if broken:
        tell(f"{broken} of {len(dataset)} training images cannot be read; others took their places")
