"""``dual_softmax`` on a GPU: one pass over the columns, and a backward in which a row-block's owner does all of it.

Legend. ``A``, ``B``: unit rows [n, BLOCK_D] in the dtype they are multiplied in. (A, B) is (student, teacher), or
(teacher, student) for the KL in the other direction. Rows are the n samples this launch owns. Columns are the n_cols
samples they are compared with. Row i's positive is column ``i + offset``. ``X_ij = scale a_i . b_j`` and
``Y_ij = scale b_i . a_j``; ``p``, ``q`` are their softmaxes over j, ``la``, ``lc`` the log-sum-exps, and
``E_i = sum_j p_ij (X_ij - Y_ij)``. ``G_ij`` is the gradient of ``X_ij``. Because ``Y_ij = X_ji``, one tile of X and one
of Y hold all that both ``G_ij`` and ``G_ji`` need.

STATE [SPLITS, 6, n]: six numbers per row, after the columns of a split that were seen so far: maximum of X,
``sum exp``, maximum of Y, ``sum exp``, ``sum exp(X) (a_i . b_j - b_i . a_j)``, positive of X; both in units of log 2.
STATE can be carried from one chunk of columns to the next. STATS [3, n]: la, lc, E. COEF [tiles, 4, BLOCK_N]
(8 unless BOUNDED, of which 6 are used): the factors of G by tile of columns, see ``coefficients_kernel``; the last tile
is whole. PARTIAL [SPLITS, 2, n, BLOCK_D]: ``sum_j G_ij b_j`` and ``sum_j G_ji a_j``. BOUNDED: the scale
is at most 40, so that no maximum is subtracted, and one exponential per similarity serves p and q and their transposes.

All sums are taken in a fixed order: there are no atomics. Nothing is read back to the host.
"""

import torch
import triton
import triton.language as tl
from fastkd.kernels.dual_softmax.tile import accumulate, gradient, load_factors, load_state, load_tile_factors
from fastkd.kernels.launch import LaunchConfig, hardware_of, launch_config
from fastkd.kernels.plans import Blocks, launch
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


