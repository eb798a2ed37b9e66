"""Losses on logits: Hinton's KD, alone or together with cross-entropy."""

import torch
from torch import Tensor

from fastkd import backends
from fastkd.backends import reference
from fastkd.numerics import weighted_sum
from fastkd.ops.soft_target import weighted_sums
from fastkd.validate import (
    Backend,
    check_labels,
    check_no_tangent,
    check_number,
    check_student_and_teacher,
    check_temperature,
    check_weight,
)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    *,
    sample_weight: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Hinton's knowledge distillation on logits.

    .. code-block:: text

        loss = temperature^2 * mean_i w_i KL(softmax(teacher_i / temperature) || softmax(student_i / temperature))

    Every row stands alone, so there is no ``group``: the mean is over the rows of this rank, with several ranks too.
    Where ranks hold different numbers of rows, multiply it by W n / N to get a rank's part of the global mean, beside a
    loss that spans ranks (:func:`dcd_loss`). The trainer does so.

    Source: arXiv 1503.02531, section 2. The DCD paper's recipes use temperature 4.

    Args:
        student_logits, teacher_logits: [B, C], in float64, float32, bf16 or fp16. The teacher's are cast to the
            student's dtype, and get no gradient.
        temperature: divides the logits; in [1e-4, 1e4].
        sample_weight: [B], as for :func:`dcd_loss`.
        backend: as for :func:`dcd_loss`; ``"reference"`` takes memory linear in B here.

    Returns:
        The loss, 0-dim, in float64 for float64 inputs and in float32 otherwise.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, there are no rows, a number is out of range, a weight is negative,
            or ``backend`` is unknown or not available here.

    Example:
        >>> import torch
        >>> from fastkd import kd_loss
        >>> student_logits, teacher_logits = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> kd_loss(student_logits, teacher_logits, temperature=4.0).backward()
    """
    logits = "student_logits", student_logits, "teacher_logits", teacher_logits
    teacher_logits = check_student_and_teacher(*logits, "[B, C]")
    return _soft_target_means(student_logits, teacher_logits, None, temperature, 0.0, sample_weight, backend)[1]


def ce_kd_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    *,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy with the labels and :func:`kd_loss`, in one read of the logits.

    .. code-block:: text

        ce = mean_i w_i [-sum_c target_ic log softmax(student_i)_c]
        target_ic = (1 - label_smoothing) [c = label_i] + label_smoothing / C

    Both are means over the rows of this rank, as for :func:`kd_loss`.

    Args:
        student_logits, teacher_logits, temperature, sample_weight, backend: as for :func:`kd_loss`.
        labels: [B], int64, in [0, C). No value is ignored. On CUDA, and under torch.compile, another value makes the
            cross-entropy NaN, because raising would wait for the device.
        label_smoothing: in [0, 1].

    Returns:
        The mean cross-entropy and the KD loss, both 0-dim.

    Raises:
        TypeError, ValueError: as for :func:`kd_loss`; or ``labels`` are not int64, do not fit the logits or are out of
            range, or ``label_smoothing`` is out of range.
    """
    logits = "student_logits", student_logits, "teacher_logits", teacher_logits
    teacher_logits = check_student_and_teacher(*logits, "[B, C]")
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
    check_temperature(temperature)
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
    return weighted_sums(1 / n, student_logits, teacher_logits, labels, weight, temperature, label_smoothing, backend)
