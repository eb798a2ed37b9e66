"""Contrastive knowledge distillation on logits (arXiv 2404.14109)."""

from torch import Tensor

from fastkd import backends
from fastkd.distributed.group import Group, check_group
from fastkd.functional.contrast import ckd_loss
from fastkd.losses.base import LossModule
from fastkd.validate import Backend, check_temperature


class CKDLoss(LossModule):
    r"""Contrast of logits as a module: :func:`fastkd.ckd_loss` at a fixed temperature.

    .. code-block:: text

        ckd = mean_i -log softmax_j(cos(teacher_i, student_j) / temperature)_i      j: all samples of the batch

    The authors' recipes weigh this loss with 100 on CIFAR-100 and with 10 on ImageNet, beside cross-entropy with 1.

    Source: arXiv 2404.14109, eq. 5-7, with the negatives (t_i, s_j) of the authors' code. The paper's summary writes
    (s_i, s_j).

    Args:
        temperature: divides the cosines; in [1e-4, 1e4]. The paper uses 1.
        group, backend: see :class:`fastkd.DCDLoss`.

    Raises:
        TypeError, ValueError: ``temperature`` is not a number in [1e-4, 1e4], or ``group`` or ``backend`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd import CKDLoss
        >>> student_logits, teacher_logits = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
        >>> terms = CKDLoss()(student_logits, teacher_logits)
        >>> (100 * terms["ckd"]).backward()
    """

    def __init__(self, temperature: float = 1.0, *, group: Group = None, backend: Backend | None = None) -> None:
        super().__init__()
        check_temperature(temperature)
        check_group(group)
        backends.check_name(backend)
        self.temperature = temperature
        self.group = group
        self.backend = backend

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, sample_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Returns ``{"ckd": loss}``, 0-dim. The teacher gets no gradient.

        student_logits, teacher_logits: [B, C], in float64, float32, bf16 or fp16; the teacher's are cast to the
        student's dtype. sample_weight: [B], >= 0.
        """
        loss = ckd_loss(
            student_logits,
            teacher_logits,
            self.temperature,
            sample_weight=sample_weight,
            group=self.group,
            backend=self.backend,
        )
        return {"ckd": loss}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
