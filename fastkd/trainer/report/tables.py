"""The tables of numbers: runs compared, the last and the best epoch of a run, the metric by class."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastkd.trainer.report.curves import Quantity
from fastkd.trainer.report.records import Group, RecordedRun

# The metrics of the tasks, with the short names that headings have.
METRICS = {
    "accuracy": (Quantity("accuracy", "Accuracy, top-1 (%)", percent=True), "Accuracy"),
    "map": (Quantity("map", "mAP, IoU 0.5 to 0.95 (%)", percent=True), "mAP"),
    "recall_1": (Quantity("recall_1", "Recall@1 (%)", percent=True), "Recall@1"),
}
LARGEST_TABLE = 20  # classes; of more, the worst are shown


@dataclass(frozen=True)
class Cell:
    """A number in a table: its ``value`` as it was recorded, and the ``text`` that the page shows.

    ``spread`` is the standard deviation where the value is a mean.
    """

    value: float | None
    text: str
    spread: str = ""


def row_of(values: Sequence[Sequence[float] | None], *, percent: bool = False, sign: bool = False) -> list[Cell]:
    """Cells with as many decimals each: a value, or the mean ± standard deviation of several; None is a dash."""
    factor = 100 if percent else 1
    finite = [abs(value) for found in values for value in found or () if math.isfinite(value)]
    places = 2 if percent else max(0, min(8, 3 - math.floor(math.log10(max(finite, default=0) or 1))))
    cells = []
    for found in values:
        if not found:
            cells.append(Cell(None, "-"))
        elif not all(map(math.isfinite, found)):
            cells.append(Cell(None, "not finite"))
        else:
            mean = statistics.fmean(found)
            text = f"{factor * mean:{'+' if sign else ''},.{places}f}".replace("-", "\N{MINUS SIGN}")
            spread = f"± {factor * statistics.stdev(found):,.{places}f}" if len(found) > 1 else ""
            cells.append(Cell(mean, text, spread))
    return cells


def epoch_rows(run: RecordedRun, quantities: Sequence[Quantity]) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Headings and rows: every quantity after the last epoch, the last evaluated epoch and the best epoch."""
    if not run.epochs:
        return [], []
    records = [("last epoch", run.epochs[-1])]
    if run.evaluated is not None and run.evaluated is not run.epochs[-1]:
        records.append(("last evaluated epoch", run.evaluated))
    if run.best is not None:
        records.append(("best epoch", run.best))
    headings = [f"{text} ({record['epoch'] + 1})" for text, record in records]
    rows = []
    for item in quantities:
        values = [[record[item.name]] if item.name in record else None for _, record in records]
        if any(values):
            rows.append((item.title, row_of(values, percent=item.percent)))
        if item.name == run.metric and run.teacher_accuracy is not None:
            gaps = [[found[0] - run.teacher_accuracy] if found else None for found in values]
            rows.append(
                (f"{short_name(run.metric)} minus the teacher's (points)", row_of(gaps, percent=True, sign=True))
            )
    return headings, rows


def comparison_table(groups: Sequence[Group], quantities: Sequence[Quantity]) -> tuple[list[str], list[list[Cell]]]:
    """Headings, and one row per group: the values of the last evaluated epoch, and the best one's metric."""
    columns: dict[str, list[Cell]] = {}

    def add(heading: str, values: list[list[float] | None], **options: bool) -> None:
        if any(values):
            columns[heading] = row_of(values, **options)

    last = [[run.evaluated or (run.epochs[-1] if run.epochs else {}) for run in group.runs] for group in groups]
    metric = groups[0].runs[0].metric
    add(f"{short_name(metric)} (%)", [_values(metric, records) for records in last], percent=True)
    gaps = [
        [
            record[metric] - run.teacher_accuracy
            for run, record in zip(group.runs, records, strict=True)
            if run.teacher_accuracy is not None and metric in record
        ]
        for group, records in zip(groups, last, strict=True)
    ]
    add("To the teacher (points)", [found or None for found in gaps], percent=True, sign=True)
    best = [[run.best or {} for run in group.runs] for group in groups]
    add("Best (%)", [_values(metric, records) for records in best], percent=True)
    columns["in epoch"] = [_epochs(records) for records in best]
    short = {"top5": "Top-5 (%)", "eval_loss": "Eval. loss", "loss": "Train. loss", "images_per_second": "Images/s"}
    for item in quantities:
        add(short[item.name], [_values(item.name, records) for records in last], percent=item.percent)
    columns["Epochs"] = [_progress(group) for group in groups]
    sizes = [group.runs[0].info["student"]["parameters"] for group in groups]
    if len(set(sizes)) > 1:
        columns["Parameters"] = [Cell(size, f"{size:,}") for size in sizes]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _values(name: str, records: Sequence[dict[str, Any]]) -> list[float] | None:
    """The quantity in the records that have it; None if none has."""
    return [record[name] for record in records if name in record] or None


