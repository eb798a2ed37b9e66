"""``make demo-ddp``: the same distillation of the digits in one process and on two gloo ranks, side by side.

Both runs take the same steps, up to the rounding of float32 sums in another order. The student is therefore a fully
connected network without batch norm: with batch norm, every rank would normalise with its own rows.
"""

from __future__ import annotations

import json
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
from fastkd.trainer.run.checkpoint import STUDENT
from fastkd.trainer.run.loop import train

RANKS = 2
TOLERANCE = 1e-4  # of the trained weights, relative to their norm: float32 rounding, amplified over some hundred steps
MLP = "fastkd.trainer.models.small:MLP"


def teacher_config(folder: str) -> TrainConfig:
    """A fully connected teacher on all training digits."""
    return TrainConfig(
        student=ModelConfig(name=MLP, options={"hidden": [128, 128]}),
        data=DataConfig(name="digits", batch_size=128),
        objective=ObjectiveConfig(terms="ce"),
        optim=OptimConfig(lr=0.1, warmup_epochs=1),
        epochs=15,
        device="cpu",
        run_dir=f"{folder}/teacher",
        tensorboard=False,
        progress=False,
        quiet=True,
    )


def student_config(folder: str, name: str) -> TrainConfig:
    """A narrow student of that teacher by DCD + KD, with a global batch of 50."""
    teacher = teacher_config(folder)
    assert teacher.student is not None
    return replace(
        teacher,
        student=ModelConfig(name=MLP, options={"hidden": [16]}),
        teacher=replace(teacher.student, weights=f"{folder}/teacher"),
        data=DataConfig(name="digits", batch_size=50),
        objective=ObjectiveConfig(terms="dcd+kd"),
        epochs=8,
        run_dir=f"{folder}/{name}",
    )


def run_on_ranks(config: TrainConfig, folder: str) -> None:
    """Train under torchrun, with one thread per rank."""
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "-m", "fastkd.demo.ddp", str(file)], check=True, timeout=600, env=environment)


def compare(folder: str) -> dict[str, Any]:
    """The histories of both runs, and the largest relative difference of a trained tensor."""
    train(teacher_config(folder))
    one = train(student_config(folder, "one"))
    run_on_ranks(student_config(folder, "ranks"), folder)
    other = Path(folder) / "ranks" / "checkpoints" / f"step-{int(one.history[-1]['step']):08d}"
    assert one.path is not None
    weights = [load_file(path / STUDENT) for path in (one.path, other)]
    difference = max(
        ((weights[1][name] - value).norm() / value.norm().clamp_min(1e-12)).item() for name, value in weights[0].items()
    )
    return {"one": one.history, "ranks": read_run(Path(folder) / "ranks", "ranks").epochs, "difference": difference}


def main() -> int:
    """Train both and print the table. Returns 1 when they differ by more than the tolerance."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:  # a rank, started by run_on_ranks
        train(TrainConfig.from_dict(json.loads(Path(sys.argv[1]).read_text())))
        return 0
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
