"""The folder of a run: opened for a new run or a resumed one, and written to while it trains."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from fastkd.trainer.callbacks import TENSORBOARD, Callback, Outcome
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.files import refuse_link, replace_text
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.rng import rng_state
from fastkd.trainer.run.meter import check_finite
from fastkd.trainer.run.saved.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    list_checkpoints,
    read_checkpoint,
)
from fastkd.trainer.run.saved.config_file import CONFIG, write_config
from fastkd.trainer.run.saved.log import CLASSES, METRICS, RUN, SPEED, RunLog
from fastkd.trainer.run.state import Identity, RunState, check_resumable
from fastkd.trainer.strict_json import read_json_object


@dataclass(frozen=True)
class OpenRun:
    """A run folder that is this run's alone: no other process trains in it.

    ``path``: None if nothing is written. ``checkpoint``: the one to go on from, None to start. ``checkpoints``: the
    folder to write them to, on rank 0 only.
    """

    path: Path | None
    checkpoint: Checkpoint | None
    checkpoints: CheckpointFolder | None


@contextmanager
def open_run(config: TrainConfig, ranks: Ranks) -> Iterator[OpenRun]:
    """Lock the run folder, before anything in it is read, until the context ends; find the checkpoint to go on from.

    A run that writes nothing leaves no folder behind.

    Raises CheckpointError when another process has the folder, when a new run would fall on an old one, when there is
    nothing (or something else) to resume, or when the run would write through a link.
    """
    if config.run_dir is None:
        yield OpenRun(None, None, None)
        return
    folder = Path(config.run_dir)
    with ExitStack() as opened:
        owned: list[CheckpointFolder] = []

        def start() -> Checkpoint | None:
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"run_dir: got {config.run_dir!r}, which is a file, expected a folder")
            if config.resume and not folder.exists():
                raise CheckpointError(f"{folder}: holds no run to resume")
            owned.append(CheckpointFolder(folder / CHECKPOINTS, config.keep))
            opened.callback(owned[0].close)
            return _find_start(config, folder)

        checkpoint = ranks.on_main(start)
        yield OpenRun(folder, checkpoint, owned[0] if owned else None)


def _find_start(config: TrainConfig, folder: Path) -> Checkpoint | None:
    """The checkpoint to go on from, None to start."""
    for name in (METRICS, SPEED, TENSORBOARD):
        refuse_link(folder / name)
    found = list_checkpoints(folder / CHECKPOINTS)
    metrics = folder / METRICS
    there = bool(found) or metrics.exists() or (folder / RUN).exists()
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and _begun_by_this_job(folder / RUN)
    if not config.resume and not (there and (config.resume_or_start or restarted)):
        if there:
            raise CheckpointError(f"{folder}: already holds a run; resume it (--resume) or choose another --run-dir")
        return None
    if found:
        try:
            checkpoint = read_checkpoint(found[-1])
        except CheckpointError as error:
            if len(found) == 1:
                raise
            raise CheckpointError(f"{error}; remove {found[-1]} to resume from {found[-2].name}") from error
        check_resumable(checkpoint, config.to_dict())
        size = metrics.stat().st_size if metrics.exists() else 0
        if size < checkpoint.state["metrics_bytes"]:
            raise CheckpointError(
                f"{metrics}: has {size} bytes, expected at least the {checkpoint.state['metrics_bytes']} "
                f"that {checkpoint.path.name} had seen"
            )
        return checkpoint
    if not (folder / RUN).exists():
        raise CheckpointError(f"{folder}: holds no run to resume")
    if metrics.exists() and metrics.stat().st_size:
        raise CheckpointError(f"{folder}: has {METRICS} but no checkpoint; resuming would start over and lose it")
    return None


def _begun_by_this_job(file: Path) -> bool:
    """Whether the torchrun job that restarts now is the one that began the run."""
    try:
        return read_json_object(file)["torchrun"] == os.environ.get("TORCHELASTIC_RUN_ID")
    except (OSError, ValueError, KeyError):
        return False


class RunFolder:
    """Writes a run's checkpoints, ``run.json``, ``classes.json`` and records, tells its callbacks, prints its lines.

    All ranks call its methods in the same order, and rank 0 writes. ``newest`` is the path of the last checkpoint.
    """

    def __init__(
        self,
        opened: OpenRun,
        config: TrainConfig,
        identity: Identity,
        info: dict[str, Any],
        state: RunState,
        ranks: Ranks,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.path, self.identity, self.info = opened.path, identity, info
        self.state, self.ranks = state, ranks
        self.newest = None if opened.checkpoint is None else opened.checkpoint.path
        self._resumed_step = None if opened.checkpoint is None else state.progress.step
        self._checkpoints = opened.checkpoints
        with ExitStack() as closing:
            ranks.on_main(self._begin)
            self.log = RunLog(
                self.path if ranks.is_main else None,
                config,
                size=state.progress.metrics_bytes,
                step=state.progress.step,
                steps=info["steps"],
                quiet=config.quiet or not ranks.is_main,
                callbacks=callbacks if ranks.is_main else (),
            )
            closing.callback(self.log.close)
            # Tells the callbacks of a run that does not come to its end.
            closing.callback(lambda: self.log.end("failed", self.newest))
            self._closing = closing.pop_all()
        self._begun = time.perf_counter() - state.progress.seconds

    def __enter__(self) -> Self:
        try:
            self.ranks.on_main(lambda: self.log.start(self.info, self.state.progress.step))
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    @property
    def seconds(self) -> float:
        """How long the run has trained so far, in seconds of wall-clock; the time before a resume counts too."""
        return time.perf_counter() - self._begun

    def end(self, outcome: Outcome) -> None:
        """Tell the callbacks that the run has ended. What one of them raised is raised here, on every rank."""
        self.ranks.on_main(lambda: self.log.end(outcome, self.newest))

    def write_classes(self, per_class: dict[str, Any]) -> None:
        """Write ``classes.json``: what the evaluation at this step found for every class, as the task filled it."""
        if self.path is None or not self.ranks.is_main or not per_class:
            return
        replace_text(self.path / CLASSES, json.dumps({"step": self.state.progress.step, **per_class}))

    def save(self, accuracy: float | None = None) -> None:
        """Write a checkpoint of the present state; ``accuracy`` if it was evaluated.

        Raises NonFiniteLossError when a weight is not finite, CheckpointError when the file cannot be written.
        """
        if self.path is None:
            return
        self.state.meter.flush()
        generators = self.ranks.gather(rng_state(self.state.step.device))
        self.newest = self.ranks.on_main(lambda: self._write(generators, accuracy))

    def _begin(self) -> None:
        if self.path is not None:
            assert self._checkpoints is not None
            self._checkpoints.begin()
            replace_text(self.path / RUN, json.dumps(self.info, indent=1) + "\n")
            write_config(self.path / CONFIG, self.info["config"], self.identity.given_as_objects)

    def _write(self, generators: list[dict[str, Any]], accuracy: float | None) -> Path:
        assert self._checkpoints is not None
        state, progress = self.state, self.state.progress
        check_finite(state.distiller, progress.step)
        progress.metrics_bytes = self.log.sync()
        progress.seconds = self.seconds
        details = {
            "epoch": progress.epoch,
            "accuracy": accuracy,
            "teacher_accuracy": self.info["teacher_accuracy"],
            "threads": torch.get_num_threads(),
            "versions": self.info["versions"],
        }
        return self._checkpoints.save(
            progress.step,
            state.modules,
            state=vars(state.saved_state(generators)),
            manifest={**vars(self.identity), **details},
            again=progress.step == self._resumed_step,
        )
