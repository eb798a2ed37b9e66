"""Weighted soft labels (arXiv 2102.00650)."""

import torch
from torch import Tensor

from fastkd import backends
from fastkd.functional.kd import soft_target_rows
from fastkd.losses.base import LossModule
from fastkd.validate import Backend, check_floating, check_row_labels, check_temperature

EPS = 1e-7


class WSLDLoss(LossModule):
    r"""WSLD: KD whose rows weigh more where the student is worse than the teacher.

    .. code-block:: text

        w_i  = 1 - exp(-CE_i(student) / (CE_i(teacher) + 1e-7))            cross-entropies at temperature 1, constants
        wsld = temperature^2 * mean_i w_i H(softmax(teacher_i / temperature), softmax(student_i / temperature))

    H is the cross-entropy, so the loss is not zero where both agree. Its gradient is that of :func:`fastkd.kd_loss`
    with the weights ``w``. The logits are read once for both temperatures. The authors add cross-entropy of weight 1.
    They give this loss the weight 2.25 at temperature 4 on CIFAR-100, and 2.5 at temperature 2 on ImageNet.

    Every row stands alone, so there is no ``group``: with several ranks the mean is over the rows of this rank.

    Source: arXiv 2102.00650, as in the authors' ImageNet code. Their settings on CIFAR-100 are from their
    answers to questions; others could not reproduce those results.

    Args:
        temperature: divides the logits; in [1e-4, 1e4].
        backend: see :func:`fastkd.kd_loss`.

    Raises:
        TypeError, ValueError: ``temperature`` is out of range, or ``backend`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import WSLDLoss
        >>> student_logits, teacher_logits = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
        >>> terms = WSLDLoss()(student_logits, teacher_logits, labels=torch.arange(6))
        >>> (2.25 * terms["wsld"]).backward()
    """

    def __init__(self, temperature: float = 4.0, *, backend: Backend | None = None) -> None:
        super().__init__()
        check_temperature(temperature)
        backends.check_name(backend)
        self.temperature, self.backend = temperature, backend

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Returns ``{"wsld": loss}``, 0-dim. The teacher gets no gradient.

        student_logits, teacher_logits: [B, C], in float64, float32, bf16 or fp16. labels: [B], int64, in [0, C); on
        CUDA another label makes the loss NaN.
        """
        check_floating("student_logits", student_logits)
        check_row_labels("labels", labels, student_logits)
        views = [1.0, self.temperature]
        rows = soft_target_rows(student_logits, teacher_logits, views, labels=labels, backend=self.backend)
        ce_s, ce_t = -rows.student_label[0].detach(), -rows.teacher_label[0]
        weight = -torch.expm1(-ce_s / (ce_t + EPS))
        # H(t, s) = KL(t || s) + H(t)
        return {"wsld": self.temperature**2 * (weight * (rows.divergence[1] + rows.entropy[1])).mean()}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
