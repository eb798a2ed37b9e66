"""``soft_target`` of the blocked backend, in blocks of rows that stay in the cache.

The backward computes its softmaxes again. On a CPU torch's fused softmax is faster than two passes with saved numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.backends.blocked.sums import row_blocks
from fastkd.backends.reference import soft_target
from fastkd.numerics import accumulation_dtype


def soft_target_forward(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    label_smoothing: float,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums over the rows of cross-entropy and of ``temperature^2 KL(teacher || student)``, times ``factor``.

    Nothing is saved for the backward.
    """
    dtype = accumulation_dtype(student_logits.dtype)
    n, classes = student_logits.shape
    ce, kd = student_logits.new_zeros(2, n, dtype=dtype)
    for rows in row_blocks(student_logits):
        if labels is not None:
            label = labels[rows].clamp(0, classes - 1)
            x = student_logits[rows].to(dtype)
            loss = F.cross_entropy(x, label, reduction="none", label_smoothing=label_smoothing)
            ce[rows] = loss.where(label == labels[rows], torch.nan)
        if teacher_logits is not None:
            kd[rows] = soft_target(student_logits[rows], teacher_logits[rows], temperature)
    w = _weights(weight, ce, factor)
    return ce.dot(w), kd.dot(w), ce.new_empty(0, n)


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
    """Gradient of the student's logits: ``w_i (p_i - target_i) + k_i temperature (p'_i - q'_i)``.

    ``w``, ``k``: upstream gradients of a row's two losses; p', q': student and teacher softmax at the temperature.
    """
    dtype, classes = stats.dtype, student_logits.shape[1]
    grad = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
    weights = _weights(weight, stats, factor)[:, None]
    w = None if grad_ce is None else weights * grad_ce
    k = None if grad_kd is None else weights * (grad_kd * temperature)
    for rows in row_blocks(student_logits):
        x = student_logits[rows].to(dtype)
        total = None
        if teacher_logits is not None and k is not None:
            q = (teacher_logits[rows].to(dtype) / temperature).softmax(dim=1)
            total = (x / temperature).softmax(dim=1).sub_(q).mul_(k[rows])
        if labels is not None and w is not None:
            label = labels[rows, None].clamp(0, classes - 1)
            w_rows = w[rows].where(label == labels[rows, None], torch.nan)
            p = x.softmax(dim=1)
            if label_smoothing > 0:
                p -= label_smoothing / classes
            p.scatter_add_(1, label, p.new_full((), label_smoothing - 1).expand(label.shape))
            total = p.mul_(w_rows) if total is None else total.addcmul_(p, w_rows)
        grad[rows] = 0 if total is None else total
    return grad


def _weights(weight: Tensor | None, like: Tensor, factor: float) -> Tensor:
    return like.new_full(like.shape[-1:], factor) if weight is None else weight.to(like.dtype) * factor
