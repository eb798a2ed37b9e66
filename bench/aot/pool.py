"""The compilations of ``multiscale_pool``: as launches would be, for the maps of usual networks.

7 x 7 with windows 7, 4, 2 is one tile of windows and of positions; 14 x 14 has several of both.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from fastkd.kernels import launch
from fastkd.kernels import multiscale_pool as pool

from bench.aot.compile import Job, launched

SMALL = (7, [7, 7, 4, 4, 2, 2], [1, 1, 1, 1, 1, 1])
LARGE = (14, [14, 14, 7, 7, 4, 4, 2, 2], [1, 1, 1, 1, 2, 2, 2, 2])


def jobs(hardware: str) -> Iterator[Job]:
    config = launch.launch_config("multiscale_pool", hardware=hardware)
    for dtype in ("bf16", "fp32", "fp16") if hardware == "sm_90" else ("bf16", "fp32"):
        types = dict.fromkeys(("X", "Y", "G", "U", "GRAD_X"), f"*{dtype}")
        align = 4 if dtype == "fp32" else 8
        for (side, windows, strides), normalize, channels_last in itertools.product(
            (SMALL, LARGE), (False, True), (False, True)
        ):
            name = f"{dtype} {side}x{side}{' channels_last' * channels_last}{' normalize' * normalize}"
            for direction, kernel, constants in _directions(
                hardware, config, dtype, side, windows, strides, normalize, channels_last, align
            ):
                yield Job(
                    name=f"pool_{direction} {name}",
                    hardware=hardware,
                    kernel=kernel,
                    constants=constants,
                    types=types,
                    **launched(config),
                )
        constants = {"BLOCK_M": pool.ROWS, "BLOCK_N": 128, "ALIGN": align}
        yield Job(f"pool_dots {dtype}", hardware, pool.dots_kernel, constants, types)


def _directions(
    hardware: str, config: launch.LaunchConfig, dtype: str, side: int, windows: list[int], strides: list[int],
    normalize: bool, channels_last: bool, align: int,
) -> Iterator[tuple[str, Any, dict[str, Any]]]:  # fmt: skip
    """Forward and backward of one map, each with its kernel's constants."""
    precision = pool.precision(hardware)
    is_split = dtype == "fp32" and precision == "tf32"
    scales = pool.scales_of(side, side, windows, strides)
    M = scales[-1][0] + scales[-1][1] * scales[-1][2]
    BLOCK_M, BLOCK_P = pool.block(M, config.BLOCK_M), pool.block(side * side, config.BLOCK_M)
    shared = {
        "H": side,
        "W": side,
        "M": M,
        "SCALES": scales,
        "CHANNELS_LAST": channels_last,
        "NORMALIZE": normalize,
        "PRECISION": precision,
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_P": BLOCK_P,
        "IS_SPLIT": is_split,
    }
    # A row of 7 x 7 positions is not aligned, a row of 14 x 14 is aligned to 4 elements, and channels are to 16 bytes.
    yield "forward", pool.forward_kernel, shared | {"ALIGN": align if channels_last else 4 if side == 14 else 1}
    has_dots = normalize and (M > BLOCK_M or side * side > BLOCK_P)
    absent = ({} if normalize else {"U": None}) | ({} if has_dots else {"DOTS": None})
    flags = {"ALIGN": align, "HAS_DOTS": has_dots, "IS_ROUNDED": dtype != "fp32" and precision == "tf32"}
    yield "backward", pool.backward_kernel, shared | flags | absent
