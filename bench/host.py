"""Measures what a loss costs Python on the way to a GPU, without a GPU: kernel launches do nothing.

    python -m bench.host [--losses dcd_loss ...] [--rounds 40] [--output FOLDER]

Eager code and fastkd's CUDA path run forward + backward on tiny CPU tensors, in turn. Only the host's part of a step is
left then: checks, autograd, torch's dispatcher, Triton's launcher up to the driver. A CUDA device adds a few
microseconds for every launch to both sides; the table counts the launches.

Operations are those that torch dispatches, but for views and uninitialised memory, which launch nothing. The command
exits with 1 where a loss costs more host time than eager code.
"""

import argparse
import contextlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import providers
from bench.gpu import Case, step_of
from bench.report import hardware, table

TARGET, MULTIPROCESSORS = "sm_90", 132
ROWS, WIDTH, SIDE = 8, 16, 7
LAUNCH_NOTHING = re.compile(
    "(empty|new_empty|alias|as_strided|detach|diagonal|expand|permute|reshape|select|slice|split|squeeze|transpose|t"
    "|unbind|unsqueeze|view)(_like|_strided|_with_sizes)?"
)


class Counts(NamedTuple):
    """What one step puts on the device's queue."""

    launches: int
    operations: int

    @property
    def total(self) -> int:
        return self.launches + self.operations


class _Operations(TorchDispatchMode):
    """Counts the operations that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not LAUNCH_NOTHING.fullmatch(name):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


_launched: list[str] = []  # one for all, because Triton keeps what it compiled


class _Compiled:
    """Stands for a compiled kernel: a launch only counts."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str) -> None:
        self._name = name

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        _launched.append(self._name)


def _always(value: Any) -> Callable[..., Any]:
    """A function of a constant value; a Mock would take as long as what is measured."""
    return lambda *_: value


@contextlib.contextmanager
def stubbed() -> Iterator[list[str]]:
    """CPU tensors take the way of CUDA tensors on ``TARGET``; gives the names of the kernels that were launched."""
    import triton
    from fastkd.kernels import launch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import jit

    from fastkd import backends, validate

    def compiled(self: Any, key: str, signature: Any, device: int, *_: Any, **__: Any) -> _Compiled:
        kernel = self.device_caches[device][0][key] = _Compiled(self.fn.__name__)
        return kernel

    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        with (
            mock.patch.object(jit.JITFunction, "_do_compile", compiled),
            mock.patch.object(launch, "_hardware", _always(TARGET)),
            mock.patch.object(launch, "_multiprocessors", _always(MULTIPROCESSORS)),
            mock.patch.object(backends, "_why_not_triton_on", _always(None)),
            mock.patch.object(validate, "_may_read", _always(False)),
        ):
            yield _launched
    finally:
        triton.runtime.driver._active = active


def cases() -> Iterator[Case]:
    """Every loss, and pooling, as small as they get."""
    for name in providers.GPU_PROVIDERS:
        side = SIDE if name in providers.POOLS else None
        yield Case(name, torch.float16, ROWS, WIDTH, side=side)


def steps(case: Case) -> dict[str, Callable[[], Tensor]]:
    """Forward + backward of eager code, in the inputs' own dtype, and of fastkd's CUDA path."""
    inputs = case.inputs(torch.device("cpu"))
    ours = providers.GPU_PROVIDERS[case.name]["fastkd triton"]()
    eager = providers.EAGER[case.name]
    return {"eager": step_of(eager, inputs), "fastkd": step_of(ours, inputs)}


def counted(step: Callable[[], Tensor], launched: list[str]) -> Counts:
    step()  # what is made once
    launched.clear()
    with _Operations() as operations:
        step()
    return Counts(len(launched), len(operations.names))


def microseconds(step: Callable[[], Tensor], repeats: int = 20) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return 1e6 * (time.perf_counter() - start) / repeats


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Counts and the median host time of both, over rounds in which they take turns."""
    with stubbed() as launched:
        both = steps(case)
        counts = {name: counted(step, launched) for name, step in both.items()}
        times: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(rounds):
            for name, step in both.items():
                times[name].append(microseconds(step))
                launched.clear()
    return {"counts": counts, "us": {name: statistics.median(found) for name, found in times.items()}}


def markdown(found: dict[str, dict[str, Any]], rounds: int) -> str:
    rows = []
    for name, result in found.items():
        us, counts = result["us"], result["counts"]
        ours = counts["fastkd"]
        rows.append(
            [name, f"{us['eager']:.0f}", f"{counts['eager'].operations}", f"{us['fastkd']:.0f}", f"{ours.launches}",
             f"{ours.operations}", f"{us['fastkd'] / us['eager']:.2f}"]
        )  # fmt: skip
    head = ("loss", "eager us", "operations", "fastkd us", "launches", "other operations", "fastkd / eager")
    lines = [
        "# Host time of forward + backward on the CUDA path",
        "",
        f"`python -m bench.host` on {hardware()}, one thread, launches stubbed, {rounds} rounds, medians.",
        "",
        *table(head, rows),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=providers.GPU_PROVIDERS)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, help="a folder that host.md is written to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {
        case.name: measure(case, options.rounds)
        for case in cases()
        if not options.losses or case.name in options.losses
    }
    text = markdown(found, options.rounds)
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "host.md").write_text(text)
    slower = [name for name, result in found.items() if result["us"]["fastkd"] > result["us"]["eager"]]
    if slower:
        print(f"costs more host time than eager code: {', '.join(slower)}", file=sys.stderr)
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
