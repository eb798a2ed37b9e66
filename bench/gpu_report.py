"""The results of bench/gpu.py as CSV, Markdown and a plot, named after the hardware."""

import datetime
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from bench import report
from bench.providers import GPU_BASELINE, ON_LOGITS, PEERS

# Columns of a row that are None where it was not measured.
NUMBERS = ("median_ms", "graph_ms", "peak_extra_mib", "loss_error", "grad_error", "gb_per_s")
GROUP = ("case", "dtype", "n", "d")


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


def write(
    rows: list[dict[str, Any]],
    device: torch.device,
    ceilings: dict[str, float],
    command: str,
    seconds: float,
    output: Path,
) -> Path:
    """Writes .csv, .md and .png to the folder ``output``; returns the path of the table."""
    output.mkdir(parents=True, exist_ok=True)
    name = hardware(device).split(", ")[0] if device.type == "cuda" else hardware(device)
    path = output / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.md"
    report.add_ratios(rows, GROUP, GPU_BASELINE)
    for row in rows:
        row["of_copy"] = row["gb_per_s"] / ceilings["copy_gb_per_s"] if row["gb_per_s"] else None
    report.write_csv(rows, path.with_suffix(".csv"))
    _plot(rows, path.with_suffix(".png"), hardware(device))
    path.write_text(_markdown(rows, device, ceilings, command, seconds))
    return path


def _markdown(
    rows: list[dict[str, Any]], device: torch.device, ceilings: dict[str, float], command: str, seconds: float
) -> str:
    packages = f"torch {torch.__version__}, triton {version('triton')}, fastkd {version('fastkd')}"
    lines = [
        "# Losses on a GPU, forward + backward",
        "",
        f"- Hardware: {hardware(device)}",
        f"- Versions: Python {platform.python_version()}, {packages}, CUDA {torch.version.cuda}",
        f"- Peers: {', '.join(f'{name} {version(name)}' for name in PEERS)}",
        f"- Date: {datetime.date.today()}; command: `{command}`; {seconds:.0f} s",
        f"- Ceilings, measured in this run: copy {ceilings['copy_gb_per_s']:.0f} GB/s, bf16 matmul "
        f"{ceilings['matmul_tflop_per_s']:.3g} TFLOP/s",
        f'- fp32 products: precision {torch.get_float32_matmul_precision()!r} ("high" is tf32), for every provider',
        "- median: called from Python, cold L2 cache. graph: the same in a CUDA graph, without Python. memory: peak of",
        "  one step beyond what was allocated before it, the gradients included. error: relative to float64, of the",
        f"  student's gradient. speed-up and memory ratio: against `{GPU_BASELINE}`. GB/s: 5 elements a logit, which",
        "  is what reading both logits twice and writing one gradient moves, over the shorter time, and of the copy.",
    ]
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
        lines += ["", *_table(case, dtype, own)]
    return "\n".join(lines) + "\n"


def _table(case: str, dtype: str, rows: list[dict[str, Any]]) -> list[str]:
    width = "C" if case in ON_LOGITS else "D"
    bandwidth = " GB/s | of copy |" if case in ON_LOGITS else ""
    lines = [
        f"## {case}, {dtype} inputs",
        "",
        f"| N | {width} | provider | median ms | graph ms | speed-up | memory MiB | memory ratio | error |{bandwidth}",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|" + "---:|---:|" * bool(bandwidth),
    ]
    for row in rows:
        head = f"| {row['n']} | {row['d']} | {row['provider']} |"
        if row["status"] != "ok":
            lines.append(f"{head} {row['status'].replace('|', '/')} |")
            continue
        cells = [
            _format(row["median_ms"], ".4g"),
            _format(row["graph_ms"], ".4g"),
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
    """Time and memory of each case over N at its first width, bandwidth of the losses on logits over their size."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(len(names), 2, figsize=(11, 3.8 * len(names)), layout="constrained", squeeze=False)
    for (time, other), name in zip(axes, names, strict=True):
        first = next(row for row in rows if row["case"] == name)
        own = [row for row in rows if (row["case"], row["dtype"]) == (name, first["dtype"])]
        time.set_title(f"{name}, {first['dtype']}", fontsize=10)
        if name in ON_LOGITS:
            own = [row | {"elements": row["n"] * row["d"]} for row in own]
            report.draw(time, own, "elements", "median_ms", "logits N C", "median time, ms")
            report.draw(other, own, "elements", "gb_per_s", "logits N C", "GB/s")
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
