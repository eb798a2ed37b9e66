"""``gram_sums`` of the blocked backend: pairs of tiles of the two Gram matrices, of which none is kept.

The matrices are symmetric, so that the tiles above the diagonal serve for those below. The derivative of the sums in
the student's product of rows i and j, both orders together, is ``(a_i + a_j) S_ij + (b_i + b_j) T_ij``. ``a`` is twice
the upstream gradient of the sums of squares, and ``b`` is that of the sums of products.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.backends.blocked.gemm import product
from fastkd.backends.blocked.sums import RowGradient
from fastkd.backends.blocked.tiles import Round, Workspace, blocks, for_each_tile, pair_rounds
from fastkd.native import extension


def shared_rounds(rows: Tensor, rank: int, world_size: int) -> Iterator[Round]:
    """The pairs of row-blocks of one rank, dealt out in turn; see :func:`fastkd.backends.blocked.tiles.pair_rounds`."""
    dealt = 0
    for tiles in pair_rounds(blocks(len(rows), rows.device)):
        yield [tile for index, tile in enumerate(tiles, dealt) if index % world_size == rank]
        dealt += len(tiles)


def gram_sums(student: Tensor, teacher: Tensor, rank: int, world_size: int) -> Tensor:
    """For every row i the sums over j of ``S_ij^2``, ``T_ij^2`` and ``S_ij T_ij``, [3, N] in float64.

    S and T: the products of the student's rows with each other, and of the teacher's. The sums are those of this rank's
    pairs of blocks.
    """
    sums = student.new_zeros(3, len(student), dtype=torch.float64)
    native = extension() if student.device.type == "cpu" else None

    def add(rows: slice, cols: slice, _: Workspace) -> None:
        S, T = product(student[rows], student[cols]), product(teacher[rows], teacher[cols])
        if native is not None:
            native.gram_tile_sums(S, T, sums, rows.start, cols.start)
            return
        S, T = S.double(), T.double()
        for number, found in zip(sums, (S * S, T * T, S.mul_(T)), strict=True):
            number[rows] += found.sum(dim=1)
            if rows != cols:
                number[cols] += found.sum(dim=0)

    for_each_tile(shared_rounds(student, rank, world_size), add, student, buffers=0)
    return sums


def gram_sums_backward(student: Tensor, teacher: Tensor, grad: Tensor, rank: int, world_size: int) -> Tensor:
    """The gradient of the student's rows, [N, D], from that of the sums."""
    factors = torch.stack([2 * grad[0], grad[2]]).to(student.dtype)
    native = extension() if student.device.type == "cpu" else None
    total = RowGradient(student, student)

    def add(rows: slice, cols: slice, _: Workspace) -> None:
        S, T = product(student[rows], student[cols]), product(teacher[rows], teacher[cols])
        if native is not None:
            native.gram_tile_gradient(S, T, factors, rows.start, cols.start)
        else:
            a, b = factors[:, rows, None] + factors[:, None, cols]
            S.mul_(a).addcmul_(T, b)
        total.add_rows(rows, cols, S)
        if rows != cols:
            total.add_cols(rows, cols, S)

    for_each_tile(shared_rounds(student, rank, world_size), add, student, buffers=0)
    return total.total()
