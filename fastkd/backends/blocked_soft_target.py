"""``soft_target`` of the blocked backend: rows in blocks that stay in the cache, and five numbers a row kept."""

import torch
from torch import Tensor

from fastkd.backends.reference import accumulation_dtype

BLOCK_ELEMENTS = 1 << 18  # a block of logits: 1 MiB in float32


def _blocks(logits: Tensor) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def soft_target_forward(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums of cross-entropy and of ``temperature^2 KL(teacher || student)``, and the numbers [5, B]."""
    dtype = accumulation_dtype(student_logits.dtype)
    n = len(student_logits)
    losses, stats = student_logits.new_zeros(2, n, dtype=dtype), student_logits.new_zeros(5, n, dtype=dtype)
    for rows in _blocks(student_logits):
        x, stats[0, rows] = _below_largest(student_logits[rows].to(dtype))
        if labels is not None:
            stats[1, rows] = log_sum = x.exp().sum(dim=1).log_()
            losses[0, rows] = log_sum - _smoothed_label_logit(x, labels[rows], label_smoothing)
        if teacher_logits is not None:
            y, stats[3, rows] = _below_largest(teacher_logits[rows].to(dtype))
            y /= temperature
            x = x / temperature
            stats[2, rows] = log_sum = x.exp().sum(dim=1).log_()
            p = y.exp()
            total = p.sum(dim=1)
            stats[4, rows] = log_total = total.log()
            losses[1, rows] = (y.sub_(x).mul_(p).sum(dim=1) / total + log_sum - log_total) * temperature**2
    w = _weights(weight, stats)
    return losses[0].dot(w), losses[1].dot(w), stats


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
    """Gradient of the student's logits: ``w_i (p_i - target_i) + k_i temperature (p_i' - q_i')``.

    ``w``, ``k``: upstream gradients of a row's two losses; p', q': student and teacher softmax at the temperature.
    """
    dtype, classes = stats.dtype, student_logits.shape[1]
    grad = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
    w = _weights(weight, stats)
    w, k = w * grad_ce, w * (grad_kd * temperature)
    for rows in _blocks(student_logits):
        x_max, log_sum, log_sum_t, y_max, log_total = stats[:, rows, None]
        x = student_logits[rows].to(dtype) - x_max
        parts = []
        if labels is not None:
            p = (x - log_sum).exp_()
            if label_smoothing > 0:
                p -= label_smoothing / classes
            label, is_label = _label_index(labels[rows], classes)
            p.scatter_add_(1, label, p.new_full((), label_smoothing - 1).expand(label.shape))
            parts.append(p.mul_(w[rows, None].where(is_label, torch.nan)))
        if teacher_logits is not None:
            p = x.div_(temperature).sub_(log_sum_t).exp_()
            q = (teacher_logits[rows].to(dtype) - y_max).div_(temperature).sub_(log_total).exp_()
            parts.append(p.sub_(q).mul_(k[rows, None]))
        grad[rows] = parts[0].add_(parts[1]) if len(parts) == 2 else parts[0]
    return grad


def _below_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits minus their row's largest, and the largest [B]."""
    largest = logits.amax(dim=1)
    return logits - largest[:, None], largest


def _label_index(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The labels as a safe index [B, 1], and which of them are labels at all."""
    label = labels[:, None]
    return label.clamp(0, classes - 1), (label >= 0) & (label < classes)


def _smoothed_label_logit(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """``sum_c target_ic logits_ic`` [B]; NaN where the label is none."""
    label, is_label = _label_index(labels, logits.shape[1])
    at_label = logits.gather(1, label).where(is_label, torch.nan)[:, 0]
    if label_smoothing == 0:
        return at_label
    return (1 - label_smoothing) * at_label + label_smoothing * logits.mean(dim=1)


def _weights(weight: Tensor | None, stats: Tensor) -> Tensor:
    return stats.new_ones(stats.shape[1]) if weight is None else weight.to(stats.dtype)
