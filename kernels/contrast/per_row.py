"""The parts of ``contrast`` that cost one visit a row: vectors, losses and statistics, factors of G, end of gradients.

The names are those of the legend in contrast.py. STATS [2, n], of queries: by index the loss and the positive's logit,
by label the log-sum-exp and COUNT, the number of positives. Rows may be of any width: they are read in pieces of
BLOCK_D elements, the second and third time from cache.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fastkd.kernels.dual_softmax.tile import LN2, LOG2E
from fastkd.kernels.normalize import EPS, padded_width, round_to_tf32
from torch import Tensor

LARGEST_G = tl.constexpr(16384.0)  # a quarter of the largest fp16: G of both sides of a pair is added
BLOCK_ROWS = 128
BLOCK_ELEMENTS = 2048


@dataclass(frozen=True, kw_only=True)
class Side:
    """Rows or columns of a launch: vectors [n, width], the number of the first, and what there is of the rest."""

    vectors: Tensor
    first: int = 0
    labels: Tensor | None = None  # int32
    positive: Tensor | None = None  # int64, of queries
    coef: Tensor | None = None  # of queries, in the backward

    def __post_init__(self) -> None:
        assert self.labels is None or self.labels.is_contiguous()
        assert self.positive is None or self.positive.is_contiguous()
        assert self.coef is None or self.coef.stride(1) == 1

    def part(self, rows: slice) -> "Side":
        return Side(
            vectors=self.vectors[rows],
            first=self.first + rows.start,
            labels=None if self.labels is None else self.labels[rows],
            positive=None if self.positive is None else self.positive[rows],
            coef=None if self.coef is None else self.coef[:, rows],
        )


@triton.jit(do_not_specialize=["stride_xn", "stride_xd", "n", "D", "width"])
def _vectors_kernel(
    X, stride_xn, stride_xd, VECTORS, INVERSE_NORM, n, D, width,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr, TO_TF32: tl.constexpr,
):  # fmt: skip
    """Unit rows as ``_unit_rows_kernel`` makes them, or rows as they are; zero beyond D."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < n
    X += rows[:, None] * stride_xn
    divisor = tl.full([BLOCK_M], 1.0, tl.float32)
    norm = tl.full([BLOCK_M], 1.0, tl.float32)
    is_zero = rows < 0
    if NORMALIZE:
        largest = tl.zeros([BLOCK_M], tl.float32)
        squares = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            mask = in_rows[:, None] & (offs_d < D)[None, :]
            x = tl.load(X + offs_d[None, :].to(tl.int64) * stride_xd, mask=mask, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        divisor = tl.where(largest == 0, 1.0, largest)
        for start in range(0, D, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            mask = in_rows[:, None] & (offs_d < D)[None, :]
            x = tl.load(X + offs_d[None, :].to(tl.int64) * stride_xd, mask=mask, other=0.0).to(tl.float32)
            x = tl.div_rn(x, divisor[:, None])
            squares += tl.sum(x * x, 1)
        norm = tl.sqrt_rn(squares)
        is_zero = divisor * norm <= EPS
        norm = tl.where(is_zero, 1.0, norm)
        tl.store(INVERSE_NORM + rows, tl.where(is_zero, 0.0, tl.div_rn(1.0, divisor * norm)), mask=in_rows)
    for start in range(0, width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = in_rows[:, None] & (offs_d < D)[None, :]
        x = tl.load(X + offs_d[None, :].to(tl.int64) * stride_xd, mask=mask, other=0.0).to(tl.float32)
        if NORMALIZE:
            x = tl.div_rn(tl.div_rn(x, divisor[:, None]), norm[:, None])
            x = tl.where(is_zero[:, None], 0.0, x)
        if TO_TF32:
            x = round_to_tf32(x)
        mask = in_rows[:, None] & (offs_d < width)[None, :]
        tl.store(VECTORS + rows[:, None] * width + offs_d[None, :], x.to(VECTORS.dtype.element_ty), mask=mask)


@triton.jit
def _log1p(u):
    """``log(1 + u)`` for u in [0, 1] to the last bits, which the hardware's logarithm loses near 1."""
    z = u / (2 + u)
    y = z * z  # at most 1/9: what follows the last term is below 1e-8
    series = 1 / 11 + y * (1 / 13)
    series = 1 / 5 + y * (1 / 7 + y * (1 / 9 + y * series))
    return 2 * z * (1 + y * (1 / 3 + y * series))


@triton.jit
def _expm1(x):
    """``exp(x) - 1`` for x <= 0 to the last bits."""
    series = 1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * series)))
    return tl.where(x > -0.5, series, tl.exp2(x * LOG2E) - 1)


