"""The gradient of rows of logits. Legend: the package's docstring."""

import triton
import triton.language as tl
from fastkd.kernels.soft_target.forward import to_power
from fastkd.kernels.tiles import LOG2E


@triton.jit(do_not_specialize=["stride_xn", "stride_yn", "n", "C"])
def backward_kernel(
    X, Y, stride_xn, stride_yn, LABELS, WEIGHT, STATS, GRAD_CE, GRAD_KD, GRAD, n, C, temperature, smoothing, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, POWER: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    """``GRAD_ic = w_i (p_ic - target_ic) + k_i (p'_ic - q'_ic)``; p' and q' are at the temperature, a factor of k."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < n
    C = C // ALIGN * ALIGN
    stride_xn = stride_xn.to(tl.int64) // ALIGN * ALIGN
    stride_yn = stride_yn.to(tl.int64) // ALIGN * ALIGN
    inside = in_rows[:, None] & (offs_n < C)[None, :]  # [BLOCK_M, BLOCK_N]
    x = tl.load(X + (rows * stride_xn)[:, None] + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
    stride_k = n.to(tl.int64)
    STATS += rows
    z = x - tl.load(STATS, mask=in_rows, other=0.0)[:, None]
    log_s1 = tl.load(STATS + stride_k, mask=in_rows, other=0.0)
    c = LOG2E / temperature
    weight = tl.full([BLOCK_M], 1.0, tl.float32) * factor
    if HAS_WEIGHT:
        weight *= tl.load(WEIGHT + rows, mask=in_rows, other=0.0).to(tl.float32)
    grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_TEACHER:
        y = tl.load(Y + (rows * stride_yn)[:, None] + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        log_st = tl.load(STATS + 2 * stride_k, mask=in_rows, other=0.0)
        my = tl.load(STATS + 3 * stride_k, mask=in_rows, other=0.0)
        log_sy = tl.load(STATS + 4 * stride_k, mask=in_rows, other=0.0)
        p = tl.exp2(z * c - (log_st * LOG2E)[:, None])
        q = tl.exp2((y - my[:, None]) * c - (log_sy * LOG2E)[:, None])
        k = weight * tl.load(GRAD_KD).to(tl.float32) * temperature
        grad = k[:, None] * (p - q)
    if HAS_LABELS:
        if HAS_TEACHER and POWER > 0:
            p = to_power(p, z, POWER) * tl.exp2((temperature * log_st - log_s1) * LOG2E)[:, None]
        else:
            p = tl.exp2((z - log_s1[:, None]) * LOG2E)
        label = tl.load(LABELS + rows, mask=in_rows, other=0)
        is_label = (label >= 0) & (label < C)
        w = tl.where(is_label, weight * tl.load(GRAD_CE).to(tl.float32), float("nan"))
        if HAS_SMOOTHING:
            p -= smoothing / C
        grad += w[:, None] * (p - tl.where(offs_n[None, :] == label[:, None], 1 - smoothing, 0.0))
    offsets = (rows * C)[:, None] + offs_n[None, :]
    tl.store(GRAD + offsets, grad.to(GRAD.dtype.element_ty), mask=inside)
