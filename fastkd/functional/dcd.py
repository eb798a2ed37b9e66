"""The public functions: validate, choose a backend, call the operation, take the mean.

Those over one softmax a row are in :mod:`fastkd.functional.contrast`.

Every loss is a 0-dim tensor in the accumulation dtype: float64 for float64 inputs, float32 otherwise (bf16 and fp16
inputs, autocast or not). Gradients come back in the inputs' dtypes. Inputs are never written to.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastkd import backends
from fastkd.backends import reference
from fastkd.distributed.agree import agreeing, eagerly, kind_of
from fastkd.distributed.group import Group, resolve_group
from fastkd.numerics import weighted_sum
from fastkd.ops.dual_softmax import means
from fastkd.validate import (
    CONSISTENCIES,
    Backend,
    Consistency,
    check_bias,
    check_choice,
    check_no_tangent,
    check_number,
    check_scale,
    check_student_and_teacher,
    check_weight,
    one_scale,
    scale_bound,
)


def dcd_loss(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor | float | None = None,
    logit_bias: Tensor | float | None = None,
    *,
    temperature: Tensor | float | None = None,
    alpha: float = 0.5,
    consistency: Consistency = "student||teacher",
    sample_weight: Tensor | None = None,
    group: Group = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""The contrastive part of DCD: each student against all teachers, and the consistency of both directions.

    .. code-block:: text

        A_ij = logit_scale * s_i . t_j + logit_bias       s, t: L2-normalised rows of student, teacher
        p_i  = softmax_j A_ij    q_i = softmax_j A_ji     student over teachers, teacher over students
        loss = mean_i w_i [-log p_i(i) + alpha * KL(p_i || q_i)]

    With W ranks, N rows in all and n of them here (n may differ between ranks, and be 0), every rank returns W / N
    times the sum over its own rows. The average over ranks is then the loss of the global batch. Averaging the
    gradients over ranks, as DistributedDataParallel does, gives its exact gradient. Every rank must call, also with
    n = 0. The gradient that reaches this loss in the backward must be the same on all ranks, as it is when each calls
    ``backward`` on its loss; rows are weighted by ``sample_weight``. :func:`fastkd.distributed.configure` sets
    how rows are exchanged.

    Source: arXiv 2407.11802, eq. 2-8. The paper's eq. 6 is ``KL(p || q)``, the default. The authors' public code
    computes ``KL(q || p)``, which is ``consistency="teacher||student"``. The classification and KD terms are not
    included.

    Args:
        student, teacher: embeddings [n, D] of the same n samples, after the projection heads, in float64, float32, bf16
            or fp16. The teacher's are cast to the student's dtype. Rows no longer than 1e-12 count as the zero vector
            and get no gradient.
        logit_scale: the positive multiplier itself, ``exp(tau)``, already clamped. A float, or a 0-dim tensor that may
            need a gradient. The sign of a tensor is checked on a CPU only, and not under torch.compile.
        temperature: its inverse, of the same types. One of the two is given.
        logit_bias: accepted for the paper's interface and for old checkpoints. It cancels in every softmax above, so it
            changes nothing, and its gradient is exactly zero.
        alpha: weight of the consistency term; >= 0.
        consistency: ``"student||teacher"`` or ``"teacher||student"``.
        sample_weight: [n], >= 0, without gradient; multiplies the loss of each row. The mean still divides by n. On
            CUDA, and under torch.compile, a negative weight makes the loss NaN, because raising would wait for the
            device.
        group: whose rows count as in-batch. ``None`` means the ranks of the default process group if torch.distributed
            is initialised, and this process otherwise. A ProcessGroup means its ranks. ``"local"`` means this process.
        backend: ``None`` picks the fastest that runs here. ``"triton"`` is fused kernels and needs CUDA. ``"blocked"``
            streams in plain PyTorch with memory linear in n. ``"reference"`` is the definition, with n x n memory, on
            one rank only.

    Returns:
        The loss, 0-dim, in float64 for float64 inputs and in float32 otherwise. Inputs that are not finite give a loss
        that is not finite. It can be differentiated once, backwards; with ``"reference"`` also twice, and forwards.

    Raises:
        TypeError: an argument has the wrong type or dtype, or not exactly one of ``logit_scale`` and ``temperature`` is
            given.
        ValueError: shapes or devices do not fit, there are no rows, a number is out of range, or an option is unknown
            or not available here. What one rank raises, and what differs between ranks, is raised on all ranks.

    Example:
        >>> import torch
        >>> from fastkd import dcd_loss
        >>> student, teacher = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        >>> loss = dcd_loss(student, teacher, logit_scale=10.0)
        >>> loss.backward()
    """
    contrast_mean, consistency_mean = dcd_terms(
        student, teacher, logit_scale, logit_bias, temperature=temperature, alpha=alpha, consistency=consistency,
        sample_weight=sample_weight, group=group, backend=backend,
    )  # fmt: skip
    return contrast_mean + consistency_mean


