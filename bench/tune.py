"""Searches launch configurations on the GPU at hand and prints the entries of kernels/launch.py to change.

    python -m bench.tune [--entries backward:2:128:bounded contrast pool ...] [--seconds 540] [--output bench/results]
    python -m bench.tune --list         # the search space, on any machine

An entry is kernel:bytes per element:width:mode. The mode is bounded or online for dual_softmax, and for soft_target the
entry's place among those of its kernel. --entries takes any part of the kernel's name and may leave out what follows.
Rows of 128 come first. The search ends ``--seconds`` after the process began or at a signal, and prints what it has
found; the rest stays as it is. Every candidate is written to a CSV file as soon as it is measured.

What is timed is the public loss that the entry is for, each call with a cold L2 cache: forward alone for an entry of
the forward, else forward and backward. Candidates are compiled in parallel. One is left out where it needs more shared
memory than the hardware has, or where it spills more than a little. ``ctas_per_sm`` is what the compiled code lets a
multiprocessor hold. An entry that no candidate beats by two percent stays as it is.
"""

import argparse
import contextlib
import csv
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
from functools import partial
from pathlib import Path

import torch
from fastkd.kernels import launch
from fastkd.kernels.launch import LaunchConfig

import bench
from bench import gpu, gpu_report, measure, providers, report

DUAL = ("dual_softmax_forward", "dual_softmax_backward")
CONTRAST = ("contrast_forward", "contrast_backward", "contrast_self")
SOFT = ("soft_target_forward", "soft_target_backward")
POOL = "multiscale_pool"
KERNELS = (*DUAL, *CONTRAST, POOL, *SOFT)
LOGITS = 1 << 27
WIDEST_CLASSES = 1 << 17  # what the last entry of soft_target is measured at
# Maps, channels and side of what pooling is measured by, in both memory formats, with and without normalisation. The
# compilations that are looked at are those of 7 x 7 and of 14 x 14.
SMALL_MAPS, LARGE_MAPS = (2048, 512, 7), (64, 256, 56)
# Local loads and stores in the code of a thread. Outside of the loop a few of them cost next to nothing, which only a
# measurement tells.
MOST_SPILLS = 64
COLUMNS = ("entry", "config", "spills", "ms", "note")


