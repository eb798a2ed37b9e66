"""Unit rows in the dtype they are multiplied in, padded so that no kernel after this one needs a mask over D.

Legend. ``X0``, ``X1``: raw rows [n, D], any strides. ``UNITS`` [2, n, width]: ``x_i / |x_i|``, zero beyond D; rows
with ``|x_i| <= 1e-12`` give zero. ``INVERSE_NORM`` [2, n]: ``1 / |x_i|`` in fp32, zero for those rows, so that their
gradient is zero too. TO_TF32: rounded to the 10 bits of mantissa that a tf32 product reads; it would drop the others,
which shrinks every element. Everything downstream, forward and backward, multiplies these same rounded rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.numerics import NORM_EPS

EPS = tl.constexpr(NORM_EPS)
BLOCK_ELEMENTS = 2048


@triton.jit
def round_to_tf32(x):
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # a NaN's bits could carry over into a zero


@triton.jit(do_not_specialize=["stride_0n", "stride_0d", "stride_1n", "stride_1d", "n", "D", "width"])
def _unit_rows_kernel(
    X0, X1, stride_0n, stride_0d, stride_1n, stride_1d, UNITS, INVERSE_NORM, n, D, width,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TO_TF32: tl.constexpr,
):  # fmt: skip
    side = tl.program_id(1)
    if side == 0:
        X, stride_n, stride_d = X0, stride_0n.to(tl.int64), stride_0d.to(tl.int64)
    else:
        X, stride_n, stride_d = X1, stride_1n.to(tl.int64), stride_1d.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    in_rows = rows < n
    inside = in_rows[:, None] & (offs_d < D)[None, :]
    x = tl.load(X + rows[:, None] * stride_n + offs_d[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
    # Divided by the largest magnitude before squaring: the square of 1e30 overflows, that of 1e-30 vanishes.
    largest = tl.max(tl.abs(x), 1)
    divisor = tl.where(largest == 0, 1.0, largest)
    x = tl.div_rn(x, divisor[:, None])
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    is_zero = divisor * norm <= EPS
    norm = tl.where(is_zero, 1.0, norm)
    unit = tl.where(is_zero[:, None], 0.0, tl.div_rn(x, norm[:, None]))
    if TO_TF32:
        unit = round_to_tf32(unit)
    inverse_norm = tl.where(is_zero, 0.0, tl.div_rn(1.0, divisor * norm))
    rows += side.to(tl.int64) * n
    units = unit.to(UNITS.dtype.element_ty)
    tl.store(UNITS + rows[:, None] * width + offs_d[None, :], units, mask=in_rows[:, None] & (offs_d < width)[None, :])
    tl.store(INVERSE_NORM + rows, inverse_norm, mask=in_rows)


def padded_width(D: int) -> int:
    """D as a tile of the streaming kernels holds it."""
    return max(16, triton.next_power_of_2(D))


def unit_rows(first: Tensor, second: Tensor, width: int, *, to_tf32: bool = False) -> tuple[Tensor, Tensor]:
    """UNITS [2, n, width] and INVERSE_NORM [2, n] of two tensors of one shape and dtype."""
    assert first.shape == second.shape
    assert first.dtype == second.dtype
    n, D = first.shape
    BLOCK_D = padded_width(width)
    assert width >= D
    BLOCK_M = max(1, BLOCK_ELEMENTS // BLOCK_D)
    units = torch.empty(2, n, width, dtype=first.dtype, device=first.device)
    inverse_norm = torch.empty(2, n, dtype=torch.float32, device=first.device)
    _unit_rows_kernel[(triton.cdiv(n, BLOCK_M), 2)](
        X0=first,
        X1=second,
        stride_0n=first.stride(0),
        stride_0d=first.stride(1),
        stride_1n=second.stride(0),
        stride_1d=second.stride(1),
        UNITS=units,
        INVERSE_NORM=inverse_norm,
        n=n,
        D=D,
        width=width,
        BLOCK_M=BLOCK_M,
        BLOCK_D=BLOCK_D,
        TO_TF32=to_tf32,
        num_warps=4 if BLOCK_D <= 2048 else 16,
    )
    return units, inverse_norm
