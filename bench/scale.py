"""``make bench-scale`` shows how ``dcd_loss`` with negatives from all ranks scales. Part is measured, part modelled.

Measured on this machine are time and bytes of a forward and backward on 1 to 4 local gloo ranks of one thread each: of
fastkd (one all-gather, owner-computes backward), of its ring, and of gather + reduce-scatter. Bytes are counted at the
collectives, whether Python or C++ starts them.

Modelled for 8 to 1024 GPUs are step time, traffic and memory of a rank. The model takes the byte counts that the
measurement confirms, a bandwidth, and the time of a forward and backward on one GPU at N = 32768 (``--gpu-ms``).
Nothing modelled was run.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bench.measuring.traffic import CountedBytes
from bench.report import hardware, table, write_csv
from fastkd import dcd_loss
from fastkd.distributed import group as distributed

WIDTH = 128
MEASURED_ROWS = 512  # of a rank
MODELLED_ROWS = 256
MODELLED_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
BANDWIDTHS = (50, 400)  # GB/s that a rank sends and receives at
LATENCY = 20e-6  # seconds of a collective, or of one step of a ring
REFERENCE_N = 32768


class _GatherWithGradient(torch.autograd.Function):
    """Gathers the features and reduce-scatters their gradients, as most public code does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        everyone = x.new_empty(dist.get_world_size() * len(x), x.shape[1])
        dist.all_gather_into_tensor(everyone, x)
        return everyone

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.new_empty(len(grad) // dist.get_world_size(), grad.shape[1])
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


def gather_reduce_scatter(student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
    """This rank's part of the loss. The features are gathered with gradients; the rank has n rows of both logits."""
    s = torch.nn.functional.normalize(student, dim=1)
    t = torch.nn.functional.normalize(teacher, dim=1)
    s_all, t_all = _GatherWithGradient.apply(torch.cat([s, t], dim=1)).split(WIDTH, dim=1)
    log_p, log_q = (scale * s @ t_all.T).log_softmax(dim=1), (scale * t @ s_all.T).log_softmax(dim=1)
    positive = torch.arange(len(s)) + dist.get_rank() * len(s)
    contrast = torch.nn.functional.nll_loss(log_p, positive)
    return contrast + 0.5 * torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def fastkd_ring(student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
    """``dcd_loss`` without room for the gathered rows, so that they are passed on in a ring."""
    distributed.configure(max_gathered_bytes=0)
    return dcd_loss(student, teacher, scale)


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fastkd": dcd_loss,
    "fastkd ring": fastkd_ring,
    "gather + reduce-scatter": gather_reduce_scatter,
}


def _measure(rank: int, world_size: int, store: str, method: str, rounds: int, output: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    generator = torch.Generator().manual_seed(rank)
    student, teacher = (torch.randn(MEASURED_ROWS, WIDTH, generator=generator).requires_grad_() for _ in range(2))
    scale = torch.tensor(2.718, requires_grad=True)
    times = []
    for _ in range(rounds + 1):
        dist.barrier()
        begun = time.perf_counter()
        METHODS[method](student, teacher, scale).backward()
        times.append(time.perf_counter() - begun)
    with CountedBytes() as counter:  # not in the timed rounds, because counting takes time
        METHODS[method](student, teacher, scale).backward()
    if rank == 0:
        sent = sum(counter.sent.values())
        Path(output).write_text(json.dumps({"seconds": statistics.median(times[1:]), "bytes": sent}))
    dist.barrier()
    dist.destroy_process_group()


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per method and number of ranks."""
    rows = []
    for method in METHODS:
        for world_size in (1, 2, 3, 4):
            with tempfile.TemporaryDirectory() as folder:
                output = f"{folder}/result.json"
                mp.spawn(_measure, (world_size, f"{folder}/store", method, rounds, output), nprocs=world_size)
                result = json.loads(Path(output).read_text())
            expected = METHOD_BYTES[method](world_size, MEASURED_ROWS, 4)
            rows.append({"method": method, "ranks": world_size, **result, "modelled_bytes": expected})
            print(rows[-1], flush=True)
    return rows


# Bytes that a rank sends in a step of n rows per rank, with b bytes per exchanged number.
METHOD_BYTES: dict[str, Callable[[int, int, int], int]] = {
    "fastkd": lambda ranks, n, b: (ranks - 1) * (n * (2 * WIDTH * b + 12) + 32),
    "fastkd ring": lambda ranks, n, b: (ranks - 1) * (n * (2 * 2 * WIDTH * b + 12) + 32),
    "gather + reduce-scatter": lambda ranks, n, b: (ranks - 1) * n * 2 * (2 * WIDTH * b),
    # The features travel forward. In the backward they travel again, together with the gradients.
    "ring of fp32 features": lambda ranks, n, _: (ranks - 1) * n * 3 * (2 * WIDTH * 4),
}


@dataclass(frozen=True)
class Point:
    """A modelled step of one rank."""

    method: str
    ranks: int
    bandwidth: int
    seconds: float
    bytes: int
    memory: int


def model(gpu_ms: float) -> Iterator[Point]:
    """One point for every method at every number of ranks and bandwidth.

    A forward takes 4 n N D operations. The owner-computes backward takes 8, and a backward that also computes gradients
    for other ranks' rows takes 12, all at the rate of ``gpu_ms``. A gather overlaps the rank's own block; that fastkd's
    chunks overlap more is left out. A ring step overlaps its block. A reduce-scatter overlaps nothing, because the
    gradient is complete only at the end.
    """
    rate = 12 * REFERENCE_N**2 * WIDTH / (gpu_ms * 1e-3)
    n = MODELLED_ROWS
    for bandwidth in BANDWIDTHS:
        for ranks in MODELLED_RANKS:
            total = n * ranks
            forward, backward = 4 * n * total * WIDTH / rate, 8 * n * total * WIDTH / rate

            def sending(size: float, steps: int = 1, per_second: float = bandwidth * 1e9) -> float:
                return size / per_second + steps * LATENCY

            half, full = 2 * WIDTH * 2, 2 * WIDTH * 4  # bytes of a row in bf16 and in fp32
            others = (ranks - 1) * n
            own = forward / ranks
            gathered = LATENCY + max(own, sending(others * half)) + forward - own  # LATENCY: the ranks agree first
            seconds = {
                # The numbers per row travel while the loss goes back through whatever was computed from it.
                "fastkd": gathered + max(backward, sending(others * 12)),
                "fastkd ring": LATENCY
                + ranks * max(forward / ranks, sending(n * half))
                + ranks * max(backward / ranks, sending(n * half)),
                "gather + reduce-scatter": gathered - LATENCY + backward * 12 / 8 + sending(others * half),
                "ring of fp32 features": ranks * max(forward / ranks, sending(n * full))
                + ranks * max(backward * 12 / 8 / ranks, sending(n * 2 * full)),
            }
            memory = {
                "fastkd": total * (half + 12),
                "fastkd ring": 2 * n * half + total * 12,
                "gather + reduce-scatter": total * half * 2,
                "ring of fp32 features": 2 * n * full * 2,
            }
            for method, value in seconds.items():
                size = METHOD_BYTES[method](ranks, n, 2)
                yield Point(method, ranks, bandwidth, value, size, memory[method])


def plot(measured: list[dict[str, Any]], points: list[Point], path: Path) -> None:
    """Draws what was measured with solid lines, and what was modelled with dashed lines and open markers."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    colours = dict(zip(METHOD_BYTES, ("C0", "C2", "C3", "C1"), strict=True))
    modelled = [asdict(point) for point in points]
    title = f"MEASURED: gloo, fp32, {MEASURED_ROWS} rows per rank"

    def draw(axis: Any, rows: list[dict[str, Any]], key: str, factor: float, **style: Any) -> None:
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            x, y = [row["ranks"] for row in own], [row[key] * factor for row in own]
            axis.plot(x, y, marker="o", color=colours[method], label=method, **style)
        axis.grid(alpha=0.3)

    for axis, key, factor, label in (
        (axes[0, 0], "bytes", 2**-20, "MiB sent by a rank per step"),
        (axes[0, 1], "seconds", 1e3, "ms per step (2 cores for all ranks)"),
    ):
        draw(axis, measured, key, factor)
        axis.set(title=title, xlabel="ranks", ylabel=label)
        axis.set_xticks([1, 2, 3, 4])
    for axis, bandwidth, key, factor, label in (
        (axes[1, 0], BANDWIDTHS[0], "seconds", 1e3, "ms per step"),
        (axes[1, 1], BANDWIDTHS[1], "seconds", 1e3, "ms per step"),
        (axes[0, 2], BANDWIDTHS[0], "bytes", 2**-20, "MiB sent by a rank per step"),
        (axes[1, 2], BANDWIDTHS[0], "memory", 2**-20, "MiB per rank"),
    ):
        rows = [row for row in modelled if row["bandwidth"] == bandwidth]
        draw(axis, rows, key, factor, linestyle="--", markerfacecolor="none")
        title = f"MODELLED: {f'{bandwidth} GB/s, ' * (key == 'seconds')}bf16, {MODELLED_ROWS} rows per rank"
        axis.set(title=title, xlabel="ranks", ylabel=label, xscale="log", yscale="log")
        axis.set_xticks(MODELLED_RANKS, [str(ranks) for ranks in MODELLED_RANKS])
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def markdown(measured: list[dict[str, Any]], points: list[Point], gpu_ms: float) -> str:
    """The tables, measured and modelled apart."""
    by_key = {(point.method, point.ranks, point.bandwidth): point for point in points}
    measured_cells = [
        [
            row["method"],
            str(row["ranks"]),
            f"{1e3 * row['seconds']:.1f}",
            *(f"{row[x]:,}" for x in ("bytes", "modelled_bytes")),
        ]
        for row in measured
    ]
    modelled_cells = []
    for method in METHOD_BYTES:
        for ranks in MODELLED_RANKS:
            slow, fast = (by_key[method, ranks, bandwidth] for bandwidth in BANDWIDTHS)
            numbers = (1e3 * slow.seconds, 1e3 * fast.seconds, slow.bytes / 2**20, slow.memory / 2**20)
            modelled_cells.append([method, str(ranks), *(f"{number:.2f}" for number in numbers)])
    lines = [
        "# dcd_loss with negatives from all ranks",
        "",
        f"- Hardware: {hardware()}; Python {platform.python_version()}, torch {torch.__version__}",
        f"- Command: `make bench-scale`; D = {WIDTH}",
        "",
        f"## Measured: local gloo ranks of one thread, fp32, {MEASURED_ROWS} rows per rank, forward + backward",
        "",
        "The ranks share this machine's cores: times beyond 2 ranks show that, not the network's.",
        "",
        *table(("method", "ranks", "ms", "bytes sent by a rank", "bytes of the model"), measured_cells),
        "",
        f"## Modelled, not run: bf16, {MODELLED_ROWS} rows per rank",
        "",
        f"Ingredients: {gpu_ms:g} ms for a forward and backward of N = {REFERENCE_N} on one GPU (`--gpu-ms`), "
        f"{1e6 * LATENCY:g} us per collective or ring step, the bytes above, the bandwidth of a rank. Memory: what the "
        "exchange needs; eager code adds several n x N matrices to gather + reduce-scatter.",
        "",
        *table(
            ("method", "ranks", "ms at 50 GB/s", "ms at 400 GB/s", "MiB sent by a rank", "MiB of memory"),
            modelled_cells,
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, model, and write JSON, CSV, Markdown and plots to bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-ms", type=float, default=4.7, help="ms of one GPU at N = 32768, D = 128, bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    measured, points = measure(arguments.rounds), list(model(arguments.gpu_ms))
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "scale"
    content = {"hardware": hardware(), "gpu_ms": arguments.gpu_ms, "measured": measured}
    path.with_suffix(".json").write_text(json.dumps({**content, "modelled": [asdict(x) for x in points]}, indent=1))
    names = [field.name for field in fields(Point)]
    rows = [{"kind": "measured", **{name: row.get(name) for name in names}} for row in measured]
    write_csv([*rows, *({"kind": "modelled", **asdict(point)} for point in points)], path.with_suffix(".csv"))
    plot(measured, points, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(markdown(measured, points, arguments.gpu_ms))
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
