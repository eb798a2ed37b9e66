"""``make gpu-bench``: forward + backward of every loss on a GPU against eager code, torch.compile and installed peers.

    python -m bench.gpu [--seconds 540] [--cases dcd_loss ...] [--output bench/results]
    python -m bench.gpu --device cpu --quick     # the whole path with tiny sizes, on any machine

Ends within ``--seconds`` and a few more for the measurement under way. The most important cases come first; what there
was no time for, no memory, no peer or no kernel, is in the results with the reason. Nothing is dropped. Writes CSV,
Markdown and PNG to the output folder, named after the hardware, also when it is interrupted.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import gpu_report, measure, providers

SIZES = tuple(2**k for k in range(8, 17))
LOGITS = ((256, 1000), (1024, 1000), (8192, 1000), (65536, 1000), (1024, 21841), (4096, 32000), (8192, 131072))
EXACT_ROWS = 16384  # up to here the error against float64 is affordable
GRAPH_ROWS = 8192  # above, Python costs nothing beside the kernels
LOGIT_SCALE = 10.0


@dataclass(frozen=True)
class Case:
    """One loss at one size: n rows of d features or classes."""

    name: str
    dtype: torch.dtype
    n: int
    d: int
    compiles: bool = True  # whether torch.compile has time for this size

    @property
    def on_logits(self) -> bool:
        return self.name in providers.ON_LOGITS

    def key(self) -> dict[str, Any]:
        return {"case": self.name, "dtype": str(self.dtype).removeprefix("torch."), "n": self.n, "d": self.d}

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Student and teacher that agree in part, as in training, and the logit scale or the labels; leaves."""
        generator = torch.Generator(device).manual_seed(self.n)
        shape = self.n, self.d
        teacher = torch.randn(shape, generator=generator, device=device, dtype=self.dtype)
        student = teacher + torch.randn(shape, generator=generator, device=device, dtype=self.dtype)
        if self.on_logits:
            labels = torch.randint(self.d, (self.n,), generator=generator, device=device)
            return student.mul_(3).requires_grad_(), teacher.mul_(3), labels
        return (
            student.requires_grad_(),
            teacher.requires_grad_(),
            torch.tensor(LOGIT_SCALE, device=device).requires_grad_(),
        )

    def bytes_moved(self) -> int | None:
        """What the loss on logits cannot do without: two reads forward, two reads and a write backward."""
        return 5 * self.n * self.d * self.dtype.itemsize if self.on_logits else None


def cases(quick: bool) -> Iterator[Case]:
    """The most important first."""
    bf16, fp32 = torch.bfloat16, torch.float32
    if quick:
        for dtype in (bf16, fp32):
            yield from (
                Case(name, dtype, n, 16) for name in ("dcd_loss", "info_nce_loss", "clip_loss") for n in (16, 40)
            )
            yield from (Case(name, dtype, 12, classes) for name in ("ce_kd_terms", "kd_loss") for classes in (10, 33))
        return
    # torch.compile takes seconds a size, more than everything else: the sizes that the project's goals are set at.
    yield from (Case("dcd_loss", bf16, n, 128, compiles=n in (4096, 32768, 65536)) for n in SIZES)
    yield from (Case("ce_kd_terms", bf16, n, classes, compiles=n == 8192) for n, classes in LOGITS)
    yield from (Case("info_nce_loss", bf16, n, 128, compiles=n == 32768) for n in SIZES)
    yield from (Case("dcd_loss", fp32, n, 128, compiles=n == 32768) for n in SIZES)
    yield from (Case("kd_loss", bf16, n, classes, compiles=classes == 128 * 1024) for n, classes in LOGITS)
    yield from (Case("clip_loss", bf16, n, 128, compiles=False) for n in SIZES[4:])
    for dtype, d in ((bf16, 256), (bf16, 64), (bf16, 512), (fp32, 256), (fp32, 64), (fp32, 512)):
        yield from (Case("dcd_loss", dtype, n, d, compiles=False) for n in SIZES)
    yield from (Case("ce_kd_terms", fp32, n, classes, compiles=False) for n, classes in LOGITS)


