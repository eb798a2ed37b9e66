"""Losses on logits: Hinton's KD, alone or together with cross-entropy."""

import torch
from torch import Tensor

from fastkd import backends
from fastkd.backends import reference
from fastkd.numerics import weighted_sum
from fastkd.ops.soft_target import soft_target
from fastkd.validate import (
    check_labels,
    check_no_tangent,
    check_number,
    check_pair,
    check_weight,
)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    *,
    sample_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Hinton's knowledge distillation on logits.

    .. code-block:: text

        loss = temperature^2 * mean_i w_i KL(softmax(teacher_i / temperature) || softmax(student_i / temperature))

    Source: arXiv 1503.02531, section 2; temperature 4 as in the DCD paper's recipes.

    Args:
        student_logits, teacher_logits: [B, C], float64, float32, bf16 or fp16, both alike. The teacher gets no
            gradient.
        temperature: > 0; divides the logits.
        sample_weight, backend: as for :func:`dcd_loss`.

    Returns:
        The loss, 0-dim.

    Raises:
        TypeError, ValueError: a bad argument; the message names it, what came and what was expected.
    """
    check_pair("student_logits", student_logits, "teacher_logits", teacher_logits, "[B, C]")
    return _soft_target_means(student_logits, teacher_logits, None, temperature, 0.0, sample_weight, backend)[1]


def ce_kd_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    *,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy with the labels and :func:`kd_loss`, in one read of the logits.

    .. code-block:: text

        ce = mean_i w_i [-sum_c target_ic log softmax(student_i)_c]
        target_ic = (1 - label_smoothing) [c = label_i] + label_smoothing / C

    Args:
        student_logits, teacher_logits, temperature, sample_weight, backend: as for :func:`kd_loss`.
        labels: [B], int64, in [0, C). On CUDA, and under torch.compile, another value makes the cross-entropy NaN
            instead of raising, which would have to wait for the device. No value is ignored.
        label_smoothing: in [0, 1].

    Returns:
        The mean cross-entropy and the KD loss, both 0-dim.

    Raises:
        TypeError, ValueError: a bad argument; the message names it, what came and what was expected.
    """
    check_pair("student_logits", student_logits, "teacher_logits", teacher_logits, "[B, C]")
    check_labels(labels, student_logits)
    check_number("label_smoothing", label_smoothing, minimum=0, maximum=1)
    return _soft_target_means(
        student_logits, teacher_logits, labels, temperature, label_smoothing, sample_weight, backend
    )


def _soft_target_means(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    temperature: float,
    label_smoothing: float,
    sample_weight: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    check_number("temperature", temperature, minimum=0, exclusive=True)
    weight = check_weight(sample_weight, student_logits)
    backend = backends.resolve(backend, "soft_target", student_logits)
    teacher_logits = teacher_logits.detach()
    n = student_logits.shape[0]
    if backend == "reference":
        with torch.autocast(student_logits.device.type, enabled=False):
            kd = reference.soft_target(student_logits, teacher_logits, temperature)
            ce = torch.zeros_like(kd)
            if labels is not None:
                ce = reference.cross_entropy(student_logits, labels, label_smoothing)
            return weighted_sum(ce, weight) / n, weighted_sum(kd, weight) / n
    check_no_tangent(student_logits, teacher_logits)
    ce_sum, kd_sum, _ = soft_target(
        student_logits, teacher_logits, labels, weight, temperature, label_smoothing, backend
    )
    return ce_sum / n, kd_sum / n
