"""Turns the JSON of pytest-benchmark into a CSV file, a Markdown table and a plot, with the ratios to the baseline."""

import csv
import json
import platform
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


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a case: the median time, the peak of extra memory, and both as ratios to the baseline of the same N."""
    rows = [
        {
            "provider": case["extra_info"]["provider"],
            "n": case["extra_info"]["n"],
            "median_ms": 1e3 * case["stats"]["median"],
            "min_ms": 1e3 * case["stats"]["min"],
            "peak_extra_mib": case["extra_info"]["peak_extra_mib"],
        }
        for case in report["benchmarks"]
    ]
    baseline = {row["n"]: row for row in rows if row["provider"] == BASELINE}
    for row in rows:
        base = baseline.get(row["n"])
        row["speedup"] = base["median_ms"] / row["median_ms"] if base else None
        row["memory_ratio"] = (
            row["peak_extra_mib"] / base["peak_extra_mib"] if base and base["peak_extra_mib"] else None
        )
    return sorted(rows, key=lambda row: row["n"])


def write(json_path: Path, command: str) -> Path:
    """Writes .csv, .md and .png beside the JSON file; returns the path of the table."""
    report = json.loads(json_path.read_text())
    rows = rows_of(report)
    with json_path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
    _plot(rows, json_path.with_suffix(".png"))
    table = json_path.with_suffix(".md")
    table.write_text(_markdown(rows, report["datetime"], command))
    return table


def _markdown(rows: list[dict[str, Any]], date: str, command: str) -> str:
    lines = [
        "# dcd_loss, forward + backward, float32, D = 128",
        "",
        f"- Hardware: {hardware()}",
        f"- Versions: Python {platform.python_version()}, torch {torch.__version__}",
        f"- Date: {date[:10]}; command: `{command}`",
        f"- Speed-up and memory ratio are against `{BASELINE}` in the same run; memory is the peak of resident memory",
        "  during one step, beyond what was resident before it.",
        "",
        "| N | provider | median ms | min ms | speed-up | peak extra MiB | memory ratio |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        memory = "" if row["memory_ratio"] is None else f"{100 * row['memory_ratio']:.1f} %"
        lines.append(
            f"| {row['n']} | {row['provider']} | {row['median_ms']:.2f} | {row['min_ms']:.2f} | {speedup} "
            f"| {row['peak_extra_mib']:.1f} | {memory} |"
        )
    return "\n".join(lines) + "\n"


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, column, label in zip(
        axes, ("median_ms", "peak_extra_mib"), ("median time, ms", "peak extra memory, MiB")
    ):
        for provider in dict.fromkeys(row["provider"] for row in rows):
            own = [row for row in rows if row["provider"] == provider]
            sizes, values = [row["n"] for row in own], [row[column] for row in own]
            axis.plot(sizes, values, marker="o", linewidth=2.5 if "fastkd" in provider else 1.2, label=provider)
        axis.set(xlabel="rows N", ylabel=label, xscale="log", yscale="log")
        ticks = sorted({row["n"] for row in rows})
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"dcd_loss forward + backward, float32, D = 128 ({hardware()})", fontsize=10)
    figure.savefig(path, dpi=130)
