"""The definition of every operation: plain PyTorch, N x N, any dtype, differentiated by autograd.

Nothing here is fast. In float64 these functions are the judge of every other backend, and are gradchecked themselves.
They return one loss per row, so that each can be read against its formula; weights and means are applied outside.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.backends.masks import Mask
from fastkd.numerics import STD_EPS, accumulation_dtype, unit_rows


def dual_softmax(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | float = 0.0,
    consistency: str = "student||teacher",
) -> tuple[Tensor, Tensor]:
    """Contrast and consistency of DCD, each [n] (arXiv 2407.11802, eq. 2-8).

    ``A_ij = logit_scale s_i . t_j + logit_bias`` of the normalised rows, ``p_i = softmax_j A_ij``,
    ``q_i = softmax_j A_ji``. Returns ``-log p_i(i)`` and ``KL(p_i || q_i)``, or ``KL(q_i || p_i)`` for
    ``consistency="teacher||student"``.
    """
    dtype = accumulation_dtype(student.dtype)
    s, t = unit_rows(student.to(dtype))[0], unit_rows(teacher.to(dtype))[0]
    A = logit_scale.to(dtype) * (s @ t.T) + logit_bias
    log_p, log_q = A.log_softmax(dim=1), A.T.log_softmax(dim=1)
    first, second = (log_p, log_q) if consistency == "student||teacher" else (log_q, log_p)
    return -log_p.diagonal(), (first.exp() * (first - second)).sum(dim=1)


def contrast(
    query: Tensor, key: Tensor, logit_scale: Tensor, normalize: bool = True, mask: Mask | None = None
) -> tuple[Tensor, Tensor]:
    """InfoNCE per query, [n], and how many positives each has, [n].

    ``logsumexp_{j in D_i} x_ij - mean_{j in P_i} x_ij`` with ``x_ij = logit_scale q_i . k_j``, rows L2-normalised first
    if asked; zero for a query without positives. For P and D see :class:`Mask`; by default, key i and all keys.
    """
    dtype = accumulation_dtype(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    if normalize:
        query, key = unit_rows(query)[0], unit_rows(key)[0]
    positive, denominator = (mask or Mask()).dense(len(query), len(key), query.device)
    logits = logit_scale.to(dtype) * (query @ key.T)
    count = positive.sum(dim=1)
    # A query that has no key left is given one, so that its unused row stays free of inf - inf.
    lse = logits.masked_fill(~denominator & (count > 0)[:, None], -torch.inf).logsumexp(dim=1)
    loss = lse - logits.masked_fill(~positive, 0).sum(dim=1) / count.clamp_min(1)
    return loss.masked_fill(count == 0, 0), count


def soft_target(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Hinton's KD per row, [B]: ``temperature^2 KL(teacher || student)``, both softmax(logits / temperature)."""
    dtype = accumulation_dtype(student_logits.dtype)
    log_s = F.log_softmax(student_logits.to(dtype) / temperature, dim=1)
    log_t = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(dim=1)


