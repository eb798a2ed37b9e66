"""``contrast`` on a GPU: one streaming pass forward; backward, the owner of a row-block computes its whole gradient.

Legend. Rows are what a launch owns, columns are what they are compared with. Either may be queries, keys, or both at
once. Their vectors [n, BLOCK_D] are in the dtype they are multiplied in, and ``x_ij = scale q_i . k_j``. ``first_row``
and ``first_col`` number them. POSITIVE: the number of the key that is a query's positive; without POSITIVE, it is the
query's own number. EXCLUDE_SELF leaves out the key of the query's own number. LABELS: int32, equal where labels are;
NO_LABEL matches nothing. ``P``, ``D``, BY_LABEL: see :class:`fastkd.backends.masks.Mask`.

STATE [SPLITS, 3, n]: three numbers per row, after the columns of a split that were seen so far: maximum, ``sum exp2``,
and the positive's logit or, BY_LABEL, the sum of the positives' logits; in units of log 2. By index the maximum and the
sum are taken over the negatives alone, so that a loss near 0 keeps its digits. STATE can be carried from one block of
columns to the next.
COEF [2, n], of queries: ``log2 w_i - lse_i``, and what is special at the positives, see ``coefficients_kernel``. Away
from the positives the gradient of ``x_ij`` is ``G_ij = exp2(x_ij + log2 w_i - lse_i)``: one multiply-add and one
exponential. A bound on the scale would save neither, so that there is no BOUNDED.
PARTIAL [SPLITS, n, BLOCK_D]: ``sum_j G_ij k_j`` if rows are queries (BY_ROW), ``sum_j G_ji q_j`` if columns are
(BY_COLUMN). Queries contrasted with themselves are both: x is symmetric, and one product serves ``G_ij + G_ji``.

All sums are taken in a fixed order: there are no atomics. Nothing is read back to the host.
"""

import torch
import triton
import triton.language as tl
from fastkd.kernels.contrast.per_row import ROWS_ANYWHERE, Side, backward_arguments, forward_arguments
from fastkd.kernels.contrast.tile import accumulate, gradient, load_side, load_state
from fastkd.kernels.plans import launch
from fastkd.kernels.tiles import (
    ANYWHERE,
    first_column,
    in_blocks,
    load_rows,
    loop_bounds,
    split_tiles,
    store_numbers,
    tiling,
)
from torch import Tensor


