"""Streaming backend in plain PyTorch: any device, any dtype, memory linear in the number of rows.

Similarities exist one tile at a time. The forward keeps a few numbers a row, the backward recomputes the tiles; both
follow the identities worked out in float64 against the definition. Half-precision inputs are computed in float32.

Legend, for :func:`dual_softmax_forward`: ``a``, ``b`` are the unit rows; ``X_ij = A_ij = scale a_i . b_j`` and
``Y_ij = C_ij = A_ji`` on a tile of rows I and columns J; ``p = softmax_j X``, ``q = softmax_j Y``; ``la = -log p_ii``
and ``lc = -log q_ii``, their log-sum-exps less the positive's logit; ``E_i = sum_j p_ij (X_ij - Y_ij)``. The tile of Y
is the transposed tile (J, I) of A, so a pair of tiles serves the rows I and the rows J in both softmaxes: 2 N^2 D
operations forward and 6 N^2 D backward.

Positives are kept apart from the sums: ``la = log(1 + sum_{j != i} exp(X_ij - X_ii))`` and ``p_ii - 1 = expm1(-la)``
keep all their digits where a loss has almost vanished, and so does the gradient. The backward gets the positives'
logits from the forward: only those of the same product agree with the other logits to the last bit.
"""

import torch
from torch import Tensor

from fastkd.backends.blocked_contrast import contrast_backward as contrast_backward
from fastkd.backends.blocked_contrast import contrast_forward as contrast_forward
from fastkd.backends.blocked_pool import multiscale_pool_backward as multiscale_pool_backward
from fastkd.backends.blocked_pool import multiscale_pool_forward as multiscale_pool_forward
from fastkd.backends.blocked_shared import MAX_SHARED_SCALE as MAX_SHARED_SCALE
from fastkd.backends.blocked_shared import (
    OnlineSums,
    RowGradient,
    beyond_positive,
    finish,
    row_weights,
    shares_exponentials,
)
from fastkd.backends.blocked_soft_target import soft_target_backward as soft_target_backward
from fastkd.backends.blocked_soft_target import soft_target_forward as soft_target_forward
from fastkd.backends.gemm import product
from fastkd.backends.reference import accumulation_dtype, unit_rows, weighted_sum
from fastkd.backends.tiles import Workspace, blocks, for_each_tile, pair_rounds