def soft_target_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    student_scale: Tensor,
    teacher_scale: Tensor,
    exclude_label: bool = False,
    standardize: bool = False,
) -> tuple[Tensor, ...]:
    """KL(q || p) per row and view, the entropy of q, and the label's log-probability in p and in q, each [K, B].

    ``p_ki = softmax(student_scale_ki student_i)`` and q likewise of the teacher; scales [K, B]. ``standardize``: rows
    are first divided by ``1e-7 + std_i``, of the sample. ``exclude_label``: p and q are over the other classes, and the
    last two are ``log (probability / (1 - probability))`` over all classes. Without labels, the last two are 0; a label
    outside [0, C) gives NaN.
    """
    dtype, classes = accumulation_dtype(student_logits.dtype), student_logits.shape[1]
    label = torch.zeros(len(student_logits), dtype=torch.int64, device=student_logits.device)
    label = label if labels is None else labels.clamp(0, classes - 1)
    left_out = (torch.arange(classes, device=label.device) == label[:, None]) & exclude_label
    log_probabilities, label_terms = [], []
    for logits, scale in ((student_logits, student_scale), (teacher_logits, teacher_scale)):
        z = logits.to(dtype)
        if standardize:
            z = (z - z.mean(dim=1, keepdim=True)) / (STD_EPS + z.std(dim=1, keepdim=True))
        z = scale[:, :, None] * z  # [K, B, C]
        log_p = z - z.masked_fill(left_out, -torch.inf).logsumexp(dim=2, keepdim=True)
        own = log_p.gather(2, label[:, None].expand(len(scale), -1, 1))[:, :, 0]
        log_probabilities.append(log_p)
        label_terms.append(torch.zeros_like(own) if labels is None else own.masked_fill(label != labels, torch.nan))
    log_p, log_q = log_probabilities
    q = log_q.exp()
    divergence = (q * (log_q - log_p)).masked_fill(left_out, 0).sum(dim=2)
    entropy = -(q * log_q).masked_fill(left_out, 0).sum(dim=2)
    return divergence, entropy, *label_terms


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``-log softmax(logits_i)`` per row, [B], against ``(1 - label_smoothing) [c = label] + label_smoothing / C``.

    A label outside [0, C) gives NaN.
    """
    classes = logits.shape[1]
    log_p = F.log_softmax(logits.to(accumulation_dtype(logits.dtype)), dim=1)
    loss = -log_p.gather(1, labels.clamp(0, classes - 1)[:, None])[:, 0]
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(dim=1)
    is_label = (labels >= 0) & (labels < classes)
    return loss * torch.ones_like(loss).masked_fill(~is_label, torch.nan)


def multiscale_pool(
    features: Tensor, windows: list[int], strides: list[int], normalize: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """The average of every window of every scale, [B, M, C]: scales in order, a scale's windows row by row.

    ``normalize``: each row of C channels divided by its norm. Rounded to ``dtype`` (None: the dtype of the features)
    last.
    """
    C = features.shape[1]
    x = features.to(accumulation_dtype(features.dtype))
    scales = [
        F.avg_pool2d(x, windows[k : k + 2], strides[k : k + 2]).flatten(2)  # [B, C, M_k]
        for k in range(0, len(windows), 2)
    ]
    rows = torch.cat(scales, dim=2).transpose(1, 2)
    if normalize:
        rows = unit_rows(rows.reshape(-1, C))[0].view(rows.shape)
    return rows.to(features.dtype if dtype is None else dtype).contiguous()


def triplet_angles(gram_s: Tensor, inverse_s: Tensor, gram_t: Tensor, inverse_t: Tensor) -> Tensor:
    """The angles of RKD per anchor i, [N]: ``sum_jk huber(a^s_ijk - a^t_ijk)`` (arXiv 1904.05068, eq. 7).

    ``a_ijk = (G_jk - G_ij - G_ik + G_ii) u_ij u_ik``, which is the cosine of ``x_j - x_i`` and ``x_k - x_i``. G holds
    the products of the rows, and u their inverse distances; both are [N, N]. u is 0 where a pair has no direction.
    """
    angles = []
    for G, u in ((gram_s, inverse_s), (gram_t, inverse_t)):
        sides = G - G[:, :, None] - G[:, None, :] + G.diagonal()[:, None, None]
        angles.append(sides * u[:, :, None] * u[:, None, :])
    return F.smooth_l1_loss(angles[0], angles[1], reduction="none").sum(dim=(1, 2))


def gram_sums(student: Tensor, teacher: Tensor) -> Tensor:
    """What SP needs of every row of two Gram matrices, [3, N]: sums of ``S_ij^2``, ``T_ij^2`` and ``S_ij T_ij`` over j.

    ``S = student student^T``, ``T = teacher teacher^T`` (arXiv 1907.09682, eq. 2).
    """
    S, T = student @ student.T, teacher @ teacher.T
    return torch.stack([(S * S).sum(dim=1), (T * T).sum(dim=1), (S * T).sum(dim=1)])


def pair_divergence(student: Tensor, inverse_s: Tensor, teacher: Tensor, inverse_t: Tensor, eps: float) -> Tensor:
    """PKT per row i, [N]: ``sum_j q_ij ln((q_ij + eps) / (p_ij + eps))`` (arXiv 1803.10837, eq. 8).

    ``p_ij = r_i (1 + u_i . u_j)``: u are the rows of ``student``, and r is ``inverse_s`` [N]. q is the teacher's.
    """
    p, q = (r[:, None] * (1 + u @ u.T) for u, r in ((student, inverse_s), (teacher, inverse_t)))
    return (q * ((q + eps) / (p + eps)).log()).sum(dim=1)
