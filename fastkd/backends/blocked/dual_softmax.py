"""``dual_softmax`` of the blocked backend: one pass of tiles forward, one backward, memory linear in the rows.

A rank's own rows are columns too. They come first (``add_own``). There the tiles (I, J) and (J, I) are one pair: two
products serve both softmaxes of I and of J, 2 n^2 D operations forward and 6 n^2 D backward. The columns of other
ranks, if there are any, follow block by block (``add``). Few rows of one rank need no tiles: see ``dense/``.

Legend. ``a``, ``b``: unit rows. ``X_ij = scale a_i . b_j`` and ``Y_ij = scale b_i . a_j = X_ji``. ``p = softmax_j X``
and ``q = softmax_j Y``. ``la = -log p_ii`` and ``lc = -log q_ii``. ``E_i = sum_j p_ij (X_ij - Y_ij)``. ``G_ij``: the
gradient of ``X_ij``.

Positives are kept apart from the sums: ``la = log(1 + sum_{j != i} exp(X_ij - X_ii))`` and ``p_ii - 1 = expm1(-la)``
keep all their digits where a loss has almost vanished, and so does the gradient.

Tiles hold X and Y in base 2: divided by log 2, so that ``exp(X_ij)`` is ``2^X_ij``. On a CPU torch's exp2 is four times
as fast as its exp. Numbers per row are in nats, but for the running sums.
"""

import torch
from torch import Tensor

from fastkd.backends.blocked.dense import dual_softmax as dense
from fastkd.backends.blocked.gemm import product
from fastkd.backends.blocked.sums import (
    LOG_2,
    OnlineSums,
    RowGradient,
    row_weights,
    shares_exponentials,
    to_raw_rows,
    unit_rows_of,
)
from fastkd.backends.blocked.tiles import Tile, Workspace, blocks, for_each_tile, pair_rounds, rectangle_rounds
from fastkd.backends.inputs import DualRows, DualUpstream
from fastkd.native import extension
from fastkd.numerics import weighted_sum


