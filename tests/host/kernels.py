"""A kernel with an argument of every kind that fastkd's kernels have, and arguments for it."""

from typing import Any

import torch
import triton
import triton.language as tl
from fastkd.kernels.plans import Blocks


@triton.jit(do_not_specialize=["plain"])
def every_kind_kernel(
    OUT, ROWS, WEIGHT, COLS, n, plain, offset, factor, is_last,
    BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Uses every argument, so that none is left out of the compiled code."""
    start = tl.program_id(0) * BLOCK
    product = tl.dot(ROWS.load([start, 0]), COLS.load([start, 0]).T, input_precision=PRECISION)
    total = tl.sum(product, 1) * factor + n + plain + offset + is_last
    offs = start + tl.arange(0, BLOCK)
    if HAS_WEIGHT:
        total *= tl.load(WEIGHT + offs)
    tl.store(OUT + offs, total)


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "OUT": torch.zeros(64),
        "ROWS": Blocks(torch.zeros(64, 32, dtype=torch.bfloat16), [16, 32]),
        "WEIGHT": None,
        "COLS": Blocks(torch.zeros(48, 64, dtype=torch.bfloat16)[:, 32:], [16, 32]),
        "n": 48,
        "plain": 1,
        "offset": 1 << 40,
        "factor": 0.1,
        "is_last": True,
        "BLOCK": 16,
        "HAS_WEIGHT": changes.get("WEIGHT") is not None,
        "PRECISION": "tf32",
        "num_warps": 2,
        "num_stages": 2,
        **changes,
    }
