"""``contrast`` of the blocked backend: any positives and masks, in tiles of queries and keys.

A rank's own queries meet its own keys first (``add_own``), and then the keys of other ranks block by block (``add``).
The owner of key j computes ``sum_i G_ij q_i`` from the queries of other ranks and their numbers (``add_queries``): no
gradient travels.

Legend. ``q`` [n, D], ``k`` [N, D]: the rows that the logits ``x_ij = scale q_i . k_j`` are made of. ``p_ij``: the
softmax over D_i. ``w_i``: the upstream gradient of query i's loss. ``G_ij``: the gradient of ``x_ij``.

Positives by index are kept apart from the sums, as in ``dual_softmax``: their logit is taken out of the tile that holds
it. ``loss_i = log(1 + sum_{j != p} exp(x_ij - x_ip))`` and ``G_ip = w_i expm1(-loss_i)``.

Positives by label are found in the tiles, by comparing labels: there ``p_ij`` and ``1 / |P_i|`` are subtracted while
both are at hand, which keeps the digits of their difference where a loss has almost converged. Queries contrasted with
each other have ``x_ij = x_ji``: a tile serves its rows and its columns, and ``sum_j (G_ij + G_ji) q_j`` is the whole
gradient. That is N^2 D operations forward and 3 N^2 D backward, instead of 2 and 6.
"""

import torch
from torch import Tensor

from fastkd.backends.blocked.dense import contrast as dense
from fastkd.backends.blocked.gemm import product
from fastkd.backends.blocked.sums import (
    LOG_2,
    OnlineSums,
    PlainSums,
    RowGradient,
    add_rows,
    are_bounded,
    row_blocks,
    row_weights,
    to_raw_rows,
    unit_rows_of,
)
from fastkd.backends.blocked.tiles import Tile, Workspace, blocks, for_each_tile, pair_rounds, rectangle_rounds
from fastkd.backends.inputs import ContrastRows, ContrastUpstream
from fastkd.backends.masks import Mask
from fastkd.numerics import accumulation_dtype, unit_rows_quickly, weighted_sum


