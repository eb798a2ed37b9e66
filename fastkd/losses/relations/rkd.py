"""Relational knowledge distillation (arXiv 1904.05068)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastkd.distributed.group import Group
from fastkd.losses.inputs import check_part_weights
from fastkd.losses.pairs import feature_pair
from fastkd.losses.relational import RelationalLoss

SHORTEST = 1e-6  # shorter distances count as this one, and get no gradient
BLOCK = 1 << 22  # so many angles are held at once


class RKDLoss(RelationalLoss):
    r"""RKD: the distances of all pairs of samples, and the angles of all triplets, are those of the teacher.

    .. code-block:: text

        d_ij  = max(|x_i - x_j|, 1e-6) / (mean over i != j of the same)              0 for i = j
        a_ijk = cosine of x_j - x_i and x_k - x_i                                    0 where one of them is 0

        distance = distance_weight * mean_ij  huber(d^s_ij, d^t_ij)
        angle    = angle_weight    * mean_ijk huber(a^s_ijk, a^t_ijk)                 huber with delta 1

    The means are over all B^2 pairs and B^3 triplets, those with equal indices included, as in the public code. The
    paper's means are over distinct tuples. The terms of the others are 0, so that only a constant factor differs.
    RepDistiller has the weights 25 and 50 beside cross-entropy; the authors have 1 and 2 on embeddings, without
    cross-entropy.

    The angles come from the Gram matrix of the centred features. The work is of order B^3, whatever the width, and the
    memory is of order B^2: blocks of angles are computed again in the backward. Two samples so close that their Gram
    matrix has no digits for their direction count as equal. Their angle is 0 and has no gradient, where the public code
    has gradients of 1e11.

    Source: arXiv 1904.05068, as in the authors' code.

    Args:
        distance_weight, angle_weight: weights of the two terms; >= 0, and not both 0. A term of weight 0 is left out.
        group: as for :class:`fastkd.DCDLoss`; pairs and triplets span the rows of all its ranks.

    Raises:
        TypeError, ValueError: a weight is out of range, or ``group`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import RKDLoss, total_loss
        >>> terms = RKDLoss()(torch.randn(6, 8, requires_grad=True), torch.randn(6, 16))
        >>> list(terms)
        ['distance', 'angle']
        >>> total_loss(terms).backward()
    """

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0, *, group: Group = None) -> None:
        super().__init__(group)
        check_part_weights(distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> dict[str, Tensor]:
        """Returns ``distance`` and ``angle``, 0-dim. The teacher gets no gradient.

        student_features: [B, D_s]. teacher_features: [B, D_t]. Both in float64, float32, bf16 or fp16.
        """
        return self._over_ranks(student_features, teacher_features)

    def _rows(self, *inputs: Tensor, may_be_empty: bool) -> tuple[Tensor, ...]:
        return feature_pair(*inputs, may_be_empty=may_be_empty)

    def _terms(self, *rows: Tensor) -> dict[str, Tensor]:
        # Not by products, whose cancellation would spoil short distances.
        distances = [torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") for x in rows]
        terms = {}
        if self.distance_weight > 0:
            loss = F.smooth_l1_loss(_relative(distances[0]), _relative(distances[1]))
            terms["distance"] = self.distance_weight * loss
        if self.angle_weight > 0:
            grams = [_gram_and_inverses(x, d) for x, d in zip(rows, distances, strict=True)]
            terms["angle"] = self.angle_weight * _mean_of_angles(*grams[0], *grams[1])
        return terms

    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"


def _relative(distances: Tensor) -> Tensor:
    """The distances [B, B] divided by the mean of those that are not on the diagonal."""
    count = len(distances)
    distances = distances.clamp_min(SHORTEST) * (1 - torch.eye(count, dtype=distances.dtype, device=distances.device))
    mean = distances.sum() / max(count * (count - 1), 1)
    return distances / mean.clamp_min(SHORTEST)


def _gram_and_inverses(x: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix of the centred rows, and 1 / distance, 0 where the Gram matrix has no direction."""
    x = x - x.mean(dim=0)
    gram = x @ x.T
    squares = gram.detach().diagonal()
    floor = 16 * torch.finfo(x.dtype).eps * (squares[:, None] + squares)
    is_near = distances.detach().square() <= floor
    return gram, distances.masked_fill(is_near, 1).reciprocal().masked_fill(is_near, 0)


def _mean_of_angles(gram_s: Tensor, inverse_s: Tensor, gram_t: Tensor, inverse_t: Tensor) -> Tensor:
    count = len(gram_s)
    step = max(1, BLOCK // count**2)
    given = gram_s, inverse_s, gram_t, inverse_t
    if step >= count:
        return _sum_of_block(*given, 0, count) / count**3
    sums = [checkpoint(_sum_of_block, *given, first, first + step, use_reentrant=False, preserve_rng_state=False)
            for first in range(0, count, step)]  # fmt: skip
    return torch.stack(sums).sum() / count**3


def _sum_of_block(gram_s: Tensor, inverse_s: Tensor, gram_t: Tensor, inverse_t: Tensor, first: int, end: int) -> Tensor:
    """The sum over i in [first, end) and all j, k of the Huber loss of the angles at i."""
    student, teacher = _angles(gram_s, inverse_s, first, end), _angles(gram_t, inverse_t, first, end)
    return F.smooth_l1_loss(student, teacher, reduction="sum")


def _angles(gram: Tensor, inverse: Tensor, first: int, end: int) -> Tensor:
    """[i, j, k]: (x_j - x_i) . (x_k - x_i) / (|x_j - x_i| |x_k - x_i|)."""
    own, inverse = gram[first:end], inverse[first:end]
    products = gram - own[:, :, None] - own[:, None, :] + gram.diagonal()[first:end, None, None]
    return products * inverse[:, :, None] * inverse[:, None, :]
