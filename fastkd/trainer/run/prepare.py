"""The steps before training: the data opened, the models built, checked against the data and made ready."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.additions import Additions
from fastkd.trainer.data.datasets import build_datasets, choose_data, names_of_classes, without_download
from fastkd.trainer.data.labels import labels_hash, normalization_of
from fastkd.trainer.data.loader import (
    AUGMENTATION,
    GlobalBatches,
    draws_nothing,
    eval_loader,
    train_loader,
)
from fastkd.trainer.models.build import Normalization, check_normalization, trained_normalization
from fastkd.trainer.objective.objective import additions_of
from fastkd.trainer.objective.terms.base import TermFunction
from fastkd.trainer.precision import DTYPES
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.run.check import check_classes, origin_of, outputs_of
from fastkd.trainer.run.distiller import (
    Distiller,
    build_distiller,
    load_paraphraser,
    takes_classes,
    weights_hash,
)
from fastkd.trainer.run.state import Identity
from fastkd.trainer.tasks.base import Task


@dataclass
class RunData:
    """The data of a run: both datasets, this rank's loaders, and the task's sample for the models.

    ``set_epoch`` tells ``loader`` the epoch, and the batch to begin with, before each pass.
    """

    train_set: Any
    eval_set: Any
    loader: DataLoader[Any]
    set_epoch: Callable[[int, int], None]
    eval_loader: DataLoader[Any]
    sample: Any

    @property
    def batches(self) -> GlobalBatches:
        """Which samples are in which batch of this rank."""
        assert isinstance(self.loader.batch_sampler, GlobalBatches)
        return self.loader.batch_sampler


def open_data(
    config: TrainConfig,
    task: Task,
    train_data: Any,
    eval_data: Any,
    device: torch.device,
    ranks: Ranks,
    terms: Mapping[str, nn.Module | TermFunction] | None = None,
) -> RunData:
    """The given datasets, or the configured ones, with their loaders, whose batches hold what the terms read."""
    if config.data.options.get("download") and ranks.world_size > 1:  # by one rank alone; then they all read it
        ranks.on_main(lambda: build_datasets(config.data) and None)
        config = replace(config, data=without_download(config.data))
    train_set, eval_set = choose_data(config.data, train_data, eval_data)
    place = (ranks.rank, ranks.world_size)
    names, crd = additions_of(config.objective, terms), config.objective.crd
    additions = Additions(names, train_set, crd.negatives, crd.mode) if names else None
    loader, set_epoch = train_loader(train_set, config.data, config.seed, device, *place, additions, task.collate)
    evaluation = eval_loader(eval_set, config.data, device, *place, task.collate)
    return RunData(train_set, eval_set, loader, set_epoch, evaluation, task.sample(train_set))


def with_classes(
    config: TrainConfig, task: Task, train_set: Any, eval_set: Any, saved: dict[str, Any] | None
) -> TrainConfig:
    """The config with what the data say: ``num_classes``, for models of whose classes it says nothing, and the number
    of samples, for CRD's memories.

    A resumed run, whose ``saved`` config is given, has the models that it began with. Left as they are: models of
    others that have no argument ``num_classes``, and teachers with published weights.
    """
    config = with_samples(config, len(train_set))
    classes = task.outputs(train_set, eval_set)
    for role in ("student", "teacher"):
        model: Any = getattr(config, role)
        if model is None or model.num_classes is not None or "num_classes" in model.options:
            continue
        if saved is not None:
            chosen = (saved.get(role) or {}).get("num_classes")
        elif classes == 0 and (model.pretrained or model.weights):
            chosen = outputs_of(model.weights)  # an encoder may be a classifier's
        else:
            chosen = classes if takes_classes(model) and not (role == "teacher" and model.pretrained) else None
        config = replace(config, **{role: replace(model, num_classes=chosen)})
    return config


def with_samples(config: TrainConfig, samples: int) -> TrainConfig:
    """The config with the number of training samples, if a term has to know it."""
    if "crd" not in config.objective.weights:
        return config
    crd = replace(config.objective.crd, samples=samples)
    return replace(config, objective=replace(config.objective, crd=crd))


def build_models(
    config: TrainConfig,
    task: Task,
    data: RunData,
    device: torch.device,
    ranks: Ranks,
    *,
    resumed: bool,
    student: nn.Module | None,
    teacher: nn.Module | None,
    terms: Mapping[str, nn.Module | TermFunction] | None,
) -> tuple[Distiller, list[str]]:
    """The distiller on ``device``, checked against the data and ready for the first step; and lines for the user."""
    told: list[str] = []
    distiller = build_distiller(
        config,
        data.sample,
        normalization_of(data.train_set),
        task=task,
        student=student,
        teacher=teacher,
        terms=terms,
        tell=told.append,
    ).to(device)
    task.teacher = distiller.teacher
    if not resumed:
        told += load_paraphraser(distiller, config.objective.ft.paraphraser)
    sets = (data.train_set, data.eval_set)
    task.check_fit(distiller.student, distiller.objective, data.sample, data.batches, *sets, resumed=resumed)
    note = getattr(data.train_set, "note", None)
    if teacher is None and config.teacher is not None and config.teacher.weights is not None:
        origin = origin_of(config.teacher.weights)
        if distiller.classes:
            check_classes(config.teacher.weights, origin, names_of_classes(data.train_set))
        mean, std = origin.input.get("mean"), origin.input.get("std")
        if config.teacher.normalization is None and mean and std and normalization_of(data.train_set) is not None:
            config = replace(config, teacher=replace(config.teacher, normalization=(mean, std)))
        size = origin.input.get("image_size")
        if size and isinstance(data.sample, Tensor) and size != data.sample.shape[-1]:
            told.append(f"teacher: was trained on images of {size} pixels, the data's have {data.sample.shape[-1]}")
    if distiller.teacher is not None and config.teacher is not None and config.teacher.fold:
        told.append(distiller.teacher.fold(distiller.teacher.model.normalized(data.sample.to(device))))
    lines = prepare(distiller, config, device, ranks, normalization_of(data.train_set))
    return distiller, [*told, *([note] if note else []), *lines]


def identify(config: TrainConfig, data: RunData, distiller: Distiller, objects: dict[str, Any]) -> Identity:
    """The run's identity; ``objects`` are the arguments of ``train`` that may replace what the config would build."""
    normalization = normalization_of(data.train_set)
    return Identity(
        config=config.to_dict(),
        given_as_objects=[name for name, value in objects.items() if value is not None],
        train_samples=len(data.train_set),
        labels_sha256=labels_hash(data.train_set),
        teacher_sha256=None if distiller.teacher is None else weights_hash(distiller.teacher.model.model),
        classes=names_of_classes(data.train_set),
        normalization=None if normalization is None else [list(map(float, values)) for values in normalization],
        augmentation=None if draws_nothing(data.train_set) else AUGMENTATION,
    )


