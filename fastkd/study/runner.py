"""Runs the cells of a study: in this process or in several, each cell by the process that holds its folder's lock.

Every process takes the most needed cell that is neither finished nor being run. Two commands on one folder, on two
machines that share it, or the ranks of ``torchrun`` so share the work. A process that dies gives its lock back, and
another one goes on with its cell from the checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastkd.study.cached import Caches, as_begun, cache_of
from fastkd.study.grid import Cell, Job, Options, Study
from fastkd.study.records import Record, check_same_settings, job_of, one_line, read_record, records
from fastkd.trainer.files import FolderLock, replace_text
from fastkd.trainer.models.weights import CheckpointError
from fastkd.trainer.signals import StopRequest

Build = Callable[[Any], Study]
Tell = Callable[[str], None]
ERROR = "error.txt"  # the traceback of a failed cell
_PAUSE = 0.5  # seconds between two looks at what other processes do


def folder_of(study: Study, options: Options) -> Path:
    """The folder that the study is in."""
    return options.out or Path("runs") / study.name


def run_cells(build: Build, options: Options, tell: Tell = print) -> int:
    """Run every cell of ``build(options)`` that is not finished. Returns the signal that stopped it, 0 if none did.

    A cell that fails has a record that says why, and the others go on; the next call runs it again.

    Raises ValueError when the folder holds cells of other settings.
    """
    study = build(options)
    folder = folder_of(study, options)
    check_same_settings(study, folder)
    begun, cells = time.time(), study.in_order_of_need()
    left = [cell for cell in cells if _unfinished(folder / cell.place, begun)]
    workers = 1 if study.sequential else min(count_workers(options), len(left))
    if workers <= 1 or _alone():
        return work(study, folder, begun, tell, options.cache_teacher)
    context = multiprocessing.get_context("spawn")
    console = Console()
    shared = (workers, begun, tell is print and not console.is_terminal)  # a terminal has the bar instead of lines
    processes = [context.Process(target=_worker, args=(build, options, number, *shared)) for number in range(workers)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with StopRequest() as stop, Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("runs", total=len(cells))
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            for process in processes:
                if stop.signal:
                    process.terminate()  # by SIGTERM: the run writes a checkpoint and ends
                process.join(_PAUSE / workers)
            bar.update(task, completed=sum(not _unfinished(folder / cell.place, begun) for cell in cells))
    lost = [process.exitcode for process in processes if process.exitcode not in (0, 1)]
    if lost and not stop.signal:
        tell(f"{len(lost)} of {workers} processes ended early (status {lost[0]}); the same command goes on")
    return stop.signal


def count_workers(options: Options) -> int:
    """How many processes run cells: one per GPU, else one per core and at most four."""
    if options.workers is not None:
        return options.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_gpus = options.device == "auto" and torch.cuda.is_available()
    return torch.cuda.device_count() if on_gpus else min(4, cores)


def _alone() -> bool:
    """Whether this process is a rank of torchrun, which then takes cells by itself and starts no processes."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(name, None)
    return ranks > 1


def _worker(build: Build, options: Options, number: int, workers: int, begun: float, speaks: bool) -> None:
    """A process of its own: on its own GPU, or with its share of the cores."""
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    study = build(options)
    with contextlib.suppress(KeyboardInterrupt):
        told = partial(print, flush=True) if speaks else lambda line: None
        work(study, folder_of(study, options), begun, told, options.cache_teacher)


def _end_with_parent() -> None:
    """Ask this process to stop when its parent is gone, which SIGKILL ends without a word to its children."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # the run writes a checkpoint and ends


def work(study: Study, folder: Path, begun: float, tell: Tell, cache_folder: Path | None = None) -> int:
    """Take one cell after the other until none is left; the signal that stopped a run, 0 if none did.

    ``begun``: cells that failed before this time are run again. ``cache_folder``: see ``Options.cache_teacher``.
    """
    cells = study.in_order_of_need()
    caches = None if cache_folder is None else Caches(cache_folder, study, folder)
    while waiting := [cell for cell in cells if _unfinished(folder / cell.place, begun)]:
        for cell in waiting:
            before = [read_record(folder / other) for other in cell.after]
            if any(record is None or (record.status == "failed" and record.at < begun) for record in before):
                continue  # the run that it needs is not there yet
            try:
                lock = FolderLock(folder / cell.place)
            except CheckpointError:  # another process has it
                continue
            with contextlib.closing(lock):
                if not _unfinished(folder / cell.place, begun):
                    break
                lock.keep()
                failed = next((record.error for record in before if record and record.status == "failed"), None)
                stopped = _run(cell, folder, failed, caches)
            if stopped:
                return stopped
            record = read_record(folder / cell.place)
            done = sum(not _unfinished(folder / other.place, begun) for other in cells)
            tell(f"{done}/{len(cells)}  {cell}: {_said(study, record)}")
            break
        else:
            time.sleep(_PAUSE)
    return 0


def _unfinished(place: Path, begun: float) -> bool:
    """Whether the cell has no result, and has not failed since the study was begun."""
    record = read_record(place)
    return record is None or (record.status == "failed" and record.at < begun)


def _run(cell: Cell, study_folder: Path, failed: str | None, caches: Caches | None) -> int:
    """Run one cell and write its record; the signal that stopped it, else 0."""
    folder = study_folder / cell.place
    if failed is not None:
        Record(status="failed", error=f"what it needs failed: {failed}").write(folder)
        return 0
    job = job_of(cell, study_folder)
    if isinstance(job, str):
        Record(status="failed", error=f"not available: {job}").write(folder)
        return 0
    try:
        given: Job | int = as_begun(job, folder) or job
        # A cache of this study is written again where a part of it was lost; that of another one is read as it is.
        if caches is not None and (given is job or cache_of(given) == str(caches.place(job))):
            given = caches.give(job)
        if isinstance(given, int):
            return given
        job = given
        outcome = job.run(folder)
    except Exception as error:
        replace_text(folder / ERROR, traceback.format_exc())
        Record(status="failed", error=one_line(error), settings=job.settings()).write(folder)
        return 0
    if not outcome.stopped_by:
        Record(status="finished", values=outcome.values, settings=job.settings()).write(folder)
    return outcome.stopped_by


def _said(study: Study, record: Record | None) -> str:
    """The end of a cell in words."""
    if record is None or record.status == "failed":
        return f"failed: {record.error}" if record else "no result"
    if study.measure not in record.values:  # a cell that others need, and no run
        return "done"
    seconds = f" in {record.values['seconds']:.1f} s" if "seconds" in record.values else ""
    return f"{record.values[study.measure]:.2f} {study.unit}{seconds}"


def failures(study: Study, folder: Path) -> dict[str, str]:
    """The error of every failed cell, and "not run" for one without a record, by its place."""
    found = records(study, folder)
    errors = {cell.place: found[cell.place].error if cell.place in found else "not run" for cell in study.cells}
    return {place: error for place, error in errors.items() if place not in found or found[place].status == "failed"}
