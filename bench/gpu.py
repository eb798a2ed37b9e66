"""``make gpu-bench`` measures forward + backward of every loss and of pooling on a GPU, against eager code,
torch.compile and installed peers.

    python -m bench.gpu [--seconds 540] [--cases dcd_loss ...] [--output bench/results]
    python -m bench.gpu --device cpu --quick     # the whole path with tiny sizes, on any machine

The run ends ``--seconds`` after the process began, and after the measurement that is then under way. The most important
cases come first. Where there was no time, no memory, no peer or no kernel, the results give the reason; no case is left
out. CSV, Markdown and PNG files are written to the output folder and named after the hardware. The CSV and the Markdown
are written after every case and the PNG every minute, so that a run that is killed leaves what it found. After SIGINT
or SIGTERM everything is written.

It needs torch, triton, numpy and matplotlib, and no network. The Makefile's first lines say how to run it in an
environment that is there already, without installing anything.
"""

import argparse
import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bench
from bench import gpu_report, measure, providers

SIZES = tuple(2**k for k in range(8, 17))
ON_ROWS = ("dcd_loss", "info_nce_loss", "clip_loss", "ckd_loss", "sup_con_loss", "masked_contrast_loss")
LOGITS = ((256, 1000), (1024, 1000), (8192, 1000), (65536, 1000), (1024, 21841), (4096, 32000), (8192, 131072))
CKD = ((256, 1000), (1024, 1000), (4096, 1000), (16384, 1000), (1024, 21841), (4096, 21841))
POOLED = ((256, 512, 7), (2048, 512, 7), (64, 256, 56))  # maps, channels, side; a 50 MB L2 cache holds the first
EXACT_ELEMENTS = 2**28  # logits up to which the error against float64 is affordable
GRAPH_ELEMENTS = 2**27  # logits above which Python's time does not count, but a graph's memory does
GRAPH_HOST_MS = 20.0  # the time of launching a few thousand nodes


