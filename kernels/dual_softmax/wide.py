"""``dual_softmax`` of rows too wide for the streaming kernels: blocks of cosines by torch.mm, then one fused kernel.

The legend in streaming.py has the names; SPLITS is 1. ``X``, ``Y`` hold one block of cosines [m, k].
"""

import torch
import triton
import triton.language as tl
from fastkd.kernels.dual_softmax.tile import accumulate, gradient, load_factors, load_state
from fastkd.kernels.launch import cdiv
from fastkd.kernels.plans import launch
from fastkd.kernels.products import blocks, product
from fastkd.kernels.tiles import ANYWHERE, store_numbers
from torch import Tensor


@triton.jit(do_not_specialize=["n", "m", "k", "offset"], do_not_specialize_on_alignment=ANYWHERE)
def accumulate_kernel(
    X, Y, SCALE, STATE, n, m, k, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr, HAS_CARRY: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = offs_m < m
    scale = tl.load(SCALE).to(tl.float32)
    state = load_state(STATE + offs_m, n, in_rows, BLOCK_M=BLOCK_M, BOUNDED=BOUNDED, HAS_CARRY=HAS_CARRY)
    for start in range(0, k, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offsets = offs_m[:, None] * k + offs_n[None, :]
        mask = in_rows[:, None] & (offs_n < k)[None, :]
        x = tl.load(X + offsets, mask=mask, other=0.0)
        y = tl.load(Y + offsets, mask=mask, other=0.0)
        state = accumulate(x, y, scale, state, offs_n, k, offs_m + offset, BOUNDED=BOUNDED, IS_EDGE=True)
    store_numbers(STATE + offs_m, n, in_rows, state)


@triton.jit(do_not_specialize=["stride_rn", "stride_cn", "m", "k", "offset"], do_not_specialize_on_alignment=ANYWHERE)
def gradient_kernel(
    X, Y, ROW_COEF, stride_rn, COL_COEF, stride_cn, SCALE, G, H, m, k, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr, NEED_A: tl.constexpr, NEED_B: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = offs_m < m
    offsets = offs_m[:, None] * k + offs_n[None, :]
    mask = in_rows[:, None] & (offs_n < k)[None, :]
    x = tl.load(X + offsets, mask=mask, other=0.0)
    y = tl.load(Y + offsets, mask=mask, other=0.0)
    row_factors = load_factors(ROW_COEF + offs_m, stride_rn, in_rows, BOUNDED=BOUNDED)
    column_factors = load_factors(COL_COEF + offs_n, stride_cn, offs_n < k, BOUNDED=BOUNDED)
    g, h = gradient(
        x, y, row_factors, column_factors, offs_n, k, offs_m + offset, tl.load(SCALE).to(tl.float32),
        BOUNDED=BOUNDED, IS_EDGE=True,
    )  # fmt: skip
    if NEED_A:
        tl.store(G + offsets, g.to(G.dtype.element_ty), mask=mask)
    if NEED_B:
        tl.store(H + offsets, h.to(H.dtype.element_ty), mask=mask)


def tile_columns(rows: Tensor, *, bounded: bool) -> int | None:
    """As the function of that name in streaming.py."""
    return None


def running_statistics(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    *,
    offset: int,
    bounded: bool,
    state: Tensor | None = None,
    all_columns: int | None = None,
) -> Tensor:
    """STATE [1, 6, n]; as the function of that name in streaming.py. ``all_columns`` changes nothing here."""
    n = rows.shape[1]
    has_carry = state is not None
    if state is None:
        state = torch.empty(1, 6, n, dtype=torch.float32, device=rows.device)
    for part, cols in blocks(n, columns.shape[1]):
        X = product(rows[0, part], columns[1, cols].T)
        Y = product(rows[1, part], columns[0, cols].T)
        m, k = X.shape
        launch(
            accumulate_kernel,
            (cdiv(m, 8),),
            X=X,
            Y=Y,
            SCALE=scale,
            STATE=state[0, 0, part],
            n=n,
            m=m,
            k=k,
            offset=offset + part.start - cols.start,
            BLOCK_M=8,
            BLOCK_N=256,
            BOUNDED=bounded,
            HAS_CARRY=has_carry or cols.start > 0,
            num_warps=4,
        )
    return state


def gradient_sums(
    rows: Tensor,
    columns: Tensor,
    row_coef: Tensor,
    column_coef: Tensor,
    scale: Tensor,
    *,
    offset: int,
    bounded: bool,
    need_a: bool,
    need_b: bool,
    partial: Tensor | None = None,
    all_columns: int | None = None,
) -> Tensor:
    """PARTIAL [1, 2, n, width]; as the function of that name in streaming.py. ``all_columns`` changes nothing here."""
    n = rows.shape[1]
    if partial is None:
        partial = torch.zeros(1, *rows.shape, dtype=torch.float32, device=rows.device)
    for part, cols in blocks(n, columns.shape[1]):
        X = product(rows[0, part], columns[1, cols].T)
        Y = product(rows[1, part], columns[0, cols].T)
        m, k = X.shape
        G = torch.empty_like(X, dtype=rows.dtype) if need_a else None
        H = torch.empty_like(Y, dtype=rows.dtype) if need_b else None
        launch(
            gradient_kernel,
            (cdiv(m, 16), cdiv(k, 128)),
            X=X,
            Y=Y,
            ROW_COEF=row_coef[0, :, part],
            stride_rn=row_coef.stride(1),
            COL_COEF=column_coef[0, :, cols],
            stride_cn=column_coef.stride(1),
            SCALE=scale,
            G=G,
            H=H,
            m=m,
            k=k,
            offset=offset + part.start - cols.start,
            BLOCK_M=16,
            BLOCK_N=128,
            BOUNDED=bounded,
            NEED_A=need_a,
            NEED_B=need_b,
            num_warps=4,
        )
        if G is not None:
            partial[0, 0, part] += product(G, columns[1, cols])
        if H is not None:
            partial[0, 1, part] += product(H, columns[0, cols])
    return partial
