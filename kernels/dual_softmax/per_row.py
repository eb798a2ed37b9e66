"""The parts of ``dual_softmax`` that cost one visit a row: statistics and losses, factors of G, end of the gradients.

The names are those of the legend in dual_softmax.py.
"""

import torch
import triton
import triton.language as tl
from fastkd.kernels.dual_softmax.tile import LN2, LOG2E
from torch import Tensor

LARGEST_G = tl.constexpr(16384.0)  # a quarter of the largest fp16
BLOCK_ROWS = 128
BLOCK_ELEMENTS = 2048


@triton.jit(do_not_specialize=["n", "splits"])
def _statistics_kernel(
    STATE, SCALE, WEIGHT, STATS, LOSS, n, splits,
    BLOCK_M: tl.constexpr, HAS_WEIGHT: tl.constexpr, IS_SWAPPED: tl.constexpr,
):  # fmt: skip
    """Merges the splits into STATS; LOSS [2, n]: weighted contrast and consistency."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = offs_m < n
    stride_k = n.to(tl.int64)
    STATE += offs_m
    mp = tl.load(STATE, mask=in_rows, other=0.0)
    mq = tl.load(STATE + 2 * stride_k, mask=in_rows, other=0.0)
    for split in range(1, splits):
        mp = tl.maximum(mp, tl.load(STATE + split * 6 * stride_k, mask=in_rows, other=0.0))
        mq = tl.maximum(mq, tl.load(STATE + (split * 6 + 2) * stride_k, mask=in_rows, other=0.0))
    sp = tl.zeros([BLOCK_M], tl.float32)
    sq = tl.zeros([BLOCK_M], tl.float32)
    se = tl.zeros([BLOCK_M], tl.float32)
    xp = tl.zeros([BLOCK_M], tl.float32)
    for split in range(splits):
        part = STATE + split * 6 * stride_k
        to_p = tl.exp2(tl.load(part, mask=in_rows, other=0.0) - mp)
        to_q = tl.exp2(tl.load(part + 2 * stride_k, mask=in_rows, other=0.0) - mq)
        sp += to_p * tl.load(part + stride_k, mask=in_rows, other=1.0)
        sq += to_q * tl.load(part + 3 * stride_k, mask=in_rows, other=1.0)
        se += to_p * tl.load(part + 4 * stride_k, mask=in_rows, other=0.0)
        xp += tl.load(part + 5 * stride_k, mask=in_rows, other=0.0)
    scale = tl.load(SCALE).to(tl.float32)
    la = (mp + tl.log2(sp)) * LN2
    lc = (mq + tl.log2(sq)) * LN2
    E = scale * se / sp
    tl.store(STATS + offs_m, la, mask=in_rows)
    tl.store(STATS + stride_k + offs_m, lc, mask=in_rows)
    tl.store(STATS + 2 * stride_k + offs_m, E, mask=in_rows)
    # The maximum minus the positive first: where the positive is the maximum, the loss is the small logarithm alone.
    contrast = ((mq - xp) + tl.log2(sq) if IS_SWAPPED else (mp - xp) + tl.log2(sp)) * LN2
    consistency = E - la + lc
    if HAS_WEIGHT:
        weight = tl.load(WEIGHT + offs_m, mask=in_rows, other=0.0).to(tl.float32)
        contrast *= weight
        consistency *= weight
    tl.store(LOSS + offs_m, contrast, mask=in_rows)
    tl.store(LOSS + stride_k + offs_m, consistency, mask=in_rows)


@triton.jit(do_not_specialize=["n_cols", "stride_sn"])
def _coefficients_kernel(
    STATS, stride_sn, WEIGHT, LARGEST_WEIGHT, GRAD_CONTRAST, GRAD_CONSISTENCY, SCALE, COEF, UNSCALE, n_cols,
    BLOCK_N: tl.constexpr, HAS_WEIGHT: tl.constexpr, IS_SWAPPED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Factors of G a row: k, r, x (times exp(-la) or exp(-lc) if BOUNDED), w, and la, lc in units of log 2.

    ``G_ij = p_ij (k_i (X_ij - Y_ij) + r_i) + q_ji x_j - p_ji k_j - w_i delta_ij`` with w, k the upstream gradients of
    contrast and consistency, ``r = w - k E``, ``x = k``; swapped, w moves from r to x. All are multiplied by a number
    that keeps G inside fp16 and far from its underflow; UNSCALE is its inverse.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < n_cols
    scale = tl.load(SCALE).to(tl.float32)
    w = tl.load(GRAD_CONTRAST).to(tl.float32)
    k = tl.load(GRAD_CONSISTENCY).to(tl.float32)
    bound = (tl.abs(w) + tl.abs(k)) * (4 + 4 * tl.abs(scale))
    weight = tl.full([BLOCK_N], 1.0, tl.float32)
    if HAS_WEIGHT:
        bound *= tl.load(LARGEST_WEIGHT).to(tl.float32)
        weight = tl.load(WEIGHT + offs_n, mask=inside, other=0.0).to(tl.float32)
    bound = tl.maximum(bound, 1e-30)  # zero gradients stay zero
    weight *= LARGEST_G / bound
    w *= weight
    k *= weight
    la = tl.load(STATS + offs_n, mask=inside, other=0.0)
    lc = tl.load(STATS + stride_sn + offs_n, mask=inside, other=0.0)
    E = tl.load(STATS + 2 * stride_sn + offs_n, mask=inside, other=0.0)
    r, x = (-k * E, w + k) if IS_SWAPPED else (w - k * E, k)
    la *= LOG2E
    lc *= LOG2E
    if BOUNDED:
        to_p = tl.exp2(-la)
        r *= to_p
        k *= to_p
        x *= tl.exp2(-lc)
    COEF += offs_n
    stride_cn = n_cols.to(tl.int64)
    tl.store(COEF, k, mask=inside)
    tl.store(COEF + stride_cn, r, mask=inside)
    tl.store(COEF + 2 * stride_cn, x, mask=inside)
    tl.store(COEF + 3 * stride_cn, w, mask=inside)
    tl.store(COEF + 4 * stride_cn, la, mask=inside)
    tl.store(COEF + 5 * stride_cn, lc, mask=inside)
    tl.store(UNSCALE, bound / LARGEST_G)


@triton.jit(do_not_specialize=["n", "D", "width", "splits"])
def _finish_kernel(
    PARTIAL, UNITS, INVERSE_NORM, SCALE, UNSCALE, GRAD_A, GRAD_B, DOTS, n, D, width, splits,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, NEED_A: tl.constexpr, NEED_B: tl.constexpr,
):  # fmt: skip
    """Adds the splits and goes back through the normalisation, whose dot products are the scale's gradient."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    in_rows = offs_m < n
    rows = offs_m.to(tl.int64)[:, None]
    half = n.to(tl.int64) * width
    in_width = in_rows[:, None] & (offs_d < width)[None, :]
    unscale = tl.load(UNSCALE)
    factor = tl.load(SCALE).to(tl.float32) * unscale
    for side in tl.static_range(2):
        if NEED_A if side == 0 else NEED_B:
            offsets = side * half + rows * width + offs_d[None, :]
            total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for split in range(splits):
                total += tl.load(PARTIAL + split * 2 * half + offsets, mask=in_width, other=0.0)
            unit = tl.load(UNITS + offsets, mask=in_width, other=0.0).to(tl.float32)
            inverse_norm = tl.load(INVERSE_NORM + side * n + offs_m, mask=in_rows, other=0.0)
            dots = tl.sum(total * unit, 1)
            grad = (total - dots[:, None] * unit) * (inverse_norm * factor)[:, None]
            GRAD = GRAD_A if side == 0 else GRAD_B
            inside = in_rows[:, None] & (offs_d < D)[None, :]
            tl.store(GRAD + rows * D + offs_d[None, :], grad.to(GRAD.dtype.element_ty), mask=inside)
            if side == 0 or not NEED_A:
                tl.store(DOTS + offs_m, dots * unscale, mask=in_rows)