@dataclass(frozen=True)
class Case:
    """One loss at one size: n rows of d features or classes, or n maps of d channels."""

    name: str
    dtype: torch.dtype
    n: int
    d: int
    compiles: bool = True  # whether torch.compile has time for this size
    side: int | None = None  # of the maps

    def __str__(self) -> str:
        return " ".join(str(x) for x in self.key().values() if x is not None)

    @property
    def on_logits(self) -> bool:
        return self.name in providers.ON_LOGITS

    @property
    def elements(self) -> int:
        """The number of logits, given or implied by the rows, or of elements of the maps."""
        if self.side:
            return self.n * self.d * self.side**2
        return self.n * self.d if self.on_logits else self.n**2

    def key(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"case": self.name, "dtype": dtype, "n": self.n, "d": self.d, "side": self.side}

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Student and teacher that agree in part, as in training, and the logit scale or the labels.

        The inputs of pooling are the maps and the gradient of their rows.
        """
        generator = torch.Generator(device).manual_seed(self.n)
        if self.side:
            shapes = (self.n, self.d, self.side, self.side), (self.n, providers.pooled_rows(self.side), self.d)
            maps, grad = (torch.randn(x, generator=generator, device=device, dtype=self.dtype) for x in shapes)
            return maps.contiguous(memory_format=providers.POOLS[self.name][0]).requires_grad_(), grad
        shape = self.n, self.d
        teacher = torch.randn(shape, generator=generator, device=device, dtype=self.dtype)
        student = teacher + torch.randn(shape, generator=generator, device=device, dtype=self.dtype)
        if self.on_logits:
            labels = torch.randint(self.d, (self.n,), generator=generator, device=device)
            return student.mul_(3).requires_grad_(), teacher.mul_(3), labels
        return (
            student.requires_grad_(),
            teacher.requires_grad_(),
            torch.tensor(providers.LOGIT_SCALE, device=device).requires_grad_(),
        )

    def bytes_moved(self) -> int | None:
        """The bytes that must be moved, or None where memory is not the limit.

        A loss on logits reads both forward; backward it reads both and writes one gradient. Pooling reads and writes
        the maps and the rows, and reads the rows once more if they are normalised.
        """
        if self.side:
            rows = self.n * self.d * providers.pooled_rows(self.side)
            return (2 * self.elements + (3 if providers.POOLS[self.name][1] else 2) * rows) * self.dtype.itemsize
        return 5 * self.n * self.d * self.dtype.itemsize if self.on_logits else None


def cases(quick: bool) -> Iterator[Case]:
    """All cases, the most important first."""
    bf16, fp32 = torch.bfloat16, torch.float32
    if quick:
        for dtype in (bf16, fp32):
            yield from (Case(name, dtype, n, 16) for name in ON_ROWS for n in (16, 40))
            yield from (Case(name, dtype, 12, classes) for name in ("ce_kd_terms", "kd_loss") for classes in (10, 33))
            yield from (Case(name, dtype, n, 20, side=7) for name in providers.POOLS for n in (2, 5))
        return
    # torch.compile takes seconds per size, more than everything else. It gets the sizes of the project's goals.
    yield from (Case("dcd_loss", bf16, n, 128, compiles=n in (4096, 32768, 65536)) for n in SIZES)
    yield from (Case("ce_kd_terms", bf16, n, classes, compiles=n == 8192) for n, classes in LOGITS)
    yield from (Case("info_nce_loss", bf16, n, 128, compiles=n == 32768) for n in SIZES)
    yield from (Case("ckd_loss", bf16, n, d, compiles=n == 4096) for n, d in CKD)
    for name in ("sup_con_loss", "masked_contrast_loss"):
        yield from (Case(name, bf16, n, 128, compiles=n == 32768) for n in SIZES[2:])
    for n, d, side in POOLED:
        yield from (Case(name, bf16, n, d, n != 2048, side) for name in providers.POOLS)
    yield from (Case("dcd_loss", fp32, n, 128, compiles=n == 32768) for n in SIZES)
    for n, d, side in POOLED:
        yield from (Case(name, fp32, n, d, n == 256, side) for name in providers.POOLS)
    yield from (Case("kd_loss", bf16, n, classes, compiles=classes == 128 * 1024) for n, classes in LOGITS)
    yield from (Case("clip_loss", bf16, n, 128, compiles=False) for n in SIZES[4:])
    for dtype, d in ((bf16, 256), (bf16, 64), (bf16, 512), (fp32, 256), (fp32, 64), (fp32, 512)):
        yield from (Case("dcd_loss", dtype, n, d, compiles=False) for n in SIZES)
    yield from (Case("ce_kd_terms", fp32, n, classes, compiles=False) for n, classes in LOGITS)


def step_of(loss: providers.Loss, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """A function that runs forward and backward. Where the value is no scalar, the second input is its gradient."""

    def step() -> Tensor:
        for x in inputs:
            x.grad = None
        value = loss(*inputs)
        value.backward(inputs[1] if value.ndim else None)
        return value

    return step


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def exact_result(case: Case, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | None:
    """The loss and the student's gradient in float64, by the streaming backend, where affordable."""
    if case.elements > EXACT_ELEMENTS:
        return None
    loss = providers.GPU_PROVIDERS[case.name]["fastkd blocked"]()
    leaves = tuple(x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs)
    value = step_of(loss, leaves)()
    assert leaves[0].grad is not None
    return value.detach(), leaves[0].grad


