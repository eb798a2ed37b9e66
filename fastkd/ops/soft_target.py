"""``soft_target``: cross-entropy and Hinton's KD on the same logits; the teacher's get no gradient.

:func:`weighted_sums` runs it as a plain autograd function. Under torch.compile custom ops take its place.
"""

from typing import Any

import torch
from torch import Tensor

from fastkd.backends import implementation
from fastkd.backends.blocked.dense import soft_target as dense
from fastkd.numerics import accumulation_dtype
from fastkd.ops.eager import computing, differentiable_once, is_traced

STATISTICS = {"blocked": 5, "triton": 5}  # numbers per row that a backend keeps for its backward


@torch.library.custom_op("fastkd::soft_target", mutates_args=())
def soft_target(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_i w_i CE_i``, ``sum_i w_i KD_i`` and the numbers per row that the backward needs, [STATISTICS[backend], B].

    student_logits, teacher_logits: [B, C]. labels: [B], int64; a label outside [0, C) makes its row's loss and gradient
    NaN. weight: [B] or None for ones. Without labels, or without a teacher, that term's sum is zero.
    """
    with computing(student_logits):
        return implementation("soft_target", backend).soft_target_forward(
            student_logits, teacher_logits, labels, weight, temperature, label_smoothing
        )


@soft_target.register_fake
def _(student_logits: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(student_logits.dtype)
    sums = [student_logits.new_empty((), dtype=dtype) for _ in range(2)]
    return sums[0], sums[1], student_logits.new_empty((STATISTICS[inputs[-1]], student_logits.shape[0]), dtype=dtype)


@torch.library.custom_op("fastkd::soft_target_backward", mutates_args=())
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
    backend: str,
) -> Tensor:
    """Gradient of the student's logits, in their dtype, from the upstream gradients of the two sums."""
    with computing(student_logits):
        return implementation("soft_target", backend).soft_target_backward(
            student_logits, teacher_logits, labels, weight, stats, grad_ce, grad_kd, temperature, label_smoothing
        )


@soft_target_backward.register_fake
def _(student_logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student_logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student_logits, teacher_logits, labels, weight, ctx.temperature, ctx.label_smoothing, ctx.backend = inputs
    ctx.save_for_backward(student_logits, teacher_logits, labels, weight, output[2])


def _op_backward(ctx: Any, grad_ce: Tensor, grad_kd: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    options = ctx.temperature, ctx.label_smoothing, ctx.backend
    return soft_target_backward(*ctx.saved_tensors, grad_ce, grad_kd, *options), *[None] * 6


soft_target.register_autograd(_op_backward, setup_context=_setup_context)


class SoftTarget(torch.autograd.Function):
    """The two sums times a factor, as a plain autograd function, which starts quicker than the custom op.

    Where the logits are few, the gradients come with the losses. ``keeps``: whether gradients are enabled, so that a
    backward may come.
    """

    @staticmethod
    def forward(ctx: Any, factor: float, keeps: bool, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.temperature, ctx.label_smoothing, backend = inputs
        ctx.module, ctx.factor = implementation("soft_target", backend), factor
        ctx.is_dense = backend == "blocked" and dense.covers(*tensors[:2])
        with computing(tensors[0]):
            if ctx.is_dense:
                ce, kd, kept = dense.computed(factor, keeps and ctx.needs_input_grad[2], *inputs[:-1])
            else:
                ce, kd, *kept = ctx.module.soft_target_forward(*inputs[:-1], factor)
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return ce, kd

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_ce: Tensor | None, grad_kd: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        student, teacher, labels, weight, *kept = saved
        # A term that nothing was made of needs no gradient.
        teacher, labels = None if grad_kd is None else teacher, None if grad_ce is None else labels
        grad = None
        if ctx.is_dense:
            for upstream, found in zip((grad_kd, grad_ce), kept, strict=False):  # without labels there is only KD's
                if upstream is not None:
                    grad = found * upstream if grad is None else grad.addcmul_(found, upstream)
            grad = None if grad is None else grad.to(student.dtype)
        elif teacher is not None or labels is not None:
            options = ctx.temperature, ctx.label_smoothing, ctx.factor
            with computing(student):
                grad = ctx.module.soft_target_backward(
                    student, teacher, labels, weight, *kept, grad_ce, grad_kd, *options
                )
        return None, None, grad, *[None] * 6


def weighted_sums(factor: float, *inputs: Any) -> tuple[Tensor, Tensor]:
    """``sum_i w_i CE_i`` and ``sum_i w_i KD_i`` times ``factor``, of the ``inputs`` of ``fastkd::soft_target``."""
    if is_traced(*inputs[:2]):
        ce, kd, _ = soft_target(*inputs)
        return ce * factor, kd * factor
    return SoftTarget.apply(factor, torch.is_grad_enabled(), *inputs)