def dcd_terms(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor | float | None = None,
    logit_bias: Tensor | float | None = None,
    *,
    temperature: Tensor | float | None = None,
    project: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    alpha: float = 0.5,
    consistency: Consistency = "student||teacher",
    sample_weight: Tensor | None = None,
    max_scale: float = math.inf,
    group: Group = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """The two summands of :func:`dcd_loss`: mean contrast, and alpha times mean consistency.

    max_scale: an upper bound of logit_scale that the caller guarantees. Up to 40 it lets a backend that must not read
    logit_scale from the device drop the running maxima; it does not clamp. project: makes the embeddings of what came
    as ``student`` and ``teacher``. What it raises is raised on all ranks.
    """
    process_group = resolve_group(group)
    return eagerly(process_group, _terms)(
        process_group, student, teacher, logit_scale, logit_bias, temperature, project, alpha, consistency,
        sample_weight, max_scale, backend,
    )  # fmt: skip


def _terms(
    group: ProcessGroup | None,
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor | float | None,
    logit_bias: Tensor | float | None,
    temperature: Tensor | float | None,
    project: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    alpha: float,
    consistency: Consistency,
    sample_weight: Tensor | None,
    max_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Both terms over the rows of all ranks; this rank's part of them if there are several."""
    with agreeing(group, "dcd_loss") as ranks:
        if project is not None:
            student, teacher = project(student, teacher)
        empty = ranks.several
        teacher = check_student_and_teacher("student", student, "teacher", teacher, "[n, D]", may_be_empty=empty)
        multiplier = one_scale(logit_scale, temperature, student)
        scale = check_scale(multiplier, student)
        check_number("alpha", alpha, minimum=0)
        check_choice("consistency", consistency, CONSISTENCIES)
        weight = check_weight(sample_weight, student)
        bias = None if logit_bias is None else check_bias(logit_bias, student)
        backend = backends.resolve(backend, "dual_softmax", student)
        options = {**kind_of(student), "alpha": alpha, "consistency": consistency}
        ranks.describe(student, options, other=teacher, scale=scale, weight=weight, backend=backend)
    if backend == "reference":
        with torch.autocast(student.device.type, enabled=False):
            rows = reference.dual_softmax(student, teacher, scale, consistency=consistency)
            contrast, divergence = (weighted_sum(row, weight) / student.shape[0] for row in rows)
            divergence = alpha * divergence
    else:
        check_no_tangent(student, teacher, scale)
        part = ranks.part_per_row(student.shape[0])
        contrast, divergence = means(
            student, teacher, scale, weight, consistency=consistency, scale_bound=scale_bound(multiplier, max_scale),
            backend=backend, factors=(part, alpha * part), peers=ranks.peers,
        )  # fmt: skip
    if bias is not None:
        contrast = contrast + 0.0 * bias.to(contrast.dtype)
    return contrast, divergence
