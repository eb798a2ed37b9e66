"""``dual_softmax`` on a GPU: one streaming pass forward, and a backward in which a row-block's owner does all of it.

Legend. ``A``, ``B``: unit rows [n, BLOCK_D] in the dtype they are multiplied in; (A, B) is (student, teacher), or
(teacher, student) for the KL in the other direction. Rows are the n samples this launch owns; columns are the n_cols
samples they are compared with, and row i's positive is column ``i + offset``. ``X_ij = scale a_i . b_j`` and
``Y_ij = scale b_i . a_j``; ``p``, ``q`` are their softmaxes over j, ``la``, ``lc`` the log-sum-exps, and
``E_i = sum_j p_ij (X_ij - Y_ij)``. ``G_ij`` is the gradient of ``X_ij``. Because ``Y_ij = X_ji``, a tile of X and one
of Y hold all that both ``G_ij`` and ``G_ji`` need.

STATE [SPLITS, 6, n]: what a split of the columns has seen so far: maximum of X, ``sum exp``, maximum of Y, ``sum exp``,
``sum exp(X) (a_i . b_j - b_i . a_j)``, positive of X; X and Y in units of log 2. It can be carried from one chunk of
columns to the next. STATS [3, n]: la, lc, E. COEF [6, n]: the factors of G, see ``_coefficients_kernel``. PARTIAL
[SPLITS, 2, n, BLOCK_D]: ``sum_j G_ij b_j`` and ``sum_j G_ji a_j``. BOUNDED: ``scale <= 40``, so that no maximum is
subtracted and one exponential a similarity serves p and q and their transposes.

All sums are taken in a fixed order: there are no atomics. Nothing is read back to the host.
"""

