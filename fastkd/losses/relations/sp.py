"""Similarity-preserving distillation (arXiv 1907.09682)."""

import torch
from torch import Tensor

from fastkd.distributed.agree import Agreement
from fastkd.distributed.gather import gather_shared_rows
from fastkd.distributed.group import Group
from fastkd.losses.pairs import feature_pair, unit
from fastkd.losses.relational import RelationalLoss, rank_of
from fastkd.ops.gram_sums import sums_of_rows
from fastkd.validate import check_floating

WHOLE = 1024  # rows up to which a rank that is alone keeps the matrices
SHORTEST = 1e-12  # shorter rows of a matrix count as zeros, as in numerics.unit_rows


class SPLoss(RelationalLoss):
    r"""SP: samples that are similar to the teacher are similar to the student.

    .. code-block:: text

        A  = the features of a sample as one row, [B, C * H * W]
        G  = A A^T, its rows divided by their norms                                  [B, B]
        sp = |G^s - G^t|_F^2 / B^2

    The numbers of channels and positions of the two networks may differ. RepDistiller's weight is 3000. A sample whose
    features are all 0 is similar to none, and gets no gradient.

    Above 1024 samples, and on several ranks, no matrix [B, B] is kept. For a row of G that is not 0, the sum over its
    entries is ``2 - 2 cos(G^s_i, G^t_i)``, for which three sums per row suffice. The backward computes the products
    again. So the memory is that of the features. Several ranks share out the pairs of samples.

    Source: arXiv 1907.09682, of the last feature maps.

    Args:
        group: as for :class:`fastkd.DCDLoss`; samples are those of all its ranks.

    Raises:
        TypeError, ValueError: ``group`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import SPLoss
        >>> terms = SPLoss()(torch.randn(6, 8, 4, 4, requires_grad=True), torch.randn(6, 16, 7, 7))
        >>> (3000 * terms["sp"]).backward()
    """

    def __init__(self, *, group: Group = None) -> None:
        super().__init__(group)

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> dict[str, Tensor]:
        """Returns ``{"sp": loss}``, 0-dim. The teacher gets no gradient.

        student_features, teacher_features: [B, ...], such as maps [B, C, H, W]; in float64, float32, bf16 or fp16.
        """
        return self._over_ranks(student_features, teacher_features)

    def _rows(self, *inputs: Tensor, may_be_empty: bool) -> tuple[Tensor, ...]:
        for name, x in zip(("student_features", "teacher_features"), inputs, strict=True):
            check_floating(name, x)
            if x.ndim < 2:
                raise ValueError(f"{name}: got shape {list(x.shape)}, expected [B, ...]")
        return feature_pair(*(x.flatten(1) for x in inputs), may_be_empty=may_be_empty)

    def _of_ranks(self, ranks: Agreement, *rows: Tensor) -> dict[str, Tensor]:
        if ranks.peers is None and len(rows[0]) <= WHOLE:
            student, teacher = (unit(x @ x.T) for x in rows)
            return {"sp": (student - teacher).square().mean()}
        student, teacher = (_scaled(gather_shared_rows(x, ranks.peers)) for x in rows)
        sums = ranks.sum(sums_of_rows(student, teacher, *rank_of(ranks)))
        s, t, both = sums
        is_row = [x.detach() > SHORTEST**2 for x in (s, t)]
        is_both = is_row[0] & is_row[1]
        cosines = (both / (s * t).masked_fill(~is_both, 1).sqrt()).masked_fill(~is_both, 0)
        total = is_row[0].sum() + is_row[1].sum() - 2 * cosines.sum()
        return {"sp": (total / len(s) ** 2).to(student.dtype)}


def _scaled(x: Tensor) -> Tensor:
    """The rows over the norm of the longest, which changes no cosine and keeps the sums of squares in range."""
    largest = torch.linalg.vector_norm(x.detach(), dim=1).amax()
    return x / largest.clamp_min(torch.finfo(x.dtype).tiny)