def dual_softmax_forward(
    student: Tensor, teacher: Tensor, logit_scale: Tensor, weight: Tensor | None, consistency: str, scale_bound: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums of contrast and consistency, and ``(la, lc, E, X_ii)`` [4, n] for the backward."""
    dtype = accumulation_dtype(student.dtype)
    scale = logit_scale.to(dtype)
    forward_kl = consistency == "student||teacher"
    # KL(q || p) is KL(p || q) with student and teacher exchanged; only the contrast then reads q instead of p.
    a, b = (student, teacher) if forward_kl else (teacher, student)
    a, b = unit_rows(a.to(dtype))[0], unit_rows(b.to(dtype))[0]
    statistics = _dual_statistics_shared if shares_exponentials(a, scale, scale_bound) else _dual_statistics_online
    stats = statistics(a, b, scale)
    la, lc, E, _ = stats
    return weighted_sum(la if forward_kl else lc, weight), weighted_sum(E - la + lc, weight), stats


def _dual_statistics_shared(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """(la, lc, E, X_ii) [4, n], with one exponential a similarity, shared by p, q and their transposes."""
    n = len(a)
    scaled_a, scaled_b, ones = a * scale, b * scale, a.new_ones(n)
    la, lc, E = a.new_zeros(3, n)  # sums over j != i until the end
    positive = a.new_zeros(n)

    def add_tile(rows: slice, cols: slice, workspace: Workspace) -> None:
        U, V = workspace(rows, cols)
        ones_rows, ones_cols = ones[rows], ones[cols]
        X = product(scaled_a[rows], b[cols])
        torch.exp(X, out=U)
        if rows == cols:
            positive[rows] = X.diagonal()
            U.fill_diagonal_(0)
        la[rows].addmv_(U, ones_cols)
        lc[cols].addmv_(U.T, ones_rows)
        if rows == cols:
            U.mul_(torch.sub(X, X.T, out=V))
            E[rows].addmv_(U, ones_cols)
            return
        Y = product(scaled_b[rows], a[cols])
        torch.exp(Y, out=V)
        lc[rows].addmv_(V, ones_cols)
        la[cols].addmv_(V.T, ones_rows)
        X.sub_(Y)
        E[rows].addmv_(U.mul_(X), ones_cols)
        E[cols].addmv_(V.mul_(X).T, ones_rows, alpha=-1)

    for_each_tile(pair_rounds(blocks(n, a.device)), add_tile, a, buffers=2)
    E = E / (la + positive.exp())
    return torch.stack([beyond_positive(la.log(), positive), beyond_positive(lc.log(), positive), E, positive])


def _dual_statistics_online(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """(la, lc, E, X_ii) [4, n] for any scale: every softmax keeps its own running maximum."""
    scaled_a, scaled_b = a * scale, b * scale
    p, q, positive = OnlineSums(a), OnlineSums(a), a.new_zeros(len(a))

    def add_tile(rows: slice, cols: slice, workspace: Workspace) -> None:
        (d,) = workspace(rows, cols)
        X = product(scaled_a[rows], b[cols])
        Y = X.T if rows == cols else product(scaled_b[rows], a[cols])
        torch.sub(X, Y, out=d)
        if rows == cols:
            positive[rows] = X.diagonal()
            X.fill_diagonal_(-torch.inf)  # and Y's, which is a view of X here
        p.add(rows, X, d)
        q.add(rows, Y)
        if rows != cols:
            p.add(cols, Y.T, d.neg_().T)
            q.add(cols, X.T)

    for_each_tile(pair_rounds(blocks(len(a), a.device)), add_tile, a, buffers=1)
    la, lc = (beyond_positive(sums.logsumexp(), positive) for sums in (p, q))
    return torch.stack([la, lc, p.mean(positive), positive])


def dual_softmax_backward(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    grad_contrast: Tensor,
    grad_consist: Tensor,
    consistency: str,
    scale_bound: float,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of student, teacher (empty if not needed) and logit_scale.

    With ``w``, ``k`` the upstream gradients of a row's contrast and consistency and ``r = w - k E``, the gradient of
    ``A_ij`` is ``p_ij (k_i (X_ij - Y_ij) + r_i) + k_j (q_ji - p_ji) - w_i delta_ij``. For the other KL, student and
    teacher are exchanged and ``w`` moves from p to q.
    """
    dtype = accumulation_dtype(student.dtype)
    scale = logit_scale.to(dtype)
    forward_kl = consistency == "student||teacher"
    raw_a, raw_b = (student, teacher) if forward_kl else (teacher, student)
    need_a, need_b = (need_student, need_teacher) if forward_kl else (need_teacher, need_student)
    a, inverse_a = unit_rows(raw_a.to(dtype))
    b, inverse_b = unit_rows(raw_b.to(dtype))
    w, k = row_weights(weight, grad_contrast, a), row_weights(weight, grad_consist, a)
    wp, wq = (w, torch.zeros_like(w)) if forward_kl else (torch.zeros_like(w), w)
    diagonal = dual_diagonal(stats[:3], wp, wq, k)
    shared = shares_exponentials(a, scale, scale_bound)
    # The gradient of logit_scale falls out of either side's, so one side is always computed.
    need_a = need_a or not need_b
    coefficients = DualCoefficients(stats, wp, wq, k, shared)
    grad_a, grad_b = _dual_gradients(a, b, scale, coefficients, need_a, need_b)
    diagonal = diagonal[:, None]
    grad_a, scale_a = finish(raw_a, grad_a, a, diagonal * b, inverse_a, scale)
    grad_b, scale_b = finish(raw_b, grad_b, b, diagonal * a, inverse_b, scale)
    grad_scale = scale_b if scale_a is None else scale_a
    assert grad_scale is not None
    grad_student, grad_teacher = (grad_a, grad_b) if forward_kl else (grad_b, grad_a)
    return grad_student, grad_teacher, grad_scale.to(logit_scale.dtype)


def dual_diagonal(stats: Tensor, wp: Tensor, wq: Tensor, k: Tensor) -> Tensor:
    """``G_ii`` [n] from (la, lc, E) [3, n]; the upstream gradients as for :class:`DualCoefficients`."""
    la, lc, E = stats
    return wp * (-la).expm1() + wq * (-lc).expm1() - k * E * (-la).exp() + k * ((-lc).expm1() - (-la).expm1())


class DualCoefficients:
    """Per-row factors of ``G_ij = p_ij (k_i d_ij + r_i) + q_ji x_j - p_ji k_j``, with ``d = X - Y``, for ``i != j``.

    ``wp``, ``wq``: upstream gradient of -log p_i(i) and of -log q_i(i); ``k``: that of KL(p_i || q_i). If ``shared``,
    the tiles hold plain exponentials, and the factors that make them p and q are folded in here.
    """

    def __init__(self, stats: Tensor, wp: Tensor, wq: Tensor, k: Tensor, shared: bool) -> None:
        self.la, self.lc, E, self.positive = stats
        self.shared = shared
        to_p, to_q = ((-sums - self.positive).exp() if shared else 1.0 for sums in (self.la, self.lc))
        self.k, self.r, self.x = k * to_p, (wp - k * E) * to_p, (wq + k) * to_q

    def exponentials(self, X: Tensor, Y: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """p_ij, q_ij, p_ji and q_ji of a tile, the first two by row and the last two by column."""
        la, lc, positive = self.la, self.lc, self.positive
        p, q = ((x - positive[rows, None]).sub_(sums[rows, None]).exp_() for x, sums in ((X, la), (Y, lc)))
        p_t, q_t = ((x - positive[columns]).sub_(sums[columns]).exp_() for x, sums in ((Y, la), (X, lc)))
        return p, q, p_t, q_t

    def gradient(
        self, p: Tensor, p_t: Tensor, q_t: Tensor, d: Tensor, rows: slice, columns: slice, out: Tensor, scratch: Tensor
    ) -> Tensor:
        """``G`` of a tile [rows, columns], written to ``out``; every argument may be a transposed view."""
        torch.mul(d, self.k[rows, None], out=out).add_(self.r[rows, None])
        if q_t is p:
            out.add_(self.x[columns]).mul_(p)
        else:
            out.mul_(p).add_(torch.mul(q_t, self.x[columns], out=scratch))
        return out.sub_(torch.mul(p_t, self.k[columns], out=scratch))


def _dual_gradients(
    a: Tensor, b: Tensor, scale: Tensor, coefficients: DualCoefficients, need_a: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``sum_j G_ij b_j`` and ``sum_i G_ij a_i`` over all tiles, without the diagonal."""
    scaled_a, scaled_b = a * scale, b * scale
    row_blocks = blocks(len(a), a.device)
    grad_a = RowGradient(a, b, row_blocks) if need_a else None
    grad_b = RowGradient(b, a, row_blocks) if need_b else None

    def add_tile(rows: slice, cols: slice, workspace: Workspace) -> None:
        U, V, G, scratch = workspace(rows, cols)
        X = product(scaled_a[rows], b[cols])
        Y = scratch.copy_(X.T) if rows == cols else product(scaled_b[rows], a[cols])
        if coefficients.shared:
            p = q_t = torch.exp(X, out=U)
            q = p_t = torch.exp(Y, out=V)
        else:
            p, q, p_t, q_t = coefficients.exponentials(X, Y, rows, cols)
        d = X.sub_(Y)
        coefficients.gradient(p, p_t, q_t, d, rows, cols, G, scratch)
        if rows == cols:
            G.fill_diagonal_(0)
        if grad_a is not None:
            grad_a.add_rows(rows, cols, G)
        if grad_b is not None:
            grad_b.add_cols(rows, cols, G)
        if rows == cols:
            return
        # The mirrored tile: rows and columns, p and its transpose change places.
        coefficients.gradient(p_t.T, p.T, q.T, d.neg_().T, cols, rows, G.T, scratch.T)
        if grad_a is not None:
            grad_a.add_cols(rows, cols, G)
        if grad_b is not None:
            grad_b.add_rows(rows, cols, G)

    for_each_tile(pair_rounds(row_blocks), add_tile, a, buffers=4)
    return None if grad_a is None else grad_a.total(), None if grad_b is None else grad_b.total()
