"""Probabilistic knowledge transfer (arXiv 1803.10837)."""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastkd.distributed.agree import Agreement
from fastkd.distributed.gather import gather_shared_rows
from fastkd.distributed.group import Group
from fastkd.losses.relational import FeatureRelation, rank_of
from fastkd.ops.pair_divergence import sum_of_pairs
from fastkd.validate import check_choice

Reduction = Literal["mean", "sum"]
EPS = 1e-7
WHOLE = 1024  # rows up to which a rank that is alone keeps the matrices


class PKTLoss(FeatureRelation):
    r"""PKT: the similarities of a sample to all others, as probabilities, are those of the teacher.

    .. code-block:: text

        u_i  = x_i / (|x_i| + 1e-7)     S_ij = (1 + u_i . u_j) / 2     P_ij = S_ij / sum_k S_ik
        pkt  = mean_ij P^t_ij ln((P^t_ij + 1e-7) / (P^s_ij + 1e-7))                    the diagonal included

    With ``reduction="sum"``, which is the paper's, the loss is B^2 times as large. The default is the public code's
    mean, whose weight is 30000 in RepDistiller. A row of zeros has equal similarities to all others, and no gradient;
    in the public code its gradient is NaN.

    The sum over k is ``(B + u_i . sum_k u_k) / 2``, so that one pass over the pairs gives the loss and its gradients.
    Above 1024 samples, and on several ranks, no matrix [B, B] is kept: the memory is that of the features. Several
    ranks share out the pairs.

    Source: arXiv 1803.10837, as in the authors' code.

    Args:
        reduction: ``"mean"`` over all pairs, or their ``"sum"``.
        group: as for :class:`fastkd.DCDLoss`; pairs span the rows of all its ranks.

    Raises:
        TypeError, ValueError: ``reduction`` or ``group`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import PKTLoss
        >>> terms = PKTLoss()(torch.randn(6, 8, requires_grad=True), torch.randn(6, 16))
        >>> (30000 * terms["pkt"]).backward()
    """

    def __init__(self, reduction: Reduction = "mean", *, group: Group = None) -> None:
        super().__init__(group)
        check_choice("reduction", reduction, get_args(Reduction))
        self.reduction = reduction

    def _of_ranks(self, ranks: Agreement, *rows: Tensor) -> dict[str, Tensor]:
        student, teacher = (_units(gather_shared_rows(x, ranks.peers)) for x in rows)
        pairs = len(student) ** 2
        if ranks.peers is None and len(student) <= WHOLE:
            p_s, p_t = (_inverse_sums(u)[:, None] * (1 + u @ u.T) for u in (student, teacher))
            total = (p_t * ((p_t + EPS) / (p_s + EPS)).log()).sum()
        else:
            inputs = student, _inverse_sums(student), teacher, _inverse_sums(teacher)
            total = ranks.sum(sum_of_pairs(*inputs, EPS, *rank_of(ranks)))
        return {"pkt": total / pairs if self.reduction == "mean" else total}

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


def _units(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return (x / (norm + EPS)).masked_fill(norm == 0, 0)


def _inverse_sums(units: Tensor) -> Tensor:
    """1 over each row's sum of ``1 + u_i . u_j``, [B]."""
    return (len(units) + units @ units.sum(dim=0)).reciprocal()
