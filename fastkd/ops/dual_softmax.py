"""``fastkd::dual_softmax``: contrast and consistency of DCD for one batch of student and teacher embeddings."""

from typing import Any

import torch
from torch import Tensor

from fastkd.backends import STREAMING
from fastkd.backends.reference import accumulation_dtype

STATISTICS = {"blocked": 4, "triton": 3}  # numbers a row that a backend keeps for its backward


@torch.library.custom_op("fastkd::dual_softmax", mutates_args=())
def dual_softmax(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    consistency: str,
    scale_bound: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_i w_i contrast_i``, ``sum_i w_i consistency_i`` and what the backward needs, a few numbers a row.

    student, teacher: [n, D]. logit_scale: 0-dim, at most ``scale_bound`` (inf: unknown). weight: [n] or None for ones.
    """
    with torch.autocast(student.device.type, enabled=False):
        return STREAMING[backend].dual_softmax_forward(student, teacher, logit_scale, weight, consistency, scale_bound)


@dual_softmax.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    consistency: str,
    scale_bound: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(student.dtype)
    scalars = [student.new_empty((), dtype=dtype) for _ in range(2)]
    return scalars[0], scalars[1], student.new_empty((STATISTICS[backend], student.shape[0]), dtype=dtype)


@torch.library.custom_op("fastkd::dual_softmax_backward", mutates_args=())
def dual_softmax_backward(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    grad_contrast: Tensor,
    grad_consistency: Tensor,
    consistency: str,
    scale_bound: float,
    need_student: bool,
    need_teacher: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of student and teacher (empty where not needed) and of logit_scale, in their inputs' dtypes."""
    with torch.autocast(student.device.type, enabled=False):
        return STREAMING[backend].dual_softmax_backward(
            student,
            teacher,
            logit_scale,
            weight,
            stats,
            grad_contrast,
            grad_consistency,
            consistency,
            scale_bound,
            need_student,
            need_teacher,
        )


@dual_softmax_backward.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    grad_contrast: Tensor,
    grad_consistency: Tensor,
    consistency: str,
    scale_bound: float,
    need_student: bool,
    need_teacher: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(student, memory_format=torch.contiguous_format) if need_student else student.new_empty(0),
        torch.empty_like(teacher, memory_format=torch.contiguous_format) if need_teacher else teacher.new_empty(0),
        torch.empty_like(logit_scale),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, logit_scale, weight, ctx.consistency, ctx.scale_bound, ctx.backend = inputs
    ctx.save_for_backward(student, teacher, logit_scale, weight, output[2])


def _backward(ctx: Any, grad_contrast: Tensor, grad_consistency: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    student, teacher, logit_scale, weight, stats = ctx.saved_tensors
    need_student, need_teacher, need_scale = ctx.needs_input_grad[:3]
    grad_student, grad_teacher, grad_scale = dual_softmax_backward(
        student,
        teacher,
        logit_scale,
        weight,
        stats,
        grad_contrast,
        grad_consistency,
        ctx.consistency,
        ctx.scale_bound,
        need_student,
        need_teacher,
        ctx.backend,
    )
    return (
        grad_student if need_student else None,
        grad_teacher if need_teacher else None,
        grad_scale if need_scale else None,
        None,
        None,
        None,
        None,
    )


dual_softmax.register_autograd(_backward, setup_context=_setup_context)