@triton.jit(do_not_specialize=["n", "splits"])
def _statistics_kernel(
    STATE, WEIGHT, COUNT, STATS, LOSS, n, splits,
    BLOCK_M: tl.constexpr, HAS_WEIGHT: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """Merges the splits into STATS; LOSS [n], weighted."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = offs_m < n
    stride_k = n.to(tl.int64)
    STATE += offs_m
    m = tl.load(STATE, mask=in_rows, other=0.0)
    for split in range(1, splits):
        m = tl.maximum(m, tl.load(STATE + split * 3 * stride_k, mask=in_rows, other=0.0))
    s = tl.zeros([BLOCK_M], tl.float32)
    xp = tl.zeros([BLOCK_M], tl.float32)
    for split in range(splits):
        part = STATE + split * 3 * stride_k
        s += tl.exp2(tl.load(part, mask=in_rows, other=0.0) - m) * tl.load(part + stride_k, mask=in_rows, other=1.0)
        xp += tl.load(part + 2 * stride_k, mask=in_rows, other=0.0)
    if BY_LABEL:
        count = tl.load(COUNT + offs_m, mask=in_rows, other=1)
        has_positive = count > 0
        loss = ((m - tl.div_rn(xp, tl.maximum(count, 1).to(tl.float32))) + tl.log2(s)) * LN2
        loss = tl.where(has_positive, loss, 0.0)
        first, second = tl.where(has_positive, (m + tl.log2(s)) * LN2, 0.0), count.to(tl.float32)
    else:
        # The negatives' log-sum-exp less the positive's logit: far below 0 near convergence, its exponential the loss.
        others = (m - xp) + tl.log2(s)
        loss = tl.maximum(others, 0.0) * LN2 + _log1p(tl.exp2(-tl.abs(others)))
        first, second = loss, xp * LN2
    tl.store(STATS + offs_m, first, mask=in_rows)
    tl.store(STATS + stride_k + offs_m, second, mask=in_rows)
    if HAS_WEIGHT:
        loss *= tl.load(WEIGHT + offs_m, mask=in_rows, other=0.0).to(tl.float32)
    tl.store(LOSS + offs_m, loss, mask=in_rows)


@triton.jit(do_not_specialize=["n", "stride_sn"])
def _coefficients_kernel(
    STATS, stride_sn, WEIGHT, LARGEST_WEIGHT, GRAD, COEF, UNSCALE, n,
    BLOCK_M: tl.constexpr, HAS_WEIGHT: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """``log2 w_i - lse_i`` in units of log 2, and what is special at the positives.

    By index that is ``w_i (p_ip - 1) = w_i expm1(-loss_i)`` in place of ``w_i p_ip``, by label ``w_i / |P_i|`` to
    subtract. The weights are brought to a largest one that keeps G inside fp16 and far from its underflow; UNSCALE is
    what undoes it, and holds the upstream gradient.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = offs_m < n
    largest = tl.full([], 1.0, tl.float32)
    w = tl.full([BLOCK_M], LARGEST_G, tl.float32)
    if HAS_WEIGHT:
        largest = tl.load(LARGEST_WEIGHT).to(tl.float32)
        largest = tl.where(largest == 0, 1.0, largest)
        w *= tl.div_rn(tl.load(WEIGHT + offs_m, mask=in_rows, other=0.0).to(tl.float32), largest)
    first = tl.load(STATS + offs_m, mask=in_rows, other=0.0)
    second = tl.load(STATS + stride_sn + offs_m, mask=in_rows, other=0.0)
    if BY_LABEL:
        w = tl.where(second > 0, w, w * 0)  # a NaN stays one
        at_positive = w / tl.maximum(second, 1.0)
        lse = first
    else:
        at_positive = w * _expm1(-first)
        lse = first + second
    tl.store(COEF + offs_m, tl.log2(w) - lse * LOG2E, mask=in_rows)
    tl.store(COEF + n.to(tl.int64) + offs_m, at_positive, mask=in_rows)
    tl.store(UNSCALE, tl.load(GRAD).to(tl.float32) * (largest / LARGEST_G))


@triton.jit(do_not_specialize=["n", "D", "width", "splits"])
def _finish_kernel(
    PARTIAL, VECTORS, INVERSE_NORM, SCALE, UNSCALE, GRAD, DOTS, n, D, width, splits,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Adds the splits and goes back through the normalisation, whose dot products are the scale's gradient."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = offs_m < n
    rows = offs_m.to(tl.int64)[:, None]
    size = n.to(tl.int64) * width
    unscale = tl.load(UNSCALE)
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * tl.load(SCALE).to(tl.float32) * unscale
    if NORMALIZE:
        factor *= tl.load(INVERSE_NORM + offs_m, mask=in_rows, other=0.0)
    dots = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        inside = in_rows[:, None] & (offs_d < D)[None, :]
        offsets = rows * width + offs_d[None, :]
        vector = tl.load(VECTORS + offsets, mask=inside, other=0.0).to(tl.float32)
        for split in range(splits):
            dots += tl.sum(tl.load(PARTIAL + split * size + offsets, mask=inside, other=0.0) * vector, 1)
    tl.store(DOTS + offs_m, dots * unscale, mask=in_rows)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        inside = in_rows[:, None] & (offs_d < D)[None, :]
        offsets = rows * width + offs_d[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for split in range(splits):
            total += tl.load(PARTIAL + split * size + offsets, mask=inside, other=0.0)
        if NORMALIZE:
            total -= dots[:, None] * tl.load(VECTORS + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = total * factor[:, None]
        tl.store(GRAD + rows * D + offs_d[None, :], grad.to(GRAD.dtype.element_ty), mask=inside)


def _tile(width: int) -> tuple[int, int]:
    """BLOCK_M and BLOCK_D of a kernel that reads whole rows in pieces."""
    BLOCK_D = min(padded_width(width), BLOCK_ELEMENTS)
    return BLOCK_ELEMENTS // BLOCK_D, BLOCK_D


def vectors(x: Tensor, width: int, *, normalize: bool, to_tf32: bool = False) -> tuple[Tensor, Tensor | None]:
    """Rows [n, width] in the dtype they are multiplied in, and their inverse norms [n] if they are normalised."""
    n, D = x.shape
    assert width >= D
    BLOCK_M, BLOCK_D = _tile(width)
    rows = torch.empty(n, width, dtype=x.dtype, device=x.device)
    inverse_norm = torch.empty(n, dtype=torch.float32, device=x.device) if normalize else None
    _vectors_kernel[(triton.cdiv(n, BLOCK_M),)](
        X=x,
        stride_xn=x.stride(0),
        stride_xd=x.stride(1),
        VECTORS=rows,
        INVERSE_NORM=inverse_norm,
        n=n,
        D=D,
        width=width,
        BLOCK_M=BLOCK_M,
        BLOCK_D=BLOCK_D,
        NORMALIZE=normalize,
        TO_TF32=to_tf32,
        num_warps=4,
    )
    return rows, inverse_norm


def statistics(state: Tensor, weight: Tensor | None, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """LOSS [n], weighted, and STATS [2, n]; ``count``: the numbers of positives, by label."""
    splits, _, n = state.shape
    loss = torch.empty(n, dtype=torch.float32, device=state.device)
    stats = torch.empty(2, n, dtype=torch.float32, device=state.device)
    _statistics_kernel[(triton.cdiv(n, BLOCK_ROWS),)](
        STATE=state,
        WEIGHT=weight,
        COUNT=count,
        STATS=stats,
        LOSS=loss,
        n=n,
        splits=splits,
        BLOCK_M=BLOCK_ROWS,
        HAS_WEIGHT=weight is not None,
        BY_LABEL=count is not None,
        num_warps=4,
    )
    return loss, stats


def coefficients(stats: Tensor, weight: Tensor | None, grad_loss: Tensor, *, by_label: bool) -> tuple[Tensor, Tensor]:
    """COEF [2, n] of all queries and UNSCALE [1]; those of a block are a slice of it."""
    n = stats.shape[1]
    coef = torch.empty(2, n, dtype=torch.float32, device=stats.device)
    unscale = torch.empty(1, dtype=torch.float32, device=stats.device)
    assert stats.stride(1) == 1
    _coefficients_kernel[(triton.cdiv(n, BLOCK_ROWS),)](
        STATS=stats,
        stride_sn=stats.stride(0),
        WEIGHT=weight,
        LARGEST_WEIGHT=None if weight is None else weight.amax(),
        GRAD=grad_loss,
        COEF=coef,
        UNSCALE=unscale,
        n=n,
        BLOCK_M=BLOCK_ROWS,
        HAS_WEIGHT=weight is not None,
        BY_LABEL=by_label,
        num_warps=4,
    )
    return coef, unscale


def gradients(
    partial: Tensor,
    rows: Tensor,
    inverse_norm: Tensor | None,
    scale: Tensor,
    unscale: Tensor,
    *,
    D: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradient of the raw rows [n, D], and each row's part of the scale's gradient [n]."""
    splits, n, width = partial.shape
    BLOCK_M, BLOCK_D = _tile(width)
    grad = torch.empty(n, D, dtype=dtype, device=rows.device)
    dots = torch.empty(n, dtype=torch.float32, device=rows.device)
    _finish_kernel[(triton.cdiv(n, BLOCK_M),)](
        PARTIAL=partial,
        VECTORS=rows,
        INVERSE_NORM=inverse_norm,
        SCALE=scale,
        UNSCALE=unscale,
        GRAD=grad,
        DOTS=dots,
        n=n,
        D=D,
        width=width,
        splits=splits,
        BLOCK_M=BLOCK_M,
        BLOCK_D=BLOCK_D,
        NORMALIZE=inverse_norm is not None,
        num_warps=4,
    )
    return grad, dots
