"""Recipes for your own images: a folder with a folder for each class, and any model of timm or torchvision.

The settings are ours. They suit small data sets and most families of models, and are a place to begin.
"""

from __future__ import annotations

from dataclasses import replace

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.optim import OptimConfig


def images() -> TrainConfig:
    """Your own images (``--data.options.root DIR``) by cross-entropy: any model, given by ``--student.name``.

    DIR holds the folders train and val with a folder for each class in them, or directly a folder for each class. All
    settings are ours: AdamW with lr 1e-3, one epoch of warm-up and a cosine, 30 epochs, batch 32.
    """
    return TrainConfig(
        student=ModelConfig(name="timm:resnet18"),
        data=DataConfig(name="images", batch_size=32, eval_batch_size=64, num_workers=2),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.05, warmup_epochs=1),
        epochs=30,
        run_dir="runs/images",
    )


def images_kd() -> TrainConfig:
    """Your own images, distilled by KD from a teacher: ``--teacher.name NAME --teacher.weights RUN-OR-FILE``.

    Other methods: ``--objective.terms "dcd + kd"``. The settings are ours, and the same as in ``images``.
    """
    return replace(images(), objective=ObjectiveConfig(terms="kd"), run_dir="runs/images-kd")
