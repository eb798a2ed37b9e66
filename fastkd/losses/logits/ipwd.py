"""Inverse probability weighting distillation (arXiv 2210.12787), in our reading."""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastkd import backends
from fastkd.backends.reference import cross_entropy
from fastkd.functional.kd import kd_loss
from fastkd.losses.base import LossModule
from fastkd.losses.pairs import in_loss_dtype, logit_pair
from fastkd.validate import Backend, check_choice, check_labels, check_pair, check_temperature

Ratio = Literal["kd/class", "class/kd"]


class IPWDLoss(LossModule):
    r"""IPWD: KD whose rows weigh more where the sample is rare in the teacher's domain. **This is our reading.**

    .. code-block:: text

        w_i  = 1 + CE_i(student) / CE_i(class head)                    ratio="kd/class"
        w_i  = 1 + CE_i(class head) / CE_i(student)                    ratio="class/kd"
        ipwd = temperature^2 * mean_i (w_i / mean_j w_j) KL(softmax(teacher_i / temperature) || softmax(student_i / ..))

    A second classifier on the student's backbone, the class head, is trained with cross-entropy alone. The student's
    own classifier is trained with cross-entropy and with this loss. The caller adds both cross-entropies. In the
    weights the logits of both are standardised row by row, with C - 1, and are constants. The weights are divided by
    their mean over the rows of this rank, and so is the loss; there is no ``group``.

    Source: arXiv 2210.12787. We know no public code, and have not read the paper in full. A summary prints
    ``"class/kd"``, which raises the weight of the samples that the student knows well. That contradicts the aim of the
    paper, so the default is the other ratio. The normalisation and the temperature are ours, too. Numbers of this loss
    should not be reported as the paper's.

    Args:
        temperature: divides the logits; in [1e-4, 1e4].
        ratio: which cross-entropy stands above the other.
        backend: see :func:`fastkd.kd_loss`.

    Raises:
        TypeError, ValueError: ``temperature`` is out of range, or ``ratio`` or ``backend`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import IPWDLoss
        >>> student_logits, class_head_logits = torch.randn(2, 6, 10, requires_grad=True)
        >>> terms = IPWDLoss()(student_logits, class_head_logits, torch.randn(6, 10), labels=torch.arange(6))
        >>> terms["ipwd"].backward()
    """

    def __init__(self, temperature: float = 4.0, ratio: Ratio = "kd/class", *, backend: Backend | None = None) -> None:
        super().__init__()
        check_temperature(temperature)
        check_choice("ratio", ratio, get_args(Ratio))
        backends.check_name(backend)
        self.temperature, self.ratio, self.backend = temperature, ratio, backend

    def forward(
        self, student_logits: Tensor, class_head_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Returns ``{"ipwd": loss}``, 0-dim. The teacher and the class head get no gradient.

        student_logits, class_head_logits, teacher_logits: [B, C], at least two classes, in float64, float32, bf16 or
        fp16. labels: [B], int64, in [0, C); on CUDA another label makes the loss NaN.
        """
        student, teacher = logit_pair(student_logits, teacher_logits, classes=2)
        names = "student_logits", student_logits, "class_head_logits", class_head_logits
        check_pair(*names, "[B, C]", may_differ_in_dtype=True)
        check_labels(labels, student_logits)
        with torch.no_grad():
            _, class_head = in_loss_dtype(student, class_head_logits)
            ce, ce_class = (cross_entropy(_standardised(z), labels) for z in (student, class_head))
            # Both are above 0, because standardised logits differ by less than 2 sqrt(C).
            weight = 1 + (ce / ce_class if self.ratio == "kd/class" else ce_class / ce)
            weight = weight / weight.mean()
        loss = kd_loss(student, teacher, self.temperature, sample_weight=weight, backend=self.backend)
        return {"ipwd": loss}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, ratio={self.ratio!r}"


def _standardised(logits: Tensor) -> Tensor:
    std = logits.std(dim=1, keepdim=True)
    return (logits - logits.mean(dim=1, keepdim=True)) / std.masked_fill(std == 0, 1)