def prepare(
    distiller: Distiller,
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks,
    data_normalization: Normalization | None = None,
) -> list[str]:
    """Give both models the precision, layout and input that ``config`` asks for; returns lines for the user.

    Called once, on ``device``, before the optimiser and DistributedDataParallel see the parameters. State dicts keep
    their names. ``data_normalization`` is how the images are normalised, or how bytes are to be for the student. It is
    None if the data do not say.

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
        nn.SyncBatchNorm.convert_sync_batchnorm(distiller.objective)  # those of connectors
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
        models.append(frozen.computing)
        if config.teacher is not None:
            lines += _normalize_teacher(distiller, config, data_normalization)
            if config.teacher.dtype != "fp32":
                for part in (frozen.model, frozen.computing):
                    part.model.to(DTYPES[config.teacher.dtype])
                lines.append(f"teacher in {config.teacher.dtype}")
    for model in models:
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            model.channels_last = True
        if config.compile:
            model.compile()
    chosen = [name for name in ("channels_last", "compile", "sync_batchnorm") if getattr(config, name)]
    return lines + ([f"models: {', '.join(chosen)}"] if chosen else [])


def _normalize_teacher(distiller: Distiller, config: TrainConfig, data: Normalization | None) -> list[str]:
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
    for part in (distiller.teacher.model, distiller.teacher.computing):
        part.take_images("bytes" if distiller.student.takes_bytes else data, own)
    shown = [f"mean {_numbers(mean)}, std {_numbers(std)}" for mean, std in (own, data)]
    return [f"teacher input: normalised with its own {shown[0]}; the student's with the data's {shown[1]}"]


def _same(left: Normalization, right: Normalization) -> bool:
    return all(tuple(map(float, a)) == tuple(map(float, b)) for a, b in zip(left, right, strict=True))


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
