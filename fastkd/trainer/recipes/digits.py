"""Recipes for scikit-learn's digits: a teacher, and a small student from scratch or distilled from it."""

from __future__ import annotations

from dataclasses import replace

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.optim import OptimConfig

NET = "fastkd.trainer.models.small:SmallConvNet"
TEACHER = ModelConfig(name=NET, options={"width": 16, "depth": 3})


def digits_teacher() -> TrainConfig:
    """A convolutional teacher (24 k parameters) on all 1,400 training digits."""
    return TrainConfig(
        student=TEACHER,
        data=DataConfig(name="digits", batch_size=128),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.1, warmup_epochs=1),
        epochs=20,
        run_dir="runs/digits_teacher",
    )


def digits_scratch() -> TrainConfig:
    """A small student (0.4 k parameters) on 200 labelled digits, without a teacher."""
    return TrainConfig(
        student=ModelConfig(name=NET, options={"width": 4, "depth": 2}),
        data=DataConfig(name="digits", labelled=200, batch_size=50),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.1, warmup_epochs=1),
        epochs=40,
        run_dir="runs/digits_scratch",
    )


def digits() -> TrainConfig:
    """The student of digits-scratch, distilled by DCD + KD from the teacher of digits-teacher."""
    return replace(
        digits_scratch(),
        teacher=replace(TEACHER, weights="runs/digits_teacher", taps=("features.5", "features")),  # two, as the student
        objective=ObjectiveConfig(terms="dcd+kd"),
        run_dir="runs/digits",
    )