def statistics(state: Tensor, scale: Tensor, weight: Tensor | None, *, swapped: bool) -> tuple[Tensor, Tensor]:
    """LOSS [2, n], weighted contrast and consistency a row, and STATS [3, n]."""
    splits, _, n = state.shape
    loss = torch.empty(2, n, dtype=torch.float32, device=state.device)
    stats = torch.empty(3, n, dtype=torch.float32, device=state.device)
    _statistics_kernel[(triton.cdiv(n, BLOCK_ROWS),)](
        STATE=state,
        SCALE=scale,
        WEIGHT=weight,
        STATS=stats,
        LOSS=loss,
        n=n,
        splits=splits,
        BLOCK_M=BLOCK_ROWS,
        HAS_WEIGHT=weight is not None,
        IS_SWAPPED=swapped,
        num_warps=4,
    )
    return loss, stats


def coefficients(
    stats: Tensor,
    weight: Tensor | None,
    grad_contrast: Tensor,
    grad_consistency: Tensor,
    scale: Tensor,
    *,
    swapped: bool,
    bounded: bool,
) -> tuple[Tensor, Tensor]:
    """COEF [6, n_cols] and UNSCALE [1] from the statistics and weights of all columns; the rows' are a slice of it."""
    n_cols = stats.shape[1]
    coef = torch.empty(6, n_cols, dtype=torch.float32, device=stats.device)
    unscale = torch.empty(1, dtype=torch.float32, device=stats.device)
    assert stats.stride(1) == 1
    _coefficients_kernel[(triton.cdiv(n_cols, BLOCK_ROWS),)](
        STATS=stats,
        stride_sn=stats.stride(0),
        WEIGHT=weight,
        LARGEST_WEIGHT=None if weight is None else weight.amax(),
        GRAD_CONTRAST=grad_contrast,
        GRAD_CONSISTENCY=grad_consistency,
        SCALE=scale,
        COEF=coef,
        UNSCALE=unscale,
        n_cols=n_cols,
        BLOCK_N=BLOCK_ROWS,
        HAS_WEIGHT=weight is not None,
        IS_SWAPPED=swapped,
        BOUNDED=bounded,
        num_warps=4,
    )
    return coef, unscale