def rows(raw_rows: tuple[Tensor, ...], normalize: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Of each side, contiguous rows in the accumulation dtype; if asked, unit rows with their inverse norms [n, 1]."""
    first, last = raw_rows[0], raw_rows[-1]
    if normalize and len(raw_rows) == 2 and first.shape == last.shape and len(row_blocks(first)) == 1:
        units, inverse_norm = unit_rows_of(raw_rows)
        return list(zip(units.unbind(), inverse_norm.unbind(), strict=True))
    return [_rows(x, normalize) for x in raw_rows]


def _rows(raw_rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Contiguous rows in the accumulation dtype; if asked, as unit rows with their inverse norms [n, 1]."""
    dtype, parts = accumulation_dtype(raw_rows.dtype), row_blocks(raw_rows)
    if not normalize:
        return raw_rows.to(dtype).contiguous(), None
    if len(parts) == 1:
        return unit_rows_quickly(raw_rows.to(dtype).contiguous())
    units = raw_rows.new_empty(raw_rows.shape, dtype=dtype)
    inverse_norm = units.new_empty(len(units), 1)
    for part in parts:
        units[part], inverse_norm[part] = unit_rows_quickly(raw_rows[part].to(dtype))
    return units, inverse_norm


class _Pass:
    """A rank's queries and keys in the accumulation dtype, and what the masks take out of a tile."""

    def __init__(self, rows: ContrastRows) -> None:
        self._scale, self._mask = scale, mask = rows.scale, rows.mask
        self._to_logits = scale / LOG_2
        self._q = rows.queries.to(scale.dtype)
        self._is_self = rows.keys is None
        self._k = self._q if rows.keys is None else rows.keys.to(scale.dtype)
        self._bounded = are_bounded(self._q, self._k, rows)
        q = self._q
        self._own = torch.arange(len(q), device=q.device)
        self._index = self._own if mask.positive_index is None else mask.positive_index
        self._positive = self._q.new_zeros(len(q))  # the positives' logits, by index
        self._codes: tuple[Tensor, Tensor] | None = None
        if mask.labels is not None:
            # As floating-point numbers they are compared, and turned into a term to subtract, ten times as fast.
            self._codes = mask.labels[0].to(scale.dtype), mask.labels[1].to(scale.dtype)
        self._masked = torch.finfo(scale.dtype).max / 4  # subtracted from a bounded logit: its exponential is 0
        self._buffers = 1 if mask.by_label or (self._codes is not None and self._bounded) else 0

    def _for_each(self, rows: Tensor, columns: Tensor, tile: Tile, buffers: int) -> None:
        rounds = rectangle_rounds(blocks(len(rows), rows.device), blocks(len(columns), columns.device))
        for_each_tile(rounds, tile, rows, buffers, len(columns))

    def _for_each_pair(self, tile: Tile, buffers: int) -> None:
        for_each_tile(pair_rounds(blocks(len(self._q), self._q.device)), tile, self._q, buffers)

    def _own_negatives(self, rows: slice, cols: slice, workspace: Workspace) -> Tensor:
        """The logits of own queries and keys that the queries' sums are made of; positives by index are taken out."""
        X = product(self._q[rows], self._k[cols]).mul_(self._to_logits)
        meets_own = rows.start < cols.stop and cols.start < rows.stop
        if not self._mask.by_label and (meets_own or self._index is not self._own):
            self._positive[rows] = _take_out(X, self._index[rows], cols.start, self._positive[rows])
        if self._mask.exclude_self and meets_own:
            _take_out(X, self._own[rows], cols.start, self._positive[rows])
        return self._drop_equal(X, rows, cols, workspace)

    def _drop_equal(self, X: Tensor, rows: slice, cols: slice, workspace: Workspace, *, by_key: bool = False) -> Tensor:
        """A tile without the logits of equal labels, where these are no positives.

        Its rows are queries and its columns keys, or the reverse if ``by_key``.
        """
        if self._codes is None or self._mask.by_label:
            return X
        left, right = reversed(self._codes) if by_key else self._codes
        if not self._bounded:
            return X.masked_fill_(left[rows, None] == right[cols], -torch.inf)
        same = next(workspace(slice(0, len(X)), slice(0, X.shape[1])))
        torch.eq(left[rows, None], right[cols], out=same)
        return X.sub_(same, alpha=self._masked)

    def _positives(self, rows: slice, cols: slice, out: Tensor | None = None, *, by_key: bool = False) -> Tensor:
        """True, or 1 in ``out``, where a key is a positive by label of a query; rows and columns as above."""
        assert self._codes is not None
        left, right = reversed(self._codes) if by_key else self._codes
        same = torch.eq(left[rows, None], right[cols], out=out)
        if self._is_self and rows.start == cols.start and cols.start < len(self._q):
            same.fill_diagonal_(0)  # a query is no positive of its own
        return same


def _take_out(X: Tensor, columns: Tensor, start: int, default: Tensor) -> Tensor:
    """The logit in every row's column (``default`` where that is in another tile), which becomes -inf in the tile."""
    local = columns - start
    inside = (local >= 0) & (local < X.shape[1])
    local = local.clamp_(0, X.shape[1] - 1)[:, None]
    logits = X.gather(1, local)
    X.scatter_(1, local, logits.masked_fill(inside[:, None], -torch.inf))
    return logits[:, 0].where(inside, default)


def _shifted(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


class TiledForward(_Pass):
    """Losses and numbers of a rank's queries, accumulated over the keys."""

    gradients: tuple[Tensor, ...] = ()
    kept: tuple[Tensor, ...] = ()

    def __init__(self, rows: ContrastRows) -> None:
        super().__init__(rows)
        self._sums = (PlainSums if self._bounded else OnlineSums)(self._q)
        self._of_positives = torch.zeros_like(self._positive)  # sums of the logits of positives by label

    def add_own(self) -> None:
        """Add this rank's own keys."""
        if self._is_self and self._mask.by_label:
            self._for_each_pair(self._pair, self._buffers)
        else:
            self._for_each(self._q, self._k, self._tile, self._buffers)

    def _pair(self, rows: slice, cols: slice, workspace: Workspace) -> None:
        X = self._own_negatives(rows, cols, workspace)
        of_positives = self._positive_logits(X, rows, cols)
        self._of_positives[rows] += of_positives.sum(dim=1)
        if rows != cols:
            self._of_positives[cols] += of_positives.sum(dim=0)
        self._sums.add_pair(rows, cols, X)

    def _tile(self, rows: slice, cols: slice, workspace: Workspace) -> None:
        X = self._own_negatives(rows, cols, workspace)
        if self._mask.by_label:
            self._of_positives[rows] += self._positive_logits(X, rows, cols).sum(dim=1)
        self._sums.add(rows, X)

    def _positive_logits(self, X: Tensor, rows: slice, cols: slice) -> Tensor:
        """The logits of positives by label, else 0; not a product, because an infinite logit times 0 is NaN."""
        return torch.where(self._positives(rows, cols), X, 0)

    def add(self, block: Tensor, cols: slice) -> None:
        """Add keys [m, D] of other ranks; ``cols``: their places among all keys."""
        k, start = block.to(self._scale.dtype), cols.start

        def tile(rows: slice, cols: slice, workspace: Workspace) -> None:
            others = _shifted(cols, start)
            X = product(self._q[rows], k[cols]).mul_(self._to_logits)
            if self._mask.by_label:
                self._of_positives[rows] += self._positive_logits(X, rows, others).sum(dim=1)
            self._sums.add(rows, self._drop_equal(X, rows, others, workspace))

        self._for_each(self._q, k, tile, self._buffers)

    def finish(self, weight: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
        """The weighted sum of the losses times ``factor``, and two numbers per query, [2, n].

        By index: the query's loss and its positive's logit; by label: its log-sum-exp and its number of positives.
        """
        if not self._mask.by_label:
            loss = self._sums.beyond_positive(self._positive)
            # An infinite positive would make the other logits vanish.
            loss = loss.where(self._positive.isfinite(), torch.nan)
            return weighted_sum(loss, weight) * factor, torch.stack([loss, self._positive * LOG_2])
        count = self._mask.positive_counts(len(self._q)).to(self._scale.dtype)
        loss = self._sums.above(self._of_positives / count.clamp_min(1)).masked_fill_(count == 0, 0)
        return weighted_sum(loss, weight) * factor, torch.stack([self._sums.logsumexp(), count])


class _Probabilities:
    """``w_i p_ij`` of a tile of negatives' logits, from the log-sum-exps of the queries' D_i; tiles are overwritten."""

    def __init__(self, mask: Mask, stats: Tensor, w: Tensor, shared: bool) -> None:
        lse = stats[0] + stats[1]
        if mask.by_label:
            without = stats[1] == 0
            lse, w = stats[0].masked_fill(without, torch.inf), w.masked_fill(without, 0)
        self._lse, self._shared, self.weights = lse / LOG_2, shared, w
        self._factor = w * (-lse).exp() if shared else w

    def of_rows(self, X: Tensor, queries: slice) -> Tensor:
        """Of a tile whose rows are these queries."""
        if not self._shared:
            X.sub_(self._lse[queries, None])
        return X.exp2_().mul_(self._factor[queries, None])

    def of_columns(self, X: Tensor, queries: slice) -> Tensor:
        """Of a tile whose columns are these queries: ``w_j p_ji``."""
        if not self._shared:
            X.sub_(self._lse[queries])
        return X.exp2_().mul_(self._factor[queries])

    def of_pair(self, X: Tensor, rows: slice, cols: slice, scratch: Tensor) -> Tensor:
        """``w_i p_ij + w_j p_ji`` of a tile in which ``x_ij = x_ji``."""
        factor, lse = self._factor, self._lse
        if self._shared:
            return X.exp2_().mul_(torch.add(factor[rows, None], factor[cols], out=scratch))
        torch.sub(X, lse[cols], out=scratch).exp2_().mul_(factor[cols])
        return X.sub_(lse[rows, None]).exp2_().mul_(factor[rows, None]).add_(scratch)


class TiledBackward(_Pass):
    """``sum_j G_ij k_j`` of a rank's queries and ``sum_i G_ij q_i`` of its keys.

    ``G_ij = w_i (p_ij - [j in P_i] / |P_i|)``. ``stats`` [2, n] and ``weight`` [n] are those of its queries; those of
    all ranks' queries, its own first, if keys need a gradient. ``need_query`` stands for both sides where queries are
    contrasted with each other.
    """

    def __init__(self, rows: ContrastRows, upstream: ContrastUpstream, need_query: bool, need_key: bool) -> None:
        super().__init__(rows)
        stats, mask = upstream.stats, rows.mask
        self._w, self._stats = row_weights(upstream.weight, upstream.grad_loss * upstream.factor, stats[0]), stats
        self._probabilities = _Probabilities(mask, stats, self._w, self._bounded)
        self._is_pair = self._is_self and mask.by_label
        self._of_queries = RowGradient(self._q, self._k) if need_query or self._is_self else None
        self._of_keys = RowGradient(self._k, self._q) if need_key or self._is_self else None
        if mask.by_label:  # w_i / |P_i|
            self._share = self._probabilities.weights / stats[1].clamp_min(1)

    def add_own(self) -> None:
        """Add the products of own queries and own keys, for both gradients."""
        if self._is_pair:
            self._for_each_pair(self._pair, 2)
        else:
            self._for_each(self._q, self._k, self._tile, self._buffers)

    def _pair(self, rows: slice, cols: slice, workspace: Workspace) -> None:
        H = self._of_pair(self._own_negatives(rows, cols, workspace), rows, cols, workspace)
        assert self._of_queries is not None
        self._of_queries.add_rows(rows, cols, H)
        if rows != cols:
            self._of_queries.add_cols(rows, cols, H)

    def _of_pair(self, X: Tensor, rows: slice, cols: slice, workspace: Workspace) -> Tensor:
        """``G_ij + G_ji`` of a tile of negatives' logits in which ``x_ij = x_ji``."""
        scratch, same = workspace(slice(0, len(X)), slice(0, X.shape[1]))
        H = self._probabilities.of_pair(X, rows, cols, scratch)
        if self._mask.by_label:
            torch.add(self._share[rows, None], self._share[cols], out=scratch)
            H.addcmul_(self._positives(rows, cols, same), scratch, value=-1)
        return H

    def _of_rows(self, X: Tensor, rows: slice, cols: slice, workspace: Workspace) -> Tensor:
        """``G_ij`` of a tile of negatives' logits whose rows are queries, and its columns keys."""
        G = self._probabilities.of_rows(X, rows)
        if self._mask.by_label:
            same = next(workspace(slice(0, len(X)), slice(0, X.shape[1])))
            G.addcmul_(self._positives(rows, cols, same), self._share[rows, None], value=-1)
        return G

    def _tile(self, rows: slice, cols: slice, workspace: Workspace) -> None:
        G = self._of_rows(self._own_negatives(rows, cols, workspace), rows, cols, workspace)
        if self._of_queries is not None:
            self._of_queries.add_rows(rows, cols, G)
        if self._of_keys is not None:
            self._of_keys.add_cols(rows, cols, G)

    def add(self, block: Tensor, cols: slice) -> None:
        """Add keys [m, D] of other ranks, which are queries too where queries are contrasted with each other."""
        k, start, gradient = block.to(self._scale.dtype), cols.start, self._of_queries
        if gradient is None:
            return

        def tile(rows: slice, cols: slice, workspace: Workspace) -> None:
            others = _shifted(cols, start)
            X = self._drop_equal(product(self._q[rows], k[cols]).mul_(self._to_logits), rows, others, workspace)
            G = (self._of_pair if self._is_self else self._of_rows)(X, rows, others, workspace)
            gradient.add(rows, G, k[cols])

        self._for_each(self._q, k, tile, 2 if self._is_self else self._buffers)

    def add_queries(self, block: Tensor, queries: slice) -> None:
        """Add queries [m, D] of other ranks, for the gradient of this rank's keys."""
        q, start, gradient = block.to(self._scale.dtype), queries.start, self._of_keys
        if gradient is None:
            return

        def tile(rows: slice, cols: slice, workspace: Workspace) -> None:
            others = _shifted(cols, start)
            X = product(self._k[rows], q[cols]).mul_(self._to_logits)
            G = self._probabilities.of_columns(self._drop_equal(X, rows, others, workspace, by_key=True), others)
            if self._mask.by_label:
                same = next(workspace(slice(0, len(X)), slice(0, X.shape[1])))
                G.addcmul_(self._positives(rows, others, same, by_key=True), self._share[others], value=-1)
            gradient.add(rows, G, q[cols])

        self._for_each(self._k, q, tile, self._buffers)

    def finish(
        self, inverse_q: Tensor | None, inverse_k: Tensor | None, dtype: torch.dtype, D: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the raw queries and keys (empty if not needed) and this rank's part of the scale's."""
        grad_q = None if self._of_queries is None else self._of_queries.total()
        grad_k = None if self._of_keys is None or self._is_pair else self._of_keys.total()
        if not self._mask.by_label:
            self._add_indexed(grad_q, grad_k)
        empty, grad_scale = self._q.new_empty(0, dtype=dtype), self._scale.new_zeros(())
        if self._is_self:
            assert grad_q is not None
            if grad_k is not None:
                grad_q += grad_k
            grad_q, grad_scale = to_raw_rows(grad_q, self._q, inverse_q, self._scale)
            return grad_q.to(dtype), empty, grad_scale / 2  # G_ij is in the sums of row i and of row j
        if grad_k is not None:
            grad_k, grad_scale = to_raw_rows(grad_k, self._k, inverse_k, self._scale)
        if grad_q is not None:
            grad_q, grad_scale = to_raw_rows(grad_q, self._q, inverse_q, self._scale)
        return empty if grad_q is None else grad_q.to(dtype), empty if grad_k is None else grad_k.to(dtype), grad_scale

    def _add_indexed(self, grad_q: Tensor | None, grad_k: Tensor | None) -> None:
        """Add ``G_ip = w_i (p_ip - 1)`` times the positive key to queries, times the query to its positive key."""
        n = len(self._q)
        if not n or not len(self._k):
            return
        G = self._w[:n] * (-self._stats[0, :n]).expm1()
        index = self._index.clamp(0, len(self._k) - 1)  # one out of range has a weight of NaN
        for block in row_blocks(self._q):
            if grad_q is not None:
                grad_q[block].addcmul_(G[block, None], self._k[index[block]])
            if grad_k is not None:
                add_rows(grad_k, index[block], self._q[block] * G[block, None])


def Forward(rows: ContrastRows) -> TiledForward | dense.Forward:
    """The forward that suits the matrix's size."""
    return dense.Forward(rows) if dense.covers(rows) else TiledForward(rows._replace(mask=rows.mask.coded))


def Backward(
    rows: ContrastRows, upstream: ContrastUpstream, need_query: bool, need_key: bool, kept: tuple[Tensor, ...] = ()
) -> TiledBackward | dense.Backward:
    """The backward of :func:`Forward`; nothing is ``kept`` for it."""
    if dense.covers(rows):
        return dense.Backward(rows, upstream, need_query, need_key)
    return TiledBackward(rows._replace(mask=rows.mask.coded), upstream, need_query, need_key)
