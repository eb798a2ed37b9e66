"""``pair_divergence``: PKT's divergence of the similarities of all pairs, of which only a tile is held.

There is no Triton kernel: most of the work is matrix products, for which the libraries are there.
"""

from typing import Any

from torch import Tensor

from fastkd.backends.blocked import pair_divergence as blocked
from fastkd.ops.eager import computing
from fastkd.ops.with_gradients import custom_op, number


def _compute(
    student: Tensor, inverse_s: Tensor, teacher: Tensor, inverse_t: Tensor, eps: float, rank: int, world_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_ij q_ij ln((q_ij + eps) / (p_ij + eps))``, and its gradients in ``student`` and ``inverse_s``.

    ``p_ij = r_i (1 + u_i . u_j)``: student [N, D_s] has the rows u, and inverse_s [N] the numbers r. q is the same of
    the teacher, which gets no gradient. All are in one dtype. ``rank`` and ``world_size``: which share of the pairs is
    summed; the shares of all ranks make the whole.
    """
    with computing(student):
        return blocked.pair_divergence(student, inverse_s, teacher, inverse_t, eps, rank, world_size)


pair_divergence = custom_op("pair_divergence", _compute)


def sum_of_pairs(*inputs: Any) -> Tensor:
    """The sum over the pairs, 0-dim, of the ``inputs`` of ``fastkd::pair_divergence``."""
    return number(pair_divergence, _compute, *inputs)
