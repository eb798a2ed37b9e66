"""Searches launch configurations on the GPU at hand and prints the entries of kernels/launch.py to paste.

    python -m bench.tune [--entries backward:2:128:bounded soft_target ...] [--seconds 540] [--rows 32768]
    python -m bench.tune --list         # the search space, on any machine

An entry is kernel:bytes per element:width:mode. The mode is bounded or online, and for soft_target the entry's place
among those of its kernel. --entries takes any part of the kernel's name and may leave out what follows. Rows of 128
come first. The search ends at --seconds or at a signal, and prints what it has found; the rest stays as it is.

Candidates are compiled in parallel, and left out where they spill or need more shared memory than the hardware has.
``ctas_per_sm`` is what the compiled code lets a multiprocessor hold. An entry that no candidate beats by two percent
stays as it is.
"""

import argparse
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from dataclasses import dataclass

import torch
from fastkd.kernels import launch
from fastkd.kernels.launch import LaunchConfig

from bench import gpu_report, measure

DUAL = ("dual_softmax_forward", "dual_softmax_backward")
SOFT = ("soft_target_forward", "soft_target_backward")
LOGITS = 1 << 27
WIDEST_CLASSES = 1 << 17  # what the last entry of soft_target is measured at


@dataclass(frozen=True)
class Entry:
    """One entry of the table. ``width``: of the rows it is measured with. ``mode``: bounded or online, or the place."""

    key: launch.Entry
    width: int
    mode: str

    @property
    def kernel(self) -> str:
        return self.key.kernel

    @property
    def dtype(self) -> torch.dtype:
        """Entries of soft_target serve every dtype and are measured in bf16."""
        return torch.float32 if self.key.itemsize == 4 else torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.kernel}:{self.dtype.itemsize}:{self.width}:{self.mode}"

    def matches(self, pattern: str) -> bool:
        (kernel, *own), (wanted, *rest) = self.name.split(":"), pattern.split(":")
        return wanted in kernel and len(rest) <= len(own) and all(x in ("", y) for x, y in zip(rest, own, strict=False))


def entries(hardware: str, kernels: tuple[str, ...]) -> Iterator[tuple[Entry, LaunchConfig]]:
    """The table's entries of these kernels, with what they are now."""
    places: Counter[str] = Counter()
    for key, config in launch.TABLE[hardware].items():
        if key.kernel in DUAL and key.kernel in kernels:
            yield Entry(key, key.width, "bounded" if key.bounded else "online"), config
        if key.kernel in SOFT and key.kernel in kernels:
            yield Entry(key, config.BLOCK_N, str(places[key.kernel])), config
            places[key.kernel] += 1


def plan(hardware: str, patterns: list[str] | None) -> list[tuple[Entry, LaunchConfig]]:
    """The entries that match a pattern, the most important first: rows of 128, then logits, then the other widths."""

    def rank(pair: tuple[Entry, LaunchConfig]) -> tuple[int, int]:
        entry = pair[0]
        return (1 if entry.kernel in SOFT else 0 if entry.width == 128 else 2), entry.dtype.itemsize

    found = [
        (entry, config)
        for entry, config in entries(hardware, (*DUAL, *SOFT))
        if patterns is None or any(entry.matches(pattern) for pattern in patterns)
    ]
    return sorted(found, key=rank)


def candidates(entry: Entry, current: LaunchConfig) -> list[LaunchConfig]:
    """The search space of an entry, the current one first."""
    if entry.kernel in DUAL:
        aparts = (False, True) if entry.kernel == DUAL[1] else (False,)
        space = [
            LaunchConfig(m, n, warps, stages, apart=apart)
            for m, n in itertools.product((32, 64, 128), (16, 32, 64, 128))
            for warps, stages, apart in itertools.product((4, 8), (1, 2, 3), aparts)
            if m >= n
        ]
    else:
        # A tile of the forward has to hold the row, except in the last entry.
        is_bound = entry.kernel == SOFT[0] and entry.key.width > 0
        widths = (current.BLOCK_N,) if is_bound or current.BLOCK_N < 1024 else (1024, 2048, 4096)
        space = [
            LaunchConfig(m, n, warps, 1)
            for m, n, warps in itertools.product((1, 2, 4, 8, 16, 32), widths, (1, 2, 4, 8, 16))
            if 128 * warps <= m * n <= 2048 * warps  # 4 to 64 elements per thread
        ]
    return [current, *(config for config in space if _shape(config) != _shape(current))]


def _shape(config: LaunchConfig) -> LaunchConfig:
    return dataclasses.replace(config, ctas_per_sm=1)


@contextlib.contextmanager
def table_with(hardware: str, entry: Entry, config: LaunchConfig) -> Iterator[None]:
    """The launch table with one entry exchanged."""
    table = launch.TABLE[hardware]
    before = table[entry.key]
    table[entry.key] = config
    launch.launch_config.cache_clear()
    try:
        yield
    finally:
        table[entry.key] = before
        launch.launch_config.cache_clear()


