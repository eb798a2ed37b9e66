"""``dual_softmax`` of one rank with few rows: whole matrices, and the gradients with the losses.

Legend, beside that of the tiles. ``U_ij = 2^(X_ij - m_i)`` and ``V_ij = 2^(Y_ij - m'_i)``, with X and Y in base 2 and
zeros in the diagonals. m, m': the row's maxima without its positive, or 0 where the scale is bounded; then V is U
transposed. ``W_ij = U_ij (X_ij - Y_ij)``. ``t``: the factors per row that make U and V the softmaxes p and q.
"""

import torch
from torch import Tensor

from fastkd.backends.blocked.gemm import product, transposed_product
from fastkd.backends.blocked.sums import LOG_2, LOG_2_TENSOR, MAX_SHARED_SCALE, log_one_plus_power
from fastkd.backends.inputs import DualRows, DualUpstream

MAX_ROWS = 1024  # of a matrix, four of which then take 16 MiB in float32


def covers(rows: DualRows) -> bool:
    """Whether the rows are all columns there are, are few, and lie on a CPU."""
    return not rows.is_packed and 0 < rows.columns <= MAX_ROWS and rows.scale.device.type == "cpu"


class Forward:
    """As the tiles' ``Forward``. It has ``gradients`` if they were asked for."""

    gradients: tuple[Tensor, ...] = ()

    def __init__(self, rows: DualRows) -> None:
        self._rows = rows

    def add_own(self) -> None:
        """Compute the exponentials and their sums."""
        a, b = self._rows.units.unbind()
        scale = self._rows.scale.item()
        self._is_bounded = abs(scale) <= MAX_SHARED_SCALE
        X = product(a, b, scale / LOG_2)
        positive = X.diagonal().clone()
        # Finite, so that its difference to itself is 0; and so low that its exponential is 0.
        X.fill_diagonal_(torch.finfo(X.dtype).min / 4)
        matrices = X.new_empty(3, *X.shape)
        self._matrices = U, V, W = matrices.unbind()
        torch.sub(X, V.copy_(X.T), out=W)
        if self._is_bounded:
            torch.exp2(X, out=U)
            V.exp2_()
            of_positive = positive.exp2()
        else:
            maxima = torch.stack([X.amax(dim=1), V.amax(dim=1)])
            torch.sub(X, maxima[0, :, None], out=U).exp2_()
            V.sub_(maxima[1, :, None]).exp2_()
            of_positive = (positive - maxima).exp2_()
        W.mul_(U)
        sums = matrices.sum(dim=2)
        others = sums[:2]
        if self._is_bounded:
            losses = (others / of_positive).log1p_()
        else:
            losses = log_one_plus_power((maxima - positive).add_(others.log2()))
        self._t = (others + of_positive).reciprocal_()
        self._missing = others.mul_(self._t)  # 1 - p_ii and 1 - q_ii
        E = sums[2:].mul_(self._t[:1]).mul_(LOG_2_TENSOR)
        self._stats = torch.cat([losses + positive.mul_(LOG_2_TENSOR), E, losses])

    def finish(
        self, weight: Tensor | None, is_swapped: bool, factors: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the tiles'."""
        _, _, E, la, lc = self._stats.unbind()
        if weight is None:
            w, k = (la.new_full(la.shape, factor) for factor in factors)
        else:
            w, k = (weight.to(la.dtype) * factor for factor in factors)
        contrast, consistency = w.dot(lc if is_swapped else la), k.dot((E - la).add_(lc))
        if self._rows.needs is not None and self._rows.inverse_norm is not None:
            self.gradients = self.of_inputs(w, k, is_swapped, self._rows.inverse_norm, *self._rows.needs)
        return contrast, consistency, self._stats

    def of_inputs(
        self, w: Tensor, k: Tensor, is_swapped: bool, inverse_norm: Tensor, need_a: bool, need_b: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the needed sides' raw rows, [1 or 2, n, D], and of the scale.

        w, k: upstream gradients of a row's contrast and of its consistency. The matrices are overwritten.
        """
        (U, V, W), (to_p, to_q), (rest_p, rest_q) = self._matrices, self._t.unbind(), self._missing.unbind()
        kE, x = k * self._stats[2], k + w if is_swapped else k
        r = kE.neg() if is_swapped else w - kE
        # G_ii = -(1 - p_ii) (r_i - k_i) - (1 - q_ii) x_i - k_i E_i
        diagonal = torch.addcmul(kE, rest_q, x).addcmul_(rest_p, r - k).neg_()
        k, r, x = k * to_p, r.mul_(to_p), x * to_q
        G = W.mul_((k * LOG_2_TENSOR)[:, None]).addcmul_(U, r[:, None])
        if self._is_bounded:
            G.addcmul_(U, x).addcmul_(V, k, value=-1)
        else:
            G.add_(V.mul_(x[:, None]).addcmul_(U, k[:, None], value=-1).T)
        G.diagonal().copy_(diagonal)
        units = self._rows.units
        a, b = units.unbind()
        if need_a and need_b:
            grads = torch.stack([product(G, b.T), transposed_product(G, a)])
        elif need_a:
            grads, units, inverse_norm = product(G, b.T)[None], units[:1], inverse_norm[:1]
        else:
            grads, units, inverse_norm = transposed_product(G, a)[None], units[1:], inverse_norm[1:]
        dots = torch.linalg.vecdot(grads, units)
        grads.addcmul_(units, dots[:, :, None], value=-1).mul_(inverse_norm * self._rows.scale)
        return grads, dots[0].sum()


class Backward:
    """As the tiles' ``Backward``, where the forward's gradients do not serve: everything is computed again."""

    def __init__(self, rows: DualRows, stats: Tensor, upstream: DualUpstream, need_a: bool, need_b: bool) -> None:
        self._rows, self._upstream, self._needs = rows, upstream, (need_a, need_b)
        self._forward = Forward(rows)

    def add_own(self) -> None:
        """Compute the exponentials."""
        self._forward.add_own()

    def finish(self, inverse_norm: Tensor, dtype: torch.dtype, D: int) -> tuple[Tensor, Tensor, Tensor]:
        """As the tiles'."""
        _, weight, *grads, is_swapped, factors = self._upstream
        ones = self._rows.scale.new_ones(self._rows.columns) if weight is None else weight.to(self._rows.scale.dtype)
        w, k = (ones * (grad.to(ones.dtype) * factor) for grad, factor in zip(grads, factors, strict=True))
        found, grad_scale = self._forward.of_inputs(w, k, is_swapped, inverse_norm, *self._needs)
        sides = iter(found)
        grad_a, grad_b = (
            next(sides).to(dtype, copy=True) if need else found.new_empty(0, dtype=dtype) for need in self._needs
        )
        return grad_a, grad_b, grad_scale
