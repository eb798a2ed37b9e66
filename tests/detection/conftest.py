"""What the tests of runs that distil a detector share: a few images, a teacher, and a configuration."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastkd.trainer import TrainConfig, train
from fastkd.trainer.data.coco.shapes import make_shapes
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from tests.detection.test_detectors import SMALL

OPTIONS = {name: value for name, value in SMALL.items() if name not in ("num_classes", "norm")}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few shapes in COCO's format."""
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, train=12, val=4)
    return folder


def configured(root: Path, run_dir: Path, terms: str, **changes: Any) -> TrainConfig:
    """A short, quiet run of a small detector, with ``changes``."""
    model = ModelConfig(name="faster-rcnn:small", options=OPTIONS)
    values: dict[str, Any] = {
        "task": "detection",
        "student": model,
        "data": DataConfig(
            name="coco", options={"root": str(root), "short_side": (64,)}, batch_size=4, eval_batch_size=4
        ),
        "objective": ObjectiveConfig(terms=terms),
        "epochs": 2,
        "eval_every": 2,
        "run_dir": str(run_dir),
        "quiet": True,
        "tensorboard": False,
        "log_every": 1,
    }
    return TrainConfig(**{**values, **changes})


@pytest.fixture(scope="session")
def teacher(root: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Trained for a step by its own losses."""
    config = configured(root, tmp_path_factory.mktemp("teacher"), "detector", epochs=1, seed=1)
    wide = ModelConfig(name="faster-rcnn:small", options={**OPTIONS, "width": 8, "fpn_channels": 12, "head_width": 24})
    train(replace(config, student=wide))
    return replace(wide, weights=config.run_dir)
