"""Measures what one launch costs the host, by every way, on a stub of the driver.

    python -m tests.host.times

The extension has to be there (``make ext``). The kernel is the forward of ``dual_softmax``, which reads four tensors by
blocks, compiled for sm_90. The ways take turns; the table has the tenth percentile.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fastkd.kernels import plans
from fastkd.kernels.dual_softmax.per_row import statistics_kernel
from fastkd.kernels.dual_softmax.streaming import forward_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.host import stub_driver

ROUNDS, REPEATS = 200, 50


def ways(kernel: Any, grid: tuple[int, int, int], given: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """The ways to launch ``kernel``; what is read by blocks is described anew, as the launchers of fastkd do."""
    read_by_blocks = {name: value for name, value in given.items() if isinstance(value, plans.Blocks)}
    others = {name: value for name, value in given.items() if name not in read_by_blocks}

    def described(make: Callable[..., Any]) -> dict[str, Any]:
        return {name: make(value.base, value.block_shape) for name, value in read_by_blocks.items()}

    def through(is_native: bool) -> Callable[[], object]:
        def launch() -> None:
            plans.is_native = lambda: is_native
            plans.launch(kernel, grid, **described(plans.Blocks), **others)

        return launch

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


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stub_driver.built(Path(folder))
        stub_driver.activate(90)
        rows, scale = torch.zeros(2, 1024, 128, dtype=torch.bfloat16), torch.tensor(1.0)
        state, numbers = torch.zeros(4, 6, 1024), torch.zeros(5, 1024)
        forward = {
            **{name: plans.Blocks(x, [128, 128]) for name, x in zip(("A_rows", "B_rows"), rows, strict=True)},
            **{name: plans.Blocks(x, [64, 128]) for name, x in zip(("A_cols", "B_cols"), rows, strict=True)},
            "SCALE": scale, "STATE": state, "n": 1024, "n_cols": 1024, "offset": 0, "tiles_per_split": 4,
            "BLOCK_M": 128, "BLOCK_N": 64, "PRECISION": "tf32", "BOUNDED": True, "HAS_CARRY": False,
            "num_warps": 8, "num_stages": 2,
        }  # fmt: skip
        statistics = {
            "STATE": state, "SCALE": scale, "WEIGHT": None, "STATS": numbers[:3], "LOSS": numbers[3:], "n": 1024,
            "splits": 4, "contrast_factor": 0.5, "consistency_factor": 0.5,
            "BLOCK_M": 128, "HAS_WEIGHT": False, "IS_SWAPPED": False, "num_warps": 4,
        }  # fmt: skip
        for title, cases in (
            ("dual_softmax forward", ways(forward_kernel, (8, 4, 1), forward)),
            ("dual_softmax statistics", ways(statistics_kernel, (8, 1, 1), statistics)),
        ):
            times: dict[str, list[float]] = {way: [] for way in cases}
            for _ in range(ROUNDS):
                for way, launch in cases.items():
                    start = time.perf_counter()
                    for _ in range(REPEATS):
                        launch()
                    times[way].append(1e6 * (time.perf_counter() - start) / REPEATS)
            for way, found in times.items():
                print(f"{title:24} {way:42} {sorted(found)[ROUNDS // 10]:6.2f} us")


if __name__ == "__main__":
    main()
