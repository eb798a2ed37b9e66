"""``soft_target`` on a CPU, of few logits or in loops: whole matrices, and the gradients with the losses.

Legend, beside that of the blocks. ``Z``: logits less their row's maximum, in base 2; of student and teacher at the
temperature, and, where there are labels, of the student at temperature 1. ``E = 2^Z``.
"""

import torch
from torch import Tensor

from fastkd.backends.blocked.dense import loops
from fastkd.backends.blocked.sums import LOG_2
from fastkd.numerics import accumulation_dtype

Result = tuple[Tensor, Tensor, list[Tensor]]
MAX_ELEMENTS = 1 << 18  # of the logits, for torch's operations; a matrix of them then takes 1 MiB in float32


def covers(student_logits: Tensor, teacher_logits: Tensor | None) -> bool:
    """Whether there is a teacher, and the logits lie on a CPU, and are few or for the loops."""
    if teacher_logits is None or student_logits.device.type != "cpu":
        return False
    elements = student_logits.numel()
    return elements > 0 and (elements <= MAX_ELEMENTS or loops(elements) is not None)


def computed(
    factor: float,
    needs_grad: bool,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    label_smoothing: float,
) -> Result:
    """The weighted sums of cross-entropy and KD times ``factor``, and the gradients if they are needed.

    These are the student's, for an upstream gradient of 1: KD's, and then the cross-entropy's where there are labels.
    The extension, where it serves, computes them in loops that run over a row once.
    """
    native = loops(student_logits.numel())
    compute = _computed if native is None else native.dense_soft_target
    return compute(student_logits, teacher_logits, labels, weight, temperature, label_smoothing, factor, needs_grad)


def _computed(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    label_smoothing: float,
    factor: float,
    needs_grad: bool,
) -> Result:
    dtype = accumulation_dtype(student_logits.dtype)
    x, t = student_logits.to(dtype), teacher_logits.to(dtype)
    n, classes = x.shape
    w = x.new_full((n,), factor) if weight is None else weight.to(dtype) * factor
    largest = x.amax(dim=1, keepdim=True)
    Z = x.new_empty(2 if labels is None else 3, n, classes)
    torch.sub(x, largest, out=Z[0])
    torch.sub(t, t.amax(dim=1, keepdim=True), out=Z[1])
    if labels is not None:
        torch.mul(Z[0], 1 / LOG_2, out=Z[2])
    Z[:2].mul_(1 / (temperature * LOG_2))
    E = Z.exp2()
    sums = E.sum(dim=2)
    # log(sums[0] / sums[1]), from their difference: where they are almost equal, their logarithms would be rounding.
    excess = torch.sub(E[0], E[1]).sum(dim=1)
    ratio = (excess.abs() / torch.where(excess < 0, sums[0], sums[1])).log1p_().copysign_(excess)
    losses = torch.linalg.vecdot(E[1], Z[1].sub_(Z[0])).div_(sums[1]).mul_(LOG_2).add_(ratio)
    kd, ce = losses.dot(w).mul_(temperature**2), w.new_zeros(())
    gradients = []
    if needs_grad:
        E[:2].mul_((w * temperature / sums[:2])[:, :, None])
        gradients.append(E[0].sub_(E[1]))
    if labels is not None:
        labels = labels[:, None]
        label, log_total = labels.clamp(0, classes - 1), sums[2, :, None].log()
        w = w[:, None].where(label == labels, torch.nan)
        losses = (largest - x.gather(1, label)).add_(log_total)
        if label_smoothing > 0:
            of_all = Z[2].mean(dim=1, keepdim=True).mul_(-LOG_2).add_(log_total)
            losses = losses.mul_(1 - label_smoothing).add_(of_all.mul_(label_smoothing))
        ce = losses[:, 0].dot(w[:, 0])
        if needs_grad:
            grad = E[2].mul_(w / sums[2, :, None])
            if label_smoothing > 0:
                grad.sub_(w * (label_smoothing / classes))
            gradients.append(grad.scatter_add_(1, label, w * (label_smoothing - 1)))
    return ce, kd, gradients
