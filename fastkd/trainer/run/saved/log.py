"""The records of a run: ``metrics.jsonl``, ``speed.jsonl``, callbacks, a progress bar, printed lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastkd.trainer.callbacks import Callback, Outcome
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.files import open_to_append, writing
from fastkd.trainer.text import printable

METRICS, SPEED, RUN, CLASSES = "metrics.jsonl", "speed.jsonl", "run.json", "classes.json"
SEED_FOLDER = "seed-"  # beginning of the names of the folders in which `--seeds 0 1 2` keeps its runs
FAILED = 1000  # above the number of every signal


class RunLog:
    """Writes the records of one run, and tells the callbacks. ``folder=None`` writes no file.

    ``metrics.jsonl`` has one object per line: ``{"kind": "step", "step", "epoch", "lr", "loss", ...}`` every
    ``log_every`` steps and ``{"kind": "epoch", ...}`` after each epoch. All values are before weights except ``loss``.
    ``speed.jsonl`` has one line per epoch with what differs between two equal runs: images per second, and the fraction
    of the time in which the run waited for data.

    ``failed`` is 0, and ``FAILED`` once a callback has raised in ``record`` or ``speed``. The run must then save and
    ``end``, which raises that exception.
    """

    def __init__(
        self,
        folder: Path | None,
        config: TrainConfig,
        *,
        size: int,
        step: int,
        steps: int,
        quiet: bool,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """``size``: how many bytes of ``metrics.jsonl`` the checkpoint at ``step`` had seen; later ones are cut off."""
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._size = size
        self._progress: Progress | None = None
        self._console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._task = TaskID(0)
        self._epochs = config.epochs
        self._rate = math.nan
        self._callbacks = callbacks
        self._started: list[Callback] = []
        self._failure: Exception | None = None
        if folder is not None:
            self._file = open_to_append(folder / METRICS)
        if config.progress and not quiet and self._console.is_terminal:
            columns = (
                *(TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
                TextColumn("{task.description}"),
            )
            self._progress = Progress(*columns, console=self._console, refresh_per_second=4, transient=True)
            shown = f"1/{config.epochs}"
            self._task = self._progress.add_task("", total=steps, completed=step, epoch=shown)
            self._progress.start()

    @property
    def failed(self) -> int:
        return FAILED if self._failure is not None else 0

    def print(self, line: str) -> None:
        """Show a line to the user, above the progress bar."""
        self._console.print("\n".join(map(printable, line.split("\n"))), markup=False)

    def start(self, info: dict[str, Any], step: int) -> None:
        """Tell the callbacks that the run starts; what they raise ends the run before its first step.

        Only then are the records that followed the checkpoint cut off: the run goes on from there.
        """
        for callback in self._callbacks:
            callback.on_start(info, self._folder, step)
            self._started.append(callback)
        if self._file is not None:
            self._file.truncate(self._size)
            self._file.seek(self._size)  # else its position, which is what is saved as its size, stays at the old end

    def record(self, kind: str, step: int, values: dict[str, float], images_per_second: float | None = None) -> None:
        """Write one line of ``metrics.jsonl`` and tell the callbacks; the speed is for the progress bar alone."""
        if self._file is not None and self._folder is not None:
            with writing(self._folder / METRICS):
                self._file.write(_line(kind, step, values))
        self._tell(kind, step, values)
        if self._progress is not None:
            self._rate = images_per_second or self._rate
            shown = f"{self._rate:,.0f} images/s  loss {values.get('loss', math.nan):.4f}  lr {values['lr']:.4g}"
            epoch = f"{values['epoch'] + 1:.0f}/{self._epochs}"
            self._progress.update(self._task, completed=step, description=shown, epoch=epoch)

    def speed(self, step: int, values: dict[str, float]) -> None:
        """Write one line of ``speed.jsonl``, for the epoch that ended, or was broken off, at ``step``."""
        if self._folder is not None:
            with writing(self._folder / SPEED), open_to_append(self._folder / SPEED) as file:
                file.write(_line("speed", step, values))
        self._tell("speed", step, values)

    def _tell(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Call ``on_record`` of all callbacks, none of them after one has raised."""
        try:
            for callback in () if self.failed else self._started:
                callback.on_record(kind, step, dict(values))
        except Exception as error:
            self._failure = error

    def sync(self) -> int:
        """Make ``metrics.jsonl`` durable, and return its size in bytes."""
        if self._file is None or self._folder is None:
            return 0
        with writing(self._folder / METRICS):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()

    def end(self, outcome: Outcome, checkpoint: Path | None) -> None:
        """Tell every callback that the run has ended, and raise what the first of them raised before or now."""
        while self._started:
            try:
                self._started.pop(0).on_end(outcome, checkpoint)
            except Exception as error:
                self._failure = self._failure or error
        if self._failure is not None:
            failure, self._failure = self._failure, None
            if checkpoint is not None:
                failure.add_note(f"A callback raised this; the run is saved and can be resumed: {checkpoint}")
            raise failure

    def close(self) -> None:
        """Stop the bar and close the file; may be called twice."""
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            with suppress(OSError):  # a full disk, of which ``record`` and ``sync`` told
                self._file.close()


def _line(kind: str, step: int, values: dict[str, float]) -> bytes:
    # JSON has no NaN or infinity (the gradient norm of a step that the loss scaling skips).
    plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"kind": kind, "step": step, **plain}).encode() + b"\n"
