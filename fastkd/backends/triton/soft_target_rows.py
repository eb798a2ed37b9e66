"""``soft_target_rows`` through the Triton kernels."""

from torch import Tensor

from fastkd.kernels import soft_target_rows as kernels
from fastkd.numerics import STD_EPS


def soft_target_rows_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    student_scale: Tensor,
    teacher_scale: Tensor,
    exclude_label: bool,
    standardize: bool,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    """As the blocked backend's."""
    labels, eps = None if labels is None else labels.contiguous(), STD_EPS if standardize else None
    inputs = student_logits, teacher_logits, labels, student_scale, teacher_scale, exclude_label, eps
    return kernels.soft_target_rows(*inputs, moments=moments)


def soft_target_rows_backward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    student_scale: Tensor,
    teacher_scale: Tensor,
    kept: Tensor,
    upstream: Tensor,
    exclude_label: bool,
    standardize: bool,
) -> Tensor:
    """As the blocked backend's."""
    labels, eps = None if labels is None else labels.contiguous(), STD_EPS if standardize else None
    inputs = student_logits, teacher_logits, labels, student_scale, teacher_scale, exclude_label, eps
    return kernels.soft_target_rows_gradient(*inputs, kept=kept, upstream=upstream)
