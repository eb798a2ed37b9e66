"""Curriculum temperature (arXiv 2211.16231)."""

import math

import torch
from torch import Tensor, nn

from fastkd import backends
from fastkd.functional.kd import soft_target_rows
from fastkd.losses.base import LossModule
from fastkd.validate import Backend, check_floating, check_int, check_number


class CTKDLoss(LossModule):
    r"""CTKD: KD at a temperature that is learnt against the student, and more so epoch by epoch.

    .. code-block:: text

        T    = start + span * sigmoid(theta)                               theta: a parameter, 1 at first
        ctkd = T^2 * mean_i KL(softmax(teacher_i / T) || softmax(student_i / T))

        the gradient of theta is multiplied by  (cos(pi min(epoch, epochs) / epochs) - 1) / 2          in [-1, 0]

    So theta ascends the loss in the same optimiser in which the student descends it. The parameter belongs in that
    optimiser. The authors weigh this loss with 0.9, and cross-entropy with 0.1. With several ranks the mean is over the
    rows of this rank, as for :class:`fastkd.KDLoss`.

    Source: arXiv 2211.16231, the global temperature, as in the authors' code. Their temperature per instance is not
    published as code, and is not here.

    Args:
        start, span: T is between ``start`` and ``start + span``; ``start`` in [1e-4, 1e4], ``span`` in [0, 1e4].
        epochs: after so many epochs the gradient is reversed in full; >= 1. The authors use 10 on CIFAR-100 and 5 on
            ImageNet.
        backend: see :func:`fastkd.kd_loss`.

    Raises:
        TypeError, ValueError: a number is out of range, or ``backend`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import CTKDLoss
        >>> student_logits, teacher_logits = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
        >>> ctkd = CTKDLoss()
        >>> terms = ctkd(student_logits, teacher_logits, epoch=1)
        >>> terms["ctkd"].backward()
        >>> round(ctkd.temperature().item(), 2)
        15.62
    """

    def __init__(
        self, start: float = 1.0, span: float = 20.0, epochs: int = 10, *, backend: Backend | None = None
    ) -> None:
        super().__init__()
        check_number("start", start, minimum=1e-4, maximum=1e4)
        check_number("span", span, minimum=0, maximum=1e4)
        check_int("epochs", epochs, minimum=1)
        backends.check_name(backend)
        self.start, self.span, self.epochs, self.backend = start, span, epochs, backend
        self.theta = nn.Parameter(torch.ones(()))

    def temperature(self) -> Tensor:
        """The temperature as it is now, 0-dim, with a gradient."""
        return self.start + self.span * torch.sigmoid(self.theta)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, epoch: int) -> dict[str, Tensor]:
        """Returns ``{"ctkd": loss}``, 0-dim. The teacher gets no gradient.

        student_logits, teacher_logits: [B, C], in float64, float32, bf16 or fp16. epoch: counted from 1; >= 0.
        """
        check_floating("student_logits", student_logits)
        check_int("epoch", epoch, minimum=0)
        if self.theta.device != student_logits.device:
            raise ValueError(f"student_logits: got device {student_logits.device}, expected that of the module's "
                             f"parameter, {self.theta.device}")  # fmt: skip
        sign = (math.cos(math.pi * min(epoch, self.epochs) / self.epochs) - 1) / 2
        temperature = self.temperature()
        held = temperature.detach()
        temperature = held + sign * (temperature - held)  # the same value, and the gradient times sign
        rows = soft_target_rows(student_logits, teacher_logits, temperature, backend=self.backend).divergence
        return {"ctkd": temperature.to(rows.dtype) ** 2 * rows.mean()}

    def extra_repr(self) -> str:
        return f"start={self.start}, span={self.span}, epochs={self.epochs}"
