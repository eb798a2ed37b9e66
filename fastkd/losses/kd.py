"""Hinton's knowledge distillation (arXiv 1503.02531)."""

from torch import Tensor, nn

from fastkd import backends
from fastkd.functional.kd import kd_loss
from fastkd.validate import check_number


class KDLoss(nn.Module):
    """``temperature^2 * mean_i KL(softmax(teacher_i / temperature) || softmax(student_i / temperature))``.

    Args:
        temperature: > 0; 4 in the DCD paper's recipes.
        backend: see :func:`fastkd.dcd_loss`.
    """

    def __init__(self, temperature: float = 4.0, *, backend: str | None = None) -> None:
        super().__init__()
        check_number("temperature", temperature, minimum=0, exclusive=True)
        backends.check_name(backend)
        self.temperature = temperature
        self.backend = backend

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, sample_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """student_logits, teacher_logits: [B, C]; sample_weight: [B]. Returns ``{"kd": loss}``."""
        loss = kd_loss(
            student_logits, teacher_logits, self.temperature, sample_weight=sample_weight, backend=self.backend
        )
        return {"kd": loss}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
