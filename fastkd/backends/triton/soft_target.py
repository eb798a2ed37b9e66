"""``soft_target`` through the Triton kernels."""

from torch import Tensor

from fastkd.kernels.soft_target import soft_target_gradient, soft_target_losses


def soft_target_forward(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    label_smoothing: float,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the blocked backend's, with the five numbers per row that the backward reads."""
    labels = None if labels is None else labels.contiguous()
    weight = None if weight is None else weight.contiguous()
    loss, stats = soft_target_losses(
        student_logits,
        teacher_logits,
        labels,
        weight,
        temperature=temperature,
        smoothing=label_smoothing,
        factor=factor,
    )
    ce = loss.new_zeros(()) if labels is None else loss[0].sum()
    kd = loss.new_zeros(()) if teacher_logits is None else loss[1].sum()
    return ce, kd, stats


def soft_target_backward(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    grad_ce: Tensor | None,
    grad_kd: Tensor | None,
    temperature: float,
    label_smoothing: float,
    factor: float = 1.0,
) -> Tensor:
    """As :func:`fastkd.backends.blocked.soft_target.soft_target_backward`."""
    return soft_target_gradient(
        student_logits,
        teacher_logits,
        None if labels is None else labels.contiguous(),
        None if weight is None else weight.contiguous(),
        stats,
        grad_ce,
        grad_kd,
        temperature=temperature,
        smoothing=label_smoothing,
        factor=factor,
    )
