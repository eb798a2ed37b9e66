"""Relational knowledge distillation (arXiv 1904.05068)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.backends import resolve
from fastkd.distributed.agree import Agreement
from fastkd.distributed.gather import gather_shared_rows
from fastkd.distributed.group import Group
from fastkd.losses.inputs import check_part_weights
from fastkd.losses.relational import FeatureRelation, share_of
from fastkd.ops.triplet_angles import sum_of_anchors

SHORTEST = 1e-6  # shorter distances count as this one, and get no gradient


class RKDLoss(FeatureRelation):
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
    memory is of order B^2: no angle is kept. Several ranks share out the corners i. Two samples so close that their
    Gram matrix has no digits for their direction count as equal. Their angle is 0 and has no gradient, where the public
    code has gradients of 1e11.

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

    def _of_ranks(self, ranks: Agreement, *rows: Tensor) -> dict[str, Tensor]:
        student, teacher = (gather_shared_rows(x, ranks.peers) for x in rows)
        count = len(student)
        corners = share_of(count, ranks)
        grams = [_gram_and_distances(x) for x in (student, teacher)]
        parts = {}
        if self.distance_weight > 0:
            relative_s, relative_t = (_relative(distances)[corners] for _, distances in grams)
            total = F.smooth_l1_loss(relative_s, relative_t, reduction="sum")
            parts["distance"] = self.distance_weight / count**2 * total
        if self.angle_weight > 0:
            matrices = [matrix for pair in grams for matrix in (pair[0], _inverses(*pair))]
            backend = resolve(None, "triplet_angles", student)
            total = sum_of_anchors(*matrices, corners.start, corners.stop, backend)
            parts["angle"] = self.angle_weight / count**3 * total
        return dict(zip(parts, ranks.sum(torch.stack(list(parts.values()))).unbind(), strict=True))

    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"


def _gram_and_distances(x: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix of the centred rows and their distances, both [B, B]."""
    x = x - x.mean(dim=0)
    if x.dtype == torch.float64:  # not by products, whose cancellation would spoil short distances
        return x @ x.T, torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    wide = x.double()  # has digits to spare for the cancellation, and a product is ten times as fast
    gram = wide @ wide.T
    squares = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    return gram.to(x.dtype), squares.clamp_min(SHORTEST**2).sqrt().to(x.dtype)


def _relative(distances: Tensor) -> Tensor:
    """The distances [B, B] divided by the mean of those that are not on the diagonal."""
    count = len(distances)
    distances = distances.clamp_min(SHORTEST) * (1 - torch.eye(count, dtype=distances.dtype, device=distances.device))
    mean = distances.sum() / max(count * (count - 1), 1)
    return distances / mean.clamp_min(SHORTEST)


def _inverses(gram: Tensor, distances: Tensor) -> Tensor:
    """1 / distance, 0 where the Gram matrix has no direction."""
    squares = gram.detach().diagonal()
    floor = 16 * torch.finfo(gram.dtype).eps * (squares[:, None] + squares)
    is_near = distances.detach().square() <= floor
    return distances.masked_fill(is_near, 1).reciprocal().masked_fill(is_near, 0)
