"""The streaming backend for several ranks: a rank's own rows against columns that arrive block by block.

Legend as in ``blocked``: ``a``, ``b`` are unit rows, ``X_ij = scale a_i . b_j``, ``Y_ij = scale b_i . a_j``. Rows and
columns are packed ``(a, b)`` [2, n, D] in the dtype they were exchanged in; they are computed with in the accumulation
dtype. ``G_ij`` is the gradient of ``X_ij``; that of ``Y_ij = X_ji`` is ``G_ji``, which the owner of row i can compute
from the numbers of row j: no gradient has to travel. Positives are kept apart from the sums, as in ``blocked``; other
ranks need only the log-sum-exps, because a rank's positives are its own.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.backends.blocked import (
    DualCoefficients,
    OnlineSums,
    beyond_positive,
    dual_diagonal,
    finish,
    row_weights,
    shares_exponentials,
)
from fastkd.backends.gemm import product
from fastkd.backends.reference import weighted_sum
from fastkd.backends.tiles import MAX_ROWS, MAX_ROWS_ACCELERATOR, Workspace, tile_slices


def _tiles(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, slice]]:
    """Column blocks outside: one stays in the cache while the rows pass."""
    return ((i, j) for j in tile_slices(len(columns), columns.device) for i in tile_slices(len(rows), rows.device))


def _workspace(rows: Tensor, buffers: int) -> Workspace:
    largest = MAX_ROWS if rows.device.type == "cpu" else MAX_ROWS_ACCELERATOR
    return Workspace(rows, buffers, min(len(rows), largest), largest)


class _Rows:
    """A rank's rows in the accumulation dtype, which is the scale's, and multiplied by the scale."""

    def __init__(self, units: Tensor, scale: Tensor) -> None:
        self.dtype = scale.dtype
        self.scale = scale
        self.a, self.b = units.to(self.dtype)
        self.scaled_a, self.scaled_b = self.a * scale, self.b * scale


class DualStatistics(_Rows):
    """The numbers (la, lc, E, X_ii) of every row, accumulated over blocks of columns."""

    def __init__(self, units: Tensor, scale: Tensor, scale_bound: float) -> None:
        super().__init__(units, scale)
        self._shared = shares_exponentials(self.a, scale, scale_bound)
        self._p, self._q = OnlineSums(self.a), OnlineSums(self.a)
        if self._shared:
            # No maximum is subtracted: the sums of exponentials are what they are.
            self._p.maximum.zero_()
            self._q.maximum.zero_()
        self._positive = self.a.new_zeros(len(self.a))
        self._workspace = _workspace(self.a, 2)

    def add(self, columns: Tensor, *, is_own: bool) -> None:
        """``is_own``: the columns are this rank's, row i's positive is column i."""
        a, b = columns.to(self.dtype)
        for i, j in _tiles(self.a, a):
            d, U = self._workspace(i, j)
            X = product(self.scaled_a[i], b[j])
            Y = product(self.scaled_b[i], a[j])
            torch.sub(X, Y, out=d)
            if is_own and i == j:
                self._positive[i] = X.diagonal()
                X.fill_diagonal_(-torch.inf)
                Y.fill_diagonal_(-torch.inf)
            if self._shared:
                self._p.total[i] += torch.exp(X, out=U).sum(dim=1)
                self._p.weighted[i] += U.mul_(d).sum(dim=1)
                self._q.total[i] += torch.exp(Y, out=U).sum(dim=1)
            else:
                self._p.add(i, X, d)
                self._q.add(i, Y)

    def finish(self, weight: Tensor | None, forward_kl: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted contrast and consistency, what other ranks need of every row [3, n], what this one does [3, n]."""
        positive = self._positive
        la, lc = (beyond_positive(sums.logsumexp(), positive) for sums in (self._p, self._q))
        E = self._p.mean(positive)
        contrast, consistency = weighted_sum(la if forward_kl else lc, weight), weighted_sum(E - la + lc, weight)
        return contrast, consistency, torch.stack([la + positive, lc + positive, E]), torch.stack([la, lc, E])


class DualGradients(_Rows):
    """``sum_j G_ij b_j`` and ``sum_j G_ji a_j`` of the rows, accumulated over blocks of columns.

    ``numbers`` [3, N] and ``weight`` [N] are the whole global batch's, in which ``rows`` are this rank's; ``own``
    [3, n] comes from ``DualStatistics.finish``; ``grads`` are the upstream gradients of contrast and consistency.
    """

    def __init__(
        self,
        units: Tensor,
        scale: Tensor,
        scale_bound: float,
        rows: slice,
        numbers: Tensor,
        own: Tensor,
        weight: Tensor | None,
        grads: tuple[Tensor, Tensor],
        forward_kl: bool,
        need_a: bool,
        need_b: bool,
    ) -> None:
        super().__init__(units, scale)
        self._start = rows.start
        w, k = (row_weights(weight, grad, numbers[0]) for grad in grads)
        wp, wq = (w, torch.zeros_like(w)) if forward_kl else (torch.zeros_like(w), w)
        self._diagonal = dual_diagonal(own, wp[rows], wq[rows], k[rows])[:, None]
        # Apart from their positives, rows are described by their log-sum-exps: the positive's logit is in them.
        stats = torch.cat([numbers, torch.zeros_like(numbers[:1])])
        self._coefficients = DualCoefficients(stats, wp, wq, k, shares_exponentials(self.a, scale, scale_bound))
        self.grad_a = torch.zeros_like(self.a) if need_a else None
        self.grad_b = torch.zeros_like(self.b) if need_b else None
        self._workspace = _workspace(self.a, 4)

    def add(self, columns: Tensor, cols: slice) -> None:
        """``cols``: which of the global batch's rows ``columns`` are."""
        a, b = columns.to(self.dtype)
        coefficients = self._coefficients
        for i, j in _tiles(self.a, a):
            rows, others = _shifted(i, self._start), _shifted(j, cols.start)
            U, V, G, scratch = self._workspace(i, j)
            X = product(self.scaled_a[i], b[j])
            Y = product(self.scaled_b[i], a[j])
            if coefficients.shared:
                p = q_t = torch.exp(X, out=U)
                q = p_t = torch.exp(Y, out=V)
            else:
                p, q, p_t, q_t = coefficients.exponentials(X, Y, rows, others)
            d = X.sub_(Y)
            if self.grad_a is not None:
                coefficients.gradient(p, p_t, q_t, d, rows, others, G, scratch)
                if rows == others:
                    G.fill_diagonal_(0)
                self.grad_a[i] += product(G, b[j].T)
            if self.grad_b is not None:
                # The mirrored tile (j, i), kept transposed.
                coefficients.gradient(p_t.T, p.T, q.T, d.neg_().T, others, rows, G.T, scratch.T)
                if rows == others:
                    G.fill_diagonal_(0)
                self.grad_b[i] += product(G, a[j].T)

    def finish(self, inverse_norm: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of the raw rows (empty if not needed), and from those of ``a`` this rank's part of the scale's."""
        like = self.a.new_empty(0, dtype=dtype)
        diagonal, scale = self._diagonal, self.scale
        grad_a, grad_scale = finish(like, self.grad_a, self.a, diagonal * self.b, inverse_norm[0], scale)
        grad_b, _ = finish(like, self.grad_b, self.b, diagonal * self.a, inverse_norm[1], scale)
        return grad_a, grad_b, grad_scale


def _shifted(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
