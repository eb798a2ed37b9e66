"""``contrast`` of one rank with few rows: whole matrices, and the gradients with the losses.

Legend, beside that of the tiles. ``U_ij = 2^(X_ij - m_i)``, with X the logits in base 2, and 0 where key j is not among
the negatives of query i, or, with positives by label, not in D_i. m: the row's maxima, or 0 where the logits are
bounded. ``t``: the factors per row that make U the softmax p.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkd.backends.blocked.dense import loops
from fastkd.backends.blocked.gemm import min_linear, product, transposed_product
from fastkd.backends.blocked.sums import LOG_2, are_bounded, log_one_plus_power, to_raw_rows
from fastkd.backends.inputs import ContrastRows, ContrastUpstream
from fastkd.backends.masks import Mask

# The losses, two numbers per query, and what makes the gradient G of the logits from the losses' upstream gradients.
Losses = tuple[Tensor, tuple[Tensor, Tensor], Callable[[Tensor], Tensor]]
Result = tuple[Tensor, Tensor, Sequence[Tensor]]
MAX_ELEMENTS = 1 << 20  # of the matrix: 4 MiB in float32


def covers(rows: ContrastRows) -> bool:
    """Whether the keys are all there are, the matrix is small, and lies on a CPU."""
    size = rows.queries.shape[0] * rows.columns
    return not rows.is_packed and 0 < size <= MAX_ELEMENTS and rows.scale.device.type == "cpu"


class Forward:
    """As the tiles' ``Forward``. It has ``gradients`` if they were asked for."""

    gradients: Sequence[Tensor] = ()
    kept: tuple[Tensor, ...] = ()

    def __init__(self, rows: ContrastRows) -> None:
        self._rows = rows

    def add_own(self) -> None:
        """Nothing yet: losses and gradients are computed in one go."""

    def finish(self, weight: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
        """As the tiles'."""
        total, stats, self.gradients = computed(self._rows, weight, factor, self._rows.needs)
        return total, stats


class Backward:
    """As the tiles' ``Backward``, where the forward has no gradients: everything is computed again."""

    def __init__(self, rows: ContrastRows, upstream: ContrastUpstream, need_query: bool, need_key: bool) -> None:
        self._rows, self._upstream, self._needs = rows, upstream, (need_query, need_key)

    def add_own(self) -> None:
        """As the forward's."""

    def finish(
        self, inverse_q: Tensor | None, inverse_k: Tensor | None, dtype: torch.dtype, D: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the tiles'; the inverse norms are those of the rows that it was given."""
        gradients = computed(self._rows, self._upstream.weight, self._upstream.factor, self._needs)[2]
        grad_loss = self._upstream.grad_loss.to(gradients[2].dtype)
        grad_query, grad_key, grad_scale = (x * grad_loss for x in gradients)
        return grad_query.to(dtype), grad_key.to(dtype), grad_scale


def computed(rows: ContrastRows, weight: Tensor | None, factor: float, needs: tuple[bool, bool] | None) -> Result:
    """The sum of the weighted losses times ``factor``, two numbers per query, and the gradients if ``needs`` names any.

    The gradients are those of the raw queries and keys, empty where not needed, and of the scale. Among few rows the
    extension computes them, in loops that run over a row once.
    """
    q, k, mask, scale = rows.queries, rows.queries if rows.keys is None else rows.keys, rows.mask, rows.scale
    is_bounded = are_bounded(q, k, rows)
    native = loops(len(q) * len(k))
    if native is not None:
        return native.dense_contrast(
            q, rows.keys, scale, mask.query_labels, mask.key_labels, mask.positive_index, mask.by_label,
            mask.exclude_self, is_bounded, weight, factor, *rows.inverse_norms, needs or (), min_linear(),
        )  # fmt: skip
    w = scale.new_full(q.shape[:1], factor) if weight is None else weight.to(scale.dtype) * factor
    return _computed(rows, w, is_bounded, needs)


def _computed(rows: ContrastRows, w: Tensor, is_bounded: bool, needs: tuple[bool, bool] | None) -> Result:
    X = product(rows.queries, rows.queries if rows.keys is None else rows.keys, rows.scale.item() / LOG_2)
    losses, stats, gradient = (_by_label if rows.mask.by_label else _by_index)(X, rows.mask, is_bounded)
    total = w.dot(losses)
    return total, torch.stack(stats), () if needs is None else _of_inputs(rows, gradient(w), *needs)


def _by_index(X: Tensor, mask: Mask, is_bounded: bool) -> Losses:
    index = None if mask.positive_index is None else mask.positive_index.clamp(0, X.shape[1] - 1)[:, None]
    positive = X.diagonal().clone() if index is None else X.gather(1, index)[:, 0]
    if mask.labels is not None:
        X.masked_fill_(mask.labels[0][:, None] == mask.labels[1], -torch.inf)
    if mask.exclude_self or index is None:
        X.fill_diagonal_(-torch.inf)
    if index is not None:
        X.scatter_(1, index, -torch.inf)
    maximum = _exponentials(X, is_bounded)
    others = X.sum(dim=1)
    if maximum is None:
        of_positive = positive.exp2()
        losses = (others / of_positive).log1p_()
    else:
        of_positive = (positive - maximum).exp2_()
        losses = log_one_plus_power((maximum - positive).add_(others.log2()))
        # An infinite positive would make the other logits vanish.
        losses = losses.where(positive.isfinite(), torch.nan)
    t = (others + of_positive).reciprocal_()
    missing = others.mul_(t)

    def gradient(w: Tensor) -> Tensor:
        G, of_positive = X.mul_((w * t)[:, None]), (w * missing).neg_()
        if index is not None:
            return G.scatter_(1, index, of_positive[:, None])
        G.diagonal().copy_(of_positive)
        return G

    return losses, (losses, positive.mul_(LOG_2)), gradient


def _by_label(X: Tensor, mask: Mask, is_bounded: bool) -> Losses:
    assert mask.labels is not None
    same = torch.eq(mask.labels[0][:, None], mask.labels[1]).to(X.dtype)
    if mask.exclude_self:
        same.fill_diagonal_(0)
    count = same.sum(dim=1)
    # Not their product, unless bounded: an infinite logit times 0 would be NaN.
    of_positives = X * same if is_bounded else X.where(same > 0, 0)
    mean = of_positives.sum(dim=1) / count.clamp_min(1)
    if mask.exclude_self:
        X.fill_diagonal_(-torch.inf)
    maximum = _exponentials(X, is_bounded)
    total = X.sum(dim=1)
    without = count == 0  # no loss, no gradient
    t = total.reciprocal().masked_fill_(without, 0)
    if maximum is None:
        power = mean.exp2_()
        losses = (total - power).div_(power).log1p_()
        lse = total.log_()
    else:
        total.log2_()
        losses = (maximum - mean).add_(total).mul_(LOG_2)
        lse = maximum.add_(total).mul_(LOG_2)

    def gradient(w: Tensor) -> Tensor:
        return X.mul_((w * t)[:, None]).addcmul_(same, (w / count.clamp_min(1))[:, None], value=-1)

    return losses.masked_fill_(without, 0), (lse, count), gradient


def _exponentials(X: Tensor, is_bounded: bool) -> Tensor | None:
    """Makes U of X in place. Returns the rows' maxima, or None where they are not needed."""
    if is_bounded:
        X.exp2_()
        return None
    # A row of nothing but -inf has no finite maximum: with a finite one its exponentials are 0.
    maximum = X.amax(dim=1).clamp_min_(torch.finfo(X.dtype).min)
    X.sub_(maximum[:, None]).exp2_()
    return maximum


def _of_inputs(rows: ContrastRows, G: Tensor, need_query: bool, need_key: bool) -> list[Tensor]:
    """Gradients of the raw queries and keys, and of the scale. G is overwritten."""
    q, (inverse_q, inverse_k) = rows.queries, rows.inverse_norms
    gradients = [G.new_empty(0), G.new_empty(0), G.new_empty(())]
    if rows.keys is None:
        gradients[0] = product(G.add_(G.T.contiguous()), q.T)
        # G_ij is in the sums of row i and of row j.
        gradients[2] = to_raw_rows(gradients[0], q, inverse_q, rows.scale)[1] / 2
        return gradients
    if need_key:
        gradients[1] = transposed_product(G, q)
        gradients[2] = to_raw_rows(gradients[1], rows.keys, inverse_k, rows.scale)[1]
    if need_query:
        gradients[0] = product(G, rows.keys.T)
        gradients[2] = to_raw_rows(gradients[0], q, inverse_q, rows.scale)[1]
    return gradients
