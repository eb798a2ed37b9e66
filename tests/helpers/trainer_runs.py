"""What the trainer's tests share: small networks with dropout, noisy data, a small config, and a run to kill."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastkd.trainer import (
    DataConfig,
    Distiller,
    FeatureModel,
    ModelConfig,
    ModelShapes,
    Objective,
    ObjectiveConfig,
    OptimConfig,
    TensorImages,
    TrainConfig,
)
from fastkd.trainer.models.small import SmallConvNet
from fastkd.trainer.run.saved.checkpoint import _manifest_hash, file_hash

ROOT = Path(__file__).parents[2]


class DropoutNet(nn.Module):
    """Dropout and batch norm: their generator and their buffers must survive a resume."""

    def __init__(self, width: int = 12, dropout: float = 0.2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.dropout(self.body(images)))


class NoisyImages(TensorImages):
    """An augmentation that draws from the three global generators, one sample at a time."""

    def __getitems__(self, indices: Any) -> Any:
        return [self[int(index)] for index in indices]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        shift = 0.05 * random.gauss(0, 1) + 0.05 * float(np.random.standard_normal())  # noqa: NPY002
        return image + 0.1 * torch.randn(image.shape) + shift, label


def noisy_data(samples: int = 52) -> tuple[NoisyImages, TensorImages]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(samples) % 4
    centres = torch.randn(4, 1, 4, 4, generator=generator)
    images = centres[labels] + 0.5 * torch.randn(samples, 1, 4, 4, generator=generator)
    return NoisyImages(images, labels), TensorImages(images[:20], labels[:20])


def networks(student: int = 4, teacher: int = 6) -> tuple[SmallConvNet, SmallConvNet]:
    torch.manual_seed(0)
    return SmallConvNet(num_classes=4, width=student), SmallConvNet(num_classes=4, width=teacher)


def convolutional(**changes: Any) -> dict[str, Any]:
    """What ``train`` takes for two small convolutional networks."""
    student, teacher = networks()
    train_data, eval_data = noisy_data()
    return {"student": student, "teacher": teacher, "train_data": train_data, "eval_data": eval_data, **changes}


def write_teacher(path: Path) -> str:
    """A teacher's weights; which ones does not matter to any test."""
    torch.manual_seed(11)
    save_file(DropoutNet(width=24).state_dict(), path)
    return str(path)


def tiny_config(folder: Path, **changes: Any) -> TrainConfig:
    """26 steps in 2 epochs of CE + KD + DCD with momentum, clipping, warm-up and cosine."""
    teacher = folder / "teacher.safetensors"
    if not teacher.exists():
        write_teacher(teacher)
    config = TrainConfig(
        student=ModelConfig(name="tests.helpers.trainer_runs:DropoutNet"),
        teacher=ModelConfig(name="tests.helpers.trainer_runs:DropoutNet", options={"width": 24}, weights=str(teacher)),
        data=DataConfig(name="tests.helpers.trainer_runs:noisy_data", batch_size=4),
        objective=ObjectiveConfig(terms="dcd+kd"),
        optim=OptimConfig(lr=0.05, warmup_epochs=0.5, clip_norm=1.0),
        epochs=2,
        device="cpu",
        run_dir=str(folder / "run"),
        log_every=1,
        tensorboard=False,
        progress=False,
        quiet=True,
        max_skipped=0,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits must not depend on what else the machine does; tiny networks are faster so, too. Autouse where imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shapes(student: int, teacher: int) -> tuple[ModelShapes, ModelShapes]:
    """Those of models with features of these widths and four classes."""
    return ModelShapes(features=student, classes=4), ModelShapes(features=teacher, classes=4)


def distiller(terms: str = "dcd+kd") -> Distiller:
    torch.manual_seed(0)
    objective = Objective(ObjectiveConfig(terms=terms), *shapes(12, 24))
    return Distiller(FeatureModel(DropoutNet()), FeatureModel(DropoutNet(width=24)), objective)


def batch(samples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 1, 4, 4, generator=generator), torch.arange(samples) % 4


def lines(run_dir: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def seal(checkpoint: Path, change: Callable[[dict[str, Any]], Any] = lambda body: None) -> None:
    """Make the manifest agree with the files, after a change of it, as someone who forges a checkpoint would."""
    body = json.loads((checkpoint / "manifest.json").read_text())
    del body["sha256"]
    change(body)
    for name, entry in body["files"].items():
        entry.update(bytes=(checkpoint / name).stat().st_size, sha256=file_hash(checkpoint / name))
    (checkpoint / "manifest.json").write_text(json.dumps({**body, "sha256": _manifest_hash(body)}))


def run_python(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` in this repository, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def same(left: Any, right: Any) -> bool:
    """Equal in every bit, through nested dicts and lists."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
