"""``triplet_angles`` on a GPU: the angles at every corner i between the ends j and k, none of which is stored.

Two kernels visit every triplet. The first sums over one end: the losses, and what the derivatives in the rows of the
two matrices need. The second sums over the corners. One kernel for both would have to add the sums of all its programs,
with atomics or through a buffer of another N^2 numbers per tile. Angles cost so little that they are computed twice.

Legend. ``GRAM_S``, ``GRAM_T`` [N, N]: products of the rows. ``INVERSE_S``, ``INVERSE_T`` [N, N]: the inverse distances
u and v, 0 where a pair has no direction. ``a``, ``b``: the angles of student and teacher. ``slope``: a - b, clamped to
[-1, 1]. ``q = slope u_ij u_ik``, ``r = slope a``. OF_GRAM and OF_INVERSE [corners, N]: the sums of q and r over k. LOSS
[corners, programs]: those of the losses over k and the program's j. ENDS [N, N]: the sums of q over the corners. They
are the same for (j, k) and (k, j), so that only tiles on and above the diagonal are computed.

Work for N corners: 20 instructions a triplet in the first kernel, 19 for half of the triplets in the second. Bytes: the
first reads 8 N^3 / CORNERS from the L2 cache, the second 32 N^3 / BLOCK_N.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fastkd.kernels.launch import cdiv
from fastkd.kernels.plans import launch
from torch import Tensor

CORNERS = tl.constexpr(4)  # of a program of the first kernel, which share the tiles that it reads
# BLOCK_M and BLOCK_N of the two kernels, on every hardware, for four warps. No wider ones leave 128 registers a thread.
CORNERS_TILE, ENDS_TILE = (8, 32), (32, 32)


@triton.jit
def sides(GRAM, INVERSE, row, j, inside):
    """``G_ij`` and ``u_ij``, of a row that starts at ``row``; 0 outside."""
    offsets = row + j
    return tl.load(GRAM + offsets, mask=inside, other=0.0), tl.load(INVERSE + offsets, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["n", "first", "last"])
def corners_kernel(
    GRAM_S, INVERSE_S, GRAM_T, INVERSE_T, LOSS, OF_GRAM, OF_INVERSE, n, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program has CORNERS corners and BLOCK_M ends j, and visits all ends k in tiles of BLOCK_N."""
    i = (first + tl.program_id(0) * CORNERS + tl.arange(0, CORNERS))[:, None, None]
    j = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :, None]
    in_rows = i < last
    in_columns = j < n
    inside = in_rows & in_columns  # [CORNERS, BLOCK_M, 1]
    row = i.to(tl.int64) * n
    gram_ij, u_ij = sides(GRAM_S, INVERSE_S, row, j, inside)
    gram_t_ij, v_ij = sides(GRAM_T, INVERSE_T, row, j, inside)
    gram_ij -= tl.load(GRAM_S + row + i, mask=in_rows, other=0.0)
    gram_t_ij -= tl.load(GRAM_T + row + i, mask=in_rows, other=0.0)
    loss = tl.zeros([CORNERS, BLOCK_M, BLOCK_N], tl.float32)
    of_gram = tl.zeros([CORNERS, BLOCK_M, BLOCK_N], tl.float32)
    of_inverse = tl.zeros([CORNERS, BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_N):
        k = (start + tl.arange(0, BLOCK_N))[None, None, :]
        gram_ik, u_ik = sides(GRAM_S, INVERSE_S, row, k, in_rows & (k < n))  # [CORNERS, 1, BLOCK_N]
        gram_t_ik, v_ik = sides(GRAM_T, INVERSE_T, row, k, in_rows & (k < n))
        jk = j.to(tl.int64) * n + k
        gram_jk = tl.load(GRAM_S + jk, mask=in_columns & (k < n), other=0.0)  # [1, BLOCK_M, BLOCK_N]
        gram_t_jk = tl.load(GRAM_T + jk, mask=in_columns & (k < n), other=0.0)
        scale = u_ij * u_ik
        a = (gram_jk - gram_ij - gram_ik) * scale
        d = a - (gram_t_jk - gram_t_ij - gram_t_ik) * (v_ij * v_ik)
        slope = tl.minimum(tl.maximum(d, -1.0), 1.0)
        loss += slope * (d - 0.5 * slope)
        of_gram += slope * scale
        of_inverse += slope * a
    row = (tl.program_id(0) * CORNERS + tl.arange(0, CORNERS)).to(tl.int64)
    in_row = row < last - first
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offsets = row[:, None] * n + column[None, :]
    inside = in_row[:, None] & (column < n)[None, :]
    tl.store(OF_GRAM + offsets, tl.sum(of_gram, axis=2), mask=inside)
    tl.store(OF_INVERSE + offsets, tl.sum(of_inverse, axis=2), mask=inside)
    total = tl.sum(tl.sum(loss, axis=2), axis=1)
    tl.store(LOSS + row * tl.num_programs(1) + tl.program_id(1), total, mask=in_row)


@triton.jit(do_not_specialize=["n", "first", "last"])
def ends_kernel(
    GRAM_S, INVERSE_S, GRAM_T, INVERSE_T, ENDS, n, first, last, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A program has a tile of ends j and k, which it keeps in registers, and visits all corners."""
    j_first, k_first = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    if k_first + BLOCK_N > j_first:
        j, k = j_first + tl.arange(0, BLOCK_M), k_first + tl.arange(0, BLOCK_N)
        in_rows, in_columns = j < n, k < n
        inside = in_rows[:, None] & in_columns[None, :]
        jk = j.to(tl.int64)[:, None] * n + k[None, :]
        gram_jk = tl.load(GRAM_S + jk, mask=inside, other=0.0)
        gram_t_jk = tl.load(GRAM_T + jk, mask=inside, other=0.0)
        ends = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        row = first.to(tl.int64) * n
        for i in range(first, last):
            gram_ij, u_ij = sides(GRAM_S, INVERSE_S, row, j, in_rows)
            gram_ik, u_ik = sides(GRAM_S, INVERSE_S, row, k, in_columns)
            gram_t_ij, v_ij = sides(GRAM_T, INVERSE_T, row, j, in_rows)
            gram_t_ik, v_ik = sides(GRAM_T, INVERSE_T, row, k, in_columns)
            gram_ij -= tl.load(GRAM_S + row + i)
            gram_t_ij -= tl.load(GRAM_T + row + i)
            scale = u_ij[:, None] * u_ik[None, :]
            a = (gram_jk - gram_ij[:, None] - gram_ik[None, :]) * scale
            b = (gram_t_jk - gram_t_ij[:, None] - gram_t_ik[None, :]) * (v_ij[:, None] * v_ik[None, :])
            ends += tl.minimum(tl.maximum(a - b, -1.0), 1.0) * scale
            row += n
        tl.store(ENDS + jk, ends, mask=inside)
        kj = k.to(tl.int64)[None, :] * n + j[:, None]
        # A tile that holds (j, k) and (k, j) writes the lower one once.
        tl.store(ENDS + kj, ends, mask=inside & (j[:, None] < k_first))


def triplet_angles(
    gram_s: Tensor, inverse_s: Tensor, gram_t: Tensor, inverse_t: Tensor, first: int, last: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, 0-dim, and ENDS, OF_GRAM and OF_INVERSE for the corners in [first, last); all fp32."""
    n = len(gram_s)
    given: dict[str, Any] = {"GRAM_S": gram_s, "INVERSE_S": inverse_s, "GRAM_T": gram_t, "INVERSE_T": inverse_t}
    given |= {"n": n, "first": first, "last": last, "num_warps": 4}
    BLOCK_M, BLOCK_N = CORNERS_TILE
    programs = cdiv(n, BLOCK_M)
    loss = torch.empty(last - first, programs, device=gram_s.device)
    of_gram, of_inverse = torch.empty(2, last - first, n, device=gram_s.device)
    ends = torch.empty(n, n, device=gram_s.device)
    if last > first:
        outputs = {"LOSS": loss, "OF_GRAM": of_gram, "OF_INVERSE": of_inverse}
        grid = cdiv(last - first, CORNERS.value), programs
        launch(corners_kernel, grid, **given, **outputs, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    BLOCK_M, BLOCK_N = ENDS_TILE
    launch(ends_kernel, (cdiv(n, BLOCK_M), cdiv(n, BLOCK_N)), **given, ENDS=ends, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N)
    return loss.sum(), ends, of_gram, of_inverse
