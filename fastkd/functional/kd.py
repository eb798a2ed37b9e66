"""Losses on logits: Hinton's KD, alone or together with cross-entropy, and what its family needs of every row."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import backends
from fastkd.backends import reference
from fastkd.numerics import accumulation_dtype, weighted_sum
from fastkd.ops.soft_target import weighted_sums
from fastkd.ops.soft_target_rows import rows_of
from fastkd.validate import (
    Backend,
    check_bool,
    check_labels,
    check_no_tangent,
    check_number,
    check_pair,
    check_row_temperature,
    check_student_and_teacher,
    check_temperature,
    check_weight,
)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 4.0,
    *,
    sample_weight: Tensor | None = None,
    standardize: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    r"""Hinton's knowledge distillation on logits.

    .. code-block:: text

        loss = mean_i w_i temperature_i^2 KL(softmax(teacher_i / temperature_i) || softmax(student_i / temperature_i))

    Every row stands alone, so there is no ``group``: the mean is over the rows of this rank, with several ranks too.
    Where ranks hold different numbers of rows, multiply it by W n / N to get a rank's part of the global mean, beside a
    loss that spans ranks (:func:`dcd_loss`). The trainer does so.

    Source: arXiv 1503.02531, section 2. The DCD paper's recipes use temperature 4.

    Args:
        student_logits, teacher_logits: [B, C], in float64, float32, bf16 or fp16. The teacher's are cast to the
            student's dtype, and get no gradient.
        temperature: divides the logits; in [1e-4, 1e4]. A tensor may have one temperature per row, [B], or one for all,
            0-dim; it gets a gradient. On CUDA, and under torch.compile, the range of a tensor is not checked.
        sample_weight: [B], as for :func:`dcd_loss`.
        standardize: divides both networks' logits by their row's standard deviation first, as
            :class:`fastkd.losses.LSKDLoss` says; at least two classes.
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
    if not standardize and not isinstance(temperature, Tensor):
        return _soft_target_means(student_logits, teacher_logits, None, temperature, 0.0, sample_weight, backend)[1]
    weight = check_weight(sample_weight, student_logits)
    rows = soft_target_rows(student_logits, teacher_logits, temperature, standardize=standardize, backend=backend)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(rows.divergence.dtype)
    return weighted_sum(temperature**2 * rows.divergence[0], weight) / len(student_logits)


def ce_kd_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    *,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    kd_weight: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy with the labels and :func:`kd_loss`, in one read of the logits.

    .. code-block:: text

        ce = mean_i w_i [-sum_c target_ic log softmax(student_i)_c]
        target_ic = (1 - label_smoothing) [c = label_i] + label_smoothing / C
        kd = temperature^2 * mean_i w_i k_i KL_i

    Both are means over the rows of this rank, as for :func:`kd_loss`.

    Args:
        student_logits, teacher_logits, temperature, sample_weight, backend: as for :func:`kd_loss`.
        labels: [B], int64, in [0, C). No value is ignored. On CUDA, and under torch.compile, another value makes the
            cross-entropy NaN, because raising would wait for the device.
        label_smoothing: in [0, 1].
        kd_weight: ``k``, [B], >= 0: a weight for each row that KD alone has. With label smoothing, the logits are then
            read twice.

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
    inputs = student_logits, teacher_logits, labels, temperature, label_smoothing
    if kd_weight is None:
        return _soft_target_means(*inputs, sample_weight, backend)
    weight, kd_weight = (
        check_weight(sample_weight, student_logits),
        check_weight(kd_weight, student_logits, "kd_weight"),
    )
    assert kd_weight is not None
    kd_weight = kd_weight if weight is None else kd_weight * weight
    if label_smoothing > 0:
        ce, _ = _soft_target_means(*inputs, sample_weight, backend)
        return ce, kd_loss(student_logits, teacher_logits, temperature, sample_weight=kd_weight, backend=backend)
    rows = soft_target_rows(student_logits, teacher_logits, [1.0, temperature], labels=labels, backend=backend)
    n = len(student_logits)
    ce, kd = weighted_sum(-rows.student_label[0], weight) / n, weighted_sum(rows.divergence[1], kd_weight) / n
    return ce, temperature**2 * kd


class SoftTargetRows(NamedTuple):
    """What :func:`soft_target_rows` returns, each [K, B] for K temperatures."""

    divergence: Tensor
    entropy: Tensor
    student_label: Tensor
    teacher_label: Tensor


