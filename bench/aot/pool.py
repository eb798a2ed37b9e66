"""The compilations of ``multiscale_pool`` for bench/aot.py: as launches would be, for the maps of usual networks.

7 x 7 with windows 7, 4, 2 is one tile of windows and of positions; 14 x 14 has several of both.
"""

from collections.abc import Iterator
from typing import Any

from fastkd.kernels import launch
from fastkd.kernels import multiscale_pool as pool

SMALL = (7, [7, 7, 4, 4, 2, 2], [1, 1, 1, 1, 1, 1])
LARGE = (14, [14, 14, 7, 7, 4, 4, 2, 2], [1, 1, 1, 1, 2, 2, 2, 2])


def cases(hardware: str) -> Iterator[dict[str, Any]]:
    """The fields of a Job, but for its hardware."""
    precision = pool._precision(hardware)
    is_tf32 = precision == "tf32"
    config = launch.pool_config(hardware)
    dtypes = ("bf16", "fp32", "fp16") if hardware == "sm_90" else ("bf16", "fp32")
    for dtype in dtypes:
        is_single = dtype == "fp32"
        for side, windows, strides in (SMALL, LARGE):
            scales = pool._scales(side, side, windows, strides)
            M = scales[-1][0] + scales[-1][1] * scales[-1][2]
            for normalize in (False, True):
                for channels_last in (False, True):
                    name = f"{dtype} {side}x{side}{' channels_last' * channels_last}{' normalize' * normalize}"
                    shared: dict[str, Any] = {
                        "H": side,
                        "W": side,
                        "M": M,
                        "SCALES": scales,
                        "CHANNELS_LAST": channels_last,
                        "NORMALIZE": normalize,
                        "PRECISION": precision,
                    }
                    yield {
                        "name": f"pool_forward {name}",
                        "kernel": pool._forward_kernel,
                        "constants": shared
                        | {
                            "BLOCK_M": pool._block(M, config.BLOCK_M),
                            "BLOCK_N": config.BLOCK_N,
                            "BLOCK_P": pool._block(side * side, config.BLOCK_M),
                            # A row of 7 x 7 positions is not aligned, one of 14 x 14 to 4 elements; channels are.
                            "ALIGN": (4 if is_single else 8) if channels_last else 4 if side == 14 else 1,
                            "IS_SPLIT": is_single and is_tf32,
                        },
                        "types": {"X": f"*{dtype}", "Y": f"*{dtype}"},
                        **_launched(config),
                    }
                    BLOCK_M, BLOCK_P = pool._block(M, config.BLOCK_M), pool._block(side * side, config.BLOCK_M)
                    has_dots = normalize and (M > BLOCK_M or side * side > BLOCK_P)
                    absent = ({} if normalize else {"U": None}) | ({} if has_dots else {"DOTS": None})
                    yield {
                        "name": f"pool_backward {name}",
                        "kernel": pool._backward_kernel,
                        "constants": shared
                        | absent
                        | {
                            "BLOCK_M": BLOCK_M,
                            "BLOCK_N": config.BLOCK_N,
                            "BLOCK_P": BLOCK_P,
                            "ALIGN": 4 if is_single else 8,
                            "HAS_DOTS": has_dots,
                            "IS_SPLIT": is_single and is_tf32,
                            "IS_ROUNDED": not is_single and is_tf32,
                        },
                        "types": {"G": f"*{dtype}", "U": f"*{dtype}", "GRAD_X": f"*{dtype}"},
                        **_launched(config),
                    }
        yield {
            "name": f"pool_dots {dtype}",
            "kernel": pool._dots_kernel,
            "constants": {"BLOCK_M": pool.ROWS, "BLOCK_N": 128, "ALIGN": 4 if is_single else 8},
            "types": {"G": f"*{dtype}", "U": f"*{dtype}"},
        }


def _launched(config: launch.LaunchConfig) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "ctas_per_sm": config.ctas_per_sm}
