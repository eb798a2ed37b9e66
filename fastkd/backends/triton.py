"""The Triton kernels behind the operations, for CUDA tensors, or for any in Triton's interpreter (TRITON_INTERPRET=1).

The kernels take rows and columns apart, with an offset; here both are the same batch.
"""

import torch
import triton
from torch import Tensor

from fastkd.backends.blocked import MAX_SHARED_SCALE
from fastkd.backends.triton_contrast import contrast_backward as contrast_backward
from fastkd.backends.triton_contrast import contrast_forward as contrast_forward
from fastkd.kernels import dual_softmax, dual_softmax_wide
from fastkd.kernels.dual_softmax_rows import coefficients, gradients, statistics
from fastkd.kernels.launch import allows_tf32, fits, hardware_of
from fastkd.kernels.multiscale_pool import pooled, spread_gradients
from fastkd.kernels.normalize import padded_width, unit_rows
from fastkd.kernels.soft_target import soft_target_gradient, soft_target_losses


def _is_wide(rows: Tensor) -> bool:
    """Whether the cosines come from torch.mm: rows too wide for a tile, or fp32 products that must not be tf32."""
    if not fits(rows.dtype, padded_width(rows.shape[1]), hardware_of(rows.device)):
        return True
    return rows.is_cuda and rows.dtype == torch.float32 and not allows_tf32()


def _rounds_to_tf32(rows: Tensor) -> bool:
    """The streaming kernels' tf32 products would truncate; the interpreter's are exact."""
    return rows.is_cuda and rows.dtype == torch.float32 and not _is_wide(rows)


def _unit_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    D = a.shape[1]
    width = triton.cdiv(D, 8) * 8 if _is_wide(a) else padded_width(D)
    return unit_rows(a, b, width=width, to_tf32=_rounds_to_tf32(a))


def dual_softmax_forward(
    student: Tensor, teacher: Tensor, logit_scale: Tensor, weight: Tensor | None, consistency: str, scale_bound: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fastkd.backends.blocked.dual_softmax_forward`."""
    swapped = consistency == "teacher||student"
    weight = None if weight is None else weight.contiguous()
    bounded = scale_bound <= MAX_SHARED_SCALE
    kernels = dual_softmax_wide if _is_wide(student) else dual_softmax
    with torch.cuda.device_of(student):
        units, _ = _unit_rows(teacher, student) if swapped else _unit_rows(student, teacher)
        state = kernels.running_statistics(units, units, logit_scale, offset=0, bounded=bounded)
        loss, stats = statistics(state, logit_scale, weight, swapped=swapped)
        return loss[0].sum(), loss[1].sum(), stats


def dual_softmax_backward(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    grad_contrast: Tensor,
    grad_consist: Tensor,
    consistency: str,
    scale_bound: float,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fastkd.backends.blocked.dual_softmax_backward`."""
    swapped = consistency == "teacher||student"
    need_a, need_b = (need_teacher, need_student) if swapped else (need_student, need_teacher)
    # The gradient of logit_scale falls out of either side's, so one side is always computed.
    compute_a = need_a or not need_b
    weight = None if weight is None else weight.contiguous()
    bounded = scale_bound <= MAX_SHARED_SCALE
    kernels = dual_softmax_wide if _is_wide(student) else dual_softmax
    with torch.cuda.device_of(student):
        units, inverse_norm = _unit_rows(teacher, student) if swapped else _unit_rows(student, teacher)
        coef, unscale = coefficients(
            stats, weight, grad_contrast, grad_consist, logit_scale, swapped=swapped, bounded=bounded
        )
        partial = kernels.gradient_sums(
            units, units, coef, coef, logit_scale, offset=0, bounded=bounded, need_a=compute_a, need_b=need_b
        )
        grad_a, grad_b, dots = gradients(
            partial,
            units,
            inverse_norm,
            logit_scale,
            unscale,
            D=student.shape[1],
            dtype=student.dtype,
            need_a=compute_a,
            need_b=need_b,
        )
        grad_scale = dots.sum().to(logit_scale.dtype)
    if not need_a:
        grad_a = student.new_empty(0)
    grad_student, grad_teacher = (grad_b, grad_a) if swapped else (grad_a, grad_b)
    return grad_student, grad_teacher, grad_scale


def soft_target_forward(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fastkd.backends.blocked.soft_target_forward`, with the five numbers a row that the backward reads."""
    labels = None if labels is None else labels.contiguous()
    weight = None if weight is None else weight.contiguous()
    with torch.cuda.device_of(student_logits):
        loss, stats = soft_target_losses(
            student_logits, teacher_logits, labels, weight, temperature=temperature, smoothing=label_smoothing
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
    grad_ce: Tensor,
    grad_kd: Tensor,
    temperature: float,
    label_smoothing: float,
) -> Tensor:
    """As :func:`fastkd.backends.blocked.soft_target_backward`."""
    with torch.cuda.device_of(student_logits):
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
        )


def multiscale_pool_forward(
    features: Tensor, windows: list[int], strides: list[int], normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As :func:`fastkd.backends.blocked.multiscale_pool_forward`."""
    with torch.cuda.device_of(features):
        return pooled(features, windows, strides, normalize=normalize, dtype=dtype)


def multiscale_pool_backward(
    grad: Tensor, unit: Tensor | None, inverse_norm: Tensor, windows: list[int], strides: list[int],
    grad_features: Tensor,
) -> None:  # fmt: skip
    """As :func:`fastkd.backends.blocked.multiscale_pool_backward`."""
    with torch.cuda.device_of(grad):
        spread_gradients(grad.contiguous(), unit, inverse_norm, windows, strides, grad_features)
