"""The results of bench/gpu.py as CSV, Markdown and a plot, named after the hardware."""

import csv
import datetime
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from bench import report
from bench.providers import GPU_BASELINE, MEMORY_BOUND, ON_LOGITS, PEERS, POOLS

# Columns of a row that are None where it was not measured.
NUMBERS = ("median_ms", "host_ms", "graph_ms", "peak_extra_mib", "loss_error", "grad_error", "gb_per_s")
GROUP = ("case", "dtype", "n", "d", "side")
COLUMNS = (*GROUP, "provider", "status", "note", *NUMBERS, "speedup", "memory_ratio", "of_copy")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def hardware(device: torch.device) -> str:
    if device.type != "cuda":
        return report.hardware()
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.multi_processor_count} SM, {properties.total_memory / 2**30:.0f} GiB"


class Results:
    """The rows of a run: each case is in the CSV file once it is measured; the table and the plot come last."""

    def __init__(self, device: torch.device, ceilings: dict[str, float], command: str, output: Path) -> None:
        self.device, self.ceilings, self.command = device, ceilings, command
        name = hardware(device).split(", ")[0] if device.type == "cuda" else hardware(device)
        self.path = output / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.md"
        self.rows: list[dict[str, Any]] = []

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds the rows of whole cases. The first ones replace the file of an earlier run."""
        report.add_ratios(rows, GROUP, GPU_BASELINE)
        for row in rows:
            row["of_copy"] = row["gb_per_s"] / self.ceilings["copy_gb_per_s"] if row["gb_per_s"] else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".csv").open("a" if self.rows else "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not self.rows:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += rows

    def finish(self, seconds: float) -> Path:
        """Writes .md and .png beside the CSV file; returns the path of the table."""
        self.path.write_text(_markdown(self.rows, self.device, self.ceilings, self.command, seconds))
        _plot(self.rows, self.path.with_suffix(".png"), hardware(self.device))
        return self.path


def _markdown(
    rows: list[dict[str, Any]], device: torch.device, ceilings: dict[str, float], command: str, seconds: float
) -> str:
    packages = f"torch {torch.__version__}, triton {version('triton')}, fastkd {version('fastkd')}"
    lines = [
        "# Losses and pooling on a GPU, forward + backward",
        "",
        f"- Hardware: {hardware(device)}",
        f"- Versions: Python {platform.python_version()}, {packages}, CUDA {torch.version.cuda}",
        f"- Peers: {', '.join(f'{name} {version(name)}' for name in PEERS)}",
        f"- Date: {datetime.date.today()}; command: `{command}`; {seconds:.0f} s",
        f"- Ceilings, measured in this run: copy {ceilings['copy_gb_per_s']:.0f} GB/s, bf16 matmul "
        f"{ceilings['matmul_tflop_per_s']:.3g} TFLOP/s",
        f'- fp32 products: precision {torch.get_float32_matmul_precision()!r} ("high" is tf32), for every provider',
        "- median: called from Python, cold L2 cache. host: what Python needs to launch a step on an idle GPU; where",
        "  it is close to the median, the median is mostly launching, as at small N. graph: the same kernels in a CUDA",
        "  graph, so without Python; not measured for peers, for `fastkd blocked` (too many nodes), and where the work",
        "  is so large that launching does not count.",
        "- memory: peak of one step beyond what was allocated before it, the gradients included. error: relative to",
        "  float64, of the gradient of the student or of the map. speed-up (of the median) and memory ratio: against",
        f"  `{GPU_BASELINE}`.",
        "- GB/s: what must be moved over the shorter time, and of the copy. 5 elements a logit: both logits are read",
        "  twice and one gradient is written. Pooling: 2 elements an element of the map and of rows, 3 of unit rows.",
    ]
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
        lines += ["", *_table(case, dtype, own)]
    return "\n".join(lines) + "\n"


def _table(case: str, dtype: str, rows: list[dict[str, Any]]) -> list[str]:
    width = "C" if case in ON_LOGITS else "C x H x W" if case in POOLS else "D"
    bandwidth = " GB/s | of copy |" if case in MEMORY_BOUND else ""
    lines = [
        f"## {case}, {dtype} inputs",
        "",
        f"| N | {width} | provider | median ms | host ms | graph ms | speed-up | memory MiB | memory ratio | error |"
        + bandwidth,
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|" + "---:|---:|" * bool(bandwidth),
    ]
    for row in rows:
        size = " x ".join(str(x) for x in (row["d"], row["side"], row["side"]) if x is not None)
        head = f"| {row['n']} | {size} | {row['provider']} |"
        if row["status"] != "ok":
            lines.append(f"{head} {row['status'].replace('|', '/')} |")
            continue
        cells = [
            _format(row["median_ms"], ".4g"),
            _format(row["host_ms"], ".3g"),
            _format(row["graph_ms"], ".4g") or row["note"].replace("|", "/"),
            _format(row["speedup"], ".2f", "x"),
            _format(row["peak_extra_mib"], ".1f"),
            _format(row["memory_ratio"], ".1%"),
            _format(row["grad_error"], ".1e"),
        ]
        if bandwidth:
            cells += [_format(row["gb_per_s"], ".0f"), _format(row["of_copy"], ".0%")]
        lines.append(f"{head} {' | '.join(cells)} |")
    return lines


def _format(value: float | None, how: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{how}}{unit}"


def _plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Time and memory of each case over N at its first width, bandwidth where memory bounds it over the size."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(len(names), 2, figsize=(11, 3.8 * len(names)), layout="constrained", squeeze=False)
    for (time, other), name in zip(axes, names, strict=True):
        first = next(row for row in rows if row["case"] == name)
        own = [row for row in rows if (row["case"], row["dtype"]) == (name, first["dtype"])]
        time.set_title(f"{name}, {first['dtype']}", fontsize=10)
        if name in MEMORY_BOUND:
            own = [row | {"elements": row["n"] * row["d"] * (row["side"] or 1) ** 2} for row in own]
            label = "logits N C" if name in ON_LOGITS else "map N C H W"
            report.draw(time, own, "elements", "median_ms", label, "median time, ms")
            report.draw(other, own, "elements", "gb_per_s", label, "GB/s")
            for axis in (time, other):
                axis.set_xticks([], [])
                axis.xaxis.set_major_locator(plt.matplotlib.ticker.LogLocator())
                axis.xaxis.set_major_formatter(plt.matplotlib.ticker.LogFormatterMathtext())
        else:
            own = [row for row in own if row["d"] == first["d"]]
            report.draw(time, own, "n", "median_ms", f"rows N, D = {first['d']}", "median time, ms")
            report.draw(other, own, "n", "peak_extra_mib", f"rows N, D = {first['d']}", "peak extra memory, MiB")
            time.tick_params(axis="x", labelrotation=45)
            other.tick_params(axis="x", labelrotation=45)
        if time.get_legend_handles_labels()[0]:
            time.legend(fontsize=7)
    figure.suptitle(f"forward + backward ({title})", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
