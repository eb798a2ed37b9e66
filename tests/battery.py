"""``make gpu-test``: runs everything that needs a GPU, in parts, and says at the end which of them failed.

    python -m tests.battery [smoke correctness ...] [--output build/gpu-test] [--workers 8] [--seconds 540]
    python -m tests.battery --collect-only      # lists the tests of every part, on any machine

Every part is a process of its own and ends within eight minutes. A part that fails does not keep the next from running.
``--seconds`` bounds them all together: a part gets what is left, and is stopped when that is over. A part that is
stopped still writes what it found. The folder gets one file in the format of JUnit per part, and one log of all parts,
which grows while they run. The exit status is 1 if a gate failed, and 2 where there is no CUDA device.

It needs torch, triton, numpy, pytest, pytest-xdist, pytest-timeout and matplotlib, and no network. The Makefile's first
lines say how to run it in an environment that is there already.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

import torch

import bench
from bench import gpu_report, measure

ROOT = Path(__file__).parents[1]
RANKS = (f"tests/ranks/test_{name}.py" for name in ("pack", "exchange", "distributed", "losses"))
FILES = ("tests/gpu", *RANKS, "tests/operations/test_contract.py")
PART_SECONDS = 480.0  # the longest that a part may take
GRACE = 30.0  # the seconds in which a part that is stopped writes its results
SHOWN = 20  # the failures of a part that are printed; the log has them all


@dataclass(frozen=True)
class Part:
    """Some tests, chosen by their markers.

    ``workers``: the most processes they are spread over; 0: they run in the process that the ``tool`` watches.
    ``each``: the seconds after which a single test counts as hung. The result of a part that is no gate is reported and
    does not count.
    """

    markers: str
    workers: int
    each: int
    is_gate: bool = True
    tool: str = ""  # of compute-sanitizer


# The tools make a kernel tens of times slower, so they get small cases only. They come last: their kernels are compiled
# by then.
PARTS = {
    "smoke": Part("smoke", 4, 60),
    "correctness": Part("gpu and not smoke and not large and not bandwidth", 64, 120),
    "large": Part("large", 1, 240, is_gate=False),
    "bandwidth": Part("bandwidth", 1, 240, is_gate=False),
    "sanitizer": Part("sanitizer", 0, 400, tool="memcheck"),
    "racecheck": Part("racecheck", 0, 400, tool="racecheck"),
}


def command_of(part: Part, results: Path, workers: int) -> list[str]:
    """No signal reaches Python while a kernel hangs: a thread then ends the process, and xdist starts another.

    With the duration of the call, a test that a stop interrupts is no test among the results.
    """
    command = [sys.executable, "-m", "pytest", "-m", part.markers, f"--junitxml={results}", "-p", "pytest_timeout"]
    command += ["-o", "junit_duration_report=call", "-o", "timeout_method=thread", "--timeout", str(part.each)]
    command += ["-p", "no:cacheprovider", "-v", *FILES]
    if not part.tool:
        spread = ["-n", str(min(part.workers, workers)), "--dist", "worksteal", "--max-worker-restart", "40"]
        return [*command, "-p", "xdist.plugin", *spread]
    sanitizer = ["compute-sanitizer", "--tool", part.tool, "--report-api-errors", "no", "--error-exitcode", "1"]
    return [*sanitizer, *command]


def environment_of(part: Part) -> dict[str, str]:
    """Plugins that happen to be installed stay out, and torch.compile starts no processes beside the workers'."""
    settings = {"PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if part.tool == "memcheck":
        settings["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # a tensor's end is then the end of an allocation
    return {**os.environ, **settings}


def run(command: list[str], environment: dict[str, str], log: IO[str], seconds: float) -> int | None:
    """The exit status; None where the time was over, and the process was asked to end, and was then ended."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, process_group=0
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then writes its results
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(results: Path) -> tuple[int, str, list[str]]:
    """How many passed; the numbers in words; one line per failure and per number that a test recorded.

    A test that took its worker along is written twice, as the test and as the worker.
    """
    if not results.exists():
        return 0, "no results, see the log", []
    tests, failed, skipped, lines = set(), set(), set(), []
    for case in ElementTree.parse(results).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        tests.add(name)
        skipped |= {name} if case.find("skipped") is not None else set()
        lines += [f"{name}: {x.get('name')} {x.get('value')}" for x in case.iter("property")]
        for problem in (*case.iter("failure"), *case.iter("error")):
            failed.add(name)
            lines.append(f"FAILED {name}: {(problem.get('message') or '?').splitlines()[0]}")
    passed = len(tests - failed - skipped)
    return passed, f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped", lines


def run_part(name: str, output: Path, log: IO[str], workers: int, seconds: float) -> bool:
    """Runs one part and prints its line; returns whether it passed, with a test that was not skipped, or is no gate."""
    part, results = PARTS[name], output.resolve() / f"{name}.xml"
    results.unlink(missing_ok=True)
    command = command_of(part, results, workers)
    if shutil.which(command[0]) is None:
        print(f"{name:12} not run: {command[0]} is not on PATH (it comes with the CUDA toolkit)", flush=True)
        return False
    if seconds <= 0:
        print(f"{name:12} not run: no time left", flush=True)
        return not part.is_gate
    print(f"\n===== {name}: {' '.join(command)}", file=log, flush=True)
    start = time.monotonic()
    status = run(command, environment_of(part), log, seconds)
    passed, numbers, lines = read(results)
    how = {0: "", None: f", stopped after {seconds:.0f} s"}.get(status, f", exit status {status}")
    gate = "" if part.is_gate else ", no gate"
    print(f"{name:12} {numbers}, {time.monotonic() - start:.0f} s{how}{gate}: {results}")
    print(*(f"    {line}" for line in lines[:SHOWN]), sep="\n", end="\n" if lines else "", flush=True)
    return (status == 0 and passed > 0) or not part.is_gate


def collect() -> int:
    """Lists every part's tests, as far as they are there without a GPU; 1 where a part has none or a file fails."""
    statuses = []
    for name, part in PARTS.items():
        command = [sys.executable, "-m", "pytest", "-p", "pytest_timeout", "-p", "no:cacheprovider", "-q"]
        command += ["--collect-only", "-m", part.markers, *FILES]
        print(f"===== {name}", flush=True)
        statuses.append(subprocess.run(command, cwd=ROOT, env=environment_of(part), check=False).returncode)
    return int(any(statuses))


def main(arguments: list[str] | None = None, started: float | None = None) -> int:
    """``started``: when the time began to run, by ``time.monotonic``; None: now."""
    started = time.monotonic() if started is None else started
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-test")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of all parts together")
    parser.add_argument("--collect-only", action="store_true")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.collect_only:
        return collect()
    if reason := measure.not_ready():
        print(f"gpu-test: {reason}", file=sys.stderr)
        return 2
    deadline = started + options.seconds
    options.output.mkdir(parents=True, exist_ok=True)
    print(gpu_report.environment(torch.device("cuda")), flush=True)
    with (options.output / "gpu-test.log").open("w") as log:
        passed = {
            name: run_part(name, options.output, log, options.workers, min(PART_SECONDS, deadline - time.monotonic()))
            for name in options.parts or PARTS
        }
    failed = [name for name, is_good in passed.items() if not is_good]
    print(f"gpu-test: {'FAILED: ' + ', '.join(failed) if failed else 'every gate passed'}; the log: {log.name}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(started=bench.STARTED))
