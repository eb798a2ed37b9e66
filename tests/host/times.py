"""Measures what one launch costs the host, by every way, on a stub of the driver.

    python -m tests.host.times [ROUNDS]

The extension has to be there (``make ext``). The kernels are those of the forward of ``dual_softmax``; the first reads
four tensors by blocks. They are compiled for sm_90. The ways take turns; the table has the tenth percentile.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fastkd.kernels import launch, plans
from fastkd.kernels.dual_softmax import per_row, streaming
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.host import stub_driver

REPEATS = 50


def ways(kernel: Any, grid: tuple[int, ...], given: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """The ways to launch ``kernel``; what is read by blocks is described anew, as the launchers of fastkd do."""
    read_by_blocks = {name: value for name, value in given.items() if isinstance(value, plans.Blocks)}
    others = {name: value for name, value in given.items() if name not in read_by_blocks}

    def described(make: Callable[..., Any]) -> dict[str, Any]:
        return {name: make(value.base, value.block_shape) for name, value in read_by_blocks.items()}

    def through(is_native: bool) -> Callable[[], object]:
        def call() -> None:
            plans.is_native = lambda: is_native
            plans.launch(kernel, grid, **described(plans.Blocks), **others)

        return call

    compiled = kernel[grid](**given)
    ready = {**others, **described(TensorDescriptor.from_tensor)}
    bound = [ready[name] for name in kernel.arg_names]
    plans.launch(kernel, grid, **given)
    remembered = plans._known[id(kernel)].plans
    return {
        "Triton, TensorDescriptor": lambda: kernel[grid](**described(TensorDescriptor.from_tensor), **others),
        "Triton, Blocks": lambda: kernel[grid](**described(plans.Blocks), **others),
        "Triton's compiled kernel, arguments bound": lambda: compiled.run(
            *grid, 0, compiled.function, compiled.packed_metadata, None, None, None, *bound
        ),
        "plans.launch, FASTKD_LAUNCHER=triton": through(False),
        "plans.launch, FASTKD_LAUNCHER=native": through(True),
        "the extension alone": lambda: remembered.launch(grid, given),
    }


def launches() -> dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]]:
    """The kernel, grid and arguments of the forward of ``dual_softmax``, as its launchers choose them for sm_90."""
    found: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {}

    def keep(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        found[kernel.__name__] = kernel, (*grid, 1, 1)[:3], arguments

    rows, scale = torch.zeros(2, 1024, 128, dtype=torch.bfloat16), torch.tensor(1.0)
    with (
        mock.patch.object(launch, "_hardware", return_value="sm_90"),
        mock.patch.object(launch, "_multiprocessors", return_value=132),
        mock.patch.object(streaming, "launch", keep),
        mock.patch.object(per_row, "launch", keep),
    ):
        state = streaming.running_statistics(rows, rows, scale, offset=0, bounded=True)
        per_row.statistics(state, scale, None, swapped=False, factors=(0.5, 0.5))
    return found


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stub_driver.built(Path(folder))
        stub_driver.activate(90)
        for kernel, (jitted, grid, given) in launches().items():
            times: dict[str, list[float]] = {}
            cases = ways(jitted, grid, given)
            for _ in range(rounds):
                for way, call in cases.items():
                    start = time.perf_counter()
                    for _ in range(REPEATS):
                        call()
                    times.setdefault(way, []).append(1e6 * (time.perf_counter() - start) / REPEATS)
            for way, found in times.items():
                print(f"{kernel:18} {way:42} {sorted(found)[rounds // 10]:6.2f} us")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
