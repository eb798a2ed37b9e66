"""``dual_softmax`` of one rank with few rows: whole matrices, whose exponentials the forward keeps for the backward.

Legend, beside that of the tiles. ``U_ij = 2^(X_ij - m_i)`` and ``V_ij = 2^(Y_ij - m'_i)``, with X and Y in base 2 and
zeros in the diagonals. m, m': the row's maxima without its positive, or 0 where the scale is bounded; then V is U
transposed. ``W_ij = U_ij (X_ij - Y_ij)``. ``t``: the factors per row that make U and V the softmaxes p and q.
"""

import torch
from torch import Tensor

from fastkd.backends.blocked.gemm import product, transposed_product
from fastkd.backends.blocked.sums import LOG_2, MAX_SHARED_SCALE, log_one_plus_power
from fastkd.backends.inputs import DualRows, DualUpstream
from fastkd.numerics import weighted_sum

MAX_ROWS = 1024  # of a matrix, three of which then take 12 MiB in float32


def covers(rows: DualRows) -> bool:
    """Whether the rows are all columns there are, are few, and lie on a CPU."""
    return not rows.is_packed and 0 < rows.columns <= MAX_ROWS and rows.scale.device.type == "cpu"


class Forward:
    """As the tiles' ``Forward``. ``kept``: U, V, W [3, n, n]; t of p and of q [2, n]; 1 - p_ii and 1 - q_ii [2, n]."""

    def __init__(self, rows: DualRows) -> None:
        self._rows = rows
        self.kept: tuple[Tensor, ...] = ()

    def add_own(self) -> None:
        """Compute everything."""
        a, b = self._rows.units
        scale = self._rows.scale.item()
        X = product(a * (scale / LOG_2), b)
        positive = X.diagonal().clone()
        # Finite, so that their difference is 0; and so low that their exponentials are 0.
        Y = X.fill_diagonal_(torch.finfo(X.dtype).min / 4).T.contiguous()
        exponentials = X.new_empty(3, *X.shape)
        U, V, W = exponentials
        if abs(scale) <= MAX_SHARED_SCALE:
            torch.exp2(X, out=U)
            torch.exp2(Y, out=V)
            of_positive = positive.exp2()
        else:
            maxima = torch.stack([X.amax(dim=1), Y.amax(dim=1)])
            torch.sub(X, maxima[0, :, None], out=U).exp2_()
            torch.sub(Y, maxima[1, :, None], out=V).exp2_()
            of_positive = (positive - maxima).exp2_()
        torch.mul(U, X.sub_(Y), out=W)
        sums = exponentials.sum(dim=2)
        others = sums[:2]
        t = (others + of_positive).reciprocal_()
        E = (sums[2] * t[0]).mul_(LOG_2)
        if abs(scale) <= MAX_SHARED_SCALE:
            losses = (others / of_positive).log1p_()
        else:
            losses = log_one_plus_power((maxima - positive).add_(others.log2()))
        self.kept = exponentials, t, others.mul_(t)
        self._stats = torch.cat([losses.view(-1), E, positive.mul_(LOG_2)]).view(4, -1)

    def finish(
        self, weight: Tensor | None, is_swapped: bool, factors: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the tiles'."""
        la, lc, E, _ = self._stats
        contrast, consistency = lc if is_swapped else la, (E - la).add_(lc)
        return weighted_sum(contrast, weight) * factors[0], weighted_sum(consistency, weight) * factors[1], self._stats


class Backward:
    """As the tiles' ``Backward``. ``kept``: what the forward kept; it is computed again where there is nothing."""

    def __init__(
        self,
        rows: DualRows,
        stats: Tensor,
        upstream: DualUpstream,
        need_a: bool,
        need_b: bool,
        kept: tuple[Tensor, ...] = (),
    ) -> None:
        self._rows, self._stats, self._upstream, self._kept = rows, stats, upstream, kept
        self._need_a, self._need_b = need_a, need_b

    def add_own(self) -> None:
        """Compute the gradient of X, in nats."""
        if not self._kept:
            forward = Forward(self._rows)
            forward.add_own()
            self._kept = forward.kept
        (U, V, W), (to_p, to_q), (rest_p, rest_q) = self._kept
        _, weight, *grads, is_swapped, factors = self._upstream
        w, k = (grad.to(U.dtype) * factor for grad, factor in zip(grads, factors, strict=True))
        if weight is not None:
            w, k = weight.to(U.dtype) * w, weight.to(U.dtype) * k
        kE, x = k * self._stats[2], k + w if is_swapped else k
        r = kE.neg() if is_swapped else w - kE
        # G_ii = -(1 - p_ii) (r_i - k_i) - (1 - q_ii) x_i - k_i E_i
        diagonal = torch.addcmul(kE, rest_q, x).addcmul_(rest_p, r - k).neg_()
        k, r, x = to_p * k, r * to_p, to_q * x
        G = W * (k * LOG_2)[:, None]
        if abs(self._rows.scale.item()) <= MAX_SHARED_SCALE:
            G.addcmul_(U, r[:, None] + x).addcmul_(V, k, value=-1)
        else:
            G.addcmul_(U, r[:, None]).add_((V * x[:, None]).addcmul_(U, k[:, None], value=-1).T)
        G.diagonal().copy_(diagonal)
        self._G = G

    def finish(self, inverse_norm: Tensor, dtype: torch.dtype, D: int) -> tuple[Tensor, Tensor, Tensor]:
        """As the tiles'."""
        scale, found = self._rows.scale, []
        a, b = units = self._rows.units
        if self._need_a:
            found.append(product(self._G, b.T))
        if self._need_b:
            found.append(transposed_product(self._G, a))
        else:
            units, inverse_norm = units[:1], inverse_norm[:1]
        if not self._need_a:
            units, inverse_norm = units[1:], inverse_norm[1:]
        grads = torch.stack(found)
        dots = torch.linalg.vecdot(grads, units)
        grads.addcmul_(units, dots[:, :, None], value=-1)
        found = [(grad * factor).to(dtype) for grad, factor in zip(grads, inverse_norm * scale, strict=True)]
        empty = a.new_empty(0, dtype=dtype)
        return found[0] if self._need_a else empty, found[-1] if self._need_b else empty, dots[0].sum()