def step_of(loss: providers.Loss, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        for x in inputs:
            x.grad = None
        value = loss(*inputs)
        value.backward()
        return value

    return step


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def exact_result(case: Case, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | None:
    """The loss and the student's gradient in float64, by the streaming backend, where affordable."""
    elements = case.n * case.d if case.on_logits else case.n**2
    if elements > EXACT_ROWS**2:
        return None
    loss = providers.GPU_PROVIDERS[case.name]["fastkd blocked"]()
    leaves = tuple(x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs)
    value = step_of(loss, leaves)()
    assert leaves[0].grad is not None
    return value.detach(), leaves[0].grad


def measured(case: Case, provider: str, device: torch.device, seconds: float, exact: Any) -> dict[str, Any]:
    """Time, memory and error of one provider."""
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
    if case.n <= GRAPH_ROWS:
        row["graph_ms"] = measure.graph_ms(step, device, seconds)
    return row


def measure_provider(
    case: Case, provider: str, device: torch.device, seconds: float, exact: Any, quick: bool
) -> dict[str, Any]:
    """The row of one provider; ``status`` says why where it has no numbers."""
    row = case.key() | {"provider": provider, "status": "ok", **dict.fromkeys(gpu_report.NUMBERS)}
    if "torch.compile" in provider and (quick or not case.compiles):
        return row | {"status": "skipped: torch.compile is measured at fewer sizes"}
    try:
        row |= measured(case, provider, device, seconds, exact)
    except ImportError as error:
        row["status"] = f"not installed: {error}"
    except torch.OutOfMemoryError:
        row["status"] = "out of memory"
    except providers.Unsupported as error:
        row["status"] = f"unsupported: {error}"
    except Exception as error:  # a peer's failure is a result; ours shows in the table as well
        row["status"] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    bytes_moved = case.bytes_moved()
    if bytes_moved and row["median_ms"]:
        row["gb_per_s"] = bytes_moved / min(x for x in (row["median_ms"], row["graph_ms"]) if x) / 1e6
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def measure_case(
    case: Case, device: torch.device, seconds: float, deadline: float, quick: bool
) -> Iterator[dict[str, Any]]:
    exact = None
    if time.monotonic() < deadline:
        try:
            exact = exact_result(case, case.inputs(device))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    # Ours first: where time runs out inside a case, it is a comparison that is missing.
    for provider in sorted(providers.GPU_PROVIDERS[case.name], key=lambda name: "fastkd triton" not in name):
        if time.monotonic() < deadline:
            yield measure_provider(case, provider, device, seconds, exact, quick)
        else:
            empty = {"provider": provider, "status": "skipped: no time left", **dict.fromkeys(gpu_report.NUMBERS)}
            yield case.key() | empty


def run(device: torch.device, names: list[str] | None, seconds: float, quick: bool, output: Path, command: str) -> Path:
    """Measures everything and writes the results; returns the path of the table."""
    start = time.monotonic()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # tf32 for everyone: what a user who minds the time sets
    ceilings = {
        "copy_gb_per_s": measure.copy_gb_per_s(device, quick),
        "matmul_tflop_per_s": measure.matmul_tflop_per_s(device, quick),
    }
    rows: list[dict[str, Any]] = []
    try:
        for case in cases(quick):
            if names and case.name not in names:
                continue
            for row in measure_case(case, device, 0.002 if quick else 0.1, start + seconds, quick):
                rows.append(row)
            if time.monotonic() < start + seconds:
                print(f"{time.monotonic() - start:6.1f} s  {' '.join(str(x) for x in case.key().values())}", flush=True)
    finally:
        table = gpu_report.write(rows, device, ceilings, command, time.monotonic() - start, output)
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--cases", nargs="+", choices=providers.GPU_PROVIDERS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a check of the harness, not a measurement")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "gpu-bench measures on a CUDA device, and torch.cuda.is_available() is False here.\n"
            "Check that the harness runs: python -m bench.gpu --device cpu --quick --output /tmp/gpu-bench",
            file=sys.stderr,
        )
        return 2
    command = shlex.join(["python", "-m", "bench.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    table = run(torch.device(options.device), options.cases, options.seconds, options.quick, options.output, command)
    print(table.read_text(), f"\nwritten to {table.parent}", sep="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
