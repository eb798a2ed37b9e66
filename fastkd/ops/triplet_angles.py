"""``triplet_angles``: how far the angles of all triplets of rows are from the teacher's, which gets no gradient."""

from typing import Any

import torch
from torch import Tensor

from fastkd.backends import implementation
from fastkd.ops.eager import computing
from fastkd.ops.with_gradients import custom_op, number


def _compute(
    gram_s: Tensor, inverse_s: Tensor, gram_t: Tensor, inverse_t: Tensor, first: int, last: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_{i, j, k} huber(a^s_ijk - a^t_ijk)`` over the anchors i in [first, last), and its two gradients.

    ``a_ijk = (G_jk - G_ij - G_ik + G_ii) u_ij u_ik``. gram: G, the products of the rows with each other. inverse: u,
    the inverse distances, 0 where a pair has no direction. All are [N, N], in one dtype. The gradients are those of the
    student's two matrices, for an upstream gradient of 1.
    """
    with computing(gram_s):
        given = gram_s, inverse_s, gram_t, inverse_t
        total, ends, of_gram, of_inverse = implementation("triplet_angles", backend).triplet_angles(*given, first, last)
        ends[first:last].sub_(of_gram, alpha=2)
        ends.diagonal()[first:last].add_(of_gram.sum(dim=1))
        u = inverse_s[first:last]
        grad_inverse = torch.zeros_like(ends)
        grad_inverse[first:last] = (2 * of_inverse / u).masked_fill(u == 0, 0)
    return total, ends, grad_inverse


triplet_angles = custom_op("triplet_angles", _compute)


def sum_of_anchors(*inputs: Any) -> Tensor:
    """The sum over the anchors, 0-dim, of the ``inputs`` of ``fastkd::triplet_angles``."""
    return number(triplet_angles, _compute, *inputs)
