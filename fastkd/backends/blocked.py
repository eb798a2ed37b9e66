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

from fastkd.backends.blocked_pool import multiscale_pool_backward as multiscale_pool_backward
from fastkd.backends.blocked_pool import multiscale_pool_forward as multiscale_pool_forward
from fastkd.backends.blocked_soft_target import soft_target_backward as soft_target_backward
from fastkd.backends.blocked_soft_target import soft_target_forward as soft_target_forward
from fastkd.backends.gemm import product
from fastkd.backends.masks import Mask
from fastkd.backends.reference import accumulation_dtype, unit_rows, weighted_sum
from fastkd.backends.tiles import Workspace, blocks, for_each_tile, pair_rounds, square_rounds

# exp(+-40) summed over any number of rows stays inside float32, so no maximum has to be subtracted.
MAX_SHARED_SCALE = 40.0


class OnlineSums:
    """Row-wise ``sum exp(logits)`` and ``sum exp(logits) d`` over columns that come in tiles."""

    def __init__(self, like: Tensor) -> None:
        n = len(like)
        self.maximum = like.new_full((n,), -torch.inf)
        self.total = like.new_zeros(n)
        self.weighted = like.new_zeros(n)

    def add(self, rows: slice, logits: Tensor, d: Tensor | None = None) -> None:
        old = self.maximum[rows]
        new = torch.maximum(old, logits.amax(dim=1))
        # A row that holds only -inf so far has no finite maximum: subtracting 0 keeps exp(-inf) = 0.
        shift = new.masked_fill(new == -torch.inf, 0)
        decay = (old - shift).exp()
        weights = (logits - shift[:, None]).exp()
        self.total[rows] = self.total[rows] * decay + weights.sum(dim=1)
        if d is not None:
            self.weighted[rows] = self.weighted[rows] * decay + (weights * d).sum(dim=1)
        self.maximum[rows] = new

    def logsumexp(self) -> Tensor:
        return self.maximum + self.total.log()

    def mean(self, positive: Tensor) -> Tensor:
        """The mean of d, whose value is 0 for a further column with the logit ``positive``."""
        return self.weighted / (self.total + (positive - self.maximum).exp())


def beyond_positive(lse_others: Tensor, positive: Tensor) -> Tensor:
    """``log(1 + exp(lse_others - positive))``: a row's log-sum-exp less its positive's logit."""
    return torch.logaddexp(lse_others - positive, torch.zeros_like(positive))


def row_weights(weight: Tensor | None, grad: Tensor, like: Tensor) -> Tensor:
    """Upstream gradient of each row's loss, [n]."""
    if weight is None:
        return grad.to(like.dtype).expand(len(like))
    return weight.to(like.dtype) * grad.to(like.dtype)