@dataclass
class Run:
    """Says how everything is measured, and what has ended it. A signal interrupts a measurement and nothing else."""

    device: torch.device
    quick: bool
    started: float
    deadline: float
    ended_by: signal.Signals | None = None
    is_measuring: bool = False
    failed_capture: str = ""  # the provider and size after which nothing is captured any more

    @property
    def seconds(self) -> float:
        """The time of one measurement."""
        return 0.002 if self.quick else 0.1

    def stopped(self) -> str | None:
        if self.ended_by:
            return f"interrupted by {self.ended_by.name}"
        return None if time.monotonic() < self.deadline else "no time left"

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        self.is_measuring = True
        try:
            yield
        finally:
            self.is_measuring = False

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM raise KeyboardInterrupt while measuring and are remembered otherwise."""

        def remember(number: int, frame: object) -> None:
            self.ended_by = signal.Signals(number)
            if self.is_measuring:
                self.is_measuring = False
                raise KeyboardInterrupt

        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def measured(case: Case, provider: str, run: Run, exact: Any) -> dict[str, Any]:
    """Time, memory and error of one provider."""
    device, seconds = run.device, run.seconds
    loss = providers.GPU_PROVIDERS[case.name][provider]()
    inputs = case.inputs(device)
    step = step_of(loss, inputs)
    value = step()
    row: dict[str, Any] = {}
    if exact is not None:
        assert inputs[0].grad is not None
        row["loss_error"] = relative_error(value.detach(), exact[0])
        row["grad_error"] = relative_error(inputs[0].grad, exact[1])
    del value
    row["median_ms"] = measure.median_ms(step, device, seconds)
    for x in inputs:
        x.grad = None
    row["peak_extra_mib"] = measure.peak_extra_mib(step, device)
    row["host_ms"] = measure.host_ms(step, device, seconds)
    is_small = case.elements <= GRAPH_ELEMENTS and (row["host_ms"] or 0) <= GRAPH_HOST_MS
    if provider.startswith(providers.CAPTURED) and is_small:
        if run.failed_capture:
            return row | {"note": f"no graph after the failed one of {run.failed_capture}"}
        try:
            row["graph_ms"] = measure.graph_ms(step, device, seconds)
        except measure.CaptureError as error:
            run.failed_capture = f"{provider}, {case}"
            row["note"] = f"no graph: {error}"
    return row


def empty_row(case: Case, provider: str, status: str) -> dict[str, Any]:
    return case.key() | {"provider": provider, "status": status, "note": "", **dict.fromkeys(gpu_report.NUMBERS)}


def measure_provider(case: Case, provider: str, run: Run, exact: Any) -> dict[str, Any]:
    """The row of one provider; ``status`` says why where it has no numbers."""
    if "torch.compile" in provider and (run.quick or not case.compiles):
        return empty_row(case, provider, "skipped: torch.compile is measured at fewer sizes")
    row = empty_row(case, provider, "ok")
    try:
        row |= measured(case, provider, run, exact)
    except ImportError as error:
        row["status"] = f"not installed: {error}"
    except torch.OutOfMemoryError:
        row["status"] = "out of memory"
    except providers.Unsupported as error:
        row["status"] = f"unsupported: {error}"
    except Exception as error:  # a peer's failure is a result; ours shows in the table as well
        row["status"] = f"failed: {measure.in_one_line(error)}"
    bytes_moved = case.bytes_moved()
    if bytes_moved and row["median_ms"]:
        row["gb_per_s"] = bytes_moved / min(x for x in (row["median_ms"], row["graph_ms"]) if x) / 1e6
    measure.release(run.device)
    return row


def measure_case(case: Case, run: Run) -> list[dict[str, Any]]:
    """A row for every provider, whatever ends the run in between."""
    exact = None
    with contextlib.suppress(KeyboardInterrupt, torch.OutOfMemoryError), run.measuring():
        if run.stopped() is None:
            exact = exact_result(case, case.inputs(run.device))
    measure.release(run.device)
    rows = []
    # Ours first: where time runs out inside a case, it is a comparison that is missing.
    for provider in sorted(providers.GPU_PROVIDERS[case.name], key=lambda name: "fastkd triton" not in name):
        row = None
        with contextlib.suppress(KeyboardInterrupt), run.measuring():
            if run.stopped() is None:
                row = measure_provider(case, provider, run, exact)
        rows.append(row or empty_row(case, provider, f"skipped: {run.stopped()}"))
    return rows


def measure_all(run: Run, names: list[str] | None, output: Path, command: str) -> Path | None:
    """Measures and writes everything; returns the path of the table, None where a signal came before any number."""
    if run.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # tf32 for everyone: what a user who minds the time sets
    ceilings: dict[str, float] = {}
    with contextlib.suppress(KeyboardInterrupt), run.measuring():
        ceilings["copy_gb_per_s"] = measure.copy_gb_per_s(run.device, run.quick)
        ceilings["matmul_tflop_per_s"] = measure.matmul_tflop_per_s(run.device, run.quick)
    results = gpu_report.Results(run.device, ceilings, command, output, run.started)
    for case in cases(run.quick):
        if names and case.name not in names:
            continue
        rows = measure_case(case, run)
        if run.ended_by and not results.rows and not any(row["median_ms"] for row in rows):
            return None
        results.append(rows)
        if run.stopped() is None:
            print(f"{results.seconds:6.1f} s  {case}", flush=True)
    return results.finish()


def main(arguments: list[str] | None = None, started: float | None = None) -> int:
    """``started``: when the time began to run, by ``time.monotonic``; None: now."""
    started = time.monotonic() if started is None else started
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--cases", nargs="+", choices=providers.GPU_PROVIDERS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check of the harness, not a measurement")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and (reason := measure.not_ready()):
        print(f"gpu-bench: {reason}; --device cpu --quick tries everything but the GPU", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "bench.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    run = Run(torch.device(options.device), options.quick, started, started + options.seconds)
    with run.signals():
        table = measure_all(run, options.cases, options.output, command)
    print(f"{table.read_text()}\nwritten to {table.parent}" if table else "interrupted before the first number")
    return 128 + run.ended_by if run.ended_by else 0


if __name__ == "__main__":
    sys.exit(main(started=bench.STARTED))