@dataclass(frozen=True)
class Entry:
    """One entry of the table. ``width``: of the rows it is measured with. ``mode``: bounded or online, or the place."""

    key: launch.Entry
    width: int
    mode: str = ""

    @property
    def kernel(self) -> str:
        return self.key.kernel

    @property
    def dtype(self) -> torch.dtype:
        """Entries that serve every dtype are measured in bf16."""
        return torch.float32 if self.key.itemsize == 4 else torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.kernel}:{self.dtype.itemsize}:{self.width}:{self.mode}".rstrip(":")

    def matches(self, pattern: str) -> bool:
        (kernel, *own), (wanted, *rest) = self.name.split(":"), pattern.split(":")
        return wanted in kernel and len(rest) <= len(own) and all(x in ("", y) for x, y in zip(rest, own, strict=False))

    def cases(self, rows: int) -> list[tuple[gpu.Case, str]]:
        """What it is measured by: cases of bench.gpu, each with the name of the provider."""
        ours = "fastkd triton"
        if self.kernel == POOL:
            maps, channels, side = SMALL_MAPS if self.key.width else LARGE_MAPS
            return [(gpu.Case(name, self.dtype, maps, channels, side=side), ours) for name in providers.POOLS]
        if self.kernel in SOFT:
            classes = self.key.width or WIDEST_CLASSES
            return [(gpu.Case("ce_kd_terms", self.dtype, max(1, LOGITS // classes), classes), ours)]
        if self.kernel in DUAL:
            provider = ours if self.mode == "bounded" else f"{ours}, unbounded scale"
            return [(gpu.Case("dcd_loss", self.dtype, rows, self.width), provider)]
        name = "sup_con_loss" if self.kernel == "contrast_self" else "info_nce_loss"
        return [(gpu.Case(name, self.dtype, rows, self.width), ours)]


def entries(hardware: str) -> Iterator[tuple[Entry, LaunchConfig]]:
    """The table's entries, with what they are now."""
    places: Counter[str] = Counter()
    for key, config in launch.TABLE[hardware].items():
        if key.kernel in DUAL:
            yield Entry(key, key.width, "bounded" if key.bounded else "online"), config
        elif key.kernel in CONTRAST:
            yield Entry(key, key.width), config
        elif key.kernel == POOL:
            yield Entry(key, (SMALL_MAPS if key.width else LARGE_MAPS)[2] ** 2), config
        elif key.kernel in SOFT:
            yield Entry(key, config.BLOCK_N, str(places[key.kernel])), config
            places[key.kernel] += 1


def plan(hardware: str, patterns: list[str] | None) -> list[tuple[Entry, LaunchConfig]]:
    """The entries that match a pattern, the most important first: rows of 128, maps, logits, then the other widths."""

    def rank(pair: tuple[Entry, LaunchConfig]) -> tuple[int, int]:
        entry = pair[0]
        groups = (DUAL if entry.width == 128 else ()), (CONTRAST if entry.width == 128 else ()), (POOL,), SOFT
        found = (number for number, group in enumerate(groups) if entry.kernel in group)
        return next(found, len(groups)), entry.dtype.itemsize

    matching = [
        (entry, config)
        for entry, config in entries(hardware)
        if patterns is None or any(entry.matches(pattern) for pattern in patterns)
    ]
    return sorted(matching, key=rank)


def candidates(entry: Entry, current: LaunchConfig) -> list[LaunchConfig]:
    """The search space of an entry, the current one first."""
    if entry.kernel == POOL:
        space = [LaunchConfig(*x) for x in itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))]
    elif entry.kernel in SOFT:
        # A tile of the forward has to hold the row, except in the last entry.
        is_bound = entry.kernel == SOFT[0] and entry.key.width > 0
        widths = (current.BLOCK_N,) if is_bound or current.BLOCK_N < 1024 else (1024, 2048, 4096)
        space = [
            LaunchConfig(m, n, warps, 1)
            for m, n, warps in itertools.product((1, 2, 4, 8, 16, 32), widths, (1, 2, 4, 8, 16))
            if 128 * warps <= m * n <= 2048 * warps  # 4 to 64 elements per thread
        ]
    else:
        is_forward, aparts = entry.kernel.endswith("_forward"), (False, True) if entry.kernel == DUAL[1] else (False,)
        space = [
            LaunchConfig(m, n, warps, stages, apart=apart, rows_in_registers=in_registers)
            for m, n in itertools.product((32, 64, 128), (16, 32, 64, 128))
            for warps, stages, apart in itertools.product((4, 8), (2, 3, 4), aparts)
            for in_registers in ((False, True) if is_forward else (False,))
            if m >= n
        ]
    return [current, *(config for config in space if _shape(config) != _shape(current))]


def _shape(config: LaunchConfig) -> LaunchConfig:
    return dataclasses.replace(config, ctas_per_sm=1)


@contextlib.contextmanager
def table_with(hardware: str, entry: Entry, config: LaunchConfig) -> Iterator[None]:
    """The launch table with one entry exchanged."""
    table = launch.TABLE[hardware]
    before = table[entry.key]
    try:
        table[entry.key] = config
        launch.clear_caches()
        yield
    finally:
        table[entry.key] = before
        launch.clear_caches()


def compiled(hardware: str, entry: Entry, config: LaunchConfig) -> tuple[LaunchConfig, int] | None:
    """The candidate with its ``ctas_per_sm``, and how much it spills; None where it spills much or does not fit.

    The number that the table asks for stays. Of others it is what the code allows that the compiler makes unbidden.
    """
    from bench.aot import compile as aot
    from bench.aot.jobs import jobs

    with table_with(hardware, entry, config):
        results = [aot.examine(job, instructions=False) for job in jobs(hardware) if _compiles(job, entry, config)]
    assert results, entry
    spills = max(result.spills for result in results)
    if spills > MOST_SPILLS or any(dataclasses.replace(result, spills=0).failures() for result in results):
        return None
    registers = max(-(-result.registers // 8) * 8 * 32 * config.num_warps for result in results)
    shared = max(result.shared for result in results) + aot.SHARED_RESERVED
    resident = min(aot.REGISTERS // registers, aot.SHARED_TOTAL[hardware] // shared, 64 // config.num_warps)
    is_given = config.ctas_per_sm > 1 or entry.kernel == POOL  # pooling launches no number that depends on it
    return config if is_given else dataclasses.replace(config, ctas_per_sm=max(1, resident)), spills


def _compiles(job: object, entry: Entry, config: LaunchConfig) -> bool:
    """Whether an ahead-of-time job is one of this entry, in the dtype that it is measured in."""
    name, constants = str(job.name), job.constants  # type: ignore[attr-defined]
    dtype = "fp32" if entry.dtype == torch.float32 else "bf16"
    if entry.kernel == POOL:
        return name.startswith("pool_") and f" {dtype} {'7x7' if entry.key.width else '14x14'}" in name
    if not name.startswith(f"{entry.kernel} {dtype}"):
        return False
    if entry.kernel in (*DUAL, *CONTRAST):
        return f" D={entry.width} {entry.mode}" in name
    tile = constants["BLOCK_M"], constants["BLOCK_N"], job.num_warps  # type: ignore[attr-defined]
    return tile == (config.BLOCK_M, config.BLOCK_N, config.num_warps)


def step_of(entry: Entry, rows: int, device: torch.device) -> Callable[[], object]:
    """What is timed. fp32 rows reach the entry's kernels as tf32 only."""
    torch.set_float32_matmul_precision("high")
    is_forward = entry.kernel.endswith("_forward")
    steps = []
    for case, provider in entry.cases(rows):
        loss, inputs = providers.GPU_PROVIDERS[case.name][provider](), case.inputs(device)
        steps.append(partial(loss, *inputs) if is_forward else gpu.step_of(loss, inputs))

    def step() -> None:
        with torch.set_grad_enabled(not is_forward):
            for one in steps:
                one()

    return step


def best_of(times: list[tuple[LaunchConfig, float]]) -> tuple[LaunchConfig, float]:
    """The fastest, or the first one, the current entry, where nothing beats it by two percent."""
    fastest = min(times, key=lambda pair: pair[1])
    return fastest if fastest[1] < 0.98 * times[0][1] else times[0]


def line_of(config: LaunchConfig) -> str:
    """As kernels/launch.py writes it."""
    options = [f"ctas_per_sm={config.ctas_per_sm}"] if config.ctas_per_sm != 1 else []
    options += [f"{name}=True" for name in ("apart", "rows_in_registers") if getattr(config, name)]
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


def prepare(hardware: str, entry: Entry, candidate: LaunchConfig, rows: int) -> tuple[LaunchConfig, int] | None:
    """In a worker: what :func:`compiled` gives. Triton's cache then holds what a launch of it needs."""
    found = compiled(hardware, entry, candidate)
    if found is not None and torch.cuda.is_available():
        with table_with(hardware, entry, found[0]):
            step_of(entry, rows, torch.device("cuda"))()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return found


@dataclass(frozen=True)
class Search:
    """Where to search, and for how long. ``each``: seconds of measurement per candidate. ``table``: the CSV file."""

    hardware: str
    device: torch.device
    pool: Executor
    deadline: float
    table: Path
    rows: int = 32768
    each: float = 0.1

    def note(self, entry: Entry, config: LaunchConfig, spills: int, ms: float | None, note: str = "") -> None:
        """Prints one candidate and writes it."""
        time_or_note = note if ms is None else f"{ms:.4f} ms"
        print(entry.name, time_or_note, line_of(config), f"{spills} spills" if spills else "", flush=True)
        with self.table.open("a", newline="") as file:
            csv.writer(file).writerow((entry.name, line_of(config), spills, ms, note))

    def prepared(self, entry: Entry, current: LaunchConfig) -> Iterator[tuple[LaunchConfig, int]]:
        """The candidates that are worth timing, the current one first, all compiled before the first is."""
        space = candidates(entry, current)
        futures = [self.pool.submit(prepare, self.hardware, entry, candidate, self.rows) for candidate in space]
        wait(futures, timeout=max(0.0, self.deadline - time.monotonic()))
        for candidate, future in zip(space, futures, strict=True):
            if not future.done():
                future.cancel()
            elif error := future.exception():
                self.note(entry, candidate, 0, None, f"not compiled: {measure.in_one_line(error)}")
            elif found := future.result():
                yield found

    def best(self, entry: Entry, current: LaunchConfig) -> LaunchConfig | None:
        """The best candidate by time, None where there was no time to find it; every one is printed."""
        times = []
        for config, spills in self.prepared(entry, current):
            if time.monotonic() >= self.deadline:
                return None
            try:
                with table_with(self.hardware, entry, config):
                    ms = measure.median_ms(step_of(entry, self.rows, self.device), self.device, self.each)
            except Exception as error:
                self.note(entry, config, spills, None, f"failed: {measure.in_one_line(error)}")
                measure.synchronize(self.device)  # raises, and so ends the search, where the device is lost
                continue
            times.append((config, ms))
            self.note(entry, config, spills, ms)
        if not times or time.monotonic() >= self.deadline:
            return None
        config, ms = best_of(times)
        print(
            f"best of {len(times)}: {entry.name} {ms:.4f} ms {line_of(config)}, first {times[0][1]:.4f} ms", flush=True
        )
        return config

    def run(self, work: list[tuple[Entry, LaunchConfig]]) -> None:
        """Searches, and prints the lines of the table that change, whatever ends it."""
        self.table.parent.mkdir(parents=True, exist_ok=True)
        self.table.write_text(",".join(COLUMNS) + "\n")
        found: dict[Entry, LaunchConfig] = {}
        try:
            for entry, current in work:
                config = self.best(entry, current) if time.monotonic() < self.deadline else None
                if config is None:
                    print(f"{entry.name} not searched: no time left, or nothing compiled")
                elif config != current:
                    found[entry] = config
        finally:
            keys = {entry.key[:3] for entry in found}  # with both modes, of which one may stay as it is
            whole = {entry: config for entry, config in entries(self.hardware) if entry.key[:3] in keys}
            print(f"\n# Measured by python -m bench.tune on {gpu_report.hardware(self.device)}; {self.table}")
            print(*(lines_of(whole | found) if found else ["# nothing to change"]), sep="\n", flush=True)


def main(arguments: list[str] | None = None, started: float | None = None) -> int:
    """``started``: when the time began to run, by ``time.monotonic``; None: now."""
    started = time.monotonic() if started is None else started
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", nargs="+", metavar="PATTERN", help="such as backward:2:128:bounded; default: all")
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--seconds", type=float, default=540, help="of the whole search")
    parser.add_argument("--each", type=float, default=0.1, help="seconds of measurement per candidate")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="that compile")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--list", action="store_true", help="print the search space and stop")
    parser.add_argument("--hardware", choices=launch.HARDWARE[:-1], default="sm_90", help="whose entries --list shows")
    options = parser.parse_args(arguments)
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
        table = options.output / f"tune-{report.slug(gpu_report.hardware(device).split(',')[0])}.csv"
        Search(hardware, device, pool, started + options.seconds, table, options.rows, options.each).run(work)
    except KeyboardInterrupt:
        return 130
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(started=bench.STARTED))