def gradients(
    partial: Tensor,
    rows: Tensor,
    inverse_norm: Tensor,
    scale: Tensor,
    unscale: Tensor,
    *,
    D: int,
    dtype: torch.dtype,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the raw rows [n, D] (empty if not needed) and each row's part of the scale's gradient [n]."""
    splits, _, n, width = partial.shape
    BLOCK_D = triton.next_power_of_2(width)
    BLOCK_M = max(1, BLOCK_ELEMENTS // BLOCK_D)
    grad_a = rows.new_empty((n, D) if need_a else 0, dtype=dtype)
    grad_b = rows.new_empty((n, D) if need_b else 0, dtype=dtype)
    dots = torch.empty(n, dtype=torch.float32, device=rows.device)
    _finish_kernel[(triton.cdiv(n, BLOCK_M),)](
        PARTIAL=partial,
        UNITS=rows,
        INVERSE_NORM=inverse_norm,
        SCALE=scale,
        UNSCALE=unscale,
        GRAD_A=grad_a,
        GRAD_B=grad_b,
        DOTS=dots,
        n=n,
        D=D,
        width=width,
        splits=splits,
        BLOCK_M=BLOCK_M,
        BLOCK_D=BLOCK_D,
        NEED_A=need_a,
        NEED_B=need_b,
        num_warps=4 if BLOCK_D <= 2048 else 16,
    )
    return grad_a, grad_b, dots