def _epochs(records: Sequence[dict[str, Any]]) -> Cell:
    """The first and the last of the records' epochs. Epochs are recorded from 0 and shown from 1."""
    numbers = sorted(record["epoch"] + 1 for record in records if "epoch" in record)
    return Cell(None, "\N{EN DASH}".join(map(str, dict.fromkeys((numbers[0], numbers[-1])))) if numbers else "-")


def _progress(group: Group) -> Cell:
    """How many epochs are done, of how many; the least of several runs."""
    done = min(run.epochs[-1]["epoch"] + 1 if run.epochs else 0 for run in group.runs)
    total = group.runs[0].info["config"]["epochs"]
    return Cell(None, str(total) if done == total else f"{done} of {total}")


def class_table(groups: Sequence[Group]) -> tuple[list[str], list[tuple[str, list[Cell]]], int]:
    """Headings and rows: the metric by class at the last evaluation, and how many classes there are.

    Of several seeds the mean and standard deviation. Of more than ``LARGEST_TABLE`` classes, those with the lowest
    values. A class without samples has none.
    """
    shares = [[_shares(run) for run in group.runs if run.classes is not None] for group in groups]
    names = list(dict.fromkeys(name for group in groups for run in group.runs for name, *_ in _classes(run)))
    values = {name: [[share[name] for share in found if name in share] or None for found in shares] for name in names}
    chosen = names
    if len(names) > LARGEST_TABLE:
        means = {name: statistics.fmean(v for found in values[name] for v in found or (math.inf,)) for name in names}
        chosen = sorted(names, key=lambda name: means[name])[:LARGEST_TABLE]
    rows = [(name, row_of(values[name], percent=True)) for name in chosen]
    headings = [group.name for group in groups]
    if len(groups) == 1 and len(groups[0].runs) == 1 and groups[0].runs[0].classes is not None:
        counts = {name: samples for name, _, samples in _classes(groups[0].runs[0])}
        rows = [(name, [*cells, Cell(None, f"{counts[name]:,}")]) for name, cells in rows]
        metric = groups[0].runs[0].metric
        headings = [f"{short_name(metric)} (%)", "Boxes" if metric == "map" else "Samples"]
    return headings, rows, len(names)


def _shares(run: RecordedRun) -> dict[str, float]:
    """The metric by class, of those that have samples."""
    return {name: share for name, share, samples in _classes(run) if samples and share is not None}


def _classes(run: RecordedRun) -> list[tuple[str, float | None, int]]:
    """(name, metric, samples) of every class. Names that occur twice get the numbers of their classes."""
    if run.classes is None:
        return []
    times = Counter(run.classes["classes"])
    names = [name if times[name] == 1 else f"{name} ({place})" for place, name in enumerate(run.classes["classes"])]
    samples = run.classes["samples"]
    shares = run.classes.get("scores") or [
        right / count if count else None for right, count in zip(run.classes["right"], samples, strict=True)
    ]
    return list(zip(names, shares, samples, strict=True))


def short_name(metric: str) -> str:
    """What headings call the metric."""
    return METRICS[metric][1] if metric in METRICS else metric


def with_teacher(run: RecordedRun) -> str:
    """The teacher's value of the metric, and how far the student's last one is from it, as a text."""
    accuracy = run.teacher_accuracy
    if accuracy is None:
        return "not measured" if run.info["teacher"] is not None else "none"
    text = f"{100 * accuracy:.2f} %"
    if run.evaluated is None or not math.isfinite(run.evaluated[run.metric]):
        return text
    return f"{text}; the student is {100 * (run.evaluated[run.metric] - accuracy):+.2f} points from it"
