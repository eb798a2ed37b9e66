"""The parts of ``contrast`` that visit every row once: losses and statistics, factors of G, end of the gradients.

The legend in streaming.py has the names. STATS [2, n], of queries: by index the loss and the positive's logit,
by label the log-sum-exp and COUNT, the number of positives.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from fastkd.kernels.launch import cdiv
from fastkd.kernels.normalize import input_gradients
from fastkd.kernels.plans import launch
from fastkd.kernels.tiles import ANYWHERE, BLOCK_ROWS, LARGEST_G, LN2, LOG2E, store_numbers
from torch import Tensor

ROWS_ANYWHERE = ["ROW_LABELS", "ROW_POSITIVE", "POSITIVE", "ROW_COEF"]  # slices too, and read only once per program


@dataclass(frozen=True, kw_only=True)
class Side:
    """Rows or columns of a launch: vectors [n, width], the number of the first, and the rest as far as there is any."""

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


def forward_arguments(queries: Side, keys: Side, by_label: bool, exclude_self: bool) -> dict[str, Any]:
    """What kernels are passed of queries and keys to see which pairs count, apart from the vectors."""
    return {
        "POSITIVE": queries.positive,
        "ROW_LABELS": queries.labels,
        "COL_LABELS": keys.labels,
        "first_row": queries.first,
        "first_col": keys.first,
        "HAS_LABELS": queries.labels is not None,
        "BY_LABEL": by_label,
        "HAS_INDEX": queries.positive is not None,
        "EXCLUDE_SELF": exclude_self,
    }


def backward_arguments(rows: Side, columns: Side, by_label: bool, exclude_self: bool) -> dict[str, Any]:
    """The same for a gradient, whose queries are the sides that have COEF."""
    found = forward_arguments(rows, columns, by_label, exclude_self)
    found["ROW_POSITIVE"], found["COL_POSITIVE"] = found.pop("POSITIVE"), columns.positive
    found["HAS_INDEX"] = rows.positive is not None or columns.positive is not None
    return found | {
        "ROW_COEF": rows.coef,
        "stride_rn": 0 if rows.coef is None else rows.coef.stride(0),
        "COL_COEF": columns.coef,
        "stride_cn": 0 if columns.coef is None else columns.coef.stride(0),
        "BY_ROW": rows.coef is not None,
        "BY_COLUMN": columns.coef is not None,
    }


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


@triton.jit
def _store_coefficients(
    first, second, WEIGHT, LARGEST_WEIGHT, COEF, UNSCALE, n, offs_m, factor,
    BLOCK_M: tl.constexpr, HAS_WEIGHT: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """``log2 w_i - lse_i`` in units of log 2, and what is special at the positives, from a row's two numbers.

    By index that is ``w_i (p_ip - 1) = w_i expm1(-loss_i)`` in place of ``w_i p_ip``, by label ``w_i / |P_i|`` to
    subtract. The weights are brought to a largest one that keeps G inside fp16 and far from its underflow. UNSCALE
    times the upstream gradient undoes it; it holds ``factor``.
    """
    in_rows = offs_m < n
    largest = tl.full([], 1.0, tl.float32)
    w = tl.full([BLOCK_M], LARGEST_G, tl.float32)
    if HAS_WEIGHT:
        largest = tl.load(LARGEST_WEIGHT).to(tl.float32)
        largest = tl.where(largest == 0, 1.0, largest)
        w *= tl.div_rn(tl.load(WEIGHT + offs_m, mask=in_rows, other=0.0).to(tl.float32), largest)
    if BY_LABEL:
        w = tl.where(second > 0, w, w * 0)  # a NaN stays one
        at_positive = w / tl.maximum(second, 1.0)
        lse = first
    else:
        at_positive = w * _expm1(-first)
        lse = first + second
    store_numbers(COEF + offs_m, n, in_rows, (tl.log2(w) - lse * LOG2E, at_positive))
    tl.store(UNSCALE, factor * largest / LARGEST_G)


@triton.jit(do_not_specialize=["n", "splits"], do_not_specialize_on_alignment=ANYWHERE)
def statistics_kernel(
    STATE, WEIGHT, LARGEST_WEIGHT, COUNT, STATS, LOSS, COEF, UNSCALE, n, splits, factor,
    BLOCK_M: tl.constexpr, HAS_WEIGHT: tl.constexpr, BY_LABEL: tl.constexpr, HAS_COEF: tl.constexpr,
):  # fmt: skip
    """Merges the splits into STATS; LOSS [n], weighted, times ``factor``; with HAS_COEF also COEF and UNSCALE."""
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
    store_numbers(STATS + offs_m, n, in_rows, (first, second))
    if HAS_COEF:
        _store_coefficients(
            first, second, WEIGHT, LARGEST_WEIGHT, COEF, UNSCALE, n, offs_m, factor,
            BLOCK_M=BLOCK_M, HAS_WEIGHT=HAS_WEIGHT, BY_LABEL=BY_LABEL,
        )  # fmt: skip
    loss *= factor
    if HAS_WEIGHT:
        loss *= tl.load(WEIGHT + offs_m, mask=in_rows, other=0.0).to(tl.float32)
    tl.store(LOSS + offs_m, loss, mask=in_rows)


@triton.jit(do_not_specialize=["n", "stride_sn"], do_not_specialize_on_alignment=ANYWHERE)
def coefficients_kernel(
    STATS, stride_sn, WEIGHT, LARGEST_WEIGHT, COEF, UNSCALE, n, factor,
    BLOCK_M: tl.constexpr, HAS_WEIGHT: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """COEF and UNSCALE of all ranks' queries, from their numbers."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.load(STATS + offs_m, mask=offs_m < n, other=0.0)
    second = tl.load(STATS + stride_sn + offs_m, mask=offs_m < n, other=0.0)
    _store_coefficients(
        first, second, WEIGHT, LARGEST_WEIGHT, COEF, UNSCALE, n, offs_m, factor,
        BLOCK_M=BLOCK_M, HAS_WEIGHT=HAS_WEIGHT, BY_LABEL=BY_LABEL,
    )  # fmt: skip


