"""``dual_softmax`` of one rank with few rows: whole matrices, and the gradients with the losses.

Legend, beside that of the tiles. ``U_ij = 2^(X_ij - m_i)`` and ``V_ij = 2^(Y_ij - m'_i)``, with X and Y in base 2 and
zeros in the diagonals. m, m': the row's maxima without its positive, or 0 where the scale is bounded; then V is U
transposed. ``W_ij = U_ij (X_ij - Y_ij)``. ``t``: the factors per row that make U and V the softmaxes p and q.
"""

import torch
from torch import Tensor

from fastkd.backends.blocked.gemm import min_linear, product, transposed_product
from fastkd.backends.blocked.sums import LOG_2, MAX_SHARED_SCALE, log_one_plus_power
from fastkd.backends.inputs import DualRows, DualUpstream
from fastkd.native import extension

Result = tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]
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
        """Nothing yet: losses and gradients are computed in one go."""

    def finish(
        self, weight: Tensor | None, is_swapped: bool, factors: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the tiles'."""
        rows = self._rows
        if weight is None:
            w, k = (rows.scale.new_full((rows.columns,), factor) for factor in factors)
        else:
            w, k = (weight.to(rows.scale.dtype) * factor for factor in factors)
        contrast, consistency, stats, self.gradients = computed(rows, w, k, is_swapped, rows.inverse_norm, rows.needs)
        return contrast, consistency, stats


class Backward:
    """As the tiles' ``Backward``, where the forward's gradients do not serve: everything is computed again."""

    def __init__(self, rows: DualRows, stats: Tensor, upstream: DualUpstream, need_a: bool, need_b: bool) -> None:
        self._rows, self._upstream, self._needs = rows, upstream, (need_a, need_b)

    def add_own(self) -> None:
        """As the forward's."""

    def finish(self, inverse_norm: Tensor, dtype: torch.dtype, D: int) -> tuple[Tensor, Tensor, Tensor]:
        """As the tiles'."""
        rows = self._rows
        _, weight, *grads, is_swapped, factors = self._upstream
        ones = rows.scale.new_ones(rows.columns) if weight is None else weight.to(rows.scale.dtype)
        w, k = (ones * (grad.to(ones.dtype) * factor) for grad, factor in zip(grads, factors, strict=True))
        found, grad_scale = computed(rows, w, k, is_swapped, inverse_norm, self._needs)[3]
        sides, empty = iter(found), found.new_empty(0, dtype=dtype)
        grad_a, grad_b = (next(sides).to(dtype, copy=True) if need else empty for need in self._needs)
        return grad_a, grad_b, grad_scale


def computed(
    rows: DualRows,
    w: Tensor,
    k: Tensor,
    is_swapped: bool,
    inverse_norm: Tensor | None,
    needs: tuple[bool, bool] | None,
) -> Result:
    """The sums of contrast and consistency, the numbers of every row, and the gradients that are needed, if any.

    w, k: what a row's contrast and its consistency are multiplied by, [n]. The gradients are those of the needed sides'
    raw rows, [1 or 2, n, D], and of the scale. The extension makes the same calls without Python between them.
    """
    native, given = extension(), needs if inverse_norm is not None else None
    if native is None:
        return _computed(rows, w, k, is_swapped, inverse_norm, given)
    *found, gradients = native.dense_dual_softmax(
        rows.units, rows.scale, w, k, is_swapped, w if inverse_norm is None else inverse_norm, given or (), min_linear()
    )
    return *found, tuple(gradients)


def _computed(
    rows: DualRows,
    w: Tensor,
    k: Tensor,
    is_swapped: bool,
    inverse_norm: Tensor | None,
    needs: tuple[bool, bool] | None,
) -> Result:
    a, b = rows.units.unbind()
    scale = rows.scale.item()
    is_bounded = abs(scale) <= MAX_SHARED_SCALE
    X = product(a, b, scale / LOG_2)
    positive = X.diagonal().clone()
    # Finite, so that its difference to itself is 0; and so low that its exponential is 0.
    X.fill_diagonal_(torch.finfo(X.dtype).min / 4)
    matrices = X.new_empty(3, *X.shape)
    U, V, W = matrices.unbind()
    torch.sub(X, V.copy_(X.T), out=W)
    if is_bounded:
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
    if is_bounded:
        losses = (others / of_positive).log1p_()
    else:
        losses = log_one_plus_power((maxima - positive).add_(others.log2()))
    t = (others + of_positive).reciprocal_()
    rest_p, rest_q = others.mul_(t)  # 1 - p_ii and 1 - q_ii
    means = sums[2:].mul_(t[:1]).mul_(LOG_2)
    stats = torch.cat([losses + positive.mul_(LOG_2), means, losses])
    _, _, E, la, lc = stats
    contrast, consistency = w.dot(lc if is_swapped else la), k.dot((E - la).add_(lc))
    if needs is None or inverse_norm is None:
        return contrast, consistency, stats, ()
    kE, x = k * E, k + w if is_swapped else k
    r = kE.neg() if is_swapped else w - kE
    # G_ii = -(1 - p_ii) (r_i - k_i) - (1 - q_ii) x_i - k_i E_i
    diagonal = torch.addcmul(kE, rest_q, x).addcmul_(rest_p, r - k).neg_()
    k, r, x = k * t[0], r.mul_(t[0]), x * t[1]
    G = W.mul_((k * LOG_2)[:, None]).addcmul_(U, r[:, None])
    if is_bounded:
        G.addcmul_(U, x).addcmul_(V, k, value=-1)
    else:
        G.add_(V.mul_(x[:, None]).addcmul_(U, k[:, None], value=-1).T)
    G.diagonal().copy_(diagonal)
    units = rows.units
    if needs[0] and needs[1]:
        grads = torch.stack([product(G, b.T), transposed_product(G, a)])
    elif needs[0]:
        grads, units, inverse_norm = product(G, b.T)[None], units[:1], inverse_norm[:1]
    else:
        grads, units, inverse_norm = transposed_product(G, a)[None], units[1:], inverse_norm[1:]
    dots = torch.linalg.vecdot(grads, units)
    grads.addcmul_(units, dots[:, :, None], value=-1).mul_(inverse_norm * rows.scale)
    return contrast, consistency, stats, (grads, dots[0].sum())
