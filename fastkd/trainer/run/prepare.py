"""What is done to the models between building them and the first step: layout, precision, input, torch.compile."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.models.build import Normalization, check_normalization, trained_normalization
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.precision import DTYPES
from fastkd.trainer.run.distiller import Distiller
from fastkd.trainer.run.ranks import Ranks


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
