"""Similarity-preserving distillation (arXiv 1907.09682)."""

from torch import Tensor

from fastkd.distributed.group import Group
from fastkd.losses.pairs import feature_pair, unit
from fastkd.losses.relational import RelationalLoss
from fastkd.validate import check_floating


class SPLoss(RelationalLoss):
    r"""SP: samples that are similar to the teacher are similar to the student.

    .. code-block:: text

        A  = the features of a sample as one row, [B, C * H * W]
        G  = A A^T, its rows divided by their norms                                  [B, B]
        sp = |G^s - G^t|_F^2 / B^2

    The numbers of channels and positions of the two networks may differ. RepDistiller's weight is 3000. A sample whose
    features are all 0 is similar to none, and gets no gradient.

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

    def _terms(self, *rows: Tensor) -> dict[str, Tensor]:
        student, teacher = (unit(x @ x.T) for x in rows)
        return {"sp": (student - teacher).square().mean()}
