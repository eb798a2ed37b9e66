"""The results of bench/gpu.py as CSV, Markdown and a plot, named after the hardware."""

import csv
import datetime
import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

import fastkd
from bench import report
from bench.providers import GPU_BASELINE, MEMORY_BOUND, ON_LOGITS, PEERS, POOLS
from fastkd.distributed import pack

# Columns of a row that are None where it was not measured.
NUMBERS = ("median_ms", "host_ms", "graph_ms", "peak_extra_mib", "loss_error", "grad_error", "gb_per_s")
PLOT_EVERY = 60  # seconds: it takes seconds itself
GROUP = ("case", "dtype", "n", "d", "side")
COLUMNS = (*GROUP, "provider", "status", "note", *NUMBERS, "speedup", "memory_ratio", "of_copy")

# The numbers of a table, by the title of their column: their name in a row, format and unit.
SHOWN = {
    "median ms": ("median_ms", ".4g"),
    "host ms": ("host_ms", ".3g"),
    "graph ms": ("graph_ms", ".4g"),
    "speed-up": ("speedup", ".2f", "x"),
    "memory MiB": ("peak_extra_mib", ".1f"),
    "memory ratio": ("memory_ratio", ".1%"),
    "error": ("grad_error", ".1e"),
}
SHOWN_OF_MEMORY_BOUND = {"GB/s": ("gb_per_s", ".0f"), "of copy": ("of_copy", ".0%")}


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


def environment(device: torch.device) -> str:
    """Hardware and versions in one line."""
    extension = "with" if pack.extension_covers(device.type) else "without"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, triton {version('triton')}"
    return (
        f"{hardware(device)}; {versions}, CUDA {torch.version.cuda}, fastkd {fastkd.__version__} {extension} extension"
    )


class Results:
    """The rows of a run. After every case the CSV file and the table hold all that was measured; the plot follows.

    ``started``: when the run began, by ``time.monotonic``.
    """

    def __init__(
        self, device: torch.device, ceilings: dict[str, float], command: str, output: Path, started: float
    ) -> None:
        self.device, self.ceilings, self.command, self.started = device, ceilings, command, started
        name = hardware(device).split(", ")[0] if device.type == "cuda" else hardware(device)
        self.path = output / f"gpu-{report.slug(name)}.md"
        self.rows: list[dict[str, Any]] = []
        self._plotted = started

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds the rows of whole cases. The first ones replace the files of an earlier run."""
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
        self._write(with_plot=time.monotonic() - self._plotted > PLOT_EVERY)

    def finish(self) -> Path:
        """Writes the table and the plot beside the CSV file; returns the path of the table."""
        self._write(with_plot=True)
        return self.path

    def _write(self, with_plot: bool) -> None:
        """Each file is replaced as a whole, so that a run that is killed leaves none in halves."""
        table, plot = self.path.with_suffix(".md.part"), self.path.with_suffix(".part.png")
        table.write_text(_markdown(self.rows, self.device, self.ceilings, self.command, self.seconds))
        table.replace(self.path)
        if with_plot:
            _plot(self.rows, plot, hardware(self.device))
            plot.replace(self.path.with_suffix(".png"))
            self._plotted = time.monotonic()


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
        "- median: the step is called from Python, with a cold L2 cache. host: what Python needs to launch a step on",
        "  an idle GPU; near the median, as at small N, it means that the median is mostly launching. graph: the same",
        "  kernels in a CUDA graph, so without Python. It is not measured for peers, for `fastkd blocked` (too many",
        "  nodes), and where the work is so large that launching does not count.",
        "- memory: the peak of one step beyond what was allocated before it, the gradients included. error: of the",
        "  gradient of the student or of the map, relative to float64. speed-up (of the median) and memory ratio are",
        f"  against `{GPU_BASELINE}`.",
        "- GB/s: what must be moved over the shorter time, and its part of the copy. Losses on logits move 5 elements",
        "  per logit: both logits are read twice and one gradient is written. Pooling moves 2 per element of the map",
        "  and of the rows, 3 per element of unit rows.",
    ]
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
        lines += ["", *_table(case, dtype, own)]
    return "\n".join(lines) + "\n"


def _table(case: str, dtype: str, rows: list[dict[str, Any]]) -> list[str]:
    width = "C" if case in ON_LOGITS else "C x H x W" if case in POOLS else "D"
    shown = SHOWN | SHOWN_OF_MEMORY_BOUND if case in MEMORY_BOUND else SHOWN
    cells = []
    for row in rows:
        size = " x ".join(str(x) for x in (row["d"], row["side"], row["side"]) if x is not None)
        numbers = {name: report.cell(row[name], *how) for name, *how in shown.values()}
        numbers["graph_ms"] = numbers["graph_ms"] or row["note"].replace("|", "/")
        values = numbers.values() if row["status"] == "ok" else [row["status"].replace("|", "/")]
        cells.append([str(row["n"]), size, row["provider"], *values])
    return [f"## {case}, {dtype} inputs", "", *report.table(("N", width, "provider", *shown), cells)]


def _plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws time and memory of each case over N at its first width; where memory bounds it, bandwidth over the size."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(len(names), 2, figsize=(11, 3.8 * len(names)), layout="constrained", squeeze=False)
    for (times, other), name in zip(axes, names, strict=True):
        first = next(row for row in rows if row["case"] == name)
        own = [row for row in rows if (row["case"], row["dtype"]) == (name, first["dtype"])]
        times.set_title(f"{name}, {first['dtype']}", fontsize=10)
        if name in MEMORY_BOUND:
            own = [row | {"elements": row["n"] * row["d"] * (row["side"] or 1) ** 2} for row in own]
            label = "logits N C" if name in ON_LOGITS else "map N C H W"
            report.draw(times, own, "elements", "median_ms", label, "median time, ms")
            report.draw(other, own, "elements", "gb_per_s", label, "GB/s")
            for axis in (times, other):
                axis.set_xticks([], [])
                axis.xaxis.set_major_locator(plt.matplotlib.ticker.LogLocator())
                axis.xaxis.set_major_formatter(plt.matplotlib.ticker.LogFormatterMathtext())
        else:
            own = [row for row in own if row["d"] == first["d"]]
            report.draw(times, own, "n", "median_ms", f"rows N, D = {first['d']}", "median time, ms")
            report.draw(other, own, "n", "peak_extra_mib", f"rows N, D = {first['d']}", "peak extra memory, MiB")
            times.tick_params(axis="x", labelrotation=45)
            other.tick_params(axis="x", labelrotation=45)
        if times.get_legend_handles_labels()[0]:
            times.legend(fontsize=7)
    figure.suptitle(f"forward + backward ({title})", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
