"""The public functions: validate, choose a backend, call the operation, take the mean.

Those over one softmax a row are in :mod:`fastkd.functional.contrast`.

Every loss is a 0-dim tensor in the accumulation dtype: float64 for float64 inputs, float32 otherwise (bf16 and fp16
inputs, autocast or not). Gradients come back in the inputs' dtypes. Inputs are never written to.
"""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastkd import backends
from fastkd.backends import reference
from fastkd.distributed.agree import agreeing, eagerly, kind_of
from fastkd.distributed.group import Group, resolve_group
from fastkd.numerics import weighted_sum
from fastkd.ops.dual_softmax import GlobalDualSoftmax, dual_softmax
from fastkd.validate import (
    CONSISTENCIES,
    check_bias,
    check_choice,
    check_no_tangent,
    check_number,
    check_pair,
    check_scale,
    check_weight,
    scale_bound,
)


def dcd_loss(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    alpha: float = 0.5,
    consistency: str = "student||teacher",
    sample_weight: Tensor | None = None,
    group: Group = None,
    backend: str | None = None,
) -> Tensor:
    r"""Discriminative and consistent distillation, the contrastive part of DCD.

    .. code-block:: text

        A_ij = logit_scale * s_i . t_j + logit_bias       s, t: L2-normalised rows of student, teacher
        p_i  = softmax_j A_ij    q_i = softmax_j A_ji     student over teachers, teacher over students
        loss = mean_i w_i [-log p_i(i) + alpha * KL(p_i || q_i)]

    Source: arXiv 2407.11802, eq. 2-8. The paper's eq. 6 is ``KL(p || q)``, the default; the authors' public code
    computes ``KL(q || p)``: ``consistency="teacher||student"``. The classification and KD terms are not included.

    Args:
        student, teacher: embeddings [n, D] of the same n samples, after the projection heads; float64, float32, bf16
            or fp16, both alike. Rows no longer than 1e-12 count as the zero vector and get no gradient.
        logit_scale: the positive multiplier itself, ``exp(tau)``, already clamped; a float or a 0-dim tensor that may
            need a gradient. A tensor's sign is checked on a CPU only, and not under torch.compile.
        logit_bias: accepted for the paper's interface and for old checkpoints. It cancels in every softmax above, so
            it changes nothing, costs no arithmetic on similarities, and its gradient is exactly zero.
        alpha: weight of the consistency term, >= 0.
        consistency: ``"student||teacher"`` or ``"teacher||student"``.
        sample_weight: [n], >= 0, without gradient; multiplies the rows' losses. The mean still divides by n. On CUDA,
            and under torch.compile, a negative weight makes the loss NaN instead of raising, which would have to wait
            for the device.
        group: whose rows count as in-batch. ``None``: those of the default process group when torch.distributed is
            initialised, else this process's; a ProcessGroup: those of its ranks; ``"local"``: this process's. With W
            ranks and N rows in all, n of them here (which may differ between ranks, and be 0), every rank returns
            W / N times the sum over its own rows: the mean over ranks is the global loss, and averaging gradients over
            ranks, as DistributedDataParallel does, gives the global loss's exact gradient. Every rank must call, also
            with n = 0, and the gradient that reaches this loss in the backward must be the same on all ranks, as it is
            when each calls ``backward`` on its loss; ``sample_weight`` is what weighs rows. An error on one rank is
            raised on all. See :func:`fastkd.distributed.group.configure` for the exchange.
        backend: ``None`` (the fastest), ``"blocked"`` (streams; memory linear in n) or ``"reference"`` (the
            definition; n x n memory; one rank only).

    Returns:
        The loss, 0-dim. Non-finite inputs give a non-finite loss. Differentiable once, backwards; ``"reference"``
        also twice, and forwards.

    Raises:
        TypeError, ValueError: a bad argument; the message names it, what came and what was expected.
    """
    contrast_mean, consistency_mean = dcd_terms(
        student, teacher, logit_scale, logit_bias, alpha=alpha, consistency=consistency, sample_weight=sample_weight,
        group=group, backend=backend,
    )  # fmt: skip
    return contrast_mean + consistency_mean


def dcd_terms(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    alpha: float = 0.5,
    consistency: str = "student||teacher",
    sample_weight: Tensor | None = None,
    max_scale: float = math.inf,
    group: Group = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The two summands of :func:`dcd_loss`: mean contrast, and alpha times mean consistency.

    max_scale: an upper bound of logit_scale that the caller guarantees. Up to 40 it lets a backend that must not read
    logit_scale from the device drop the running maxima; it does not clamp.
    """
    process_group = resolve_group(group)
    contrast_mean, consistency_mean = eagerly(process_group, _means)(
        process_group, student, teacher, logit_scale, alpha, consistency, sample_weight, max_scale, backend
    )
    if logit_bias is not None:
        contrast_mean = contrast_mean + 0.0 * check_bias(logit_bias, student).to(contrast_mean.dtype)
    return contrast_mean, alpha * consistency_mean


def _means(
    group: ProcessGroup | None,
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor | float,
    alpha: float,
    consistency: str,
    sample_weight: Tensor | None,
    max_scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Mean contrast and mean consistency over the rows of all ranks; this rank's part of them if there are several."""
    with agreeing(group, "dcd_loss") as ranks:
        check_pair("student", student, "teacher", teacher, "[n, D]", may_be_empty=ranks.several)
        scale = check_scale(logit_scale, student)
        check_number("alpha", alpha, minimum=0)
        check_choice("consistency", consistency, CONSISTENCIES)
        weight = check_weight(sample_weight, student)
        backend = backends.resolve(backend, "dual_softmax", student)
        options = {**kind_of(student), "alpha": alpha, "consistency": consistency}
        ranks.describe(student, options, other=teacher, scale=scale, weight=weight, backend=backend)
    if backend == "reference":
        with torch.autocast(student.device.type, enabled=False):
            rows = reference.dual_softmax(student, teacher, scale, consistency=consistency)
            sums = [weighted_sum(row, weight) for row in rows]
    else:
        check_no_tangent(student, teacher, scale)
        arguments = student, teacher, scale, weight, consistency, scale_bound(logit_scale, max_scale), backend
        peers = ranks.peers
        sums = dual_softmax(*arguments) if peers is None else GlobalDualSoftmax.apply(*arguments, peers)
    return ranks.mean(sums[0], len(student)), ranks.mean(sums[1], len(student))
