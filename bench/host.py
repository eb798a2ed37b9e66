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
import shlex
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
from fastkd.native import extension

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
    """Stands for a compiled kernel: a launch by Triton only counts."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, signature: dict[str, Any], num_warps: int) -> None:
        self._name = name
        self.src = SimpleNamespace(signature=signature)
        blocks = [re.findall(r"\d+", kind)[1:] for kind in signature.values() if str(kind).startswith("tensordesc")]
        maps = [
            {"elem_type": 6, "elem_size": 2, "swizzle": 3, "block_size": [*map(int, block)], "fp4_padded": False}
            for block in blocks
        ]
        self.metadata = SimpleNamespace(num_warps=num_warps, shared=0, tensordesc_meta=maps)

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        _launched.append(self._name)


def _always(value: Any) -> Callable[..., Any]:
    """A function of a constant value; a Mock would take as long as what is measured."""
    return lambda *_: value


@contextlib.contextmanager
def stubbed(launcher: str = "triton") -> Iterator[Callable[[], int]]:
    """CPU tensors take the way of CUDA tensors on ``TARGET``. Gives how many kernels were launched so far.

    ``launcher``: "triton", or "native" for the extension's, whose calls of the driver are stubbed as well.
    """
    import triton
    from fastkd.kernels import launch, plans
    from triton.backends.compiler import GPUTarget
    from triton.runtime import jit

    from fastkd import backends, validate

    def compiled(self: Any, key: str, signature: Any, device: int, constants: Any, options: Any, *_: Any) -> _Compiled:
        kernel = self.device_caches[device][0][key] = _Compiled(self.fn.__name__, signature, options.num_warps)
        return kernel

    is_native = launcher == "native"
    driver = SimpleNamespace(
        get_current_device=_always(0),
        get_current_stream=_always(0),
        get_current_target=_always(GPUTarget("cuda", 90, 32)),
        get_active_torch_device=_always(torch.device("cpu")),
    )
    active, before = triton.runtime.driver._active, 0
    triton.runtime.driver.set_active(driver)
    if is_native:
        extension().use_stubs(True)
        before = extension().counts()[0]
    plans._known.clear()
    _launched.clear()
    try:
        with (
            mock.patch.object(jit.JITFunction, "_do_compile", compiled),
            mock.patch.object(launch, "_hardware", _always(TARGET)),
            mock.patch.object(launch, "_multiprocessors", _always(MULTIPROCESSORS)),
            mock.patch.object(backends, "_why_not_triton_on", _always(None)),
            mock.patch.object(validate, "_may_read", _always(False)),
            mock.patch.object(plans, "is_native", _always(is_native)),
        ):
            yield lambda: len(_launched) + (extension().counts()[0] - before if is_native else 0)
    finally:
        triton.runtime.driver._active = active
        plans._known.clear()
        if is_native:
            extension().use_stubs(False)


def cases() -> Iterator[Case]:
    """Every loss, and pooling, as small as they get."""
    for name in providers.GPU_PROVIDERS:
        side = SIDE if name in providers.POOLS else None
        yield Case(name, torch.float16, ROWS, WIDTH, side=side)


def steps(case: Case) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Forward + backward of eager code, in the inputs' own dtype, and of fastkd's CUDA path."""
    inputs = case.inputs(torch.device("cpu"))
    ours = providers.GPU_PROVIDERS[case.name]["fastkd triton"]()
    eager = providers.EAGER[case.name]
    return step_of(eager, inputs), step_of(ours, inputs)


def counted(step: Callable[[], Tensor], launches: Callable[[], int]) -> Counts:
    step()  # what is made once
    before = launches()
    with _Operations() as operations:
        step()
    return Counts(launches() - before, len(operations.names))


def microseconds(step: Callable[[], Tensor], repeats: int = 20) -> float:
    """The processor time of this thread for one step; waiting for a busy machine does not count."""
    start = time.thread_time()
    for _ in range(repeats):
        step()
    return 1e6 * (time.thread_time() - start) / repeats


class Result(NamedTuple):
    """Counts and least host time of eager code, and of fastkd with either launcher."""

    counts: dict[str, Counts]
    us: dict[str, float]


def measure(case: Case, rounds: int, launchers: tuple[str, ...]) -> Result:
    """Over rounds in which eager code and fastkd take turns; eager code's time is from the first launcher's rounds."""
    counts: dict[str, Counts] = {}
    us: dict[str, float] = {}
    for launcher in launchers:
        with stubbed(launcher) as launches:
            eager, ours = steps(case)
            both = {"eager": eager, launcher: ours}
            counts |= {name: counted(step, launches) for name, step in both.items()}
            times: dict[str, list[float]] = {name: [] for name in both}
            for _ in range(rounds):
                for name, step in both.items():
                    times[name].append(microseconds(step))
            us |= {name: min(found) for name, found in times.items() if name not in us}
    return Result(counts, us)


def markdown(found: dict[str, Result], rounds: int, command: str) -> str:
    launchers = [name for name in next(iter(found.values())).us if name != "eager"]
    rows = []
    for name, (counts, us) in found.items():
        ours = counts[launchers[0]]
        row = [name, f"{us['eager']:.0f}", f"{counts['eager'].operations}", f"{ours.launches}", f"{ours.operations}"]
        rows.append([*row, *(f"{us[x]:.0f} ({us[x] / us['eager']:.2f})" for x in launchers)])
    head = ("loss", "eager us", "operations", "launches", "other operations", *(f"{x} us" for x in launchers))
    lines = [
        "# Host time of forward + backward on the CUDA path",
        "",
        f"`{command}` on {hardware()}; launches stubbed, fastest of {rounds} rounds. By launcher: fastkd's time, and",
        "its ratio to eager code's in brackets. Launches and other operations are fastkd's.",
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
    launchers = ("triton", "native") if extension() is not None else ("triton",)
    found = {
        case.name: measure(case, options.rounds, launchers)
        for case in cases()
        if not options.losses or case.name in options.losses
    }
    text = markdown(found, options.rounds, shlex.join(["python", "-m", "bench.host", *(arguments or sys.argv[1:])]))
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "host.md").write_text(text)
    slower = [name for name, result in found.items() if result.us[launchers[0]] > result.us["eager"]]
    if slower:
        print(f"costs more host time than eager code: {', '.join(slower)}", file=sys.stderr)
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
