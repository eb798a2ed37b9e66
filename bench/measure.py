"""Time, memory and ceilings of the device at hand. On a CPU everything runs too, timed by the wall clock."""

import statistics
import time
from collections.abc import Callable

import torch

FLUSHED_BYTES = 1 << 28  # larger than any L2 cache


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median over about ``seconds`` of calls, at least three, each with a cold L2 cache and timed on the device."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    estimate = time.perf_counter() - start
    repeats = min(100, max(3, int(seconds / max(estimate, 1e-6))))
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        flushed.zero_()
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def graph_ms(step: Callable[[], object], device: torch.device, seconds: float) -> float | None:
    """As :func:`median_ms` for the step captured in a CUDA graph, so without Python; None where it cannot be."""
    if device.type != "cuda":
        return None
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except Exception:  # whatever it was that waited for the host: a peer may do as it likes
        torch.cuda.synchronize(device)
        return None
    return median_ms(graph.replay, device, seconds)


def peak_extra_mib(step: Callable[[], object], device: torch.device) -> float | None:
    """The peak of allocated memory during one step beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def copy_gb_per_s(device: torch.device, quick: bool) -> float:
    """Bytes read plus bytes written by a large copy, a second."""
    source = torch.ones(1 << (20 if quick else 30), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / median_ms(lambda: target.copy_(source), device, 0.2) / 1e6


def matmul_tflop_per_s(device: torch.device, quick: bool) -> float:
    """A square bf16 product."""
    n = 128 if quick else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    return 2 * n**3 / median_ms(lambda: torch.mm(a, a, out=out), device, 0.2) / 1e9
