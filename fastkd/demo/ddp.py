"""``make demo-ddp``: the same distillation of the digits in one process and on two gloo ranks, side by side.

Both runs take the same steps, up to the rounding of float32 sums in another order. The student is therefore a fully
connected network without batch norm: with batch norm, every rank would normalise with its own rows.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.optim import OptimConfig
from fastkd.trainer.report.records import read_run
from fastkd.trainer.run.loop import train
from fastkd.trainer.run.saved.checkpoint import STUDENT, find_checkpoint

RANKS = 2
TOLERANCE = 1e-4  # of the trained weights, relative to their norm: float32 rounding, amplified over some hundred steps
TEACHER = ModelConfig(name="fastkd.trainer.models.small:MLP", options={"hidden": [128, 128]})


def teacher() -> TrainConfig:
    """A fully connected teacher on all training digits."""
    return TrainConfig(
        student=TEACHER,
        data=DataConfig(name="digits", batch_size=128),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.1, warmup_epochs=1),
        epochs=8,
        device="cpu",
        run_dir="teacher",
        tensorboard=False,
        progress=False,
        quiet=True,
    )


def student() -> TrainConfig:
    """A narrow student of that teacher by DCD + KD, with a global batch of 50."""
    return replace(
        teacher(),
        student=replace(TEACHER, options={"hidden": [16]}),
        teacher=replace(TEACHER, weights="teacher"),
        data=DataConfig(name="digits", batch_size=50),
        objective=ObjectiveConfig(terms="dcd+kd"),
        epochs=4,
        run_dir="ranks",
    )


def compare(folder: str) -> dict[str, Any]:
    """The histories of both runs, and the largest relative difference of a trained tensor."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with contextlib.chdir(folder):  # the recipes' folders are relative
        train(teacher())
        one = train(replace(student(), run_dir="one"))
        command = [*torchrun, "-m", "fastkd", "train", "fastkd.demo.ddp:student"]
        subprocess.run(command, check=True, timeout=600, env=environment)
        first, second = (load_file(find_checkpoint(name) / STUDENT) for name in ("one", "ranks"))
        epochs = read_run(Path("ranks"), "ranks").epochs
    difference = max(
        ((second[name] - value).norm() / value.norm().clamp_min(1e-12)).item() for name, value in first.items()
    )
    return {"one": one.history, "ranks": epochs, "difference": difference}


def main() -> int:
    """Train both and print the table. Returns 1 when they differ by more than the tolerance."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(folder)
    table = Table(title=f"Digits, DCD + KD, global batch 50: one process and {RANKS} gloo ranks")
    for column in ("epoch", "loss, one process", f"loss, {RANKS} ranks", "accuracy, one", f"accuracy, {RANKS} ranks"):
        table.add_column(column, justify="right")
    for one, other in zip(result["one"], result["ranks"], strict=True):
        values = (
            f"{record[key]:.{digits}f}" for key, digits in (("loss", 6), ("accuracy", 4)) for record in (one, other)
        )
        table.add_row(str(int(one["epoch"]) + 1), *values)
    matches = result["difference"] <= TOLERANCE
    console = Console()
    console.print(table)
    console.print(
        f"largest relative difference of a trained tensor: {result['difference']:.2g} "
        f"({'within' if matches else 'BEYOND'} the tolerance of {TOLERANCE:g} for float32)"
    )
    return 0 if matches else 1


if __name__ == "__main__":
    sys.exit(main())
