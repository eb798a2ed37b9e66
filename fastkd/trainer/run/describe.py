"""Describes a run for ``run.json`` and the first lines of the log: models, settings, hardware and versions."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.models.build import ModelConfig, count_parameters
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.objective.config import describe_terms
from fastkd.trainer.optim import Schedule
from fastkd.trainer.run.distiller import Distiller
from fastkd.trainer.run.saved.checkpoint import Checkpoint
from fastkd.trainer.run.state import Identity
from fastkd.trainer.tasks.base import Task


def versions() -> dict[str, str]:
    """The versions of Python, fastkd and the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in ("fastkd", "torch", "torchvision", "timm", "numpy", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def describe(
    config: TrainConfig,
    distiller: Distiller,
    device: torch.device,
    schedule: Schedule,
    eval_samples: int,
    identity: Identity,
    ranks: int,
    task: Task,
) -> dict[str, Any]:
    """The content of ``run.json``: everything that is needed to tell what a run was."""

    def model(role: str, model: FeatureModel, named: ModelConfig | None) -> dict[str, Any]:
        name = type(model.model).__name__
        if named is not None and role not in identity.given_as_objects:
            name = named.name
        return {
            "name": name,
            "classifier": model.classifier_name,
            "feature_map": None if model.map_source is None else model.map_source.layer,
            "taps": None if model.tap_sources is None else [tap.layer for tap in model.tap_sources.maps],
            "parameters": count_parameters(model.model),
        }

    return {
        "student": model("student", distiller.student, config.student),
        "teacher": None if distiller.teacher is None else model("teacher", distiller.teacher.model, config.teacher),
        "teacher_sha256": identity.teacher_sha256,
        "metric": task.metric,
        "classes": distiller.classes,
        "train_samples": identity.train_samples,
        "eval_samples": eval_samples,
        "global_batch": config.data.batch_size,
        "ranks": ranks,
        "steps": schedule.total,
        "learning_rate": schedule.rule,
        "loss_weights": distiller.objective.weights,
        "seed": config.seed,
        "precision": config.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": versions(),
        "torchrun": os.environ.get("TORCHELASTIC_RUN_ID"),
        "command": command_line(),
        "given_as_objects": identity.given_as_objects,
        "config": identity.config,
    }


def command_line() -> str:
    """The command that started this process, as a shell takes it."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", program.parent.name, *sys.argv[1:]])
    return shlex.join([program.name if program.suffix != ".py" else f"python {program}", *sys.argv[1:]])


def changes(
    checkpoint: Checkpoint, config: TrainConfig, schedule: Schedule, step: int, device: torch.device
) -> list[str]:
    """Lines about what a resumed run changes of what it computes. A warning for what may change its last bits."""
    threads = checkpoint.manifest.get("threads")  # absent from a checkpoint of an earlier version
    if device.type == "cpu" and threads not in (None, torch.get_num_threads()):
        warnings.warn(
            f"{checkpoint.path}: was written on {threads} thread(s), this process has {torch.get_num_threads()}: "
            f"the last bits may differ from an uninterrupted run's (OMP_NUM_THREADS={threads} keeps them)",
            RuntimeWarning,
            stacklevel=3,
        )
    lines = []
    before = checkpoint.manifest["config"]
    if before["epochs"] != config.epochs:
        batch = config.data.batch_size
        per_epoch = schedule.total // config.epochs
        old = Schedule(config.optim, steps_per_epoch=per_epoch, epochs=before["epochs"], global_batch=batch)
        now = f"; the next step has lr {schedule(step):.4g}" if step < schedule.total else ""
        last = f" (the last step had {old(step - 1):.4g})" if now and step else ""
        lines.append(
            f"epochs {before['epochs']} -> {config.epochs}: the learning rate follows the schedule of {config.epochs} "
            f"epochs from here on{now}{last}"
        )
    return lines


def header(info: dict[str, Any]) -> list[str]:
    """The lines a run prints before its first step."""
    student, teacher = info["student"], info["teacher"]
    lines = [f"student {student['name']} ({student['parameters']:,} parameters)"]
    if teacher is not None:
        lines.append(
            f"teacher {teacher['name']} ({teacher['parameters']:,} parameters) sha256 {info['teacher_sha256']}"
        )
    on_ranks = f" on {info['ranks']} ranks" if info["ranks"] > 1 else ""
    return [
        *lines,
        f"loss {describe_terms(info['loss_weights'])}",
        f"global batch {info['global_batch']}{on_ranks}, {info['train_samples']} training samples, "
        f"{info['steps']} steps",
        f"{info['learning_rate']}; {info['precision']} on {info['device']}; seed {info['seed']}",
        ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
    ]