def soft_target_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor | Sequence[float] = 4.0,
    *,
    teacher_temperature: float | Tensor | Sequence[float] | None = None,
    labels: Tensor | None = None,
    exclude_label: bool = False,
    standardize: bool = False,
    backend: Backend | None = None,
) -> SoftTargetRows:
    r"""What the losses of the KD family are made of, per row and temperature, in one read of the logits.

    .. code-block:: text

        p_ki = softmax(student_i / temperature_ki)             q_ki = softmax(teacher_i / teacher_temperature_ki)

        divergence    = KL(q || p)                             entropy       = -sum_c q_c log q_c
        student_label = log p_label                            teacher_label = log q_label

        exclude_label: p and q are over the other classes, and the last two are log (P / (1 - P)) of the label's
                       probability P over all classes
        standardize:   each row of logits is first divided by 1e-7 + its standard deviation, of the sample

    ``divergence`` and ``student_label`` have gradients, for the student's logits and for the temperatures. ``entropy``
    and ``teacher_label`` are constants. A loss is then a mean over numbers per row: ``-student_label`` at temperature 1
    is cross-entropy, and ``temperature^2 * divergence`` is KD, which may have a weight for each row.

    Source: arXiv 1503.02531; 2203.08679 for the excluded label, 2403.01427 for standardised rows, 2211.16231 for a
    temperature with a gradient.

    Args:
        student_logits, teacher_logits: [B, C], in float64, float32, bf16 or fp16. Both are read in the wider of their
            dtypes. The teacher's get no gradient.
        temperature: divides the logits; in [1e-4, 1e4]. A list has several temperatures. A tensor has one per row, [B],
            or one for all, 0-dim, and gets a gradient; its range is checked on a CPU alone.
        teacher_temperature: the same for the teacher, as many; None: those of the student.
        labels: [B], int64, in [0, C); None: the last two results are zeros. On CUDA another label gives NaN.
        exclude_label, standardize: see above; both need at least two classes.
        backend: as for :func:`dcd_loss`; ``"reference"`` alone has second derivatives.

    Raises:
        TypeError, ValueError: as for :func:`kd_loss`; or the numbers of temperatures differ, or ``exclude_label`` has
            no labels.

    Example:
        >>> import torch
        >>> from fastkd import soft_target_rows
        >>> student_logits, teacher_logits = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> rows = soft_target_rows(student_logits, teacher_logits, [1.0, 4.0], labels=torch.arange(8))
        >>> rows.divergence.shape
        torch.Size([2, 8])
        >>> (4.0**2 * rows.divergence[1] - rows.student_label[0]).mean().backward()
    """
    names = "student_logits", student_logits, "teacher_logits", teacher_logits
    check_pair(*names, "[B, C]", may_differ_in_dtype=True)
    for name, flag in (("exclude_label", exclude_label), ("standardize", standardize)):
        check_bool(name, flag)
        if flag and student_logits.shape[1] < 2:
            raise ValueError(f"student_logits: got shape {list(student_logits.shape)}, expected at least 2 classes")
    if labels is not None:
        check_labels(labels, student_logits)
    elif exclude_label:
        raise TypeError("labels: got None, expected a torch.Tensor for exclude_label=True")
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    student_scale = teacher_scale = _scales("temperature", temperature, student_logits)
    if teacher_temperature is not None:
        teacher_scale = _scales("teacher_temperature", teacher_temperature, student_logits)
        if len(teacher_scale) != len(student_scale):
            raise ValueError(f"teacher_temperature: got {len(teacher_scale)}, expected as many as of temperature, "
                             f"{len(student_scale)}")  # fmt: skip
    backend_name = backends.resolve(backend, "soft_target_rows", student_logits)
    inputs = student_logits, teacher_logits, labels, student_scale, teacher_scale, exclude_label, standardize
    rows: tuple[Tensor, ...]
    if backend_name == "reference":
        with torch.autocast(student_logits.device.type, enabled=False):
            rows = reference.soft_target_rows(*inputs)
    else:
        check_no_tangent(student_logits, teacher_logits, student_scale, teacher_scale)
        moments = standardize or student_scale.requires_grad or teacher_scale.requires_grad
        rows = rows_of(*inputs, moments, backend_name).unbind()
    return SoftTargetRows(rows[0], rows[1].detach(), rows[2], rows[3].detach())


def _scales(name: str, temperature: float | Tensor | Sequence[float], like: Tensor) -> Tensor:
    """The inverse temperatures, [K, B]."""
    if isinstance(temperature, Tensor):
        return check_row_temperature(name, temperature, like).reciprocal()[None]
    temperatures: Sequence[Any] = temperature if isinstance(temperature, list | tuple) else [temperature]
    if not temperatures:
        raise ValueError(f"{name}: got no number, expected at least one")
    for value in temperatures:
        check_temperature(value, name)
    dtype = accumulation_dtype(like.dtype)
    return torch.stack([torch.full((len(like),), 1 / T, dtype=dtype, device=like.device) for T in temperatures])


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
