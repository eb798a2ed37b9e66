"""``fastkd::soft_target``: Hinton's KD on logits; the teacher's logits get no gradient."""

from typing import Any

import torch
from torch import Tensor

from fastkd.backends import STREAMING
from fastkd.backends.reference import accumulation_dtype


@torch.library.custom_op("fastkd::soft_target", mutates_args=())
def soft_target(
    student_logits: Tensor, teacher_logits: Tensor, weight: Tensor | None, temperature: float, backend: str
) -> Tensor:
    """``temperature^2 sum_i w_i KL(softmax(teacher_i / temperature) || softmax(student_i / temperature))``.

    student_logits, teacher_logits: [B, C]. weight: [B] or None for ones.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        return STREAMING[backend].soft_target_forward(student_logits, teacher_logits, weight, temperature)


@soft_target.register_fake
def _(
    student_logits: Tensor, teacher_logits: Tensor, weight: Tensor | None, temperature: float, backend: str
) -> Tensor:
    return student_logits.new_empty((), dtype=accumulation_dtype(student_logits.dtype))


@torch.library.custom_op("fastkd::soft_target_backward", mutates_args=())
def soft_target_backward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor | None,
    grad_loss: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    """Gradient of the student's logits, in their dtype."""
    with torch.autocast(student_logits.device.type, enabled=False):
        return STREAMING[backend].soft_target_backward(student_logits, teacher_logits, weight, grad_loss, temperature)


@soft_target_backward.register_fake
def _(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor | None,
    grad_loss: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(student_logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student_logits, teacher_logits, weight, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(student_logits, teacher_logits, weight)


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    grad = soft_target_backward(*ctx.saved_tensors, grad_loss, ctx.temperature, ctx.backend)
    return grad, None, None, None, None


soft_target.register_autograd(_backward, setup_context=_setup_context)
