"""Arithmetic of ``dual_softmax`` on one tile, shared by the streaming kernels and by those on matrix products.

The legend in streaming.py has the names. ``state`` is STATE of a row-block, ``row_factors`` is its COEF. IS_EDGE: the
tile may hold columns that do not exist, and positives of these rows.
"""

import triton
import triton.language as tl
from fastkd.kernels.tiles import LN2, LOG2E


@triton.jit
def accumulate(X, Y, scale, state, offs_n, n_cols, positive, BOUNDED: tl.constexpr, IS_EDGE: tl.constexpr):
    """The state of a row-block after one more tile of cosines X, Y [BLOCK_M, BLOCK_N]."""
    mp, sp, mq, sq, se, xp = state
    d = X - Y
    X *= scale * LOG2E
    Y *= scale * LOG2E
    if IS_EDGE:
        # The positive comes from the tile, not from its own dot product: a loss near 0 then cancels exactly.
        xp += tl.sum(tl.where(offs_n[None, :] == positive[:, None], X, 0.0), 1)
        inside = (offs_n < n_cols)[None, :]
        X = tl.where(inside, X, -float("inf"))
        Y = tl.where(inside, Y, -float("inf"))
    if not BOUNDED:
        new_p, new_q = tl.maximum(mp, tl.max(X, 1)), tl.maximum(mq, tl.max(Y, 1))
        decay_p = tl.exp2(mp - new_p)
        sp *= decay_p
        se *= decay_p
        sq *= tl.exp2(mq - new_q)
        mp, mq = new_p, new_q
        X -= mp[:, None]
        Y -= mq[:, None]
    U = tl.exp2(X)
    sp += tl.sum(U, 1)
    sq += tl.sum(tl.exp2(Y), 1)
    se += tl.sum(U * d, 1)
    return mp, sp, mq, sq, se, xp


@triton.jit
def load_state(STATE, n, in_rows, BLOCK_M: tl.constexpr, BOUNDED: tl.constexpr, HAS_CARRY: tl.constexpr):
    stride_k = n.to(tl.int64)
    if HAS_CARRY:
        mp = tl.load(STATE, mask=in_rows, other=0.0)
        sp = tl.load(STATE + stride_k, mask=in_rows, other=0.0)
        mq = tl.load(STATE + 2 * stride_k, mask=in_rows, other=0.0)
        sq = tl.load(STATE + 3 * stride_k, mask=in_rows, other=0.0)
        se = tl.load(STATE + 4 * stride_k, mask=in_rows, other=0.0)
        xp = tl.load(STATE + 5 * stride_k, mask=in_rows, other=0.0)
    else:
        mp = tl.full([BLOCK_M], 0.0 if BOUNDED else -float("inf"), tl.float32)
        mq = tl.full([BLOCK_M], 0.0 if BOUNDED else -float("inf"), tl.float32)
        sp = tl.zeros([BLOCK_M], tl.float32)
        sq = tl.zeros([BLOCK_M], tl.float32)
        se = tl.zeros([BLOCK_M], tl.float32)
        xp = tl.zeros([BLOCK_M], tl.float32)
    return mp, sp, mq, sq, se, xp


@triton.jit
def load_factors(COEF, stride_k, inside, BOUNDED: tl.constexpr):
    """k, r, x, w, la, lc of rows or columns, where COEF points to the first number of each."""
    k = tl.load(COEF, mask=inside, other=0.0)
    r = tl.load(COEF + stride_k, mask=inside, other=0.0)
    x = tl.load(COEF + 2 * stride_k, mask=inside, other=0.0)
    w = tl.load(COEF + 3 * stride_k, mask=inside, other=0.0)
    la, lc = w, w
    if not BOUNDED:
        la = tl.load(COEF + 4 * stride_k, mask=inside, other=0.0)
        lc = tl.load(COEF + 5 * stride_k, mask=inside, other=0.0)
    return k, r, x, w, la, lc


@triton.jit
def load_tile_factors(COEF, start, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr):
    """The same of the columns of one tile, all numbers in one piece.

    A load of each number by itself would be in the layout of the product, in which 32 threads copy every number.
    """
    NUMBERS: tl.constexpr = 4 if BOUNDED else 8
    COEF += start.to(tl.int64) * NUMBERS
    numbers = tl.load(COEF + tl.arange(0, NUMBERS)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :])
    even, odd = numbers.T.reshape(BLOCK_N, NUMBERS // 2, 2).split()
    if BOUNDED:
        k, x = even.split()
        r, w = odd.split()
        la, lc = w, w
    else:
        k_la, x_none = even.reshape(BLOCK_N, 2, 2).split()
        r_lc, w_none = odd.reshape(BLOCK_N, 2, 2).split()
        k, la = k_la.split()
        r, lc = r_lc.split()
        x, _ = x_none.split()
        w, _ = w_none.split()
    return k, r, x, w, la, lc


@triton.jit
def gradient(
    X, Y, row_factors, column_factors, offs_n, n_cols, positive, scale, BOUNDED: tl.constexpr, IS_EDGE: tl.constexpr
):
    """``G_ij`` and ``H_ij = G_ji`` of a tile of cosines X, Y [BLOCK_M, BLOCK_N]."""
    ki, ri, xi, wi, lai, lci = row_factors
    kj, rj, xj, _, laj, lcj = column_factors
    ki, ri, xi, wi, lai, lci = ki[:, None], ri[:, None], xi[:, None], wi[:, None], lai[:, None], lci[:, None]
    kj, rj, xj, laj, lcj = kj[None, :], rj[None, :], xj[None, :], laj[None, :], lcj[None, :]
    X *= scale * LOG2E
    Y *= scale * LOG2E
    d = X - Y  # in units of log 2: k times LN2 takes an instruction per row and column, d times LN2 one per pair
    if BOUNDED:
        P, Q = tl.exp2(X), tl.exp2(Y)
        G = P * (ki * LN2 * d + (ri + xj)) - Q * kj
        H = Q * ((rj + xi) - kj * LN2 * d) - P * ki
    else:
        P, Q = tl.exp2(X - lai), tl.exp2(Y - laj)  # p_ij, p_ji
        G = P * (ki * LN2 * d + ri) - Q * kj + tl.exp2(X - lcj) * xj
        H = Q * (rj - kj * LN2 * d) - P * ki + tl.exp2(Y - lci) * xi
    if IS_EDGE:
        inside = offs_n < n_cols
        # Before the result is rounded: where p_ii is near 1, p_ii - 1 keeps its relative precision.
        is_positive = offs_n[None, :] == positive[:, None]
        G = tl.where(is_positive, G - wi, G)
        H = tl.where(is_positive, H - wi, H)
        # Their unit rows are zero, but exp(0 - la) may overflow, and inf times zero is NaN.
        G = tl.where(inside[None, :], G, 0.0)
        H = tl.where(inside[None, :], H, 0.0)
    return G, H
