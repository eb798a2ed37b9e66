"""The compilations of ``multiscale_pool``: as launches would be, for the maps of usual networks.

7 x 7 with windows 7, 4, 2 is one tile of windows and of positions; 14 x 14 has several of both.
"""

import itertools
from collections.abc import Iterator

import torch
from fastkd.kernels import launch
from fastkd.kernels import multiscale_pool as pool

from bench.aot.compile import Job, launched

SMALL = (7, [7, 7, 4, 4, 2, 2], [1, 1, 1, 1, 1, 1])
LARGE = (14, [14, 14, 7, 7, 4, 4, 2, 2], [1, 1, 1, 1, 2, 2, 2, 2])


def jobs(hardware: str) -> Iterator[Job]:
    precision = pool.precision(hardware)
    maps = itertools.product((SMALL, LARGE), (False, True), (False, True))
    dtypes = ("bf16", "fp32", "fp16") if hardware == "sm_90" else ("bf16", "fp32")
    for ((side, windows, strides), normalize, channels_last), dtype in itertools.product(maps, dtypes):
        torch_dtype = torch.float32 if dtype == "fp32" else torch.float16
        config = launch.launch_config("multiscale_pool", hardware=hardware, dtype=torch_dtype, width=side * side)
        align = 4 if dtype == "fp32" else 8
        scales = pool.scales_of(side, side, windows, strides)
        M = scales[-1][0] + scales[-1][1] * scales[-1][2]
        BLOCK_M, BLOCK_P = pool.block(M, config.BLOCK_M), pool.block(side * side, config.BLOCK_M)
        has_dots = normalize and (M > BLOCK_M or side * side > BLOCK_P)
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
            "IS_SPLIT": dtype == "fp32" and precision == "tf32",
        }
        # Rows of 14 x 14 positions are aligned to 4 elements, rows of 7 x 7 not, and channels to 16 bytes.
        paired = side == 7 and dtype != "fp32" and not channels_last
        forward = shared | {"ALIGN": align if channels_last else 4 if side == 14 else 1 + paired}
        forward |= {"ALIGN_C": align, "PAIRED": paired}
        backward = shared | ({} if normalize else {"U": None}) | ({} if has_dots else {"DOTS": None})
        backward |= {"ALIGN": align, "HAS_DOTS": has_dots, "IS_ROUNDED": dtype != "fp32" and precision == "tf32"}
        kernels = ("forward", pool.forward_kernel, forward), ("backward", pool.backward_kernel, backward)
        for direction, kernel, constants in kernels:
            form = f"{side}x{side}{' channels_last' * channels_last}{' normalize' * normalize}"
            yield Job(
                name=f"pool_{direction} {dtype} {form}",
                hardware=hardware,
                kernel=kernel,
                constants=constants,
                types=_types(dtype),
                **launched(config),
            )
    for dtype in dtypes:
        constants = {"BLOCK_M": pool.ROWS, "BLOCK_N": 128, "ALIGN": 4 if dtype == "fp32" else 8}
        yield Job(f"pool_dots {dtype}", hardware, pool.dots_kernel, constants, _types(dtype))


def _types(dtype: str) -> dict[str, str]:
    return dict.fromkeys(("X", "Y", "G", "U", "GRAD_X"), f"*{dtype}")
