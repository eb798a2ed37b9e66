"""The parts of ``dual_softmax`` that visit every row once: losses and statistics, factors of G, end of the gradients.

The legend in streaming.py has the names. IS_SWAPPED: (A, B) is (teacher, student), so that the contrast reads
q instead of p.
"""

import torch
import triton
import triton.language as tl
from fastkd.kernels.launch import cdiv
from fastkd.kernels.normalize import input_gradients
from fastkd.kernels.plans import launch
from fastkd.kernels.tiles import ANYWHERE, BLOCK_ROWS, LARGEST_G, LN2, LOG2E, store_numbers
from torch import Tensor

NUMBERS = {True: 4, False: 8}  # of COEF, by BOUNDED


@triton.jit(do_not_specialize=["n", "splits"], do_not_specialize_on_alignment=ANYWHERE)
def statistics_kernel(
    STATE, SCALE, WEIGHT, STATS, LOSS, n, splits, contrast_factor, consistency_factor,
    BLOCK_M: tl.constexpr, HAS_WEIGHT: tl.constexpr, IS_SWAPPED: tl.constexpr,
):  # fmt: skip
    """Merges the splits into STATS; LOSS [2, n]: weighted contrast and consistency times their factors."""
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
    store_numbers(STATS + offs_m, n, in_rows, (la, lc, E))
    # The maximum minus the positive first: where the positive is the maximum, the loss is the small logarithm alone.
    contrast = ((mq - xp) + tl.log2(sq) if IS_SWAPPED else (mp - xp) + tl.log2(sp)) * LN2
    consistency = (E - la + lc) * consistency_factor
    contrast *= contrast_factor
    if HAS_WEIGHT:
        weight = tl.load(WEIGHT + offs_m, mask=in_rows, other=0.0).to(tl.float32)
        contrast *= weight
        consistency *= weight
    store_numbers(LOSS + offs_m, n, in_rows, (contrast, consistency))


@triton.jit(
    do_not_specialize=["n_cols", "stride_sn", "stride_ct", "stride_ck"], do_not_specialize_on_alignment=ANYWHERE
)
def coefficients_kernel(
    STATS, stride_sn, WEIGHT, LARGEST_WEIGHT, GRAD_CONTRAST, GRAD_CONSISTENCY, SCALE, COEF, stride_ct, stride_ck,
    UNSCALE, n_cols, contrast_factor, consistency_factor,
    BLOCK_N: tl.constexpr, HAS_WEIGHT: tl.constexpr, IS_SWAPPED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """The factors of G per row: k, r, x (times exp(-la) or exp(-lc) if BOUNDED), w; else also la, lc in units of log 2.

    ``G_ij = p_ij (k_i (X_ij - Y_ij) + r_i) + q_ji x_j - p_ji k_j - w_i delta_ij`` with w, k the upstream gradients of
    contrast and consistency times their factors, ``r = w - k E``, ``x = k``; IS_SWAPPED moves w from r to x. All are
    multiplied by a number that keeps G inside fp16 and far from its underflow; UNSCALE is its inverse.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs_n < n_cols
    scale = tl.load(SCALE).to(tl.float32)
    w = tl.load(GRAD_CONTRAST).to(tl.float32) * contrast_factor
    k = tl.load(GRAD_CONSISTENCY).to(tl.float32) * consistency_factor
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
    # Without a mask: the last tile is read whole, and what its columns beyond n_cols give is finite.
    COEF += tl.program_id(0) * stride_ct.to(tl.int64) + tl.arange(0, BLOCK_N)
    tl.store(COEF, k)
    tl.store(COEF + stride_ck, r)
    tl.store(COEF + 2 * stride_ck, x)
    tl.store(COEF + 3 * stride_ck, w)
    if not BOUNDED:
        tl.store(COEF + 4 * stride_ck, la)
        tl.store(COEF + 5 * stride_ck, lc)
    tl.store(UNSCALE, bound / LARGEST_G)


def statistics(
    state: Tensor, scale: Tensor, weight: Tensor | None, *, swapped: bool, factors: tuple[float, float] = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """LOSS [2, n], the weighted contrast and consistency per row times ``factors``, and STATS [3, n]."""
    splits, _, n = state.shape
    loss = torch.empty(2, n, dtype=torch.float32, device=state.device)
    stats = torch.empty(3, n, dtype=torch.float32, device=state.device)
    launch(
        statistics_kernel,
        (cdiv(n, BLOCK_ROWS),),
        STATE=state,
        SCALE=scale,
        WEIGHT=weight,
        STATS=stats,
        LOSS=loss,
        n=n,
        splits=splits,
        contrast_factor=factors[0],
        consistency_factor=factors[1],
        BLOCK_M=BLOCK_ROWS,
        HAS_WEIGHT=weight is not None,
        IS_SWAPPED=swapped,
        num_warps=4,
    )
    return loss, stats


def coefficients(
    stats: Tensor,
    weight: Tensor | None,
    largest_weight: Tensor | None,
    grad_contrast: Tensor,
    grad_consistency: Tensor,
    scale: Tensor,
    *,
    swapped: bool,
    bounded: bool,
    tile: int | None,
    factors: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """COEF of a block of columns, in tiles of ``tile`` columns (None: all in one), and UNSCALE [1].

    ``stats`` [3, n_cols] and ``weight`` are those of the block; ``largest_weight`` is that of all columns.
    """
    n_cols = stats.shape[1]
    block = tile or BLOCK_ROWS
    blocks = cdiv(n_cols, block)
    shape = (blocks, NUMBERS[bounded], block) if tile else (1, NUMBERS[bounded], blocks * block)
    coef = torch.empty(shape, dtype=torch.float32, device=stats.device)
    unscale = torch.empty(1, dtype=torch.float32, device=stats.device)
    assert stats.stride(1) == 1
    launch(
        coefficients_kernel,
        (blocks,),
        STATS=stats,
        stride_sn=stats.stride(0),
        WEIGHT=weight,
        LARGEST_WEIGHT=largest_weight,
        GRAD_CONTRAST=grad_contrast,
        GRAD_CONSISTENCY=grad_consistency,
        SCALE=scale,
        COEF=coef,
        stride_ct=coef.stride(0) if tile else block,
        stride_ck=coef.stride(1),
        UNSCALE=unscale,
        n_cols=n_cols,
        contrast_factor=factors[0],
        consistency_factor=factors[1],
        BLOCK_N=block,
        HAS_WEIGHT=weight is not None,
        IS_SWAPPED=swapped,
        BOUNDED=bounded,
        num_warps=1,
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
    """Gradients of the input's rows [n, D] (empty if not needed), and each row's part of the scale's gradient [n]."""
    if not (need_a and need_b):
        side = slice(0, 1) if need_a else slice(1, 2)
        partial, rows, inverse_norm = partial[:, side], rows[side], inverse_norm[side]
    grads, dots = input_gradients(partial, rows, inverse_norm, scale, unscale, D=D, dtype=dtype)
    empty = rows.new_empty(0, dtype=dtype)
    return grads[0] if need_a else empty, grads[-1] if need_b else empty, dots[0]
