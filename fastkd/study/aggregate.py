"""The numbers of a study's table: means, deviations, paired differences, and the papers' relative improvement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastkd.study.grid import TEACHER, Study
from fastkd.study.records import Record, records


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of paired differences over the seeds that both sides have."""

    seeds: int
    mean: float
    error: float | None  # standard error of the mean; None with one seed
    low: float | None  # 95 % interval of Student's t
    high: float | None

    @property
    def exceeds_noise(self) -> bool:
        """Whether the 95 % interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One place of the table.

    Attributes:
        row, column: where it is.
        values: by seed, in the unit of the study, of the finished runs.
        published: the published number, None where there is none.
        to_baseline, to_vanilla: the paired differences to these rows of the same column.
        errors: what the failed runs said, by seed.
        missing: how many runs have no result yet.
        seconds: the mean of the runs' training times, None where none has one.
    """

    row: str
    column: str
    values: Mapping[int, float]
    published: float | None
    to_baseline: Difference | None
    to_vanilla: Difference | None
    errors: Mapping[int, str]
    missing: int
    seconds: float | None

    @property
    def mean(self) -> float | None:
        """The mean over seeds, None without a finished run."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation of a sample (divided by n - 1), None for fewer than two runs."""
        return spread(list(self.values.values()))


def entries(study: Study, folder: Path) -> dict[tuple[str, str], Entry]:
    """Every place of the table of ``study``, from the records in ``folder``, by (row, column)."""
    found = records(study, folder)
    values: dict[tuple[str, str], dict[int, Record | None]] = {}
    for cell in study.cells:
        if cell.shown:
            values.setdefault((cell.row, cell.column), {})[cell.seed] = found.get(cell.place)

    def finished(row: str | None, column: str) -> dict[int, float]:
        runs = values.get((row or "", column), {})
        return {seed: run.values[study.measure] for seed, run in runs.items() if run and run.status == "finished"}

    def difference(row: str, reference: str | None, column: str) -> Difference | None:
        compared = row not in (reference, TEACHER)
        return paired(finished(row, column), finished(reference, column)) if compared else None

    table = {}
    for (row, column), runs in values.items():
        own = finished(row, column)
        times = [run.values["seconds"] for run in runs.values() if run is not None and "seconds" in run.values]
        table[row, column] = Entry(
            row=row,
            column=column,
            values=own,
            published=study.published.get((row, column)),
            to_baseline=difference(row, study.baseline, column),
            to_vanilla=difference(row, study.vanilla, column),
            errors={seed: run.error for seed, run in runs.items() if run is not None and run.status == "failed"},
            missing=sum(run is None for run in runs.values()),
            seconds=statistics.fmean(times) if times else None,
        )
    return table


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """``values`` minus ``reference``, seed by seed. None without a common seed.

    Example:
        >>> paired({0: 71.0, 1: 73.0}, {0: 70.0, 1: 71.0, 2: 99.0}).mean
        1.5
    """
    deltas = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    if not deltas:
        return None
    mean, error, low, high = statistics.fmean(deltas), None, None, None
    if len(deltas) > 1:
        from scipy import stats  # type: ignore[import-untyped]

        error = statistics.stdev(deltas) / math.sqrt(len(deltas))
        margin = float(stats.t.ppf(0.975, len(deltas) - 1)) * error
        low, high = mean - margin, mean + margin
    return Difference(seeds=len(deltas), mean=mean, error=error, low=low, high=high)


def relative_improvement(
    row: Mapping[str, float], baseline: Mapping[str, float], vanilla: Mapping[str, float]
) -> float | None:
    """The average relative improvement of a method over a baseline, in percent (arXiv 1910.10699 and 2407.11802).

    It is the mean over the columns (pairs) i of ``(row_i - baseline_i) / (baseline_i - vanilla_i)``, over those that
    all three have and where the baseline differs from the students without a teacher. None if there is none. From the
    numbers of its table 1, DCD's paper gets 20.31 % for DCD and 73.87 % for DCD + KD over KD, and this function too.

    Example:
        >>> relative_improvement({"a": 72.0}, {"a": 71.0}, {"a": 69.0})
        50.0
    """
    common = [name for name in row if name in baseline and name in vanilla and baseline[name] != vanilla[name]]
    shares = [(row[name] - baseline[name]) / (baseline[name] - vanilla[name]) for name in common]
    return 100 * statistics.fmean(shares) if shares else None


def improvements(study: Study, table: Mapping[tuple[str, str], Entry]) -> dict[str, tuple[float | None, float | None]]:
    """The relative improvement of every row over the baseline: of the runs here, and of the published numbers."""
    if study.baseline is None or study.vanilla is None or len(study.columns) < 2:
        return {}
    here = {row: {c: m for c in study.columns if (m := _mean(table, row, c)) is not None} for row in study.rows}
    there = {row: {c: study.published[row, c] for c in study.columns if (row, c) in study.published} for row in here}
    return {
        row: (
            relative_improvement(here[row], here.get(study.baseline, {}), here.get(study.vanilla, {})),
            relative_improvement(there[row], there.get(study.baseline, {}), there.get(study.vanilla, {})),
        )
        for row in study.rows
        if row not in (study.baseline, study.vanilla)
    }


def _mean(table: Mapping[tuple[str, str], Entry], row: str, column: str) -> float | None:
    entry = table.get((row, column))
    return None if entry is None else entry.mean


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample (divided by n - 1). None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def with_spread(values: Sequence[float], digits: int = 2) -> str:
    """``mean ± standard deviation``, or the mean alone for a single value."""
    deviation = spread(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if deviation is None else f"{mean} ± {deviation:.{digits}f}"


def signed(value: float, digits: int = 2) -> str:
    """The value with its sign, a typographic minus, and no negative zero."""
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def with_error(difference: Difference | None) -> str:
    """``mean ± standard error`` of a difference. Empty if there is none."""
    if difference is None:
        return ""
    return signed(difference.mean) + ("" if difference.error is None else f" ± {difference.error:.2f}")
