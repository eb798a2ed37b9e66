"""Logit standardisation (arXiv 2403.01427)."""

import inspect
from typing import Any

from torch import Tensor

from fastkd.losses.base import LossModule
from fastkd.losses.kd import KDLoss
from fastkd.losses.pairs import logit_pair
from fastkd.numerics import STD_EPS
from fastkd.validate import check_type


class LSKDLoss(LossModule):
    r"""LSKD: any loss of logits, of logits that are standardised row by row.

    .. code-block:: text

        z_i = (logits_i - mean_c logits_ic) / (1e-7 + std_c logits_ic)          std: of the sample, with C - 1

    With KD or DKD this is one temperature more for each row of each network, and the logits are read once.
    The gradient passes the mean and the standard deviation. The authors' loss is ``9 * KD`` beside cross-entropy of
    weight 0.1, at temperature 2; weights (1 to 18) and temperatures (2 to 4) differ by pair. With DKD they multiply
    alpha and beta by 9, and cross-entropy has weight 1. Cross-entropy always reads the raw logits.

    A row whose logits are all equal becomes zeros. Its gradient is finite and very large, because its standard
    deviation is 0. A classifier that is initialised with zeros should not begin with this loss.

    Source: arXiv 2403.01427, as in the authors' code.

    Args:
        loss: a module whose call begins with the logits of the student and of the teacher, such as
            :class:`fastkd.KDLoss` (the default, at temperature 2) or :class:`fastkd.losses.DKDLoss`. If its ``forward``
            has an option ``standardize``, as theirs have, it gets the raw logits and ``standardize=True``.

    Raises:
        TypeError: ``loss`` is no :class:`LossModule`.

    Example:
        >>> import torch
        >>> from fastkd.losses import DKDLoss, LSKDLoss, total_loss
        >>> student_logits, teacher_logits = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
        >>> terms = LSKDLoss()(student_logits, teacher_logits)
        >>> total_loss(terms).backward()
        >>> list(LSKDLoss(DKDLoss(temperature=2.0))(student_logits, teacher_logits, torch.arange(6)))
        ['target', 'non_target']
    """

    def __init__(self, loss: LossModule | None = None) -> None:
        super().__init__()
        loss = KDLoss(temperature=2.0) if loss is None else loss
        check_type("loss", loss, LossModule)
        self.loss = loss
        self._standardizes = "standardize" in inspect.signature(loss.forward).parameters

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, *arguments: Any, **options: Any
    ) -> dict[str, Tensor]:
        """Returns the terms of the wrapped loss, which gets the other arguments as they are.

        student_logits, teacher_logits: [B, C], at least two classes, in float64, float32, bf16 or fp16.
        """
        pair = logit_pair(student_logits, teacher_logits, classes=2)
        if self._standardizes:
            return self.loss(student_logits, teacher_logits, *arguments, standardize=True, **options)
        student, teacher = ((z - z.mean(dim=1, keepdim=True)) / (STD_EPS + z.std(dim=1, keepdim=True)) for z in pair)
        return self.loss(student, teacher, *arguments, **options)