@triton.jit(
    do_not_specialize=["n", "n_cols", "first_row", "first_col", "tiles_per_split"],
    do_not_specialize_on_alignment=ANYWHERE + ROWS_ANYWHERE,
)
def forward_kernel(
    ROWS, COLS, SCALE, POSITIVE, ROW_LABELS, COL_LABELS, STATE, n, n_cols, first_row, first_col, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, HAS_LABELS: tl.constexpr,
    BY_LABEL: tl.constexpr, HAS_INDEX: tl.constexpr, EXCLUDE_SELF: tl.constexpr, HAS_CARRY: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    offs_m = row + tl.arange(0, BLOCK_M)
    in_rows = offs_m < n
    STATE += split.to(tl.int64) * 3 * n + offs_m
    scale = tl.load(SCALE).to(tl.float32)
    state = load_state(STATE, n, in_rows, BLOCK_M=BLOCK_M, HAS_CARRY=HAS_CARRY)
    queries = load_side(
        ROW_LABELS, POSITIVE, None, 0, offs_m, first_row, in_rows,
        HAS_LABELS=HAS_LABELS, HAS_INDEX=HAS_INDEX, HAS_COEF=False,
    )  # fmt: skip
    q = load_rows(ROWS, row, IN_REGISTERS=IN_REGISTERS)  # [BLOCK_M, BLOCK_D]
    # Where the diagonal means nothing, it lies before the first column.
    HAS_DIAGONAL: tl.constexpr = EXCLUDE_SELF or not (BY_LABEL or HAS_INDEX)
    diagonal = row + first_row - first_col if HAS_DIAGONAL else -BLOCK_M
    tiles = split_tiles(split, tiles_per_split, n_cols, diagonal, BLOCK_M, BLOCK_N)
    for turn in tl.static_range(2):  # all other tiles, then the edge
        low, high = loop_bounds(tiles, BLOCK_N=BLOCK_N, IS_EDGE=turn == 1)
        for index in range(low, high, BLOCK_N):
            start = first_column(index, tiles, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, IS_EDGE=turn == 1)
            X = tl.dot(q, COLS.load([start, 0]).T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            offs_n = start + tl.arange(0, BLOCK_N)
            keys = load_side(
                COL_LABELS, None, None, 0, offs_n, first_col, offs_n < n_cols,
                HAS_LABELS=HAS_LABELS, HAS_INDEX=False, HAS_COEF=False,
            )  # fmt: skip
            state = accumulate(
                X, scale, state, queries, keys, offs_n < n_cols, HAS_LABELS=HAS_LABELS, BY_LABEL=BY_LABEL,
                HAS_INDEX=HAS_INDEX, EXCLUDE_SELF=EXCLUDE_SELF, IS_EDGE=turn == 1,
            )  # fmt: skip
    store_numbers(STATE, n, in_rows, state)


@triton.jit(
    do_not_specialize=["stride_rn", "stride_cn", "n", "n_cols", "first_row", "first_col", "tiles_per_split"],
    do_not_specialize_on_alignment=ANYWHERE + ROWS_ANYWHERE,
)
def backward_kernel(
    ROWS, COLS, SCALE, ROW_COEF, stride_rn, COL_COEF, stride_cn, ROW_POSITIVE, COL_POSITIVE, ROW_LABELS, COL_LABELS,
    PARTIAL, n, n_cols, first_row, first_col, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    HAS_LABELS: tl.constexpr, BY_LABEL: tl.constexpr, HAS_INDEX: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    offs_m = row + tl.arange(0, BLOCK_M)
    in_rows = offs_m < n
    scale = tl.load(SCALE).to(tl.float32)
    rows = load_side(
        ROW_LABELS, ROW_POSITIVE, ROW_COEF, stride_rn, offs_m, first_row, in_rows,
        HAS_LABELS=HAS_LABELS, HAS_INDEX=HAS_INDEX and BY_ROW, HAS_COEF=BY_ROW,
    )  # fmt: skip
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    a = ROWS.load([row, 0])  # [BLOCK_M, BLOCK_D]
    HAS_DIAGONAL: tl.constexpr = EXCLUDE_SELF or not (BY_LABEL or HAS_INDEX)
    diagonal = row + first_row - first_col if HAS_DIAGONAL else -BLOCK_M
    tiles = split_tiles(split, tiles_per_split, n_cols, diagonal, BLOCK_M, BLOCK_N)
    # The edge comes first: the other loop needs more registers if the edge's bounds stay alive during it.
    for turn in tl.static_range(2):
        low, high = loop_bounds(tiles, BLOCK_N=BLOCK_N, IS_EDGE=turn == 0)
        for index in range(low, high, BLOCK_N):
            start = first_column(index, tiles, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, IS_EDGE=turn == 0)
            b = COLS.load([start, 0])  # [BLOCK_N, BLOCK_D]
            X = tl.dot(a, b.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            offs_n = start + tl.arange(0, BLOCK_N)
            columns = load_side(
                COL_LABELS, COL_POSITIVE, COL_COEF, stride_cn, offs_n, first_col, offs_n < n_cols,
                HAS_LABELS=HAS_LABELS, HAS_INDEX=HAS_INDEX and BY_COLUMN, HAS_COEF=BY_COLUMN,
            )  # fmt: skip
            G = gradient(
                X, scale, rows, columns, offs_n < n_cols, HAS_LABELS=HAS_LABELS, BY_LABEL=BY_LABEL,
                HAS_INDEX=HAS_INDEX, EXCLUDE_SELF=EXCLUDE_SELF, BY_ROW=BY_ROW, BY_COLUMN=BY_COLUMN,
                IS_EDGE=turn == 0,
            )  # fmt: skip
            total = tl.dot(G.to(b.dtype), b, total, input_precision=PRECISION)
    PARTIAL += (split.to(tl.int64) * n + offs_m)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(PARTIAL, total, mask=in_rows[:, None])


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
    """STATE [SPLITS, 3, n] of the queries after these keys.

    ``state``: what an earlier call returned for the keys before these; it is updated in place and returned.
    ``all_columns``: how many keys all calls together will see, where that is more than the first call's; SPLITS is
    chosen for that number.
    """
    config, grid, arguments = tiling(
        "contrast_forward", queries.vectors, keys.vectors, all_columns=all_columns,
        splits=None if state is None else state.shape[0],
    )  # fmt: skip
    n = queries.vectors.shape[0]
    has_carry = state is not None
    if state is None:
        state = torch.empty(grid[1], 3, n, dtype=torch.float32, device=queries.vectors.device)
    launch(
        forward_kernel,
        grid,
        **arguments,
        **forward_arguments(queries, keys, by_label, exclude_self),
        ROWS=in_blocks(queries.vectors, config.BLOCK_M),
        COLS=in_blocks(keys.vectors, config.BLOCK_N),
        SCALE=scale,
        STATE=state,
        HAS_CARRY=has_carry,
        IN_REGISTERS=config.rows_in_registers,
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
    """PARTIAL [SPLITS, n, BLOCK_D] of the rows after these columns. Queries are the sides that have COEF.

    ``partial``: what an earlier call returned for the columns before these; it is updated in place and returned.
    ``all_columns``: see :func:`running_statistics`.
    """
    kernel = "contrast_backward" if rows.coef is None or columns.coef is None else "contrast_self"
    config, grid, arguments = tiling(
        kernel, rows.vectors, columns.vectors, all_columns=all_columns,
        splits=None if partial is None else partial.shape[0],
    )  # fmt: skip
    n, BLOCK_D = rows.vectors.shape
    sums = torch.empty(grid[1], n, BLOCK_D, dtype=torch.float32, device=rows.vectors.device)
    launch(
        backward_kernel,
        grid,
        **arguments,
        **backward_arguments(rows, columns, by_label, exclude_self),
        ROWS=in_blocks(rows.vectors, config.BLOCK_M),
        COLS=in_blocks(columns.vectors, config.BLOCK_N),
        SCALE=scale,
        PARTIAL=sums,
        BLOCK_D=BLOCK_D,
    )
    return sums if partial is None else partial.add_(sums)
