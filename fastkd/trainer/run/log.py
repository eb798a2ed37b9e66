"""The records of a run: ``metrics.jsonl``, ``speed.jsonl``, TensorBoard curves, a progress bar, printed lines."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.extras import is_missing

METRICS, SPEED, RUN = "metrics.jsonl", "speed.jsonl", "run.json"


class RunLog:
    """Writes the records of one run. ``folder=None`` writes no file.

    ``metrics.jsonl`` has one object per line: ``{"kind": "step", "step", "epoch", "lr", "loss", ...}`` every
    ``log_every`` steps and ``{"kind": "epoch", ...}`` after each epoch. All values are before weights except ``loss``.
    ``speed.jsonl`` has one line per epoch with what differs between two equal runs: images per second, and the fraction
    of the time in which the run waited for data.
    """

    def __init__(
        self, folder: Path | None, config: TrainConfig, *, size: int, step: int, steps: int, quiet: bool
    ) -> None:
        """``size``: how many bytes of ``metrics.jsonl`` the checkpoint at ``step`` had seen; later ones are cut off."""
        self._folder = folder
        self._file = None
        self._board: Any = None
        self._progress: Progress | None = None
        self._console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._task = TaskID(0)
        if folder is not None:
            self._file = (folder / METRICS).open("ab")
            self._file.truncate(size)
            self._file.seek(size)  # else its position, which is what is saved as its size, stays at the old end
            if config.tensorboard and is_missing("tensorboard"):
                self.print("tensorboard is not installed: no curves for it")
            elif config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if config.progress and not quiet and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, refresh_per_second=4, transient=True)
            self._task = self._progress.add_task("training", total=steps, completed=step)
            self._progress.start()

    def print(self, line: str) -> None:
        """Show a line to the user, above the progress bar."""
        self._console.print(line, markup=False)

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one line of ``metrics.jsonl``, and its numbers as TensorBoard scalars ``kind/name``."""
        if self._file is not None:
            # JSON has no NaN or infinity (the gradient norm of a step that the loss scaling skips).
            plain = {name: None if not math.isfinite(value) else value for name, value in values.items()}
            self._file.write(json.dumps({"kind": kind, "step": step, **plain}).encode() + b"\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=f"loss {values.get('loss', math.nan):.4f}")

    def speed(self, step: int, values: dict[str, float]) -> None:
        """Write one line of ``speed.jsonl``, for the epoch that ended, or was broken off, at ``step``."""
        if self._folder is not None:
            with (self._folder / SPEED).open("a") as file:
                file.write(json.dumps({"kind": "speed", "step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"speed/{name}", value, step)

    def sync(self) -> int:
        """Make ``metrics.jsonl`` durable, and return its size in bytes."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Flush and close everything; may be called twice."""
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            self._file.close()
