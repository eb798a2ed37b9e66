"""``contrast`` of one rank with few rows: whole matrices, and the gradients with the losses.

Legend, beside that of the tiles. ``U_ij = 2^(X_ij - m_i)``, with X the logits in base 2, and 0 where key j is not among
the negatives of query i, or, with positives by label, not in D_i. m: the row's maxima, or 0 where the logits are
bounded. ``t``: the factors per row that make U the softmax p.
"""

import torch
from torch import Tensor

from fastkd.backends.blocked.gemm import product, transposed_product
from fastkd.backends.blocked.sums import LOG_2, LOG_2_TENSOR, are_bounded, log_one_plus_power
from fastkd.backends.inputs import ContrastRows, ContrastUpstream

MAX_ELEMENTS = 1 << 20  # of the matrix: 4 MiB in float32


def covers(rows: ContrastRows) -> bool:
    """Whether the keys are all there are, the matrix is small, and lies on a CPU."""
    size = rows.queries.shape[0] * rows.columns
    return not rows.is_packed and 0 < size <= MAX_ELEMENTS and rows.scale.device.type == "cpu"


class Forward:
    """As the tiles' ``Forward``. It has ``gradients`` if they were asked for."""

    gradients: tuple[Tensor, ...] = ()
    kept: tuple[Tensor, ...] = ()

    def __init__(self, rows: ContrastRows) -> None:
        self._rows, self._mask = rows, rows.mask

    def add_own(self) -> None:
        """Compute losses, exponentials and their sums."""
        rows = self._rows
        q = rows.queries
        k = q if rows.keys is None else rows.keys
        self._is_bounded = are_bounded(q, k, rows)
        X = product(q, k, rows.scale.item() / LOG_2)
        if self._mask.by_label:
            self._by_label(X)
        else:
            self._by_index(X)

    def _by_index(self, X: Tensor) -> None:
        index = self._mask.positive_index
        self._index = None if index is None else index.clamp(0, X.shape[1] - 1)[:, None]
        positive = X.diagonal().clone() if self._index is None else X.gather(1, self._index)[:, 0]
        if self._mask.labels is not None:
            X.masked_fill_(self._mask.labels[0][:, None] == self._mask.labels[1], -torch.inf)
        if self._mask.exclude_self or self._index is None:
            X.fill_diagonal_(-torch.inf)
        if self._index is not None:
            X.scatter_(1, self._index, -torch.inf)
        maximum = self._exponentials(X)
        others = X.sum(dim=1)
        if maximum is None:
            of_positive = positive.exp2()
            self._losses = (others / of_positive).log1p_()
        else:
            of_positive = (positive - maximum).exp2_()
            losses = log_one_plus_power((maximum - positive).add_(others.log2()))
            # An infinite positive would make the other logits vanish.
            self._losses = losses.where(positive.isfinite(), torch.nan)
        self._t = (others + of_positive).reciprocal_()
        self._missing = others.mul_(self._t)
        self._stats = self._losses, positive.mul_(LOG_2_TENSOR)

    def _exponentials(self, X: Tensor) -> Tensor | None:
        """Makes U of X in place. Returns the rows' maxima, or None where they are not needed."""
        self._U = X
        if self._is_bounded:
            X.exp2_()
            return None
        # A row of nothing but -inf has no finite maximum: with a finite one its exponentials are 0.
        maximum = X.amax(dim=1).clamp_min_(torch.finfo(X.dtype).min)
        X.sub_(maximum[:, None]).exp2_()
        return maximum

    def _by_label(self, X: Tensor) -> None:
        assert self._mask.labels is not None
        left, right = self._mask.labels
        self._same = torch.eq(left[:, None], right).to(X.dtype)
        if self._mask.exclude_self:
            self._same.fill_diagonal_(0)
        self._count = self._same.sum(dim=1)
        # Not their product, unless bounded: an infinite logit times 0 would be NaN.
        of_positives = X * self._same if self._is_bounded else X.where(self._same > 0, 0)
        mean = of_positives.sum(dim=1) / self._count.clamp_min(1)
        if self._mask.exclude_self:
            X.fill_diagonal_(-torch.inf)
        maximum = self._exponentials(X)
        total = X.sum(dim=1)
        without = self._count == 0  # no loss, no gradient
        self._t = total.reciprocal().masked_fill_(without, 0)
        if maximum is None:
            power = mean.exp2_()
            losses = (total - power).div_(power).log1p_()
            lse = total.log_()
        else:
            total.log2_()
            losses = (maximum - mean).add_(total).mul_(LOG_2_TENSOR)
            lse = maximum.add_(total).mul_(LOG_2_TENSOR)
        self._losses = losses.masked_fill_(without, 0)
        self._stats = lse, self._count

    def finish(self, weight: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
        """As the tiles'."""
        losses = self._losses
        w = losses.new_full(losses.shape, factor) if weight is None else weight.to(losses.dtype) * factor
        total = w.dot(losses)
        if self._rows.needs is not None:
            self.gradients = self.of_inputs(w, *self._rows.needs)
        return total, torch.stack(self._stats)

    def of_inputs(self, w: Tensor, need_query: bool, need_key: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the raw queries and keys (empty if not needed), and of the scale.

        w: upstream gradients of the queries' losses. U is overwritten.
        """
        rows, G = self._rows, self._U.mul_((w * self._t)[:, None])
        if self._mask.by_label:
            G.addcmul_(self._same, (w / self._count.clamp_min(1))[:, None], value=-1)
        else:
            of_positive = (w * self._missing).neg_()
            if self._index is None:
                G.diagonal().copy_(of_positive)
            else:
                G.scatter_(1, self._index, of_positive[:, None])
        q, empty = rows.queries, w.new_empty(0)
        if rows.keys is None:
            grad, grad_scale = self._raw(product(G.add_(G.T.contiguous()), q.T), q, 0)
            return grad, empty, grad_scale / 2  # G_ij is in the sums of row i and of row j
        grad_q = grad_k = empty
        if need_key:
            grad_k, grad_scale = self._raw(transposed_product(G, q), rows.keys, 1)
        if need_query:
            grad_q, grad_scale = self._raw(product(G, rows.keys.T), q, 0)
        return grad_q, grad_k, grad_scale

    def _raw(self, grad: Tensor, rows: Tensor, side: int) -> tuple[Tensor, Tensor]:
        dots, inverse_norm = torch.linalg.vecdot(grad, rows), self._rows.inverse_norms[side]
        if inverse_norm is None:
            return grad.mul_(self._rows.scale), dots.sum()
        return grad.addcmul_(rows, dots[:, None], value=-1).mul_(inverse_norm * self._rows.scale), dots.sum()


class Backward:
    """As the tiles' ``Backward``, where the forward has no gradients: everything is computed again."""

    def __init__(self, rows: ContrastRows, upstream: ContrastUpstream, need_query: bool, need_key: bool) -> None:
        self._forward, self._upstream = Forward(rows._replace(needs=(need_query, need_key))), upstream

    def add_own(self) -> None:
        """Compute losses and gradients."""
        self._forward.add_own()
        self._forward.finish(self._upstream.weight, self._upstream.factor)

    def finish(
        self, inverse_q: Tensor | None, inverse_k: Tensor | None, dtype: torch.dtype, D: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the tiles'; the inverse norms are those of the rows that it was given."""
        grad_loss = self._upstream.grad_loss.to(self._forward.gradients[2].dtype)
        grad_query, grad_key, grad_scale = (x * grad_loss for x in self._forward.gradients)
        return grad_query.to(dtype), grad_key.to(dtype), grad_scale