import torch
import triton
import triton.language as tl
from fastkd.kernels.dual_softmax.tile import accumulate, gradient, load_row_factors, load_state, store_state
from fastkd.kernels.launch import LaunchConfig, column_splits, hardware_of, launch_config, multiprocessors
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def split_tiles(split, tiles_per_split, n_cols, first_positive, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A split's tiles ``first ... last - 1``; those of ``skip ... resume - 1`` hold positives of the row-block.

    ragged: 1 if tile ``whole`` is the split's, has columns that do not exist, and is not among those; else 0. It
    and the tiles with positives have a loop of their own, so that the loop over all others has no mask.
    """
    first = split * tiles_per_split
    last = max(min(first + tiles_per_split, tl.cdiv(n_cols, BLOCK_N)), first)
    skip = min(max(max(first_positive, 0) // BLOCK_N, first), last)
    resume = min(max(tl.cdiv(max(first_positive + BLOCK_M, 0), BLOCK_N), first), last)
    whole = min(n_cols // BLOCK_N, last)
    ragged = tl.where((whole < first) | ((skip <= whole) & (whole < resume)), 0, last - whole)
    return first, last, skip, resume, whole, ragged


@triton.jit(do_not_specialize=["n", "n_cols", "offset", "tiles_per_split"])
def _forward_kernel(
    A_rows, B_rows, A_cols, B_cols, SCALE, STATE, n, n_cols, offset, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, BOUNDED: tl.constexpr,
    HAS_CARRY: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    offs_m = row + tl.arange(0, BLOCK_M)
    STATE += split.to(tl.int64) * 6 * n + offs_m
    positive, offs_n = offs_m + offset, tl.arange(0, BLOCK_N)
    scale = tl.load(SCALE).to(tl.float32)
    state = load_state(STATE, n, offs_m < n, BLOCK_M=BLOCK_M, BOUNDED=BOUNDED, HAS_CARRY=HAS_CARRY)
    a = A_rows.load([row, 0])  # [BLOCK_M, BLOCK_D]
    b = B_rows.load([row, 0])
    first, last, skip, resume, whole, ragged = split_tiles(
        split, tiles_per_split, n_cols, row + offset, BLOCK_M, BLOCK_N
    )  # fmt: skip
    for index in range(first, last - ragged - (resume - skip)):
        start = tl.where(index < skip, index, index + resume - skip) * BLOCK_N
        X = tl.dot(a, B_cols.load([start, 0]).T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        Y = tl.dot(b, A_cols.load([start, 0]).T, input_precision=PRECISION)
        state = accumulate(X, Y, scale, state, offs_n, n_cols, positive, BOUNDED=BOUNDED, IS_EDGE=False)
    for index in range(skip, resume + ragged):
        start = tl.where(index < resume, index, whole) * BLOCK_N
        X = tl.dot(a, B_cols.load([start, 0]).T, input_precision=PRECISION)
        Y = tl.dot(b, A_cols.load([start, 0]).T, input_precision=PRECISION)
        state = accumulate(X, Y, scale, state, start + offs_n, n_cols, positive, BOUNDED=BOUNDED, IS_EDGE=True)
    store_state(STATE, n, offs_m < n, state)


@triton.jit
def _gradient_tile(
    a, b, A_cols, B_cols, COEF, stride_cn, start, n_cols, positive, row_factors, scale, acc_a, acc_b,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, BOUNDED: tl.constexpr, NEED_A: tl.constexpr,
    NEED_B: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    a_cols, b_cols = A_cols.load([start, 0]), B_cols.load([start, 0])  # [BLOCK_N, BLOCK_D]
    X = tl.dot(a, b_cols.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    Y = tl.dot(b, a_cols.T, input_precision=PRECISION)
    G, H = gradient(
        X, Y, COEF, stride_cn, start + tl.arange(0, BLOCK_N), n_cols, positive, row_factors, scale,
        BOUNDED=BOUNDED, IS_EDGE=IS_EDGE,
    )  # fmt: skip
    if NEED_A:
        acc_a = tl.dot(G.to(b_cols.dtype), b_cols, acc_a, input_precision=PRECISION)
    if NEED_B:
        acc_b = tl.dot(H.to(a_cols.dtype), a_cols, acc_b, input_precision=PRECISION)
    return acc_a, acc_b


@triton.jit(do_not_specialize=["stride_rn", "stride_cn", "n", "n_cols", "offset", "tiles_per_split"])
def _backward_kernel(
    A_rows, B_rows, A_cols, B_cols, ROW_COEF, stride_rn, COL_COEF, stride_cn, SCALE, PARTIAL, n, n_cols,
    offset, tiles_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BOUNDED: tl.constexpr, NEED_A: tl.constexpr, NEED_B: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    offs_m = row + tl.arange(0, BLOCK_M)
    positive = offs_m + offset
    scale = tl.load(SCALE).to(tl.float32)
    ROW_COEF += offs_m
    in_rows = offs_m < n
    row_factors = load_row_factors(ROW_COEF, stride_rn, in_rows, BOUNDED=BOUNDED)
    acc_a = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc_b = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    a = A_rows.load([row, 0])  # [BLOCK_M, BLOCK_D]
    b = B_rows.load([row, 0])
    first, last, skip, resume, whole, ragged = split_tiles(
        split, tiles_per_split, n_cols, row + offset, BLOCK_M, BLOCK_N
    )  # fmt: skip
    # The edge first: with its bounds alive during the other loop, that one spills.
    for index in range(skip, resume + ragged):
        tile = tl.where(index < resume, index, whole)
        acc_a, acc_b = _gradient_tile(
            a, b, A_cols, B_cols, COL_COEF, stride_cn, tile * BLOCK_N, n_cols, positive, row_factors, scale,
            acc_a, acc_b, BLOCK_N=BLOCK_N, PRECISION=PRECISION, BOUNDED=BOUNDED, NEED_A=NEED_A, NEED_B=NEED_B,
            IS_EDGE=True,
        )  # fmt: skip
    for index in range(first, last - ragged - (resume - skip)):
        tile = tl.where(index < skip, index, index + resume - skip)
        acc_a, acc_b = _gradient_tile(
            a, b, A_cols, B_cols, COL_COEF, stride_cn, tile * BLOCK_N, n_cols, positive, row_factors, scale,
            acc_a, acc_b, BLOCK_N=BLOCK_N, PRECISION=PRECISION, BOUNDED=BOUNDED, NEED_A=NEED_A, NEED_B=NEED_B,
            IS_EDGE=False,
        )  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    PARTIAL += (split.to(tl.int64) * 2 * n + offs_m)[:, None] * BLOCK_D + offs_d[None, :]
    if NEED_A:
        tl.store(PARTIAL, acc_a, mask=in_rows[:, None])
    if NEED_B:
        tl.store(PARTIAL + n.to(tl.int64) * BLOCK_D, acc_b, mask=in_rows[:, None])


def _config(kernel: str, rows: Tensor, bounded: bool) -> LaunchConfig:
    return launch_config(
        kernel, dtype=rows.dtype, block_d=rows.shape[-1], bounded=bounded, hardware=hardware_of(rows.device)
    )


def _splits(config: LaunchConfig, rows: Tensor, columns: Tensor) -> int:
    return column_splits(
        triton.cdiv(rows.shape[1], config.BLOCK_M),
        triton.cdiv(columns.shape[1], config.BLOCK_N),
        config.ctas_per_sm * multiprocessors(rows.device),
    )


def _descriptors(rows: Tensor, columns: Tensor, config: LaunchConfig) -> dict[str, TensorDescriptor]:
    assert rows.shape[2] == columns.shape[2]
    assert rows.dtype == columns.dtype
    row_block, column_block = [config.BLOCK_M, rows.shape[2]], [config.BLOCK_N, rows.shape[2]]
    return {
        "A_rows": TensorDescriptor.from_tensor(rows[0], row_block),
        "B_rows": TensorDescriptor.from_tensor(rows[1], row_block),
        "A_cols": TensorDescriptor.from_tensor(columns[0], column_block),
        "B_cols": TensorDescriptor.from_tensor(columns[1], column_block),
    }


def running_statistics(
    rows: Tensor, columns: Tensor, scale: Tensor, *, offset: int, bounded: bool, state: Tensor | None = None
) -> Tensor:
    """STATE [SPLITS, 6, n] of unit rows [2, n, BLOCK_D] after these columns [2, n_cols, BLOCK_D].

    Row i's positive is column ``i + offset``, which may lie outside these columns. ``state``: that of the columns
    before these; it is updated in place and returned.
    """
    config = _config("dual_softmax_forward", rows, bounded)
    n, n_cols = rows.shape[1], columns.shape[1]
    has_carry = state is not None
    if state is None:
        state = torch.empty(_splits(config, rows, columns), 6, n, dtype=torch.float32, device=rows.device)
    splits = state.shape[0]
    _forward_kernel[(triton.cdiv(n, config.BLOCK_M), splits)](
        **_descriptors(rows, columns, config),
        SCALE=scale,
        STATE=state,
        n=n,
        n_cols=n_cols,
        offset=offset,
        tiles_per_split=triton.cdiv(triton.cdiv(n_cols, config.BLOCK_N), splits),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        PRECISION="tf32",
        BOUNDED=bounded,
        HAS_CARRY=has_carry,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
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
) -> Tensor:
    """PARTIAL [SPLITS, 2, n, BLOCK_D] after these columns; ``offset`` as in :func:`running_statistics`.

    ``partial``: that of the columns before these; it is updated in place and returned. The half of a side that is not
    needed is never written.
    """
    config = _config("dual_softmax_backward", rows, bounded)
    _, n, BLOCK_D = rows.shape
    n_cols = columns.shape[1]
    splits = _splits(config, rows, columns) if partial is None else partial.shape[0]
    sums = torch.empty(splits, 2, n, BLOCK_D, dtype=torch.float32, device=rows.device)
    assert row_coef.stride(1) == column_coef.stride(1) == 1
    sides = [(need_a, need_b)]
    if config.apart and need_a and need_b:
        sides = [(True, False), (False, True)]
    for side_a, side_b in sides:
        _backward_kernel[(triton.cdiv(n, config.BLOCK_M), splits)](
            **_descriptors(rows, columns, config),
            ROW_COEF=row_coef,
            stride_rn=row_coef.stride(0),
            COL_COEF=column_coef,
            stride_cn=column_coef.stride(0),
            SCALE=scale,
            PARTIAL=sums,
            n=n,
            n_cols=n_cols,
            offset=offset,
            tiles_per_split=triton.cdiv(triton.cdiv(n_cols, config.BLOCK_N), splits),
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_D=BLOCK_D,
            PRECISION="tf32",
            BOUNDED=bounded,
            NEED_A=side_a,
            NEED_B=side_b,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    # Added here: a kernel that loads a second pair of accumulators spills.
    return sums if partial is None else partial.add_(sums)
