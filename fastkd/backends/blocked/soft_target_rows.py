"""``soft_target_rows`` of the blocked backend: in blocks of rows that stay in the cache, or in the extension's loops.

Legend. ``zx``, ``zy``: logits of student and teacher less their row's maximum. ``a``, ``b``: their scales, which for
standardised rows are divided by the spread ``1e-7 + std``. ``u = exp(a zx)``, ``v = exp(b zy)``, ``d = b zy - a zx``,
p = u / sum u and q = v / sum v. Maxima and sums are over all classes, or over all but the label. Kept for the backward:

    of each row             the maxima of student and teacher, the mean of zx, the spreads of student and teacher
    of each row and view    sum u, sum v, and the derivatives  dKL/da = E_p zx - E_q zx,  dKL/db = Cov_q(zy, d),  and of
                            the student's label by a, zx_label - E_p zx
"""

import torch
from torch import Tensor

from fastkd.backends.blocked.dense import loops
from fastkd.backends.blocked.sums import LOG_2, row_blocks
from fastkd.numerics import STD_EPS, accumulation_dtype


def soft_target_rows_forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    student_scale: Tensor,
    teacher_scale: Tensor,
    exclude_label: bool,
    standardize: bool,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    """The results, [4, K, B], and the numbers for the backward, [5 + 5 K, B]; see the operation and the legend."""
    if student_logits.is_cpu and (native := loops(student_logits.numel())) is not None:
        eps = STD_EPS if standardize else None
        return native.soft_target_rows(
            student_logits, teacher_logits, labels, student_scale, teacher_scale, exclude_label, eps, moments
        )
    dtype, (views, n) = accumulation_dtype(student_logits.dtype), student_scale.shape
    found = student_logits.new_zeros(4, views, n, dtype=dtype)
    kept = found.new_zeros(5 + 5 * views, n)
    base, by_view = kept[:5], kept[5:].view(5, views, n)
    base[3:] = 1
    for rows in row_blocks(student_logits):
        x, y = student_logits[rows].to(dtype), teacher_logits[rows].to(dtype)
        label = None if labels is None else labels[rows, None].clamp(0, x.shape[1] - 1)
        left_out = label if exclude_label else None
        (zx, base[0, rows]), (zy, base[1, rows]) = (_below_maximum(z, left_out) for z in (x, y))
        own = [zx.new_zeros(len(zx))] * 2 if label is None else [z.gather(1, label)[:, 0] for z in (zx, zy)]
        if standardize:
            base[2, rows] = zx.mean(dim=1)
            base[3, rows], base[4, rows] = (z.std(dim=1) + STD_EPS for z in (zx, zy))
        if left_out is not None:
            zx.scatter_(1, left_out, 0), zy.scatter_(1, left_out, 0)
        for k in range(views):
            a, b = student_scale[k, rows] / base[3, rows], teacher_scale[k, rows] / base[4, rows]
            log_u, d = zx * (a / LOG_2)[:, None], zy * (b / LOG_2)[:, None]
            u, v = _powers(log_u, left_out), _powers(d, left_out)
            d.sub_(log_u)
            sums = u.sum(dim=1), v.sum(dim=1)
            mean_d = torch.linalg.vecdot(v, d).div_(sums[1]).mul_(LOG_2)
            # log(sums[0] / sums[1]), from their difference: where they are almost equal, the rest would be rounding.
            excess = (u - v).sum(dim=1)
            ratio = (excess.abs() / torch.where(excess < 0, *sums)).log1p_().copysign_(excess)
            mean_zy = torch.linalg.vecdot(v, zy).div_(sums[1])
            found[0, k, rows] = mean_d + ratio
            found[1, k, rows] = sums[1].log() - b * mean_zy
            if label is not None and labels is not None:
                for kind, scale, z, total in ((2, a, own[0], sums[0]), (3, b, own[1], sums[1])):
                    found[kind, k, rows] = (scale * z - total.log()).where(label[:, 0] == labels[rows], torch.nan)
            by_view[0, k, rows], by_view[1, k, rows] = sums
            if moments:
                mean_zx = torch.linalg.vecdot(u, zx).div_(sums[0])
                by_view[2, k, rows] = mean_zx - torch.linalg.vecdot(v, zx).div_(sums[1])
                by_view[3, k, rows] = torch.linalg.vecdot(v, zy * d).div_(sums[1]).mul_(LOG_2) - mean_zy * mean_d
                by_view[4, k, rows] = own[0] - mean_zx
    return found, kept


def _below_maximum(x: Tensor, left_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits less the largest of their row that is not left out, and that maximum; a row that is left out alone."""
    largest = (x if left_out is None else x.scatter(1, left_out, -torch.inf)).amax(dim=1)
    return x - largest[:, None], largest


def _powers(exponents: Tensor, left_out: Tensor | None) -> Tensor:
    powers = exponents.exp2()
    return powers if left_out is None else powers.scatter_(1, left_out, 0)


def soft_target_rows_backward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    student_scale: Tensor,
    teacher_scale: Tensor,
    kept: Tensor,
    upstream: Tensor,
    exclude_label: bool,
    standardize: bool,
) -> Tensor:
    """``sum_k a_k ((g_k - h_k) p_k - g_k q_k) + l (zx - mean zx)``, and ``sum_k a_k h_k`` more at the label.

    ``g``, ``h``: upstream gradients of the divergence and of the student's label. ``l``: what comes through the
    standard deviation, ``-sum_k (g_k dKL/da_k + h_k dlabel/da_k) a_k / (spread std (C - 1))``, or 0 where that is 0.
    """
    if student_logits.is_cpu and (native := loops(student_logits.numel())) is not None:
        eps = STD_EPS if standardize else None
        return native.soft_target_rows_gradient(
            student_logits, teacher_logits, labels, student_scale, teacher_scale, kept, upstream, exclude_label, eps
        )
    dtype, classes, views = kept.dtype, student_logits.shape[1], len(student_scale)
    grad = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
    sums_u, sums_v, of_divergence, _, of_label = kept[5:].unflatten(0, (5, views))
    a, b = student_scale / kept[3], teacher_scale / kept[4]
    if labels is not None:
        upstream = upstream.where((labels >= 0) & (labels < classes), torch.nan)
    g, h = upstream[0], upstream[2]
    of_u, of_v, at_label = a * (g - h) / sums_u, a * g / sums_v, (a * h).sum(dim=0)
    if standardize:
        std = kept[3] - STD_EPS
        of_std = ((g * of_divergence + h * of_label) * a).sum(dim=0) / (kept[3] * std * -(classes - 1))
        of_std.masked_fill_(std <= 0, 0)
    for rows in row_blocks(student_logits):
        zx = student_logits[rows].to(dtype) - kept[0, rows, None]
        zy = teacher_logits[rows].to(dtype) - kept[1, rows, None]
        total = torch.zeros_like(zx)
        for k in range(views):
            total.addcmul_((zx * (a[k, rows] / LOG_2)[:, None]).exp2_(), of_u[k, rows, None])
            total.addcmul_((zy * (b[k, rows] / LOG_2)[:, None]).exp2_(), of_v[k, rows, None], value=-1)
        if labels is not None:
            label = labels[rows, None].clamp(0, classes - 1)
            if exclude_label:
                total.scatter_(1, label, 0)
            total.scatter_add_(1, label, at_label[rows, None])
        if standardize:
            total.addcmul_(zx.sub_(kept[2, rows, None]), of_std[rows, None])
        grad[rows] = total
    return grad
