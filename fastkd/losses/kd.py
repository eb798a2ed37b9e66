"""Hinton's knowledge distillation (arXiv 1503.02531)."""

from torch import Tensor

from fastkd import backends
from fastkd.functional.kd import kd_loss
from fastkd.losses.base import LossModule
from fastkd.validate import Backend, check_temperature


class KDLoss(LossModule):
    r"""Hinton's knowledge distillation as a module: :func:`fastkd.kd_loss` at a fixed temperature.

    .. code-block:: text

        kd = temperature^2 * mean_i KL(softmax(teacher_i / temperature) || softmax(student_i / temperature))

    Every row stands alone, so there is no ``group``: with several ranks the mean is over the rows of this rank. Where
    all ranks hold equally many rows, the average over the ranks is the mean over all of them.

    Source: arXiv 1503.02531, section 2.

    Args:
        temperature: divides the logits; in [1e-4, 1e4]. The DCD paper's recipes use 4.
        backend: see :func:`fastkd.kd_loss`.

    Raises:
        TypeError, ValueError: ``temperature`` is not a number in [1e-4, 1e4], or ``backend`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd import KDLoss
        >>> student_logits, teacher_logits = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
        >>> terms = KDLoss(temperature=4.0)(student_logits, teacher_logits)
        >>> terms["kd"].backward()
    """

    def __init__(self, temperature: float = 4.0, *, backend: Backend | None = None) -> None:
        super().__init__()
        check_temperature(temperature)
        backends.check_name(backend)
        self.temperature = temperature
        self.backend = backend

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        sample_weight: Tensor | None = None,
        *,
        standardize: bool = False,
    ) -> dict[str, Tensor]:
        """Returns ``{"kd": loss}``, 0-dim.

        student_logits, teacher_logits: [B, C], in float64, float32, bf16 or fp16; the teacher's are cast to the
        student's dtype. sample_weight: [B], >= 0. standardize: see :func:`fastkd.kd_loss`.
        """
        loss = kd_loss(
            student_logits,
            teacher_logits,
            self.temperature,
            sample_weight=sample_weight,
            standardize=standardize,
            backend=self.backend,
        )
        return {"kd": loss}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