def statistics(
    state: Tensor, weight: Tensor | None, count: Tensor | None, *, factor: float = 1.0, needs_coef: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """LOSS [n], weighted, times ``factor``; STATS [2, n]; COEF and UNSCALE, as :func:`coefficients`, if asked for.

    ``count``: the numbers of positives, by label.
    """
    splits, _, n = state.shape
    loss = torch.empty(n, dtype=torch.float32, device=state.device)
    stats = torch.empty(2, n, dtype=torch.float32, device=state.device)
    coef, unscale = _empty_coefficients(stats) if needs_coef else (None, None)
    launch(
        statistics_kernel,
        (cdiv(n, BLOCK_ROWS),),
        STATE=state,
        WEIGHT=weight,
        LARGEST_WEIGHT=None if weight is None or not needs_coef else weight.amax(),
        COUNT=count,
        STATS=stats,
        LOSS=loss,
        COEF=coef,
        UNSCALE=unscale,
        n=n,
        splits=splits,
        factor=factor,
        BLOCK_M=BLOCK_ROWS,
        HAS_WEIGHT=weight is not None,
        BY_LABEL=count is not None,
        HAS_COEF=needs_coef,
        num_warps=4,
    )
    return loss, stats, () if coef is None or unscale is None else (coef, unscale)


def _empty_coefficients(stats: Tensor) -> tuple[Tensor, Tensor]:
    coef = torch.empty(2, stats.shape[1], dtype=torch.float32, device=stats.device)
    return coef, torch.empty(1, dtype=torch.float32, device=stats.device)


def coefficients(stats: Tensor, weight: Tensor | None, *, by_label: bool, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """COEF [2, n] of all queries, and UNSCALE [1]. A slice of COEF serves a block of queries."""
    n = stats.shape[1]
    coef, unscale = _empty_coefficients(stats)
    assert stats.stride(1) == 1
    launch(
        coefficients_kernel,
        (cdiv(n, BLOCK_ROWS),),
        STATS=stats,
        stride_sn=stats.stride(0),
        WEIGHT=weight,
        LARGEST_WEIGHT=None if weight is None else weight.amax(),
        COEF=coef,
        UNSCALE=unscale,
        n=n,
        factor=factor,
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
    upstream: Tensor,
    *,
    D: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradient of the input's rows [n, D], and DOTS [n]: each row's part of the scale's gradient."""
    inverse_norm = None if inverse_norm is None else inverse_norm[None]
    grads, dots = input_gradients(
        partial[:, None], rows[None], inverse_norm, scale, unscale, upstream, D=D, dtype=dtype
    )
    return grads[0], dots[0]
