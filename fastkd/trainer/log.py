"""What a run leaves behind: ``run.json``, ``metrics.jsonl``, TensorBoard curves, a progress bar, printed lines."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.distiller import Distiller
from fastkd.trainer.models import FeatureModel, ModelConfig, count_parameters
from fastkd.trainer.optim import Schedule

METRICS, SPEED, RUN = "metrics.jsonl", "speed.jsonl", "run.json"


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the terms."""


class Meter:
    """Sums of the loss and its terms over an epoch, without a device synchronisation per step.

    ``add`` keeps the step's values on the device; ``flush`` moves all of them to the host in one transfer and adds them
    to ``sums`` in order. Steps whose loss, or gradient norm, is not finite were skipped: they are counted and reported,
    and more than ``max_skipped`` of them raise NonFiniteLossError.
    """

    def __init__(
        self,
        reduce: Callable[[Tensor], Tensor] = lambda values: values,
        *,
        max_skipped: int = 0,
        scaled: bool = False,
        report: Callable[[str], None] = print,
    ) -> None:
        """``reduce``: the mean over the ranks. ``scaled``: in fp16 a gradient that is not finite is how the loss scale
        is found, and does not count."""
        self.names: list[str] = []
        self.skipped = 0
        self.max_skipped = max_skipped
        self.report = report
        self._scaled = scaled
        self.sums: dict[str, float] = {}
        self.count = 0
        self.latest: dict[str, float] = {}
        self._pending: list[tuple[int, Tensor]] = []
        self._reduce = reduce

    def add(self, step: int, loss: Tensor, terms: dict[str, Tensor], norm: Tensor) -> None:
        """Take the values of ``step``, counted from 1. Checked at once on the CPU, elsewhere every 64 steps."""
        self.names = ["loss", *terms, "grad_norm"]
        values = torch.stack([value.detach().float() for value in (loss, *terms.values(), norm)])
        self._pending.append((step, values))
        if values.device.type == "cpu" or len(self._pending) >= 64:
            self.flush()

    def flush(self) -> None:
        """Bring the pending values to the host."""
        if not self._pending:
            return
        steps, pending = zip(*self._pending, strict=True)
        self._pending = []
        rows = self._reduce(torch.stack(pending)).tolist()
        for step, row in zip(steps, rows, strict=True):
            if not math.isfinite(row[0]) or not (self._scaled or math.isfinite(row[-1])):
                self._skip(step, row)
                continue
            for name, value in zip(self.names[:-1], row, strict=False):
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.count += 1
        self.latest = dict(zip(self.names, rows[-1], strict=True))

    def _skip(self, step: int, row: list[float]) -> None:
        shown = ", ".join(f"{name} = {value}" for name, value in zip(self.names, row, strict=True))
        what = "gradient" if math.isfinite(row[0]) else "loss"
        self.skipped += 1
        if self.skipped > self.max_skipped:
            before = f", after {self.max_skipped} that were skipped" if self.max_skipped else ""
            raise NonFiniteLossError(f"the {what} is not finite at step {step}{before}: {shown}")
        self.report(f"step {step} skipped, the {what} is not finite ({self.skipped} of {self.max_skipped}): {shown}")

    def means(self) -> dict[str, float]:
        """Mean of each value over the epoch's steps so far, without those that were skipped."""
        return {name: total / self.count for name, total in self.sums.items()}

    def reset(self) -> None:
        """Begin an epoch."""
        self.sums, self.count = {}, 0


def check_finite(distiller: Distiller, step: int) -> None:
    """NonFiniteLossError when a weight is not finite: a finite loss can have a gradient that is not."""
    for module in (distiller.student.model, distiller.objective):
        trained = {name for name, _ in module.named_parameters()}
        for name, tensor in module.state_dict().items():
            # A buffer may hold infinities for good, such as an attention mask.
            bad = ~tensor.isfinite() if name in trained else tensor.isnan()
            if tensor.is_floating_point() and bad.any():
                raise NonFiniteLossError(f"the weights are not finite after step {step}: {name}")


