"""What a study is: a table whose cells are runs, in the order in which they are needed.

A study is a Python function. It takes its options and returns a ``Study``::

    def two_methods(options: Options) -> Study:
        cells = [
            Cell(row=method, column="digits", seed=seed, make=lambda folder, m=method, s=seed: Training(config(m, s)))
            for method in ("ce", "kd")
            for seed in range(options.seeds)
        ]
        return Study(name="two", title="Two methods", cells=tuple(cells), baseline="kd", vanilla="ce")

``fastkd study package.module:two_methods`` runs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastkd.trainer.run.saved.log import SEED_FOLDER
from fastkd.validate import check_int

TEACHER = "teacher"  # the row of teachers that a study trains itself


@dataclass(kw_only=True, frozen=True)
class Options:
    """The options that every study has; a study adds its own in a subclass.

    Attributes:
        seeds: runs of every cell of the table, with the seeds 0, 1, ...
        methods: the rows to run, by default all of the study.
        epochs: epochs of every student; None has those of the paper.
        out: the folder of the study, by default runs/NAME. The same command goes on in it.
        workers: processes that run cells at the same time; by default one per GPU, else one per core and at most four.
        device: auto, cpu, cuda, ...
        cache_teacher: a folder for caches of the teachers, which are then run once for all methods of a seed.
        dry_run: say what would run, how long it takes and what is missing, and stop.
    """

    seeds: int = 5
    methods: tuple[str, ...] = ()
    epochs: int | None = None
    out: Path | None = None
    workers: int | None = None
    device: str = "auto"
    cache_teacher: Path | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_int("seeds", self.seeds, 1)
        for name in ("epochs", "workers"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        if len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods: got {' '.join(self.methods)}, expected each once")

    def choose(self, rows: Sequence[str]) -> list[str]:
        """The rows of the study that were asked for. ValueError for one that it does not have."""
        unknown = [method for method in self.methods if method not in rows]
        if unknown:
            raise ValueError(f"methods: got {unknown[0]!r}, expected methods among {', '.join(rows)}")
        return list(self.methods or rows)


@dataclass(frozen=True)
class Outcome:
    """What a job came to.

    ``values`` are numbers by name. The table shows the one that ``Study.measure`` names. ``stopped_by`` is the number
    of the signal that ended the job early: there are no values then, and the job goes on when it is run again.
    """

    values: Mapping[str, float]
    stopped_by: int = 0


class Job(Protocol):
    """The work of a cell: see ``fastkd.study.jobs``."""

    def run(self, folder: Path) -> Outcome:
        """Do the work in ``folder``; go on where an earlier, interrupted call stopped."""

    def settings(self) -> dict[str, Any]:
        """Plain data that say what is computed. A finished cell with other settings is refused."""

    def needed(self) -> list[Path]:
        """The files and folders that must be there before it runs."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study.

    Attributes:
        row, column, seed: its place in the table. A row is a method, a column is a setting.
        make: returns the job, for the folder of the study. It may raise ValueError, TypeError or ImportError, which
            say why the job is not available; the other cells run all the same.
        place: the folder of the cell in the folder of the study. Cells with one place are one run, which is shown
            several times. By default COLUMN/ROW/seed-N.
        after: the places of the cells that must be finished before, such as the teacher's.
        shown: whether the table has it.
    """

    row: str
    column: str
    seed: int
    make: Callable[[Path], Job]
    place: str = ""
    after: tuple[str, ...] = ()
    shown: bool = True

    def __post_init__(self) -> None:
        if not self.place:
            object.__setattr__(self, "place", place(self.column, self.row, self.seed))

    def __str__(self) -> str:
        return f"{self.column}, {self.row}, seed {self.seed}"


@dataclass(frozen=True)
class Picture:
    """A drawing of a study's page: ``svg`` as text, under a heading, with a sentence about what it shows."""

    heading: str
    name: str
    svg: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A table of runs, and what is published beside it.

    Attributes:
        name, title: for its folder and its page.
        about: what it reproduces and how, one sentence or more.
        cells: the runs.
        names: how rows are written, where this differs from their keys.
        published: the published number by (row, column), in the unit of the table. What is not there stays empty.
        source: where the published numbers come from.
        baseline: the row that the others are compared with, seed by seed.
        vanilla: the row of students without a teacher. With it, the relative improvement over the baseline is shown.
        measure: the name of the value that the table shows.
        unit: of that value.
        sources: where files come from, by their path. The dry run says this of files that are missing.
        samples: how many training samples the data have. The dry run needs it where they are not there.
        pictures: draws further pictures from the finished runs: it gets the study and its folder.
        notes: what a reader has to know.
        sequential: one cell at a time, because it measures time.
    """

    name: str
    title: str
    about: str = ""
    cells: tuple[Cell, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[tuple[str, str], float] = field(default_factory=dict)
    source: str = ""
    baseline: str | None = None
    vanilla: str | None = None
    measure: str = "accuracy"
    unit: str = "%"
    sources: Mapping[str, str] = field(default_factory=dict)
    samples: int | None = None
    pictures: Callable[[Study, Path], list[Picture]] | None = None
    notes: tuple[str, ...] = ()
    sequential: bool = False

    def __post_init__(self) -> None:
        places = {cell.place for cell in self.cells}
        for cell in self.cells:
            for awaited in cell.after:
                if awaited not in places:
                    raise ValueError(f"after: got {awaited!r} for {cell}, expected the place of a cell of the study")

    @property
    def rows(self) -> list[str]:
        """The rows of the table, in order."""
        return list(dict.fromkeys(cell.row for cell in self.cells if cell.shown))

    @property
    def columns(self) -> list[str]:
        """The columns of the table, in order."""
        return list(dict.fromkeys(cell.column for cell in self.cells if cell.shown))

    def display(self, row: str) -> str:
        """The row as it is written."""
        return self.names.get(row, row)

    def in_order_of_need(self) -> list[Cell]:
        """One cell per place: first what others wait for, then the first seed of every row, column by column.

        An early stop so leaves a whole table of one seed, or of the first columns.
        """
        once = {cell.place: cell for cell in reversed(self.cells)}
        cells = [once.pop(cell.place) for cell in self.cells if cell.place in once]
        columns = {column: number for number, column in enumerate(dict.fromkeys(cell.column for cell in self.cells))}
        awaited = {place for cell in cells for place in cell.after}
        return sorted(cells, key=lambda cell: (cell.seed, columns[cell.column], cell.place not in awaited))


def place(column: str, row: str, seed: int) -> str:
    """The folder of a cell in the folder of its study: ``COLUMN/ROW/seed-N``, with plain letters."""
    return "/".join([*(re.sub(r"[^\w.+=]+", "-", name).strip("-") for name in (column, row)), f"{SEED_FOLDER}{seed}"])
