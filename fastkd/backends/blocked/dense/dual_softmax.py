"""``dual_softmax`` of one rank with few rows: whole matrices, and the gradients with the losses.

Legend, beside that of the tiles. ``U_ij = 2^(X_ij - m_i)`` and ``V_ij = 2^(Y_ij - m'_i)``, with X and Y in base 2 and
zeros in the diagonals. m, m': the row's maxima without its positive, or 0 where the scale is bounded; then V is U
transposed. ``W_ij = U_ij (X_ij - Y_ij)``. ``t``: the factors per row that make U and V the softmaxes p and q.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.backends.blocked.dense import loops
from fastkd.backends.blocked.gemm import min_linear, product, transposed_product
from fastkd.backends.blocked.sums import LOG_2, MAX_SHARED_SCALE, log_one_plus_power, to_raw_rows
from fastkd.backends.inputs import DualRows, DualUpstream

Result = tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]
MAX_ROWS = 1024  # of a matrix, four of which then take 16 MiB in float32


def covers(rows: DualRows) -> bool:
    """Whether the rows are all columns there are, are few, and lie on a CPU."""
    return not rows.is_packed and 0 < rows.columns <= MAX_ROWS and rows.scale.device.type == "cpu"


class Forward:
    """As the tiles' ``Forward``. It has ``gradients`` if they were asked for."""

    gradients: Sequence[Tensor] = ()

    def __init__(self, rows: DualRows) -> None:
        self._rows = rows

    def add_own(self) -> None:
        """Nothing yet: losses and gradients are computed in one go."""

    def finish(
        self, weight: Tensor | None, is_swapped: bool, factors: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the tiles'."""
        rows = self._rows
        contrast, consistency, stats, self.gradients = computed(
            rows, weight, factors, is_swapped, rows.inverse_norm, rows.needs
        )
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
        grad_a, grad_b, grad_scale = _computed(rows, w, k, is_swapped, inverse_norm, self._needs)[3]
        return grad_a.to(dtype), grad_b.to(dtype), grad_scale


def computed(
    rows: DualRows,
    weight: Tensor | None,
    factors: tuple[float, float],
    is_swapped: bool,
    inverse_norm: Tensor | None,
    needs: tuple[bool, bool] | None,
) -> Result:
    """The sums of contrast and consistency, the numbers of every row, and the gradients if any are needed.

    The gradients are those of the raw rows of a and b, empty where not needed, and of the scale. Among few rows the
    extension computes them, in loops that run over a row once.
    """
    native, given = loops(rows.columns**2), needs if inverse_norm is not None else None
    if native is not None:
        *found, gradients = native.dense_dual_softmax(
            rows.units, inverse_norm, rows.scale, weight, factors, is_swapped, given or (), min_linear()
        )
        return *found, gradients
    ones = rows.scale.new_ones(rows.columns) if weight is None else weight.to(rows.scale.dtype)
    return _computed(rows, ones * factors[0], ones * factors[1], is_swapped, inverse_norm, given)


def _computed(
    rows: DualRows,
    w: Tensor,
    k: Tensor,
    is_swapped: bool,
    inverse_norm: Tensor | None,
    needs: tuple[bool, bool] | None,
) -> Result:
    """As ``computed``; w, k: what a row's contrast and its consistency are multiplied by, [n]."""
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
    gradients = [G.new_empty(0), G.new_empty(0), G.new_empty(())]
    for side, need in reversed([*enumerate(needs)]):  # the scale's gradient is that of the first side that is needed
        if need:
            gradients[side] = transposed_product(G, a) if side else product(G, b.T)
            gradients[2] = to_raw_rows(gradients[side], rows.units[side], inverse_norm[side], rows.scale)[1]
    return contrast, consistency, stats, gradients
