"""A run's folder and its training state: what a checkpoint holds, and how it is put back."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd.trainer.config import TrainConfig, differences
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.run.checkpoint import (
    EMA,
    LOSS,
    MANIFEST,
    STATE,
    STUDENT,
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    load_into,
    read_checkpoint,
)
from fastkd.trainer.run.distiller import Distiller
from fastkd.trainer.run.log import METRICS, RUN
from fastkd.trainer.run.meter import Meter
from fastkd.trainer.run.step import TrainStep

_PROGRESS = ("step", "epoch", "seconds", "history", "metrics_bytes", "loader")
_IDENTITY = ("train_samples", "labels_sha256", "teacher_sha256")


@dataclass
class TrainResult:
    """What ``train`` returns.

    ``accuracy``: top-1 on the evaluation set after the last epoch, in [0, 1]. ``history``: one dict per epoch (epoch,
    step, lr, the epoch's means of loss and terms, ``dcd/tau``, ``dcd/scale``, accuracy, top5, eval_loss). ``seconds``:
    wall-clock of training, resumed parts included. ``parameters``: of the student. ``path``: the last checkpoint, None
    without run_dir. ``distiller``: student, teacher and objective, in eval mode. ``deployed``: the model that was
    evaluated, the student or its moving average. ``resumed_from``: the step, None for a new run.
    ``already_finished``: there was nothing left to do. ``stopped_by``: the signal that ended the run early, else None.
    """

    accuracy: float
    history: list[dict[str, float]]
    seconds: float
    parameters: int
    path: Path | None
    distiller: Distiller
    deployed: FeatureModel
    resumed_from: int | None
    already_finished: bool
    stopped_by: signal.Signals | None = None


@dataclass
class Progress:
    """Where a run is: ``step`` optimiser steps done, ``epoch`` the one to go on with, ``history`` a record each."""

    step: int = 0
    epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    metrics_bytes: int = 0
    loader: dict[str, Any] | None = None


def open_run(config: TrainConfig) -> tuple[Path | None, Checkpoint | None]:
    """The run folder (None: nothing is written) and the checkpoint to go on from (None: start).

    Raises CheckpointError when a new run would fall on an old one, or when there is nothing (or something else) to
    resume.
    """
    if config.run_dir is None:
        return None, None
    folder = Path(config.run_dir)
    found = list_checkpoints(folder / "checkpoints")
    metrics = folder / METRICS
    there = bool(found) or metrics.exists() or (folder / RUN).exists()
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and _begun_by_this_job(folder / RUN)
    if not config.resume and not (there and (config.resume_or_start or restarted)):
        if there:
            raise CheckpointError(f"{folder}: already holds a run; resume it (resume=True) or choose another run_dir")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"run_dir: got {config.run_dir!r}, which is a file, expected a folder")
        # Made with its first file: a start that fails leaves nothing behind.
        return folder, None
    if found:
        try:
            checkpoint = read_checkpoint(found[-1])
        except CheckpointError as error:
            if len(found) == 1:
                raise
            raise CheckpointError(f"{error}; remove {found[-1]} to resume from {found[-2].name}") from error
        _check_complete(checkpoint)
        changed = differences(checkpoint.manifest["config"], config.to_dict())
        if changed:
            raise CheckpointError(f"{checkpoint.path}: belongs to another config ({'; '.join(changed)})")
        size = metrics.stat().st_size if metrics.exists() else 0
        if size < checkpoint.state["metrics_bytes"]:
            raise CheckpointError(
                f"{metrics}: has {size} bytes, expected at least the {checkpoint.state['metrics_bytes']} "
                f"that {checkpoint.path.name} had seen"
            )
        return folder, checkpoint
    if not (folder / RUN).exists():
        raise CheckpointError(f"{folder}: holds no run to resume")
    if metrics.exists() and metrics.stat().st_size:
        raise CheckpointError(f"{folder}: has {METRICS} but no checkpoint; resuming would start over and lose it")
    return folder, None


def _begun_by_this_job(file: Path) -> bool:
    """Whether the torchrun job that restarts now is the one that began the run."""
    try:
        return json.loads(file.read_bytes())["torchrun"] == os.environ.get("TORCHELASTIC_RUN_ID")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_complete(checkpoint: Checkpoint) -> None:
    """CheckpointError when the manifest or the state lacks what resuming reads."""
    state = checkpoint.state
    rng = state["rng"] if isinstance(state.get("rng"), dict) else {}
    for name, have, need in (
        (MANIFEST, checkpoint.manifest, {*_IDENTITY, "given_as_objects"}),
        (STATE, state, {*_PROGRESS, "meter", "optimizer", "scaler", "rng", "rng_of_other_ranks"}),
        (STATE, rng, {"torch", "cuda", "python", "numpy"}),
    ):
        if missing := sorted(need - have.keys()):
            raise CheckpointError(f"{checkpoint.path / name}: lacks {', '.join(missing)}")


def given_as_objects(**objects: Any) -> list[str]:
    """The names of the arguments that replaced what the config would build; the config does not describe those."""
    return [name for name, value in objects.items() if value is not None]


def check_same_run(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """CheckpointError when the data or the teacher are not those that the checkpoint was written with."""
    for key in _IDENTITY:
        if checkpoint.manifest[key] != identity[key]:
            raise CheckpointError(
                f"{checkpoint.path}: was written with {key}={checkpoint.manifest[key]}, this run has {identity[key]}"
            )
    before, now = ("data" in source["given_as_objects"] for source in (checkpoint.manifest, identity))
    if before != now:
        raise CheckpointError(
            f"{checkpoint.path}: its data {'was' if before else 'was not'} given as objects (train_data, eval_data), "
            f"that of this run {'is' if now else 'is not'}"
        )


def write_run_file(folder: Path, info: dict[str, Any]) -> None:
    """Write ``run.json`` in one piece."""
    temporary = folder / (RUN + ".tmp")
    temporary.write_text(json.dumps(info, indent=1) + "\n")
    os.replace(temporary, folder / RUN)


def pack(
    progress: Progress,
    meter: Meter,
    step: TrainStep,
    generators: list[dict[str, Any]],
) -> dict[str, Any]:
    """The training state in plain types and tensors, which ``torch.load(weights_only=True)`` accepts.

    ``generators``: ``rng_state`` of every rank.
    """
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "seconds": progress.seconds,
        "history": progress.history,
        "metrics_bytes": progress.metrics_bytes,
        "loader": progress.loader,
        "meter": {"sums": dict(meter.sums), "count": meter.count, "skipped": meter.skipped},
        **step.state_dict(),
        "rng": generators[0],
        "rng_of_other_ranks": generators[1:],
    }


def unpack(
    checkpoint: Checkpoint,
    distiller: Distiller,
    meter: Meter,
    step: TrainStep,
) -> Progress:
    """Put a checkpoint back, all but the generators (``restore_rng``). CheckpointError when it does not fit."""
    state = checkpoint.state
    load_into(distiller.student.model, checkpoint.student, checkpoint.path / STUDENT)
    load_into(distiller.objective, checkpoint.loss, checkpoint.path / LOSS)
    if step.ema is not None:
        if checkpoint.ema is None:
            raise CheckpointError(f"{checkpoint.path}: has no {EMA}, expected the moving average of the student")
        load_into(step.ema.module, checkpoint.ema, checkpoint.path / EMA)
    try:
        step.load_state_dict(state)
        meter.sums, meter.count = dict(state["meter"]["sums"]), state["meter"]["count"]
        meter.skipped = state["meter"]["skipped"]
        return Progress(**{name: state[name] for name in _PROGRESS})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.path / STATE}: is not a training state ({error!r})") from error
