"""``soft_target_rows``: what the losses of the KD family need of each row of logits, at several temperatures at once.

A view is a pair of scales per row, which multiply the logits of the student and of the teacher: inverse temperatures.
:func:`rows_of` runs the operation as a plain autograd function. Under torch.compile custom ops take its place.
"""

from typing import Any

import torch
from torch import Tensor

from fastkd.backends import implementation
from fastkd.numerics import accumulation_dtype
from fastkd.ops.eager import computing, differentiable_once, is_traced

ROWS = 4  # results per row and view: divergence, entropy, the label's log-probability of student and of teacher
BASE, PER_VIEW = 5, 5  # numbers per row, and per row and view, that a backend keeps for its backward


@torch.library.custom_op("fastkd::soft_target_rows", mutates_args=())
def soft_target_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    student_scale: Tensor,
    teacher_scale: Tensor,
    exclude_label: bool,
    standardize: bool,
    moments: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The results of ``reference.soft_target_rows``, [ROWS, K, B], and what the backward needs, [BASE + PER_VIEW K, B].

    student_logits, teacher_logits: [B, C]. labels: [B], int64. student_scale, teacher_scale: [K, B], contiguous, in the
    accumulation dtype. moments: whether the gradients of the scales are wanted. The entropy and the teacher's label get
    no gradient, nor do the teacher's logits.
    """
    with computing(student_logits):
        return implementation("soft_target_rows", backend).soft_target_rows_forward(
            student_logits, teacher_logits, labels, student_scale, teacher_scale, exclude_label, standardize, moments
        )


@soft_target_rows.register_fake
def _(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, student_scale: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    views, n = student_scale.shape
    new = student_logits.new_empty
    dtype = accumulation_dtype(student_logits.dtype)
    return new(ROWS, views, n, dtype=dtype), new(BASE + PER_VIEW * views, n, dtype=dtype)


@torch.library.custom_op("fastkd::soft_target_rows_backward", mutates_args=())
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
    backend: str,
) -> Tensor:
    """Gradient of the student's logits, in their dtype. upstream: [ROWS, K, B], that of the results."""
    with computing(student_logits):
        return implementation("soft_target_rows", backend).soft_target_rows_backward(
            student_logits,
            teacher_logits,
            labels,
            student_scale,
            teacher_scale,
            kept,
            upstream.contiguous(),
            exclude_label,
            standardize,
        )


@soft_target_rows_backward.register_fake
def _(student_logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student_logits, memory_format=torch.contiguous_format)


def _scale_gradients(needs: tuple[bool, ...], kept: Tensor, upstream: Tensor) -> list[Tensor | None]:
    """Those of the student's and of the teacher's scales, [K, B], where they are needed."""
    if not any(needs):
        return [None, None]
    _, _, of_divergence, of_teacher, of_label = kept[BASE:].unflatten(0, (PER_VIEW, -1))
    student = (upstream[0] * of_divergence + upstream[2] * of_label) / kept[3] if needs[0] else None
    return [student, upstream[0] * of_teacher / kept[4] if needs[1] else None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.exclude_label, ctx.standardize, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])


def _op_backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, kept = ctx.saved_tensors
    options = ctx.exclude_label, ctx.standardize, ctx.backend
    grad = soft_target_rows_backward(*inputs, kept, upstream, *options) if ctx.needs_input_grad[0] else None
    return grad, None, None, *_scale_gradients(ctx.needs_input_grad[3:5], kept, upstream), *[None] * 4


soft_target_rows.register_autograd(_op_backward, setup_context=_setup_context)


class SoftTargetRows(torch.autograd.Function):
    """The results as a plain autograd function, which starts quicker than the custom op."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ctx.exclude_label, ctx.standardize, moments, backend = inputs
        ctx.module = implementation("soft_target_rows", backend)
        with computing(tensors[0]):
            rows, kept = ctx.module.soft_target_rows_forward(*tensors, ctx.exclude_label, ctx.standardize, moments)
        ctx.save_for_backward(*tensors, kept)
        return rows

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], upstream: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept = saved
        upstream, grad = upstream.contiguous(), None
        if ctx.needs_input_grad[0]:
            with computing(inputs[0]):
                grad = ctx.module.soft_target_rows_backward(*inputs, kept, upstream, ctx.exclude_label, ctx.standardize)
        return grad, None, None, *_scale_gradients(ctx.needs_input_grad[3:5], kept, upstream), *[None] * 4


def rows_of(*inputs: Any) -> Tensor:
    """The results [ROWS, K, B] of the inputs of ``fastkd::soft_target_rows``."""
    return soft_target_rows(*inputs)[0] if is_traced(*inputs[:2]) else SoftTargetRows.apply(*inputs)
