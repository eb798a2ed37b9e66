"""Recipes: functions that return the config of a run. ``fastkd train NAME`` runs one, every field a flag."""

from __future__ import annotations

from collections.abc import Callable

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data import DataConfig
from fastkd.trainer.models import ModelConfig
from fastkd.trainer.objective import ObjectiveConfig
from fastkd.trainer.optim import OptimConfig


def digits_teacher() -> TrainConfig:
    """A convolutional teacher (24 k parameters) on all 1,400 training digits."""
    return TrainConfig(
        student=ModelConfig(name="fastkd.trainer.nets:SmallConvNet", options={"width": 16, "depth": 3}),
        data=DataConfig(name="digits", batch_size=128),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.1, warmup_epochs=1),
        epochs=20,
        run_dir="runs/digits_teacher",
    )


def digits_scratch() -> TrainConfig:
    """A small student (0.4 k parameters) on 200 labelled digits, without a teacher."""
    return TrainConfig(
        student=ModelConfig(name="fastkd.trainer.nets:SmallConvNet", options={"width": 4, "depth": 2}),
        data=DataConfig(name="digits", labelled=200, batch_size=50),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.1, warmup_epochs=1),
        epochs=40,
        run_dir="runs/digits_scratch",
    )


def digits() -> TrainConfig:
    """The same student distilled by DCD + KD from the teacher of ``digits_teacher``."""
    return TrainConfig(
        student=ModelConfig(name="fastkd.trainer.nets:SmallConvNet", options={"width": 4, "depth": 2}),
        teacher=ModelConfig(
            name="fastkd.trainer.nets:SmallConvNet",
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
}
