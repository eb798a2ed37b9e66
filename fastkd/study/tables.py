"""The table of a study as rows of text, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastkd.study.aggregate import Entry, improvements, signed, with_error, with_spread
from fastkd.study.grid import TEACHER, Study
from fastkd.trainer.report.style import write_atomically

Table = Mapping[tuple[str, str], Entry]


@dataclass(frozen=True)
class Grid:
    """A table of texts under a heading: the first heading is that of the rows' names."""

    title: str
    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table as Markdown; the first column is to the left, the others are to the right."""
        lines = [self.headings, ["---", *["---:"] * (len(self.headings) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def grids(study: Study, table: Table) -> list[Grid]:
    """The tables of the page: the values beside the published ones, and the differences to the baseline."""
    if len(study.columns) == 1:
        return [_one_column(study, table)]
    published = any(entry.published is not None for entry in table.values())
    measure = "Best epoch" if study.measure == "best" else study.measure.capitalize()
    title = f"{measure}, {study.unit}: mean ± standard deviation"
    shown = [Grid(title + (" (published)" if published else ""), *_wide(study, table, _value))]
    if study.baseline is not None:
        title = f"Difference to {study.display(study.baseline)}: mean ± standard error, paired by seed"
        headings, rows = _wide(study, table, lambda entry: with_error(entry.to_baseline))
        rows = [row for row in rows if any(row[1:])]
        relative = {study.display(row): found for row, found in improvements(study, table).items()}
        if relative:
            headings = [*headings, "relative improvement, %", "published"]
            blank: tuple[None, None] = (None, None)
            for row in rows:
                row += ["" if value is None else signed(value) for value in relative.get(row[0], blank)]
        shown.append(Grid(title, headings, rows))
    return shown


def _wide(study: Study, table: Table, text: object) -> tuple[list[str], list[list[str]]]:
    assert callable(text)
    rows = [
        [study.display(row), *(text(table[row, c]) if (row, c) in table else "" for c in study.columns)]
        for row in study.rows
    ]
    return ["method", *study.columns], rows


def _value(entry: Entry) -> str:
    """``74.90 ± 0.21 (74.92)``: the runs here, and the published number in brackets."""
    here = with_spread(list(entry.values.values())) if entry.values else "failed" if entry.errors else "-"
    return here if entry.published is None else f"{here} ({entry.published:.2f})"


def _one_column(study: Study, table: Table) -> Grid:
    """One row per method, with its differences beside it. Columns without any text are left out."""
    headings = ["method", f"{study.measure}, {study.unit}"]
    headings += [] if study.vanilla is None else ["to scratch"]
    headings += [] if study.baseline is None else [f"to {study.display(study.baseline)}"]
    headings += ["published", "s a run"]
    rows = []
    for name in study.rows:
        entry = table[name, study.columns[0]]
        here = with_spread(list(entry.values.values())) if entry.values else "failed" if entry.errors else "-"
        differences = [
            with_error(found)
            for row, found in ((study.vanilla, entry.to_vanilla), (study.baseline, entry.to_baseline))
            if row is not None
        ]
        published = "" if entry.published is None else f"{entry.published:.2f}"
        seconds = "" if entry.seconds is None else f"{entry.seconds:.1f}"
        rows.append([study.display(name), here, *differences, published, seconds])
    kept = [number for number in range(len(headings)) if any(row[number] for row in rows)]
    return Grid(study.columns[0], [headings[n] for n in kept], [[row[n] for n in kept] for row in rows])


def remarks(study: Study, table: Table) -> list[str]:
    """What a reader of the table has to know: runs that are missing, failed runs, where published numbers are from."""
    lines = list(study.notes)
    seeds = {len(entry.values) for entry in table.values() if entry.row != TEACHER}
    counts = " to ".join(str(count) for count in dict.fromkeys((min(seeds), max(seeds)))) if seeds else "0"
    lines.append(f"Finished runs per cell: {counts}. Differences are paired by seed.")
    missing = sum(entry.missing for entry in table.values())
    if missing:
        lines.append(f"{missing} runs have no result yet. The same command goes on with them.")
    without = sum(entry.published is None for entry in table.values())
    if study.source and without < len(table):
        lines.append(f"Published numbers: {study.source}")
    if without and without < len(table):
        lines.append(f"{without} of {len(table)} cells have no published number at hand, and are left without one.")
    return lines


def failed(study: Study, table: Table) -> list[str]:
    """A line for every error of a run, with the number of runs that have it."""
    lines: dict[str, list[str]] = {}
    for entry in table.values():
        for seed, error in entry.errors.items():
            lines.setdefault(error, []).append(f"{entry.column}, {study.display(entry.row)}, seed {seed}")
    return [
        f"{cells[0]}{f' and {len(cells) - 1} more' if len(cells) > 1 else ''}: {error}"
        for error, cells in lines.items()
    ]


def markdown(study: Study, table: Table) -> str:
    """The whole study as Markdown."""
    parts = [f"# {study.title}", study.about]
    for grid in grids(study, table):
        parts += [f"## {grid.title}", grid.markdown()]
    parts += ["\n".join(f"- {line}" for line in remarks(study, table))]
    if errors := failed(study, table):
        parts += ["## Failed runs", "\n".join(f"- {line}" for line in errors)]
    return "\n\n".join(part for part in parts if part) + "\n"


CSV = (
    *("column", "row", "runs", "mean", "standard_deviation", "published", "seconds"),
    *("to_baseline", "to_baseline_error", "to_vanilla", "to_vanilla_error", "seeds", "values", "error"),
)


def as_csv(study: Study, table: Table) -> str:
    """One line for every place of the table, with all its numbers; the values of the seeds are apart by blanks."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV)
    for entry in table.values():
        numbers: Sequence[float | None] = (entry.mean, entry.deviation, entry.published, entry.seconds)
        differences = [
            value
            for found in (entry.to_baseline, entry.to_vanilla)
            for value in ((None, None) if found is None else (found.mean, found.error))
        ]
        seeds, values = " ".join(map(str, entry.values)), " ".join(map(repr, entry.values.values()))
        error = next(iter(entry.errors.values()), "")
        writer.writerow(
            [entry.column, study.display(entry.row), len(entry.values)]
            + ["" if number is None else repr(number) for number in (*numbers, *differences)]
            + [seeds, values, error]
        )
    return text.getvalue()


def write_tables(study: Study, table: Table, folder: Path) -> list[Path]:
    """Write ``table.md`` and ``table.csv`` into the folder of the study; returns their paths."""
    paths = [folder / "table.md", folder / "table.csv"]
    for path, text in zip(paths, (markdown(study, table), as_csv(study, table)), strict=True):
        write_atomically(path, text)  # several processes may do so at once
    return paths
