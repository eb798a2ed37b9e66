"""Recipes: functions that return the config of a run. ``fastkd train NAME`` runs one, every field a flag."""

from __future__ import annotations

from collections.abc import Callable

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.optim import OptimConfig
from fastkd.trainer.recipes import cifar as recipes_cifar
from fastkd.trainer.recipes import imagenet as recipes_imagenet


def digits_teacher() -> TrainConfig:
    """A convolutional teacher (24 k parameters) on all 1,400 training digits."""
    return TrainConfig(
        student=ModelConfig(name="fastkd.trainer.models.small:SmallConvNet", options={"width": 16, "depth": 3}),
        data=DataConfig(name="digits", batch_size=128),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.1, warmup_epochs=1),
        epochs=20,
        run_dir="runs/digits_teacher",
    )


def digits_scratch() -> TrainConfig:
    """A small student (0.4 k parameters) on 200 labelled digits, without a teacher."""
    return TrainConfig(
        student=ModelConfig(name="fastkd.trainer.models.small:SmallConvNet", options={"width": 4, "depth": 2}),
        data=DataConfig(name="digits", labelled=200, batch_size=50),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.1, warmup_epochs=1),
        epochs=40,
        run_dir="runs/digits_scratch",
    )


def digits() -> TrainConfig:
    """The same student distilled by DCD + KD from the teacher of ``digits_teacher``."""
    return TrainConfig(
        student=ModelConfig(name="fastkd.trainer.models.small:SmallConvNet", options={"width": 4, "depth": 2}),
        teacher=ModelConfig(
            name="fastkd.trainer.models.small:SmallConvNet",
            options={"width": 16, "depth": 3},
            weights="runs/digits_teacher",
        ),
        data=DataConfig(name="digits", labelled=200, batch_size=50),
        objective=ObjectiveConfig(terms="dcd+kd"),
        optim=OptimConfig(lr=0.1, warmup_epochs=1),
        epochs=40,
        run_dir="runs/digits",
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "digits": digits,
    "digits-scratch": digits_scratch,
    "digits-teacher": digits_teacher,
    "cifar100-resnet32x4": recipes_cifar.resnet32x4,
    "cifar100-wrn-40-2": recipes_cifar.wrn_40_2,
    "cifar100-dcd-kd": recipes_cifar.dcd_kd,
    "cifar100-ckd": recipes_cifar.ckd,
    "cifar100-pckd": recipes_cifar.pckd,
    "imagenet-r34-r18-dcd": recipes_imagenet.resnet34_resnet18_dcd,
    "imagenet-r34-r18-dcd-kd": recipes_imagenet.resnet34_resnet18_dcd_kd,
    "imagenet-r50-r18-dcd": recipes_imagenet.resnet50_resnet18_dcd,
    "imagenet-r50-r18-dcd-kd": recipes_imagenet.resnet50_resnet18_dcd_kd,
    "imagenet-r50-mv2-dcd": recipes_imagenet.resnet50_mobilenetv2_dcd,
    "imagenet-r50-mv2-dcd-kd": recipes_imagenet.resnet50_mobilenetv2_dcd_kd,
    "imagenet-r34-r18-ckd": recipes_imagenet.resnet34_resnet18_ckd,
    "imagenet-r34-r18-pckd": recipes_imagenet.resnet34_resnet18_pckd,
    "imagenet-large-batch": recipes_imagenet.large_batch,
}


def summary(name: str) -> str:
    """The first line of a recipe's docstring."""
    return (RECIPES[name].__doc__ or "").strip().splitlines()[0]
