"""``fastkd study NAME --dry-run``: what will run, how long it takes, and what is missing. Nothing is written."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

import torch

from fastkd.study import cached
from fastkd.study.costs import timed, training_step
from fastkd.study.grid import Cell, Job, Study
from fastkd.study.jobs import Training
from fastkd.study.records import job_of, one_line, read_record
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.datasets import choose_data, without_download
from fastkd.trainer.run.saved.checkpoint import CHECKPOINTS, list_checkpoints

ROWS = 16  # of the batches that are timed on a CPU
STEPS = 3
QUICK = (
    0.2  # seconds of a step up to which the whole batch is timed, because the time does not grow with the rows there
)


def plan(study: Study, folder: Path, workers: int) -> list[str]:
    """The lines of the dry run."""
    cells = study.in_order_of_need()
    found = {cell.place: read_record(folder / cell.place) for cell in cells}
    done = [cell for cell in cells if (record := found[cell.place]) is not None and record.status == "finished"]
    left = [cell for cell in cells if cell not in done]
    jobs = {cell.place: job_of(cell, folder) for cell in left}
    begun = [cell for cell in left if list_checkpoints(folder / cell.place / CHECKPOINTS)]
    failed = [cell for cell in left if found[cell.place] is not None]
    ready = [cell for cell in left if not isinstance(jobs[cell.place], str)]
    lines = [
        f"{study.name} in {folder}: {len(study.rows)} rows, {len(study.columns)} columns, {len(cells)} runs",
        f"{len(done)} finished, {len(begun)} begun, {len(failed)} failed before, {len(left)} to run in this order:",
        *(f"  {number}. {cell}" for number, cell in enumerate(left[:5], 1)),
        *([f"  ... and {len(left) - 5} more"] if len(left) > 5 else []),
    ]
    reasons = [(f"not available: {job}", cell) for cell in left if isinstance(job := jobs[cell.place], str)]
    lines += _grouped(reasons)
    lines += missing(study, folder, [job for cell in ready if not isinstance(job := jobs[cell.place], str)])
    return [*lines, *_times(study, folder, ready, jobs, workers), *cached.lines(study, jobs, ROWS, STEPS)]


def missing(study: Study, folder: Path, jobs: Iterable[Job]) -> list[str]:
    """A line for every file or folder that the jobs need and that is not there: where it is expected, and its source.

    What the study itself makes, in its folder, is not missing.
    """
    paths = dict.fromkeys(path for job in jobs for path in job.needed())
    absent = [path for path in paths if not path.exists() and not path.is_relative_to(folder)]
    return [f"missing: {path}: {study.sources.get(str(path), 'give its place by a flag')}" for path in absent]


def _grouped(reasons: list[tuple[str, Cell]]) -> list[str]:
    """A line for every reason, with the number of cells that have it."""
    by_reason: dict[str, list[Cell]] = {}
    for reason, cell in reasons:
        by_reason.setdefault(reason, []).append(cell)
    return [f"{cells[0]}{f' and {len(cells) - 1} more' if cells[1:] else ''}: {r}" for r, cells in by_reason.items()]


def _times(study: Study, folder: Path, cells: list[Cell], jobs: dict[str, Job | str], workers: int) -> list[str]:
    """How long the cells take: by the recorded times of finished ones like them, else by some timed steps."""
    recorded: dict[tuple[str, str], list[float]] = {}
    for cell in study.cells:
        record = read_record(folder / cell.place)
        if record is not None and "seconds" in record.values:
            recorded.setdefault((cell.row, cell.column), []).append(record.values["seconds"])
    lines, total, unknown = [], 0.0, 0
    by_column: dict[tuple[str, bool], list[Cell]] = {}
    for cell in cells:
        times = recorded.get((cell.row, cell.column))
        if times:
            total += statistics.fmean(times)
        elif isinstance(jobs[cell.place], Training):
            by_column.setdefault((cell.column, cell.shown), []).append(cell)
        else:
            unknown += 1
    if total:
        lines.append(f"time: {duration(total)} for the runs like which there are finished ones, as these took")
    for (column, _), alike in by_column.items():
        chosen = next((cell for cell in alike if cell.row == study.baseline), alike[0])
        job = jobs[chosen.place]
        assert isinstance(job, Training)
        try:
            seconds, how = estimate(job.config, study.samples)
        except Exception as error:
            lines.append(f"time of {column}: unknown ({one_line(error)})")
            unknown += len(alike)
            continue
        total += seconds * len(alike)
        lines.append(f"time of {column}: {duration(seconds)} for a run of {study.display(chosen.row)} ({how})")
    if cells:
        rest = f", and {unknown} runs of unknown time" if unknown else ""
        note = (
            " (a student from scratch takes less than a run that was timed, another method as long or longer)"
            if by_column
            else ""
        )
        by_all = f"{duration(total / workers)} by {workers} processes"
        lines.append(f"together: {duration(total)} of runs, {by_all}{rest}{note}")
    return lines


def estimate(config: TrainConfig, samples: int | None) -> tuple[float, str]:
    """The seconds of a run by some timed steps on this machine, and how they were measured.

    ValueError where the data are not there and ``samples`` is None.
    """
    try:
        samples = len(choose_data(without_download(config.data), None, None)[0])
    except (ValueError, OSError):
        if samples is None:
            raise
    batch = config.data.batch_size
    rows = batch if torch.cuda.is_available() and config.device != "cpu" else min(ROWS, batch)
    step = training_step(config, rows)
    step()
    if rows < batch and timed(step) * batch / rows < QUICK:
        rows, step = batch, training_step(config, batch)
        step()
    seconds = statistics.median(timed(step) for _ in range(STEPS))
    per_epoch = samples // batch if config.data.drop_last else -(-samples // batch)
    scaled = f", times {batch / rows:g} for {batch}" if rows < batch else ""
    how = f"{STEPS} steps of {rows} rows, {1e3 * seconds:.0f} ms each{scaled}; {config.epochs * per_epoch:,} steps"
    return seconds * batch / rows * per_epoch * config.epochs, how


def duration(seconds: float) -> str:
    """``42 s``, ``7.5 min``, ``3.2 h``, ``4.1 days``."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
