"""Arithmetic of ``contrast`` on one tile, shared by the streaming kernels and by those on matrix products.

The legend in streaming.py has the names. IS_EDGE: the tile may hold columns that do not exist, and the diagonal: the
pairs of a query and the key of the same number.
"""

import triton
import triton.language as tl
from fastkd.kernels.tiles import LOG2E

# The maximum before any key. It is finite, so that a query that has seen no key yet stays free of inf - inf.
LOWEST = tl.constexpr(-1e30)
NO_LABEL = tl.constexpr(-1)  # of queries whose label no key has


@triton.jit
def load_state(STATE, n, in_rows, BLOCK_M: tl.constexpr, HAS_CARRY: tl.constexpr):
    stride_k = n.to(tl.int64)
    if HAS_CARRY:
        m = tl.load(STATE, mask=in_rows, other=0.0)
        s = tl.load(STATE + stride_k, mask=in_rows, other=0.0)
        xp = tl.load(STATE + 2 * stride_k, mask=in_rows, other=0.0)
    else:
        m = tl.full([BLOCK_M], LOWEST, tl.float32)
        s = tl.zeros([BLOCK_M], tl.float32)
        xp = tl.zeros([BLOCK_M], tl.float32)
    return m, s, xp


@triton.jit
def load_side(
    LABELS, POSITIVE, COEF, stride_c, offsets, first, inside,
    HAS_LABELS: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_COEF: tl.constexpr,
):  # fmt: skip
    """Number, label, positive, and both parts of COEF of rows or columns. What is absent is filled with the number."""
    number = offsets + first
    label, positive, log_weight, at_positive = number, number, number, number
    if HAS_LABELS:
        label = tl.load(LABELS + offsets, mask=inside, other=NO_LABEL)
    if HAS_INDEX:
        positive = tl.load(POSITIVE + offsets, mask=inside, other=-1).to(tl.int32)
    if HAS_COEF:
        log_weight = tl.load(COEF + offsets, mask=inside, other=-float("inf"))
        at_positive = tl.load(COEF + stride_c + offsets, mask=inside, other=0.0)
    return number, label, positive, log_weight, at_positive


@triton.jit
def accumulate(
    X, scale, state, queries, keys, in_keys,
    HAS_LABELS: tl.constexpr, BY_LABEL: tl.constexpr, HAS_INDEX: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    IS_EDGE: tl.constexpr,
):  # fmt: skip
    """The state of a row-block of queries after one more tile of dot products X [BLOCK_M, BLOCK_N]."""
    m, s, xp = state
    query, key = queries[0][:, None], keys[0][None, :]
    kept = in_keys[None, :]
    if EXCLUDE_SELF:
        kept = kept & (query != key)
    if BY_LABEL:
        is_positive = queries[1][:, None] == keys[1][None, :]
        if IS_EDGE:
            is_positive = is_positive & kept
        xp += tl.sum(tl.where(is_positive, X, 0.0), 1) * (scale * LOG2E)
    else:
        if HAS_INDEX or IS_EDGE:
            # From the tile, not from its own dot product: only then does it agree with the others to the last bit.
            is_positive = key == queries[2][:, None]
            xp += tl.sum(tl.where(is_positive, X, 0.0), 1) * (scale * LOG2E)
            X = tl.where(is_positive, -float("inf"), X)
        if HAS_LABELS:
            X = tl.where(queries[1][:, None] == keys[1][None, :], -float("inf"), X)
    if IS_EDGE:
        X = tl.where(kept, X, -float("inf"))
    # The maximum of the dot products, not of the logits, so that exp2's argument is one multiply-add.
    new = tl.maximum(m, tl.max(X, 1) * (scale * LOG2E))
    s = s * tl.exp2(m - new) + tl.sum(tl.exp2(X * (scale * LOG2E) - new[:, None]), 1)
    return new, s, xp


@triton.jit
def _side_gradient(
    X, scale, log_weight, at_positive, key, positive, same, kept,
    HAS_LABELS: tl.constexpr, BY_LABEL: tl.constexpr, HAS_INDEX: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """``G`` of a tile. What belongs to queries or to keys comes broadcast along the other side."""
    G = tl.exp2(X * (scale * LOG2E) + log_weight)
    if BY_LABEL:
        # Before the result is rounded: where p_ij is near 1 / |P_i|, the difference keeps its relative precision.
        G = tl.where(same, G - at_positive, G)
    elif HAS_LABELS:
        G = tl.where(same, 0.0, G)
    if IS_EDGE:
        # Rows that do not exist are zero, but exp2(log_weight) may overflow, and inf times zero is NaN.
        G = tl.where(kept, G, 0.0)
    if not BY_LABEL and (HAS_INDEX or IS_EDGE):
        G = tl.where(key == positive, at_positive, G)
    return G


@triton.jit
def gradient(
    X, scale, rows, columns, in_columns,
    HAS_LABELS: tl.constexpr, BY_LABEL: tl.constexpr, HAS_INDEX: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """``G_ij`` (BY_ROW) plus ``G_ji`` (BY_COLUMN) of a tile of dot products X [BLOCK_M, BLOCK_N]."""
    row, column = rows[0][:, None], columns[0][None, :]
    same = rows[1][:, None] == columns[1][None, :]
    kept = in_columns[None, :]
    if EXCLUDE_SELF:
        kept = kept & (row != column)
    if BY_ROW:
        G = _side_gradient(
            X, scale, rows[3][:, None], rows[4][:, None], column, rows[2][:, None], same, kept,
            HAS_LABELS=HAS_LABELS, BY_LABEL=BY_LABEL, HAS_INDEX=HAS_INDEX, IS_EDGE=IS_EDGE,
        )  # fmt: skip
    if BY_COLUMN:
        H = _side_gradient(
            X, scale, columns[3][None, :], columns[4][None, :], row, columns[2][None, :], same, kept,
            HAS_LABELS=HAS_LABELS, BY_LABEL=BY_LABEL, HAS_INDEX=HAS_INDEX, IS_EDGE=IS_EDGE,
        )  # fmt: skip
        G = G + H if BY_ROW else H
    return G
