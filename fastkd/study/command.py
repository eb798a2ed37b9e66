"""``fastkd study``: a grid of runs by one command, resumed where it stopped, beside the published numbers."""

from __future__ import annotations

import difflib
import os
import platform
import shlex
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import tyro

from fastkd.study.aggregate import entries
from fastkd.study.grid import Options, Study
from fastkd.study.page import write_page
from fastkd.study.plan import missing, plan
from fastkd.study.records import job_of, read_record
from fastkd.study.runner import Build, Tell, count_workers, failures, folder_of, run_cells
from fastkd.study.studies import STUDIES
from fastkd.study.tables import markdown, write_tables
from fastkd.trainer.commands.messages import errors_in_one_line
from fastkd.trainer.imports import import_object
from fastkd.trainer.run.describe import versions

_USAGE = """\
usage: fastkd study NAME [flags]     run a study, or go on with it; flags choose a part of it
       fastkd study NAME --dry-run   what will run, how long it takes, which files are missing

`fastkd study NAME --help` lists the flags of a study. NAME is package.module:function, or one of
"""


def study_command(arguments: list[str]) -> int:
    """Run ``fastkd study`` with these arguments and return the exit status: 1 if a cell has no result."""
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(_USAGE + "\n".join(_lines()))
        return 0
    sys.path.insert(0, os.getcwd())  # the user's own studies usually lie in the current folder
    name, *flags = arguments
    build = find_study(name)
    options = parse_options(build, name, flags)
    if options.dry_run:
        study = build(options)
        print("\n".join(plan(study, folder_of(study, options), count_workers(options))))
        return 0
    speaks = os.environ.get("RANK", "0") == "0"
    command = shlex.join(["fastkd", "study", *arguments])
    return run_study(build, options, command, print if speaks else lambda line: None)


def find_study(name: str) -> Build:
    """The function of a study. ValueError for a name that there is not."""
    if ":" not in name and name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, 3)
        meant = f"did you mean {' or '.join(near)}?" if near else "expected a study or package.module:function;"
        raise ValueError(f"got the study {name!r}, {meant} `fastkd study --help` lists them")
    found = STUDIES.get(name) or import_object(name, "study")
    if not callable(found):
        raise TypeError(f"study: {name!r} is of type {type(found).__name__}, expected a function")
    return found


def parse_options(build: Build, name: str, flags: list[str]) -> Any:
    """The options of a study from its flags; their type is the one that its parameter ``options`` has."""
    kind = typing.get_type_hints(build).get("options", Options)
    names = [f"--{part.name.replace('_', '-')}" for part in fields(kind)]
    with errors_in_one_line(flags, [*names, "--help"]):
        return tyro.cli(kind, prog=f"fastkd study {name}", args=flags, description=build.__doc__)


def run_study(build: Build, options: Options, command: str, tell: Tell = print) -> int:
    """Run the cells that are not finished, write the tables and the page, and return the exit status."""
    begun = time.perf_counter()
    study = build(options)
    folder = folder_of(study, options)
    check_something_can_run(study, folder)
    stopped = run_cells(build, options, tell)
    if not folder.is_dir():
        return 128 + stopped if stopped else 1
    table = entries(study, folder)
    workers = 1 if study.sequential else count_workers(options)
    paths = write_tables(study, table, folder)
    environment = {
        "command": command,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {workers} processes",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    page = write_page(study, table, folder, environment)
    tell(markdown(study, table))
    left = failures(study, folder)
    tell(f"{time.perf_counter() - begun:.0f} s. {', '.join(map(str, [*paths, page]))}")
    if left:
        tell(f"{len(left)} of {len(study.cells)} cells have no result; the same command runs them again")
    return 128 + stopped if stopped else 1 if left else 0


def check_something_can_run(study: Study, folder: Path) -> None:
    """Raise ValueError, before anything is written, when no cell is finished and none can run."""
    cells = study.in_order_of_need()
    if any(read_record(folder / cell.place) is not None for cell in cells):
        return
    jobs = [job_of(cell, folder) for cell in cells]
    available = [job for job in jobs if not isinstance(job, str)]
    if not available:
        raise ValueError(f"{study.name}: no run is available ({jobs[0]}); --dry-run says all")
    lacking = [missing(study, folder, [job]) for job in available]
    if all(lacking):
        raise ValueError(f"{study.name}: {lacking[0][0]}; --dry-run says all that is missing")


def _lines() -> list[str]:
    width = max(map(len, STUDIES))
    return [f"  {name:<{width}}  {_first_line(build)}" for name, build in STUDIES.items()]


def _first_line(build: Callable[..., Any]) -> str:
    return (build.__doc__ or "").strip().splitlines()[0]