def finish(
    raw_rows: Tensor, grad: Tensor | None, rows: Tensor, diagonal: Tensor, inverse_norm: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """From ``sum_{j != i} G_ij other_j`` to the gradient of the raw rows, and to that of the scale.

    Adds the positives' part ``G_ii other_i`` (``diagonal``) and goes back through the normalisation. Its dot products
    with the unit rows are the gradient of the scale, row by row. Without a gradient: an empty tensor and None.
    """
    if grad is None:
        return raw_rows.new_empty(0), None
    grad += diagonal
    dots = (grad * rows).sum(dim=1, keepdim=True)
    if inverse_norm is not None:
        grad = grad.addcmul_(dots, rows, value=-1) * inverse_norm
    return (grad * scale).to(raw_rows.dtype), dots.sum()


class _RowGradient:
    """``sum_j G_ij other_j`` [n, D], from tiles of G and of its transpose.

    Sums over a tile's columns are kept transposed, [D, n]: the products then read the tile as it lies in memory.
    """

    def __init__(self, like: Tensor, other: Tensor, row_blocks: list[slice]) -> None:
        self._other = other
        self._transposed = {block.start: other[block].T.contiguous() for block in row_blocks}
        self._by_rows = torch.zeros_like(like)
        self._by_cols = like.new_zeros(like.shape[1], like.shape[0])

    def add_rows(self, rows: slice, cols: slice, G: Tensor) -> None:
        """Add ``G other_cols`` to the gradient of the tile's rows."""
        self._by_rows[rows] += product(G, self._other[cols].T)

    def add_cols(self, rows: slice, cols: slice, G: Tensor) -> None:
        """Add ``G^T other_rows`` to the gradient of the tile's columns."""
        self._by_cols[:, cols] += product(self._transposed[rows.start], G.T)

    def total(self) -> Tensor:
        return self._by_rows.add_(self._by_cols.T)


def shares_exponentials(a: Tensor, scale: Tensor, scale_bound: float) -> bool:
    """Whether ``|A|`` is small enough for one plain exponential; reads the scale itself only where that is free."""
    if scale_bound <= MAX_SHARED_SCALE:
        return True
    return a.device.type == "cpu" and abs(scale.item()) <= MAX_SHARED_SCALE


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
    grad_a = _RowGradient(a, b, row_blocks) if need_a else None
    grad_b = _RowGradient(b, a, row_blocks) if need_b else None

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


def _rows(raw_rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows in the accumulation dtype; if asked, as unit rows with their inverse norms [n, 1]."""
    rows = raw_rows.to(accumulation_dtype(raw_rows.dtype))
    return unit_rows(rows) if normalize else (rows, None)


def contrast_forward(
    query: Tensor, key: Tensor, logit_scale: Tensor, weight: Tensor | None, mask: Mask, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Weighted sum of InfoNCE over the rows, and each row's loss and positive logit [2, n] for the backward."""
    (q, _), (k, _) = _rows(query, normalize), _rows(key, normalize)
    scale = logit_scale.to(q.dtype)
    sums, positive = OnlineSums(q), q.new_zeros(len(q))
    scaled = q * scale

    def add_tile(rows: slice, cols: slice, workspace: Workspace) -> None:
        logits = product(scaled[rows], k[cols])
        if rows == cols:
            positive[rows] = logits.diagonal()
            logits.fill_diagonal_(-torch.inf)
        sums.add(rows, logits)

    for_each_tile(square_rounds(blocks(len(q), q.device)), add_tile, q, buffers=0)
    loss = beyond_positive(sums.logsumexp(), positive)
    return weighted_sum(loss, weight), torch.stack([loss, positive])


def contrast_backward(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    mask: Mask,
    stats: Tensor,
    grad_loss: Tensor,
    normalize: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key (empty if not needed) and logit_scale: ``G_ij = w_i (p_ij - delta_ij)``."""
    (q, inverse_q), (k, inverse_k) = _rows(query, normalize), _rows(key, normalize)
    scale = logit_scale.to(q.dtype)
    w = row_weights(weight, grad_loss, q)
    need_query = need_query or not need_key  # the gradient of logit_scale needs one side
    row_blocks = blocks(len(q), q.device)
    grad_q = _RowGradient(q, k, row_blocks) if need_query else None
    grad_k = _RowGradient(k, q, row_blocks) if need_key else None
    scaled = q * scale
    loss, positive = stats

    def add_tile(rows: slice, cols: slice, workspace: Workspace) -> None:
        G = product(scaled[rows], k[cols]).sub_(positive[rows, None]).sub_(loss[rows, None]).exp_().mul_(w[rows, None])
        if rows == cols:
            G.fill_diagonal_(0)
        if grad_q is not None:
            grad_q.add_rows(rows, cols, G)
        if grad_k is not None:
            grad_k.add_cols(rows, cols, G)

    for_each_tile(square_rounds(row_blocks), add_tile, q, buffers=0)
    diagonal = (w * (-loss).expm1())[:, None]
    grad_query, scale_q = finish(query, None if grad_q is None else grad_q.total(), q, diagonal * k, inverse_q, scale)
    grad_key, scale_k = finish(key, None if grad_k is None else grad_k.total(), k, diagonal * q, inverse_k, scale)
    grad_scale = scale_k if scale_q is None else scale_q
    assert grad_scale is not None
    return grad_query, grad_key, grad_scale.to(logit_scale.dtype)
