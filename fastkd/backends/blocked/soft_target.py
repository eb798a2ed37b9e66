"""``soft_target`` of the blocked backend, in blocks of rows that stay in the cache.

A softmax is ``2^((x - m) / (temperature log 2))``, with m the row's maximum, divided by its sum. On a CPU torch's exp2
is four times as fast as its exp, and faster than its softmax. The backward computes the powers again; the maxima and
the sums are kept.
"""

import torch
from torch import Tensor

from fastkd.backends.blocked.sums import LOG_2, row_blocks
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

    And for the backward [5, B]: the maxima of student and teacher; the sums of powers of the student at temperature 1,
    and of student and teacher at the temperature.
    """
    dtype = accumulation_dtype(student_logits.dtype)
    n = student_logits.shape[0]
    ce, kd = student_logits.new_zeros(2, n, dtype=dtype)
    stats = ce.new_zeros(5, n)
    for rows in row_blocks(student_logits):
        x = student_logits[rows].to(dtype)
        largest_x, largest_t, total, total_x, total_t = stats[:, rows].unbind()
        torch.amax(x, 1, out=largest_x)
        if labels is not None:
            torch.sum(_exponents(x, largest_x, 1.0).exp2_(), 1, out=total)
            ce[rows] = _cross_entropy(x, labels[rows], largest_x, total.log(), label_smoothing)
        if teacher_logits is not None:
            t = teacher_logits[rows].to(dtype)
            torch.amax(t, 1, out=largest_t)
            log_p, log_q = _exponents(x, largest_x, temperature), _exponents(t, largest_t, temperature)
            q = log_q.exp2()
            torch.sum(q, 1, out=total_t)
            difference = torch.linalg.vecdot(q, log_q.sub_(log_p)).div_(total_t).mul_(LOG_2)
            torch.sum(log_p.exp2_(), 1, out=total_x)
            kd[rows] = difference.add_(total_x.log()).sub_(total_t.log())
    w = _weights(weight, ce, factor)
    return ce.dot(w), kd.dot(w) * temperature**2, stats


def _exponents(x: Tensor, largest: Tensor, temperature: float) -> Tensor:
    return (x - largest[:, None]).mul_(1 / (temperature * LOG_2))


def _cross_entropy(x: Tensor, labels: Tensor, largest: Tensor, log_total: Tensor, label_smoothing: float) -> Tensor:
    label = labels.clamp(0, x.shape[1] - 1)
    loss = (largest - x.gather(1, label[:, None])[:, 0]).add_(log_total)
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss + label_smoothing * ((largest[:, None] - x).mean(dim=1) + log_total)
    return loss.where(label == labels, torch.nan)


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
        x, largest = student_logits[rows].to(dtype), stats[:, rows]
        found: Tensor | None = None
        if teacher_logits is not None and k is not None:
            t = teacher_logits[rows].to(dtype)
            found = _exponents(x, largest[0], temperature).exp2_().mul_(k[rows] / stats[3, rows, None])
            q = _exponents(t, largest[1], temperature).exp2_()
            found.addcmul_(q, k[rows] / stats[4, rows, None], value=-1)
        if labels is not None and w is not None:
            label = labels[rows, None].clamp(0, classes - 1)
            w_rows = w[rows].where(label == labels[rows, None], torch.nan)
            p, share = _exponents(x, largest[0], 1.0).exp2_(), w_rows / stats[2, rows, None]
            found = p.mul_(share) if found is None else found.addcmul_(p, share)
            if label_smoothing > 0:
                found -= w_rows * (label_smoothing / classes)
            found.scatter_add_(1, label, w_rows * (label_smoothing - 1))
        grad[rows] = 0 if found is None else found
    return grad


def _weights(weight: Tensor | None, like: Tensor, factor: float) -> Tensor:
    return like.new_full(like.shape[-1:], factor) if weight is None else weight.to(like.dtype) * factor