@triton.jit(do_not_specialize=["n", "n_cols", "offset", "tiles_per_split"], do_not_specialize_on_alignment=ANYWHERE)
def forward_kernel(
    A_rows, B_rows, A_cols, B_cols, SCALE, STATE, n, n_cols, offset, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, BOUNDED: tl.constexpr,
    HAS_CARRY: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    offs_m = row + tl.arange(0, BLOCK_M)
    STATE += split.to(tl.int64) * 6 * n + offs_m
    positive, offs_n = offs_m + offset, tl.arange(0, BLOCK_N)
    scale = tl.load(SCALE).to(tl.float32)
    state = load_state(STATE, n, offs_m < n, BLOCK_M=BLOCK_M, BOUNDED=BOUNDED, HAS_CARRY=HAS_CARRY)
    a = load_rows(A_rows, row, IN_REGISTERS=IN_REGISTERS)  # [BLOCK_M, BLOCK_D]
    b = load_rows(B_rows, row, IN_REGISTERS=IN_REGISTERS)
    tiles = split_tiles(split, tiles_per_split, n_cols, row + offset, BLOCK_M, BLOCK_N)
    for turn in tl.static_range(2):  # all other tiles, then the edge
        low, high = loop_bounds(tiles, BLOCK_N=BLOCK_N, IS_EDGE=turn == 1)
        for index in range(low, high, BLOCK_N):
            start = first_column(index, tiles, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, IS_EDGE=turn == 1)
            X = tl.dot(a, B_cols.load([start, 0]).T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            Y = tl.dot(b, A_cols.load([start, 0]).T, input_precision=PRECISION)
            state = accumulate(
                X, Y, scale, state, start + offs_n, n_cols, positive, BOUNDED=BOUNDED, IS_EDGE=turn == 1
            )  # fmt: skip
    store_numbers(STATE, n, offs_m < n, state)


@triton.jit(do_not_specialize=["n", "n_cols", "offset", "tiles_per_split"], do_not_specialize_on_alignment=ANYWHERE)
def backward_kernel(
    A_rows, B_rows, A_cols, B_cols, ROW_COEF, COL_COEF, SCALE, PARTIAL, n, n_cols,
    offset, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BOUNDED: tl.constexpr, NEED_A: tl.constexpr, NEED_B: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    offs_m = row + tl.arange(0, BLOCK_M)
    positive = offs_m + offset
    scale = tl.load(SCALE).to(tl.float32)
    in_rows = offs_m < n
    ROW_COEF += (offs_m // BLOCK_N).to(tl.int64) * ((4 if BOUNDED else 8) * BLOCK_N) + offs_m % BLOCK_N
    row_factors = load_factors(ROW_COEF, BLOCK_N, in_rows, BOUNDED=BOUNDED)
    acc_a = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_b = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    a = A_rows.load([row, 0])  # [BLOCK_M, BLOCK_D]
    b = B_rows.load([row, 0])
    tiles = split_tiles(split, tiles_per_split, n_cols, row + offset, BLOCK_M, BLOCK_N)
    # The edge comes first: the other loop spills if the edge's bounds stay alive during it.
    for turn in tl.static_range(2):
        low, high = loop_bounds(tiles, BLOCK_N=BLOCK_N, IS_EDGE=turn == 0)
        for index in range(low, high, BLOCK_N):
            start = first_column(index, tiles, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, IS_EDGE=turn == 0)
            a_cols, b_cols = A_cols.load([start, 0]), B_cols.load([start, 0])  # [BLOCK_N, BLOCK_D]
            X = tl.dot(a, b_cols.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            Y = tl.dot(b, a_cols.T, input_precision=PRECISION)
            column_factors = load_tile_factors(COL_COEF, start, BLOCK_N=BLOCK_N, BOUNDED=BOUNDED)
            G, H = gradient(
                X, Y, row_factors, column_factors, start + tl.arange(0, BLOCK_N), n_cols, positive, scale,
                BOUNDED=BOUNDED, IS_EDGE=turn == 0,
            )  # fmt: skip
            if NEED_A:
                acc_a = tl.dot(G.to(b_cols.dtype), b_cols, acc_a, input_precision=PRECISION)
            if NEED_B:
                acc_b = tl.dot(H.to(a_cols.dtype), a_cols, acc_b, input_precision=PRECISION)
    offs_d = tl.arange(0, BLOCK_D)
    PARTIAL += (split.to(tl.int64) * 2 * n + offs_m)[:, None] * BLOCK_D + offs_d[None, :]
    if NEED_A:
        tl.store(PARTIAL, acc_a, mask=in_rows[:, None])
    if NEED_B:
        tl.store(PARTIAL + n.to(tl.int64) * BLOCK_D, acc_b, mask=in_rows[:, None])


def _blocks(rows: Tensor, columns: Tensor, config: LaunchConfig) -> dict[str, Blocks]:
    (a, b), (a_cols, b_cols) = rows.unbind(), columns.unbind()
    return {
        "A_rows": in_blocks(a, config.BLOCK_M),
        "B_rows": in_blocks(b, config.BLOCK_M),
        "A_cols": in_blocks(a_cols, config.BLOCK_N),
        "B_cols": in_blocks(b_cols, config.BLOCK_N),
    }


def tile_columns(rows: Tensor, *, bounded: bool) -> int | None:
    """How many columns a tile of COEF has; None: all columns are one tile."""
    kernel, hardware = "dual_softmax_backward", hardware_of(rows.device)
    return launch_config(kernel, hardware=hardware, dtype=rows.dtype, width=rows.shape[-1], bounded=bounded).BLOCK_N


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
    """STATE [SPLITS, 6, n] of unit rows [2, n, BLOCK_D] after these columns [2, n_cols, BLOCK_D].

    Row i's positive is column ``i + offset``, which may lie outside these columns. ``state``: what an earlier call
    returned for the columns before these; it is updated in place and returned. ``all_columns``: how many columns all
    calls together will see, where that is more than the first call's; SPLITS is chosen for that number.
    """
    config, grid, arguments = tiling(
        "dual_softmax_forward", rows, columns, bounded=bounded, all_columns=all_columns,
        splits=None if state is None else state.shape[0],
    )  # fmt: skip
    n = rows.shape[1]
    has_carry = state is not None
    if state is None:
        state = torch.empty(grid[1], 6, n, dtype=torch.float32, device=rows.device)
    launch(
        forward_kernel,
        grid,
        **_blocks(rows, columns, config),
        **arguments,
        SCALE=scale,
        STATE=state,
        offset=offset,
        BOUNDED=bounded,
        HAS_CARRY=has_carry,
        IN_REGISTERS=config.rows_in_registers,
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
    """PARTIAL [SPLITS, 2, n, BLOCK_D] after these columns. ``offset``, ``all_columns``: see :func:`running_statistics`.

    ``partial``: what an earlier call returned for the columns before these; it is updated in place and returned. The
    half of a side that is not needed is never written.
    """
    config, grid, arguments = tiling(
        "dual_softmax_backward", rows, columns, bounded=bounded, all_columns=all_columns,
        splits=None if partial is None else partial.shape[0],
    )  # fmt: skip
    _, n, BLOCK_D = rows.shape
    sums = torch.empty(grid[1], 2, n, BLOCK_D, dtype=torch.float32, device=rows.device)
    assert row_coef.shape[2] == column_coef.shape[2] == config.BLOCK_N
    sides = [(need_a, need_b)]
    if config.apart and need_a and need_b:
        sides = [(True, False), (False, True)]
    for side_a, side_b in sides:
        launch(
            backward_kernel,
            grid,
            **_blocks(rows, columns, config),
            **arguments,
            ROW_COEF=row_coef,
            COL_COEF=column_coef,
            SCALE=scale,
            PARTIAL=sums,
            offset=offset,
            BLOCK_D=BLOCK_D,
            BOUNDED=bounded,
            NEED_A=side_a,
            NEED_B=side_b,
        )
    # Added here: a kernel that loads a second pair of accumulators spills.
    return sums if partial is None else partial.add_(sums)
