"""``make aot``: compiles all kernels in parallel and prints a table."""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import bench.aot
from bench.aot.compile import TARGETS, Job, Result, clocks, examine, milliseconds
from bench.aot.jobs import jobs


def row(result: Result) -> str:
    job, counts = result.job, result.counts
    tile = "x".join(str(job.constants[x]) for x in ("BLOCK_M", "BLOCK_N") if x in job.constants)
    line = (
        f"{job.hardware:7}{job.name:50}{tile:>9}{job.num_warps:>3}w{job.num_stages:>2}s{result.registers:>5}"
        f"{result.spills:>5}{result.shared:>8}{counts['matrix']:>5}{counts['exp']:>5}{counts['fp32']:>6}{counts['all']:>6}"
    )
    if job.hardware == "sm_90" and job.matrix_dtype and counts:
        c = clocks(result)
        line += "".join(f"{c[x]:>7.0f}" for x in ("matrix", "exp", "issue", "shared", "L2", "bound", "serial"))
        line += f"{c['matrix'] / c['bound']:>6.0%}"
    return line


ROWS, REST = 32768, 0.07  # ms of the kernels that visit every row once, see bench/NOTES.md
LOSSES = {
    "DCD": ["dual_softmax_forward bf16 D=128 bounded", "dual_softmax_backward bf16 D=128 bounded"],
    "InfoNCE": [
        "contrast_forward bf16 D=128 index",
        "contrast_backward bf16 D=128 index q",
        "contrast_backward bf16 D=128 index k",
    ],
}
HEADER = (
    f"{'target':7}{'kernel':50}{'tile':>9}{'warps':>4}{'st':>3}{'regs':>5}{'spill':>5}{'shared':>8}{'mma':>5}{'ex2':>5}"
    f"{'fp32':>6}{'all':>6}{'matrix':>7}{'exp':>7}{'issue':>7}{'shared':>7}{'L2':>7}{'bound':>7}{'serial':>7}{'limit':>6}"
)


def matching(pattern: str, work: list[Job]) -> list[int]:
    return [index for index, job in enumerate(work) if re.search(pattern, job.name)]


def predictions(times: dict[str, tuple[float, float]]) -> Iterator[str]:
    """One line per loss whose kernels are all among ``times``: forward, backward, and the kernels over single rows."""
    for loss, names in LOSSES.items():
        if set(names) <= times.keys():
            parts = [times[name] for name in names] + [(REST, REST)]
            bound, serial = (sum(part) for part in zip(*parts, strict=True))
            each = ", ".join(f"{low:.2f} to {high:.2f}" for low, high in parts)
            yield f"{loss}, N = {ROWS}: {each} ms: {bound:.2f} to {serial:.2f} ms, mean {(bound + serial) / 2:.2f} ms"


def run(hardware: list[str], workers: int, select: Callable[[list[Job]], list[int]], instructions: bool = True) -> int:
    """Compiles the jobs whose numbers ``select`` returns. Prints the table; returns how many failed.

    Without ``instructions`` the gate is the same, and the table has no counts and no times.
    """
    everything = [job for name in hardware for job in jobs(name)]
    chosen = select(everything)
    work = [everything[index] for index in chosen]
    print(HEADER)
    failed, times = [], {}
    with ProcessPoolExecutor(workers) as pool:
        tasks = ((hardware, index, instructions) for index in chosen)
        for job, measured in zip(work, pool.map(_measure, tasks), strict=True):
            result = Result(job=job, **measured)
            print(row(result), flush=True)
            if job.hardware == "sm_90" and job.matrix_dtype and instructions:
                times[job.name] = milliseconds(result, ROWS)
            failed += [f"{job.hardware} {job.name}: {failure}" for failure in result.failures()]
    for line in failed:
        print("FAILED", line)
    for line in predictions(times):
        print(line)
    print(f"{len(work)} kernels compiled, {len(failed)} failures")
    return len(failed)


def _measure(task: tuple[list[str], int, bool]) -> dict[str, Any]:
    """What :func:`examine` found of the job of a number: kernels themselves do not travel between processes."""
    hardware, index, instructions = task
    fields = vars(examine([job for name in hardware for job in jobs(name)][index], instructions))
    del fields["job"]
    return fields


def main() -> None:
    parser = argparse.ArgumentParser(
        description=bench.aot.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hardware", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="kernels whose name it matches, as the table has it"
    )
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    sys.exit(run(options.hardware, options.workers, functools.partial(matching, options.only)) > 0)


if __name__ == "__main__":
    main()
