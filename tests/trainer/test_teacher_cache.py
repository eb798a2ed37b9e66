"""A teacher that is run once: the cache is written, and a run that reads it is the run with the teacher."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastkd.cli import main
from fastkd.trainer import (
    CheckpointError,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
    load_weights,
    train,
)
from fastkd.trainer.commands import cache_teacher as writing
from fastkd.trainer.commands.cache_teacher import cache_teacher
from fastkd.trainer.data.loader import SeededFetch
from fastkd.trainer.models.small import SmallConvNet
from fastkd.trainer.run import step as stepping
from fastkd.trainer.run.saved.config_file import write_config
from fastkd.trainer.run.teacher_cache import TeacherCache, packed
from tests.helpers.images import write_classes
from tests.helpers.trainer_runs import lines, one_thread, same  # noqa: F401

NET = "fastkd.trainer.models.small:SmallConvNet"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a teacher, and its float32 cache."""
    folder = tmp_path_factory.mktemp("cache")
    write_classes(folder / "data" / "train", ("a", "b", "c"), 7)
    write_classes(folder / "data" / "val", ("a", "b", "c"), 1)
    torch.manual_seed(5)
    save_file(SmallConvNet(3, 3, width=6).state_dict(), folder / "teacher.safetensors")
    cache_teacher(config_in(folder), folder / "cache", dtype="float32")
    return folder


def config_in(folder: Path, cache: str | Path | None = None, **changes: Any) -> TrainConfig:
    """Two epochs of four batches of 5 of 21 augmented images, whose one that is left over belongs to no batch."""
    options = {"num_classes": 3, "options": {"in_channels": 3, "width": 6}}
    weights = str(folder / "teacher.safetensors")
    config = TrainConfig(
        student=ModelConfig(name=NET, num_classes=3, options={"in_channels": 3, "width": 4}),
        teacher=ModelConfig(name=NET, weights=weights, cache=None if cache is None else str(cache), **options),
        data=DataConfig(name="images", options={"root": str(folder / "data"), "image_size": 16}, batch_size=5),
        objective=ObjectiveConfig(terms="kd+dcd"),
        optim=OptimConfig(lr=0.05),
        epochs=2,
        device="cpu",
        tensorboard=False,
        quiet=True,
        max_skipped=0,
    )
    return replace(config, **changes)


def weights_of(config: TrainConfig, **given: Any) -> dict[str, Any]:
    return train(config, **given).distiller.state_dict()


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The teacher's body is not run in training."""
    whole = stepping.TrainStep.__call__

    def step(self: Any, *given: Any) -> Any:
        def forbidden(images: Any) -> Any:
            raise AssertionError("the teacher is run")

        monkeypatch.setattr(self.distiller.teacher, "forward", forbidden)
        return whole(self, *given)

    monkeypatch.setattr(stepping.TrainStep, "__call__", step)
    yield


@pytest.mark.parametrize("changes", [{}, {"chunks": 2, "data.num_workers": 2}])
def test_a_run_that_reads_a_float32_cache_has_the_bits_of_the_run_with_its_teacher(place, changes):
    workers = changes.pop("data.num_workers", 0)
    config = config_in(place, **changes)
    config = replace(config, data=replace(config.data, num_workers=workers))
    cached = replace(config, teacher=replace(config.teacher, cache=str(place / "cache")))
    assert same(weights_of(config), weights_of(cached))