def units(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The unit rows of both sides in the accumulation dtype, [2, n, D], and their inverse norms [2, n, 1]."""
    return unit_rows_of((a, b))


class _Pass:
    """The rank's rows in the accumulation dtype, which is the scale's, and multiplied by the scale."""

    def __init__(self, rows: DualRows) -> None:
        self._scale = scale = rows.scale
        self._a, self._b = (x.to(scale.dtype) for x in rows.units)
        self._scaled_a, self._scaled_b = (x * (scale / LOG_2) for x in (self._a, self._b))
        self._shared = shares_exponentials(self._a, scale, rows.scale_bound)
        self._blocks = blocks(len(self._a), self._a.device)
        # Its loops go through a pair of tiles once; torch's operations take a pass each.
        self._native = extension() if self._shared and scale.device.type == "cpu" else None

    def _for_each_pair(self, tile: Tile, buffers: int) -> None:
        for_each_tile(pair_rounds(self._blocks), tile, self._a, buffers)

    def _for_each(self, columns: Tensor, tile: Tile, buffers: int) -> None:
        rounds = rectangle_rounds(self._blocks, blocks(len(columns), columns.device))
        for_each_tile(rounds, tile, self._a, buffers, len(columns))


class TiledForward(_Pass):
    """Both log-sum-exps, E, la and lc of every row, [5, n], accumulated over the columns."""

    gradients: tuple[Tensor, ...] = ()

    def __init__(self, rows: DualRows) -> None:
        super().__init__(rows)
        self._p, self._q = OnlineSums(self._a), OnlineSums(self._a)
        if self._shared:  # no maximum is subtracted
            self._p.maximum.zero_()
            self._q.maximum.zero_()
        self._positive = self._a.new_zeros(len(self._a))

    def add_own(self) -> None:
        """Add the rows themselves as columns: row i's positive is column i."""
        self._for_each_pair(self._shared_pair if self._shared else self._online_pair, 2)

    def _shared_pair(self, rows: slice, cols: slice, workspace: Workspace) -> None:
        U, V = workspace(rows, cols)
        p, q = self._p, self._q
        X = product(self._scaled_a[rows], self._b[cols])
        if self._native is not None and rows != cols:
            Y = product(self._scaled_b[rows], self._a[cols])
            self._native.dual_softmax_pair_sums(X, Y, p.total, p.weighted, q.total, rows.start, cols.start)
            return
        ones_rows, ones_cols = X.new_ones(len(X)), X.new_ones(X.shape[1])
        torch.exp2(X, out=U)
        if rows == cols:
            self._positive[rows] = X.diagonal()
            U.fill_diagonal_(0)
        p.total[rows].addmv_(U, ones_cols)
        q.total[cols].addmv_(U.T, ones_rows)
        if rows == cols:
            p.weighted[rows].addmv_(U.mul_(torch.sub(X, V.copy_(X.T), out=V)), ones_cols)
            return
        Y = product(self._scaled_b[rows], self._a[cols])
        torch.exp2(Y, out=V)
        q.total[rows].addmv_(V, ones_cols)
        p.total[cols].addmv_(V.T, ones_rows)
        d = X.sub_(Y)
        p.weighted[rows].addmv_(U.mul_(d), ones_cols)
        p.weighted[cols].addmv_(V.mul_(d).T, ones_rows, alpha=-1)

    def _online_pair(self, rows: slice, cols: slice, workspace: Workspace) -> None:
        d, _ = workspace(rows, cols)
        X = product(self._scaled_a[rows], self._b[cols])
        Y = X.T.contiguous() if rows == cols else product(self._scaled_b[rows], self._a[cols])
        torch.sub(X, Y, out=d)
        if rows == cols:
            self._positive[rows] = X.diagonal()
            X.fill_diagonal_(-torch.inf)
            Y.fill_diagonal_(-torch.inf)
        self._p.add(rows, X, d)
        self._q.add(rows, Y)
        if rows != cols:
            self._p.add(cols, Y.T, d.neg_().T)
            self._q.add(cols, X.T)

    def add(self, block: Tensor, cols: slice) -> None:
        """Add columns [2, m, D] of other ranks."""
        a, b = block.to(self._scale.dtype)

        def tile(rows: slice, cols: slice, workspace: Workspace) -> None:
            d, U = workspace(rows, cols)
            X, Y = product(self._scaled_a[rows], b[cols]), product(self._scaled_b[rows], a[cols])
            torch.sub(X, Y, out=d)
            if self._shared:
                self._p.total[rows] += torch.exp2(X, out=U).sum(dim=1)
                self._p.weighted[rows] += U.mul_(d).sum(dim=1)
                self._q.total[rows] += torch.exp2(Y, out=U).sum(dim=1)
            else:
                self._p.add(rows, X, d)
                self._q.add(rows, Y)

        self._for_each(a, tile, 2)

    def finish(
        self, weight: Tensor | None, is_swapped: bool, factors: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sums of contrast and consistency, times their factors, and the numbers of every row, [5, n]."""
        positive = self._positive
        la, lc = (sums.beyond_positive(positive) for sums in (self._p, self._q))
        E, positive = self._p.mean(positive) * LOG_2, positive * LOG_2
        sums = (weighted_sum(rows, weight) for rows in (lc if is_swapped else la, E - la + lc))
        contrast, consistency = (total * factor for total, factor in zip(sums, factors, strict=True))
        return contrast, consistency, torch.stack([la + positive, lc + positive, E, la, lc])


def numbers(stats: Tensor) -> Tensor:
    """What the owner of a column needs of a row, [3, n]: both log-sum-exps and E."""
    return stats[:3]


class _Factors:
    """Per-row factors of ``G_ij = p_ij (k_i d_ij + r_i) + q_ji x_j - p_ji k_j``, with ``d = X - Y``, for ``i != j``.

    ``wp``, ``wq``: upstream gradients of -log p_i(i) and of -log q_i(i). ``k``: upstream gradient of KL(p_i || q_i). If
    ``shared``, tiles hold plain exponentials, and what makes them p and q is folded in here.
    """

    def __init__(self, numbers: Tensor, wp: Tensor, wq: Tensor, k: Tensor, shared: bool) -> None:
        lse_p, lse_q, E = numbers
        self._shared = shared
        self._lse_p, self._lse_q = lse_p / LOG_2, lse_q / LOG_2
        to_p, to_q = ((-lse).exp() if shared else 1.0 for lse in (lse_p, lse_q))
        self._k, self._r, self._x = k * to_p, (wp - k * E) * to_p, (wq + k) * to_q
        self._k_of_d = self._k * LOG_2

    @property
    def of_rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All factors, in the order in which the extension takes them."""
        return self._r, self._x, self._k, self._k_of_d

    def exponentials(
        self, X: Tensor, Y: Tensor, rows: slice, columns: slice, U: Tensor, V: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """p_ij, q_ij, p_ji and q_ji of a tile."""
        if self._shared:
            p = q_t = torch.exp2(X, out=U)
            q = p_t = torch.exp2(Y, out=V)
            return p, q, p_t, q_t
        p, q = ((x - lse[rows, None]).exp2_() for x, lse in ((X, self._lse_p), (Y, self._lse_q)))
        p_t, q_t = ((x - lse[columns]).exp2_() for x, lse in ((Y, self._lse_p), (X, self._lse_q)))
        return p, q, p_t, q_t

    def gradient(
        self, p: Tensor, p_t: Tensor, q_t: Tensor, d: Tensor, rows: slice, columns: slice, out: Tensor
    ) -> Tensor:
        """``G`` of a tile [rows, columns], written to ``out``; every argument may be a transposed view."""
        torch.addcmul(self._r[rows, None], d, self._k_of_d[rows, None], out=out).mul_(p)
        return out.addcmul_(q_t, self._x[columns]).addcmul_(p_t, self._k[columns], value=-1)


class TiledBackward(_Pass):
    """``sum_j G_ij b_j`` and ``sum_j G_ji a_j`` of every row, accumulated over the columns.

    ``stats`` [5, n]: what :class:`TiledForward` found.
    """

    def __init__(
        self,
        rows: DualRows,
        stats: Tensor,
        upstream: DualUpstream,
        need_a: bool,
        need_b: bool,
    ) -> None:
        super().__init__(rows)
        everyone, weight, *grads, is_swapped, factors = upstream
        w, k = (row_weights(weight, grad * factor, everyone[0]) for grad, factor in zip(grads, factors, strict=True))
        wp, wq = (torch.zeros_like(w), w) if is_swapped else (w, torch.zeros_like(w))
        n = len(self._a)
        _, _, E, la, lc = stats
        to_p, to_q = (-la).expm1(), (-lc).expm1()
        self._diagonal = (wp[:n] * to_p + wq[:n] * to_q - k[:n] * E * (-la).exp() + k[:n] * (to_q - to_p))[:, None]
        self._factors = _Factors(everyone, wp, wq, k, self._shared)
        self._grad_a = RowGradient(self._a, self._b) if need_a else None
        self._grad_b = RowGradient(self._b, self._a) if need_b else None

    def add_own(self) -> None:
        """Add the rows themselves as columns, all but their positives."""
        self._for_each_pair(self._pair, 4)

    def _pair(self, rows: slice, cols: slice, workspace: Workspace) -> None:
        U, V, G, scratch = workspace(rows, cols)
        X = product(self._scaled_a[rows], self._b[cols])
        Y = scratch.copy_(X.T) if rows == cols else product(self._scaled_b[rows], self._a[cols])
        if self._native is not None and rows != cols:
            self._native.dual_softmax_pair_gradients(X, Y, G, scratch, *self._factors.of_rows, rows.start, cols.start)
            self._add(rows, cols, G, scratch)
            return
        p, q, p_t, q_t = self._factors.exponentials(X, Y, rows, cols, U, V)
        d = X.sub_(Y)
        self._factors.gradient(p, p_t, q_t, d, rows, cols, G)
        if rows == cols:
            G.fill_diagonal_(0)
            self._add(rows, cols, G)
            return
        # The mirrored tile: rows and columns, p and its transpose change places.
        mirrored = self._factors.gradient(p_t.T, p.T, q.T, d.neg_().T, cols, rows, scratch.T).T
        self._add(rows, cols, G, mirrored)

    def _add(self, rows: slice, cols: slice, G: Tensor, mirrored: Tensor | None = None) -> None:
        """Add what a tile gives, and what the mirrored one, [rows, cols] too, gives."""
        if self._grad_a is not None:
            self._grad_a.add_rows(rows, cols, G)
            if mirrored is not None:
                self._grad_a.add_cols(rows, cols, mirrored)
        if self._grad_b is not None:
            self._grad_b.add_cols(rows, cols, G)
            if mirrored is not None:
                self._grad_b.add_rows(rows, cols, mirrored)

    def add(self, block: Tensor, cols: slice) -> None:
        """Add columns [2, m, D] of other ranks; ``cols``: their places among all columns."""
        a, b = block.to(self._scale.dtype)
        start = cols.start

        def tile(rows: slice, cols: slice, workspace: Workspace) -> None:
            U, V, G = workspace(rows, cols)
            others = slice(cols.start + start, cols.stop + start)
            X, Y = product(self._scaled_a[rows], b[cols]), product(self._scaled_b[rows], a[cols])
            p, q, p_t, q_t = self._factors.exponentials(X, Y, rows, others, U, V)
            d = X.sub_(Y)
            if self._grad_a is not None:
                self._factors.gradient(p, p_t, q_t, d, rows, others, G)
                self._grad_a.add(rows, G, b[cols])
            if self._grad_b is not None:
                self._factors.gradient(p_t.T, p.T, q.T, d.neg_().T, others, rows, G.T)
                self._grad_b.add(rows, G, a[cols])

        self._for_each(a, tile, 3)

    def finish(self, inverse_norm: Tensor, dtype: torch.dtype, D: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the raw rows in ``dtype`` (empty if not needed), and this rank's part of the scale's."""
        found, grad_scale = [], self._scale.new_zeros(())
        sides = ((self._grad_b, self._b, self._a), (self._grad_a, self._a, self._b))
        for (gradient, rows, other), inverse in zip(sides, (inverse_norm[1], inverse_norm[0]), strict=True):
            if gradient is None:
                found.append(rows.new_empty(0, dtype=dtype))
                continue
            grad, grad_scale = to_raw_rows(gradient.total().add_(self._diagonal * other), rows, inverse, self._scale)
            found.append(grad.to(dtype))
        return found[1], found[0], grad_scale


def Forward(rows: DualRows) -> TiledForward | dense.Forward:
    """The forward that suits the number of rows."""
    return dense.Forward(rows) if dense.covers(rows) else TiledForward(rows)


def Backward(
    rows: DualRows, stats: Tensor, upstream: DualUpstream, need_a: bool, need_b: bool
) -> TiledBackward | dense.Backward:
    """The backward of :func:`Forward`."""
    backward = dense.Backward if dense.covers(rows) else TiledBackward
    return backward(rows, stats, upstream, need_a, need_b)
