"""``multiscale_pool`` with normalisation, forward + backward, fp32, on this machine's CPU, against the eager chain.

    python -m bench.bench_pool [--seconds 1.0] [--output bench/results]

The chain is avg_pool2d at every scale, cat, transpose and F.normalize; also through torch.compile, which gets one shape
at a time. Memory is the peak of resident memory during one step, beyond what was resident before it. Providers take
turns, so that a busy machine slows all of them. Writes CSV and Markdown named after the hardware.
"""

import argparse
import ctypes
import datetime
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import report
from bench.bench_dcd import _RESET_PEAK, _resident_bytes
from fastkd import multiscale_pool

Pool = Callable[[Tensor, list[int], list[int]], Tensor]
BASELINE = "eager chain"
GROUP = ("shape", "windows", "strides", "format")
FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
# (shape, windows, strides): MSDCRD's last map first, then a ViT's grid, then maps that take the axes apart.
CASES = (
    ((256, 512, 7, 7), [7, 4, 2], [1, 1, 1]),
    ((256, 512, 7, 7), [7, 4, 2], [7, 3, 2]),
    ((64, 384, 14, 14), [14, 7, 4, 2], [1, 1, 2, 2]),
    ((16, 256, 28, 28), [28, 14, 7, 2], [1, 1, 1, 1]),
    ((4, 256, 56, 56), [56, 28, 14, 7], [1, 14, 7, 7]),
)


def chain(features: Tensor, windows: list[int], strides: list[int]) -> Tensor:
    scales = [F.avg_pool2d(features, w, s).flatten(2) for w, s in zip(windows, strides, strict=True)]
    return F.normalize(torch.cat(scales, dim=2).transpose(1, 2), dim=2)


def compiled() -> Pool:
    torch.compiler.reset()
    return torch.compile(chain, fullgraph=True, dynamic=False)


PROVIDERS: dict[str, Callable[[], Pool]] = {
    BASELINE: lambda: chain,
    "torch.compile(chain)": compiled,
    "fastkd blocked": lambda: partial(multiscale_pool, normalize=True, backend="blocked"),
}


def measure_case(shape: tuple[int, ...], windows: list[int], strides: list[int], name: str, seconds: float) -> list:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator).contiguous(memory_format=FORMATS[name]).requires_grad_()
    expected = chain(features, windows, strides)
    upstream = torch.randn(expected.shape, generator=generator)
    (exact,) = torch.autograd.grad(expected, features, upstream)
    del expected
    steps: dict[str, Callable[[], None]] = {}
    rows: list[dict[str, Any]] = []
    for provider, build in PROVIDERS.items():
        pool = build()

        def step(pool: Pool = pool) -> None:
            features.grad = None
            pool(features, windows, strides).backward(upstream)

        step()
        assert features.grad is not None
        assert (features.grad - exact).norm() <= 1e-5 * exact.norm(), provider
        steps[provider] = step
        # What earlier steps freed must not be resident still: a step served from it would seem to need nothing.
        features.grad = None
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _RESET_PEAK.write_text("5")
        before = _resident_bytes("VmRSS")
        step()
        key = dict(zip(GROUP, (shape, windows, strides, name), strict=True))
        extra = (_resident_bytes("VmHWM") - before) / 2**20
        rows.append({**key, "provider": provider, "peak_extra_mib": extra})
    times: dict[str, list[float]] = {provider: [] for provider in steps}
    end = time.perf_counter() + seconds * len(steps)
    while time.perf_counter() < end or len(times[BASELINE]) < 5:
        for provider, step in steps.items():
            start = time.perf_counter()
            step()
            times[provider].append(1e3 * (time.perf_counter() - start))
    for row in rows:
        row |= {"median_ms": statistics.median(times[row["provider"]]), "min_ms": min(times[row["provider"]])}
    report.add_ratios(rows, GROUP, BASELINE)
    return rows


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# multiscale_pool with normalisation, forward + backward, float32",
        "",
        f"- Hardware: {report.hardware()}",
        f"- Versions: Python {platform.python_version()}, torch {torch.__version__}",
        f"- Date: {datetime.date.today()}; command: `{command}`",
        f"- Speed-up and memory ratio are against `{BASELINE}` in the same run; memory is the peak of resident memory",
        "  during one step, beyond what was resident before it.",
        "",
        "| map | windows | strides | format | provider | median ms | min ms | speed-up | extra MiB | memory ratio |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        key = " | ".join(str(row[name]) for name in GROUP)
        lines.append(
            f"| {key} | {row['provider']} | {row['median_ms']:.2f} | {row['min_ms']:.2f} | {row['speedup']:.2f}x "
            f"| {row['peak_extra_mib']:.1f} | {100 * row['memory_ratio']:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each provider and case")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rows = [row for case in CASES for name in FORMATS for row in measure_case(*case, name, options.seconds)]
    slug = re.sub(r"[^a-z0-9]+", "-", report.hardware().lower()).strip("-")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"pool-cpu-{slug}.md"
    path.write_text(markdown(rows, "python -m bench.bench_pool"))
    report.write_csv(rows, path.with_suffix(".csv"))
    print(path.read_text(), f"\nwritten to {options.output}", sep="")


if __name__ == "__main__":
    main()
