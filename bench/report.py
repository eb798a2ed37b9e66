"""Tables and plots of results. Turns the JSON of pytest-benchmark into a CSV file, a Markdown table and a plot."""

import csv
import json
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch

from bench.providers import BASELINE


def hardware() -> str:
    """The processor's name and how many cores this process may use."""
    names = {
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    }
    return f"{', '.join(sorted(names)) or platform.machine()}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """``name`` as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table. Columns of text are aligned on the left, columns of numbers on the right."""
    marks = ["---" if name in ("provider", "method", "case", "part", "work") else "---:" for name in columns]
    return [f"| {' | '.join(cells)} |" for cells in (columns, marks, *rows)]


def cell(value: float | None, how: str, unit: str = "") -> str:
    """The value in a table; empty for None."""
    return "" if value is None else f"{value:{how}}{unit}"


def rows_of(report: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """One row per case: median time, peak of extra memory, and both as ratios to the baseline of the same key."""
    rows = [
        {
            "provider": case["extra_info"]["provider"],
            key: case["extra_info"][key],
            "median_ms": 1e3 * case["stats"]["median"],
            "min_ms": 1e3 * case["stats"]["min"],
            "peak_extra_mib": case["extra_info"]["peak_extra_mib"],
        }
        for case in report["benchmarks"]
    ]
    add_ratios(rows, (key,), BASELINE)
    return sorted(rows, key=lambda row: row[key])


def add_ratios(rows: list[dict[str, Any]], group: tuple[str, ...], baseline: str) -> None:
    """Time and memory of every row as ratios to the baseline of its group, None where either was not measured."""
    bases = {tuple(row[key] for key in group): row for row in rows if row["provider"] == baseline}
    for row in rows:
        base = bases.get(tuple(row[key] for key in group), {})
        times, memory = (base.get("median_ms"), row["median_ms"]), (row["peak_extra_mib"], base.get("peak_extra_mib"))
        row["speedup"] = times[0] / times[1] if times[0] and times[1] else None
        row["memory_ratio"] = memory[0] / memory[1] if memory[0] is not None and memory[1] else None


def broken(json_path: Path, key: str, promises: dict[str, tuple[float, float]]) -> list[str]:
    """One line for every row of fastkd that is slower than promised, or takes more memory, against the baseline.

    ``promises``: times faster at least, and parts of its memory at most, by the first word of the row's case.
    """
    lines = []
    for row in rows_of(json.loads(json_path.read_text()), key):
        faster, memory = promises.get(re.split(r"\W", row[key])[0], (0.0, float("inf")))
        if "fastkd" in row["provider"] and (row["speedup"] < faster or row["memory_ratio"] > memory):
            found = f"{row['speedup']:.2f}x with {row['memory_ratio']:.1%} of the memory"
            lines.append(f"{row[key]}: {found}, expected {faster}x with {memory:.0%}")
    return lines


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write(json_path: Path, command: str, title: str, key: str) -> Path:
    """Writes .csv, .md and, if ``key`` is a number, .png beside the JSON file; returns the path of the table."""
    report = json.loads(json_path.read_text())
    rows = rows_of(report, key)
    write_csv(rows, json_path.with_suffix(".csv"))
    if key == "n":
        _plot(rows, json_path.with_suffix(".png"), title)
    table = json_path.with_suffix(".md")
    table.write_text(_markdown(rows, report["datetime"], command, title, key))
    return table


def _markdown(rows: list[dict[str, Any]], date: str, command: str, title: str, key: str) -> str:
    cells = [
        [
            *(str(row[key]), row["provider"], cell(row["median_ms"], ".3f"), cell(row["min_ms"], ".3f")),
            *(cell(row["speedup"], ".2f", "x"), cell(row["peak_extra_mib"], ".1f"), cell(row["memory_ratio"], ".1%")),
        ]
        for row in rows
    ]
    lines = [
        f"# {title}",
        "",
        f"- Hardware: {hardware()}",
        f"- Versions: Python {platform.python_version()}, torch {torch.__version__}",
        f"- Date: {date[:10]}; command: `{command}`",
        f"- Speed-up and memory ratio are against `{BASELINE}` in the same run; memory is the peak of resident memory",
        "  during one step, beyond what was resident before it.",
        "",
        *table((key, "provider", "median ms", "min ms", "speed-up", "peak extra MiB", "memory ratio"), cells),
    ]
    return "\n".join(lines) + "\n"


def _plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    draw(axes[0], rows, "n", "median_ms", "rows N", "median time, ms")
    draw(axes[1], rows, "n", "peak_extra_mib", "rows N", "peak extra memory, MiB")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{title} ({hardware()})", fontsize=10)
    figure.savefig(path, dpi=130)


def draw(axis: Any, rows: list[dict[str, Any]], x: str, y: str, x_label: str, y_label: str) -> None:
    """Draws one line per provider, over the rows in which it was measured."""
    measured = [row for row in rows if row[y] is not None]
    for provider in dict.fromkeys(row["provider"] for row in measured):
        own = [row for row in measured if row["provider"] == provider]
        sizes, values = [row[x] for row in own], [row[y] for row in own]
        axis.plot(sizes, values, marker="o", linewidth=2.5 if "fastkd" in provider else 1.2, label=provider)
    axis.set(xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
    ticks = sorted({row[x] for row in measured})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.grid(alpha=0.3)