def compiled(hardware: str, entry: Entry, config: LaunchConfig) -> LaunchConfig | None:
    """The candidate with its ``ctas_per_sm``, or None where it spills or does not fit."""
    from bench.aot import compile as aot
    from bench.aot.jobs import jobs

    with table_with(hardware, entry, dataclasses.replace(config, ctas_per_sm=1)):
        results = [aot.examine(job) for job in jobs(hardware) if _compiles(job, entry, config)]
    assert results
    if any(result.failures() for result in results):
        return None
    registers = max(-(-result.registers // 8) * 8 * 32 * config.num_warps for result in results)
    shared = max(result.shared for result in results) + aot.SHARED_RESERVED
    resident = min(aot.REGISTERS // registers, aot.SHARED_TOTAL[hardware] // shared, 64 // config.num_warps)
    return dataclasses.replace(config, ctas_per_sm=max(1, resident))


def _compiles(job: object, entry: Entry, config: LaunchConfig) -> bool:
    """Whether an ahead-of-time job is one of this entry."""
    name, constants = str(job.name), job.constants  # type: ignore[attr-defined]
    if not name.startswith(f"{entry.kernel} {'fp32' if entry.dtype == torch.float32 else 'bf16'}"):
        return False
    if entry.kernel in DUAL:
        return f" D={entry.width} {entry.mode}" in name
    tile = constants["BLOCK_M"], constants["BLOCK_N"], job.num_warps  # type: ignore[attr-defined]
    return tile == (config.BLOCK_M, config.BLOCK_N, config.num_warps)


def step_of(entry: Entry, rows: int, device: torch.device) -> Callable[[], object]:
    """What is timed: the entry's kernel alone, at ``rows`` rows or at ``LOGITS`` logits."""
    if entry.kernel in SOFT:
        from fastkd.kernels import soft_target

        classes = entry.key.width or WIDEST_CLASSES
        n = LOGITS // classes
        x, y = (torch.randn(n, classes, device=device, dtype=entry.dtype) for _ in range(2))
        labels = torch.randint(classes, (n,), device=device)
        options = {"temperature": 4.0, "smoothing": 0.1}
        if entry.kernel == SOFT[0]:
            return lambda: soft_target.soft_target_losses(x, y, labels, None, **options)
        _, stats = soft_target.soft_target_losses(x, y, labels, None, **options)
        one = torch.ones((), device=device)
        return lambda: soft_target.soft_target_gradient(x, y, labels, None, stats, one, one, **options)
    from fastkd.kernels import normalize
    from fastkd.kernels.dual_softmax import per_row as dual_softmax_rows
    from fastkd.kernels.dual_softmax import streaming as dual_softmax

    x, y = (torch.randn(rows, entry.width, device=device, dtype=entry.dtype) for _ in range(2))
    units, _ = normalize.unit_rows(x, y, width=entry.width)
    scale, bounded = torch.tensor(10.0, device=device), entry.mode == "bounded"

    def forward() -> torch.Tensor:
        return dual_softmax.running_statistics(units, units, scale, offset=0, bounded=bounded)

    if entry.kernel == DUAL[0]:
        return forward
    _, stats = dual_softmax_rows.statistics(forward(), scale, None, swapped=False)
    one = torch.ones((), device=device)
    coef, _ = dual_softmax_rows.coefficients(stats, None, one, one, scale, swapped=False, bounded=bounded)
    return lambda: dual_softmax.gradient_sums(
        units, units, coef, coef, scale, offset=0, bounded=bounded, need_a=True, need_b=True
    )


def best_of(times: list[tuple[LaunchConfig, float]]) -> tuple[LaunchConfig, float]:
    """The fastest, or the first one, the current entry, where nothing beats it by two percent."""
    fastest = min(times, key=lambda pair: pair[1])
    return fastest if fastest[1] < 0.98 * times[0][1] else times[0]


def line_of(config: LaunchConfig) -> str:
    """As kernels/launch.py writes it."""
    options = [f"ctas_per_sm={config.ctas_per_sm}"] if config.ctas_per_sm != 1 else []
    options += ["apart=True"] if config.apart else []
    numbers = (str(x) for x in (config.BLOCK_M, config.BLOCK_N, config.num_warps, config.num_stages))
    return f"LaunchConfig({', '.join([*numbers, *options])})"


def lines_of(found: dict[Entry, LaunchConfig]) -> Iterator[str]:
    """The entries to paste, in the table's own words: one line where both modes are alike."""
    kernels: dict[str, dict[tuple[int, int], dict[bool | None, LaunchConfig]]] = {}
    for entry, config in found.items():
        kernel, itemsize, width, bounded = entry.key
        kernels.setdefault(kernel, {}).setdefault((itemsize, width), {})[bounded] = config
    for kernel, rows in kernels.items():
        yield f'"{kernel}": {{'
        for (itemsize, width), modes in rows.items():
            config, *others = modes.values()
            if None in modes or [config] == others:
                yield f"    ({itemsize}, {width}): {line_of(config)},"
            else:
                yield from (f"    ({itemsize}, {width}, {mode}): {line_of(x)}," for mode, x in modes.items())
        yield "},"


def prepare(hardware: str, entry: Entry, candidate: LaunchConfig, rows: int) -> LaunchConfig | None:
    """In a worker: what :func:`compiled` gives. Triton's cache then holds what a launch of it needs."""
    config = compiled(hardware, entry, candidate)
    if config is not None and torch.cuda.is_available():
        with table_with(hardware, entry, config):
            step_of(entry, rows, torch.device("cuda"))()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return config


@dataclass(frozen=True)
class Search:
    """Where to search, and for how long. ``each``: seconds of measurement per candidate."""

    hardware: str
    device: torch.device
    pool: Executor
    deadline: float
    rows: int = 32768
    each: float = 0.1

    def prepared(self, entry: Entry, current: LaunchConfig) -> Iterator[LaunchConfig]:
        """The candidates that are worth timing, the current one first, all compiled before the first is."""
        space = candidates(entry, current)
        futures = [self.pool.submit(prepare, self.hardware, entry, candidate, self.rows) for candidate in space]
        wait(futures, timeout=max(0.0, self.deadline - time.monotonic()))
        for candidate, future in zip(space, futures, strict=True):
            if not future.done():
                future.cancel()
            elif error := future.exception():
                print(f"{entry.name} {line_of(candidate)} not compiled: {measure.in_one_line(error)}")
            elif config := future.result():
                yield config

    def best(self, entry: Entry, current: LaunchConfig) -> LaunchConfig | None:
        """The best candidate by time, None where there was no time to find it; every one is printed."""
        times = []
        for config in self.prepared(entry, current):
            if time.monotonic() >= self.deadline:
                return None
            try:
                with table_with(self.hardware, entry, config):
                    ms = measure.median_ms(step_of(entry, self.rows, self.device), self.device, self.each)
            except Exception as error:
                print(f"{entry.name} {line_of(config)} failed: {measure.in_one_line(error)}")
                measure.synchronize(self.device)  # raises, and so ends the search, where the device is lost
                continue
            times.append((config, ms))
            print(f"{entry.name} {ms:.4f} ms {line_of(config)}")
        if not times or time.monotonic() >= self.deadline:
            return None
        config, ms = best_of(times)
        print(
            f"best of {len(times)}: {entry.name} {ms:.4f} ms {line_of(config)}, first {times[0][1]:.4f} ms", flush=True
        )
        return config

    def run(self, work: list[tuple[Entry, LaunchConfig]]) -> None:
        """Searches and prints the rows of the table that hold an entry that was searched, whatever ends it."""
        found: dict[Entry, LaunchConfig] = {}
        try:
            for entry, current in work:
                config = self.best(entry, current) if time.monotonic() < self.deadline else None
                if config is None:
                    print(f"{entry.name} not searched: no time left, or nothing compiled")
                else:
                    found[entry] = config
        finally:
            keys = {entry.key[:3] for entry in found}  # with both modes, of which one may not have been searched
            table = entries(self.hardware, (*DUAL, *SOFT))
            whole = {entry: config for entry, config in table if entry.key[:3] in keys}
            print(f"\n# Measured by python -m bench.tune on {gpu_report.hardware(self.device)}.")
            print(*lines_of(whole | found), sep="\n", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", nargs="+", metavar="PATTERN", help="such as backward:2:128:bounded; default: all")
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--seconds", type=float, default=540, help="of the whole search")
    parser.add_argument("--each", type=float, default=0.1, help="seconds of measurement per candidate")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--list", action="store_true", help="print the search space and stop")
    parser.add_argument("--hardware", choices=launch.HARDWARE[:-1], default="sm_90", help="whose entries --list shows")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    if not options.list and (reason := measure.not_ready()):
        print(f"tune: {reason}; --list prints the search space", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    hardware = options.hardware if options.list else launch.hardware_of(device)
    work = plan(hardware, options.entries)
    if not work:
        parser.error(f"--entries: none of {hardware}'s matches {' '.join(options.entries)}; see --list")
    if options.list:
        for entry, current in work:
            print(entry.name, *(line_of(config) for config in candidates(entry, current)), sep="\n    ")
        return 0
    import bench.aot  # noqa: F401  # names the cache that the workers fill

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # spawn: a process that was forked cannot use CUDA.
    pool = ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        Search(hardware, device, pool, deadline, options.rows, options.each).run(work)
    except KeyboardInterrupt:
        return 130
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
