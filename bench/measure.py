"""Measures time, memory and ceilings of the device at hand. On a CPU the wall clock is the timer."""

import contextlib
import ctypes
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_RESET_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
FLUSHED_BYTES = 1 << 28  # larger than any L2 cache


def not_ready() -> str | None:
    """Why nothing of ours runs on a GPU here; None where it does."""
    if not torch.cuda.is_available():
        return "this needs a CUDA device, and torch.cuda.is_available() is False here"
    if importlib.util.find_spec("fastkd.kernels") is None:
        return "there is no fastkd.kernels; the Makefile's first lines say how to install it, also without a network"
    return None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def called_ms(step: Callable[[], object], until: torch.device | None = None) -> float:
    """The time that Python needs to call ``step``, and that the device ``until`` then needs to end it."""
    start = time.perf_counter()
    step()
    if until is not None:
        synchronize(until)
    return 1e3 * (time.perf_counter() - start)


def median_ms(step: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The median over about ``seconds`` of calls, at least three, each with a cold L2 cache and timed on the device."""
    synchronize(device)
    estimate = called_ms(step, until=device)
    repeats = min(100, max(3, int(1e3 * seconds / max(estimate, 1e-3))))
    if device.type != "cuda":
        return statistics.median(called_ms(step) for _ in range(repeats))
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        flushed.zero_()
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def host_ms(step: Callable[[], object], device: torch.device, seconds: float) -> float | None:
    """The median time in which Python launches the step on an idle GPU. None on a CPU, which launches nothing."""
    if device.type != "cuda":
        return None
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (len(times) < 20 and time.perf_counter() < end):
        torch.cuda.synchronize(device)
        times.append(called_ms(step))
    torch.cuda.synchronize(device)
    return statistics.median(times)


class CaptureError(RuntimeError):
    """The step cannot be captured in a CUDA graph. Torch may not capture, nor free cached memory, from here on."""


def graph_ms(step: Callable[[], object], device: torch.device, seconds: float) -> float | None:
    """The :func:`median_ms` of the step captured in a CUDA graph, so without Python. None on a CPU."""
    if device.type != "cuda":
        return None
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            step()
        current.wait_stream(side)
        with torch.cuda.graph(graph):
            step()
    except Exception as error:
        torch.cuda.set_stream(current)  # torch.cuda.graph leaves its own where the capture's end fails
        raise CaptureError(in_one_line(error)) from error
    return median_ms(graph.replay, device, seconds)


def release(device: torch.device) -> None:
    """Gives cached memory back to the device. After a failed capture torch refuses, and nothing is done."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def in_one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def peak_extra_mib(step: Callable[[], object], device: torch.device) -> float | None:
    """The peak of allocated memory during one step, beyond what was allocated before it. None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _resident_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_resident_mib(step: Callable[[], object]) -> float:
    """The peak of this process's resident memory during one step, beyond what was resident before it. Linux only."""
    # Memory that earlier steps freed goes back first. A step that is served from it would seem to need nothing.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    _RESET_PEAK.write_text("5")  # the peak of resident memory starts again at what is resident now
    before = _resident_bytes("VmRSS")
    step()
    return (_resident_bytes("VmHWM") - before) / 2**20


def rounds_for(rows: int) -> int:
    """How often a loss of so many rows is timed: hundreds of times where a step takes less than a millisecond."""
    return max(5, min(300, (1 << 26) // rows**2))


def run_case(benchmark: Any, step: Callable[[], object], rounds: int, warmup_rounds: int = 0, **info: Any) -> None:
    """Times ``step`` by pytest-benchmark's fixture, and notes its peak memory, the threads and ``info``."""
    step()  # compiles, and allocates what stays
    benchmark.group = info["case"]
    benchmark.extra_info.update(dtype="float32", threads=torch.get_num_threads(), **info)
    benchmark.extra_info["peak_extra_mib"] = peak_resident_mib(step)
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=warmup_rounds)


def copy_gb_per_s(device: torch.device, quick: bool) -> float:
    """Bytes read plus bytes written per second by a large copy."""
    source = torch.ones(1 << (20 if quick else 30), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / median_ms(lambda: target.copy_(source), device, 0.2) / 1e6


def matmul_tflop_per_s(device: torch.device, quick: bool) -> float:
    """Operations per second of a square bf16 product."""
    n = 128 if quick else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    return 2 * n**3 / median_ms(lambda: torch.mm(a, a, out=out), device, 0.2) / 1e9