class Clock:
    """Images a second, and the share of the time in which the next batch was waited for."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._waited = 0.0
        self.images = 0

    def watch(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of ``loader``; the time that it takes to hand them out counts as waiting."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - asked
            yield batch

    def values(self) -> dict[str, float]:
        """``images_per_second`` and ``data_wait``, in [0, 1], since the beginning."""
        seconds = time.perf_counter() - self._begun
        return {"images_per_second": self.images / seconds, "data_wait": self._waited / seconds}


class RunLog:
    """Writes the records of one run. ``folder=None`` writes no file.

    ``metrics.jsonl`` has one object a line: ``{"kind": "step", "step", "epoch", "lr", "loss", ...}`` every
    ``log_every`` steps and ``{"kind": "epoch", ...}`` after each epoch; all values are before weights except
    ``loss``. ``speed.jsonl`` has what differs between two equal runs, a line an epoch: images a second, and the share
    of the time in which data were waited for.
    """

    def __init__(
        self, folder: Path | None, *, size: int, step: int, steps: int, tensorboard: bool, progress: bool, quiet: bool
    ) -> None:
        """``size``: the bytes of ``metrics.jsonl`` to keep, those that the checkpoint at ``step`` had seen."""
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
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if progress and not quiet and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, refresh_per_second=4, transient=True)
            self._task = self._progress.add_task("training", total=steps, completed=step)
            self._progress.start()

    def print(self, line: str) -> None:
        """A line for the user, above the progress bar."""
        self._console.print(line, markup=False)

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line of ``metrics.jsonl`` and the numbers in it as TensorBoard scalars ``kind/name``."""
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
        """One line of ``speed.jsonl``; the epoch that ended, or was broken off, at ``step``."""
        if self._folder is not None:
            with (self._folder / SPEED).open("a") as file:
                file.write(json.dumps({"kind": "speed", "step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"speed/{name}", value, step)

    def sync(self) -> int:
        """Make ``metrics.jsonl`` durable; its size in bytes."""
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


def versions() -> dict[str, str]:
    """Versions of Python, fastkd and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in ("fastkd", "torch", "torchvision", "timm", "torchdata", "numpy", "safetensors"):
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
    identity: dict[str, Any],
    ranks: int,
) -> dict[str, Any]:
    """What ``run.json`` holds: everything needed to tell what a run was."""

    def model(role: str, model: FeatureModel, named: ModelConfig | None) -> dict[str, Any]:
        name = type(model.model).__name__
        if named is not None and role not in identity["given_as_objects"]:
            name = named.name
        return {
            "name": name,
            "classifier": model.classifier_name,
            "feature_map": None if model.map_source is None else model.map_source.layer,
            "parameters": count_parameters(model.model),
        }

    return {
        "student": model("student", distiller.student, config.student),
        "teacher": None if distiller.teacher is None else model("teacher", distiller.teacher.model, config.teacher),
        "teacher_sha256": identity["teacher_sha256"],
        "train_samples": identity["train_samples"],
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
        "given_as_objects": identity["given_as_objects"],
        "config": identity["config"],
    }


def header(info: dict[str, Any]) -> list[str]:
    """The lines a run prints before its first step."""
    student, teacher = info["student"], info["teacher"]
    lines = [f"student {student['name']} ({student['parameters']:,} parameters)"]
    if teacher is not None:
        lines.append(
            f"teacher {teacher['name']} ({teacher['parameters']:,} parameters) sha256 {info['teacher_sha256']}"
        )
    on_ranks = f" on {info['ranks']} ranks" if info["ranks"] > 1 else ""
    weights = " + ".join(f"{weight:g} x {name}" for name, weight in info["loss_weights"].items())
    return [
        *lines,
        f"loss {weights}",
        f"global batch {info['global_batch']}{on_ranks}, {info['train_samples']} training samples, "
        f"{info['steps']} steps",
        f"{info['learning_rate']}; {info['precision']} on {info['device']}; seed {info['seed']}",
        ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
    ]
