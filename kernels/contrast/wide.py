"""``contrast`` of rows too wide for the streaming kernels: blocks of dot products by torch.mm, then one fused kernel.

The legend in streaming.py has the names; SPLITS is 1. ``X`` holds one block of dot products [m, k].
"""

import torch
import triton
import triton.language as tl
from fastkd.kernels.contrast.per_row import ROWS_ANYWHERE, Side, backward_arguments, forward_arguments
from fastkd.kernels.contrast.tile import accumulate, gradient, load_side, load_state
from fastkd.kernels.launch import cdiv
from fastkd.kernels.plans import launch
from fastkd.kernels.products import blocks, product
from fastkd.kernels.tiles import ANYWHERE, store_numbers
from torch import Tensor


@triton.jit(
    do_not_specialize=["n", "m", "k", "first_row", "first_col"], do_not_specialize_on_alignment=ANYWHERE + ROWS_ANYWHERE
)
def accumulate_kernel(
    X, SCALE, POSITIVE, ROW_LABELS, COL_LABELS, STATE, n, m, k, first_row, first_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LABELS: tl.constexpr, BY_LABEL: tl.constexpr,
    HAS_INDEX: tl.constexpr, EXCLUDE_SELF: tl.constexpr, HAS_CARRY: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = offs_m < m
    scale = tl.load(SCALE).to(tl.float32)
    state = load_state(STATE + offs_m, n, in_rows, BLOCK_M=BLOCK_M, HAS_CARRY=HAS_CARRY)
    queries = load_side(
        ROW_LABELS, POSITIVE, None, 0, offs_m, first_row, in_rows,
        HAS_LABELS=HAS_LABELS, HAS_INDEX=HAS_INDEX, HAS_COEF=False,
    )  # fmt: skip
    for start in range(0, k, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        inside = offs_n < k
        keys = load_side(
            COL_LABELS, None, None, 0, offs_n, first_col, inside,
            HAS_LABELS=HAS_LABELS, HAS_INDEX=False, HAS_COEF=False,
        )  # fmt: skip
        mask = in_rows[:, None] & inside[None, :]
        x = tl.load(X + offs_m[:, None] * k + offs_n[None, :], mask=mask, other=0.0)
        state = accumulate(
            x, scale, state, queries, keys, inside, HAS_LABELS=HAS_LABELS, BY_LABEL=BY_LABEL, HAS_INDEX=HAS_INDEX,
            EXCLUDE_SELF=EXCLUDE_SELF, IS_EDGE=True,
        )  # fmt: skip
    store_numbers(STATE + offs_m, n, in_rows, state)


@triton.jit(
    do_not_specialize=["stride_rn", "stride_cn", "m", "k", "first_row", "first_col"],
    do_not_specialize_on_alignment=ANYWHERE + ROWS_ANYWHERE,
)
def gradient_kernel(
    X, SCALE, ROW_COEF, stride_rn, COL_COEF, stride_cn, ROW_POSITIVE, COL_POSITIVE, ROW_LABELS, COL_LABELS, G, m, k,
    first_row, first_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LABELS: tl.constexpr, BY_LABEL: tl.constexpr,
    HAS_INDEX: tl.constexpr, EXCLUDE_SELF: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, inside = offs_m < m, offs_n < k
    offsets = offs_m[:, None] * k + offs_n[None, :]
    mask = in_rows[:, None] & inside[None, :]
    rows = load_side(
        ROW_LABELS, ROW_POSITIVE, ROW_COEF, stride_rn, offs_m, first_row, in_rows,
        HAS_LABELS=HAS_LABELS, HAS_INDEX=HAS_INDEX and BY_ROW, HAS_COEF=BY_ROW,
    )  # fmt: skip
    columns = load_side(
        COL_LABELS, COL_POSITIVE, COL_COEF, stride_cn, offs_n, first_col, inside,
        HAS_LABELS=HAS_LABELS, HAS_INDEX=HAS_INDEX and BY_COLUMN, HAS_COEF=BY_COLUMN,
    )  # fmt: skip
    g = gradient(
        tl.load(X + offsets, mask=mask, other=0.0), tl.load(SCALE).to(tl.float32), rows, columns, inside,
        HAS_LABELS=HAS_LABELS, BY_LABEL=BY_LABEL, HAS_INDEX=HAS_INDEX, EXCLUDE_SELF=EXCLUDE_SELF, BY_ROW=BY_ROW,
        BY_COLUMN=BY_COLUMN, IS_EDGE=True,
    )  # fmt: skip
    tl.store(G + offsets, g.to(G.dtype.element_ty), mask=mask)


def running_statistics(
    queries: Side,
    keys: Side,
    scale: Tensor,
    *,
    by_label: bool,
    exclude_self: bool,
    state: Tensor | None = None,
    all_columns: int | None = None,
) -> Tensor:
    """STATE [1, 3, n]; as the function of that name in streaming.py. ``all_columns`` changes nothing here."""
    n = queries.vectors.shape[0]
    has_carry = state is not None
    if state is None:
        state = torch.empty(1, 3, n, dtype=torch.float32, device=queries.vectors.device)
    for part, cols in blocks(n, keys.vectors.shape[0]):
        a, b = queries.part(part), keys.part(cols)
        X = product(a.vectors, b.vectors.T)
        m, k = X.shape
        launch(
            accumulate_kernel,
            (cdiv(m, 4),),
            **forward_arguments(a, b, by_label, exclude_self),
            X=X,
            SCALE=scale,
            STATE=state[0, 0, part],
            n=n,
            m=m,
            k=k,
            BLOCK_M=4,
            BLOCK_N=256,
            HAS_CARRY=has_carry or cols.start > 0,
            num_warps=4,
        )
    return state


def gradient_sums(
    rows: Side,
    columns: Side,
    scale: Tensor,
    *,
    by_label: bool,
    exclude_self: bool,
    partial: Tensor | None = None,
    all_columns: int | None = None,
) -> Tensor:
    """PARTIAL [1, n, width]; as the function of that name in streaming.py. ``all_columns`` changes nothing here."""
    n = rows.vectors.shape[0]
    if partial is None:
        partial = torch.zeros(1, *rows.vectors.shape, dtype=torch.float32, device=rows.vectors.device)
    for part, cols in blocks(n, columns.vectors.shape[0]):
        a, b = rows.part(part), columns.part(cols)
        X = product(a.vectors, b.vectors.T)
        G = torch.empty_like(X, dtype=a.vectors.dtype)
        m, k = X.shape
        launch(
            gradient_kernel,
            (cdiv(m, 16), cdiv(k, 128)),
            **backward_arguments(a, b, by_label, exclude_self),
            X=X,
            SCALE=scale,
            G=G,
            m=m,
            k=k,
            BLOCK_M=16,
            BLOCK_N=128,
            num_warps=4,
        )
        partial[0, part] += product(G, b.vectors)
    return partial
