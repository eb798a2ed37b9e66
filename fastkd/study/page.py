"""The HTML page of a study: its tables beside the published numbers, every run, curves, and the study's pictures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from fastkd.study.figures import accuracy_dots
from fastkd.study.grid import Study
from fastkd.study.tables import Table, failed, grids, remarks
from fastkd.trainer.report.curves import draw, look
from fastkd.trainer.report.records import Group, read_run
from fastkd.trainer.report.style import render_page, write_atomically
from fastkd.trainer.report.tables import METRICS

PAGE = "report.html"
LOOKS = 24  # curves that can be told apart


def write_page(study: Study, table: Table, folder: Path, environment: Mapping[str, str]) -> Path:
    """Write ``report.html`` into the folder of the study and return its path."""
    looks = {study.display(row): look(index) for index, row in enumerate(study.rows)}
    curves = draw_curves(study, table, folder)
    pictures = study.pictures(study, folder) if study.pictures is not None else []
    page = render_page(
        Path(__file__).parent,
        title=study.title,
        study=study,
        grids=grids(study, table),
        remarks=remarks(study, table),
        failed=failed(study, table),
        dots=draw_dots(study, table),
        curves=curves,
        looks=looks,
        pictures=[
            (heading, drawn[0].text, drawn)
            for heading, group in itertools.groupby(pictures, lambda picture: picture.heading)
            if (drawn := list(group))
        ],
        environment=environment,
    )
    write_atomically(folder / PAGE, page)
    return folder / PAGE


def draw_dots(study: Study, table: Table) -> list[tuple[str, str]]:
    """A picture per column with every run and the published numbers. Columns without a run have none."""
    names = {row: study.display(row) for row in study.rows}
    colours = {row: look(index)[0] for index, row in enumerate(study.rows)}
    drawn = []
    for number, column in enumerate(study.columns):
        values = {row: list(table[row, column].values.values()) for row in study.rows if (row, column) in table}
        if any(values.values()):
            published = {row: study.published[row, column] for row in values if (row, column) in study.published}
            label = f"{study.measure} ({study.unit})"
            svg = accuracy_dots(values, names, colours, None, published, f"dots{number}", label)
            drawn.append((column, svg))
    return drawn


def draw_curves(study: Study, table: Table, folder: Path) -> list[tuple[str, str]]:
    """A picture per column with the accuracy over epochs, of the runs of the trainer that have as many epochs."""
    drawn = []
    for number, column in enumerate(study.columns):
        groups = []
        for row in study.rows[:LOOKS]:
            cells = [cell for cell in study.cells if (cell.row, cell.column) == (row, column) and cell.shown]
            done = [cell for cell in cells if (row, column) in table and cell.seed in table[row, column].values]
            runs = [
                read_run(folder / cell.place, f"{study.display(row)}, seed {cell.seed}")
                for cell in done
                if (folder / cell.place / "run.json").exists()
            ]
            groups.append(Group(study.display(row), folder, runs))
        lengths = {run.info["config"]["epochs"] for group in groups for run in group.runs}
        if len(lengths) == 1:
            panel = draw(groups, METRICS[groups[0].runs[0].metric][0], f"curves{number}")
            drawn += [(column, panel.svg)] if panel.svg is not None else []
    return drawn
