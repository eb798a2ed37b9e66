"""``pair_divergence`` of the blocked backend: pairs of tiles, of which none is kept, in one pass.

The similarities are symmetric: a tile above the diagonal has the pairs (i, j) of its rows, and (j, i) of its columns.
The gradient needs nothing that is known only at the end, because a row's normaliser r is an input of its own. With
``w = q / (p + eps)`` it is ``-(r_i w_ij + r_j w_ji) u_j`` summed over j for the row ``u_i``, and ``-w_ij p_ij / r_i``
summed over j for ``r_i``.
"""

import torch
from torch import Tensor

from fastkd.backends.blocked.gemm import product
from fastkd.backends.blocked.gram_sums import shared_rounds
from fastkd.backends.blocked.sums import RowGradient
from fastkd.backends.blocked.tiles import Workspace, for_each_tile


def pair_divergence(
    student: Tensor, inverse_s: Tensor, teacher: Tensor, inverse_t: Tensor, eps: float, rank: int, world_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over this rank's pairs of blocks, and its gradients in ``student`` and ``inverse_s``."""
    student, teacher = student.contiguous(), teacher.contiguous()
    totals = student.new_zeros(2, len(student), dtype=torch.float64)  # of the loss, and of w p, per row
    gradient = RowGradient(student, student)

    def slope(S: Tensor, T: Tensor, rows: slice, dim: int) -> Tensor:
        """Adds the losses of one order of the tile's pairs. Returns ``r w``, the derivative in -S."""
        shape = (-1, 1) if dim == 1 else (1, -1)
        r = inverse_s[rows].view(shape)
        p, q = S * r, T * inverse_t[rows].view(shape)
        ratio = (q + eps).div_(p + eps)
        totals[0, rows] += ratio.log().mul_(q).sum(dim=dim)
        w = q.div_(p + eps)
        totals[1, rows] += p.mul_(w).sum(dim=dim)
        return w.mul_(r)

    def add(rows: slice, cols: slice, _: Workspace) -> None:
        S, T = product(student[rows], student[cols]).add_(1), product(teacher[rows], teacher[cols]).add_(1)
        G = slope(S, T, rows, 1)
        G += G.T.clone() if rows == cols else slope(S, T, cols, 0)
        gradient.add_rows(rows, cols, G)
        if rows != cols:
            gradient.add_cols(rows, cols, G)

    for_each_tile(shared_rounds(student, rank, world_size), add, student, buffers=0)
    of_inverse = -(totals[1] / inverse_s).to(student.dtype)
    return totals[0].sum().to(student.dtype), gradient.total().neg_(), of_inverse
