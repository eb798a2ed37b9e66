"""``contrast`` of the blocked backend: any positives and masks, in tiles of queries and keys.

A rank's own queries meet its own keys first (``add_own``), and then the keys of other ranks block by block (``add``).
The owner of key j computes ``sum_i G_ij q_i`` from the queries of other ranks and their numbers (``add_queries``): no
gradient travels.

Legend. ``q`` [n, D], ``k`` [N, D]: the rows that the logits ``x_ij = scale q_i . k_j`` are made of. ``p_ij``: the
softmax over D_i. ``w_i``: the upstream gradient of query i's loss. ``G_ij``: the gradient of ``x_ij``.

Positives by index are kept apart from the sums, as in ``dual_softmax``: their logit is taken out of the tile that holds
it. ``loss_i = log(1 + sum_{j != p} exp(x_ij - x_ip))`` and ``G_ip = w_i expm1(-loss_i)``.

Positives by label never meet the tiles. The mean of their logits is ``scale q_i . mean_{j in P_i} k_j``, and their
part of the gradients is such a sum by label too, N D operations in all. Queries contrasted with each other have ``x_ij
= x_ji``: a tile serves its rows and its columns, and ``sum_j (G_ij + G_ji) q_j`` is the whole gradient. That is N^2 D
operations forward and 3 N^2 D backward, instead of 2 and 6.
"""

import torch
from torch import Tensor

from fastkd.backends.blocked.gemm import product
from fastkd.backends.blocked.sums import (
    MAX_SHARED_SCALE,
    LabelSums,
    OnlineSums,
    PlainSums,
    RowGradient,
    add_rows,
    beyond_positive,
    row_blocks,
    row_weights,
    to_raw_rows,
)
from fastkd.backends.blocked.tiles import Tile, Workspace, blocks, for_each_tile, pair_rounds, rectangle_rounds
from fastkd.backends.inputs import ContrastRows, ContrastUpstream
from fastkd.backends.masks import Mask
from fastkd.numerics import accumulation_dtype, unit_rows, weighted_sum


def rows(raw_rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Contiguous rows in the accumulation dtype; if asked, as unit rows with their inverse norms [n, 1]."""
    dtype = accumulation_dtype(raw_rows.dtype)
    if not normalize:
        return raw_rows.to(dtype).contiguous(), None
    units = raw_rows.new_empty(raw_rows.shape, dtype=dtype)
    inverse_norm = units.new_empty(len(units), 1)
    for block in row_blocks(units):
        units[block], inverse_norm[block] = unit_rows(raw_rows[block].to(dtype))
    return units, inverse_norm


def _are_bounded(q: Tensor, k: Tensor, rows: ContrastRows) -> bool:
    """Whether one plain exponential per logit is safe; looks only where that costs no wait, on a CPU."""
    if q.device.type != "cpu" or (rows.is_packed and not rows.normalized):  # other ranks' rows may be longer
        return False
    bound = abs(rows.scale.item())
    if not rows.normalized:
        longest = [torch.linalg.vector_norm(x, dim=1).amax().item() for x in ((q,) if q is k else (q, k))]
        bound *= longest[0] * longest[-1]
    return bound <= MAX_SHARED_SCALE


class _Pass:
    """A rank's queries and keys in the accumulation dtype, and what the masks take out of a tile."""

    def __init__(self, rows: ContrastRows) -> None:
        self._scale, self._mask = scale, mask = rows.scale, rows.mask
        self._q = rows.queries.to(scale.dtype)
        self._is_self = rows.keys is None
        self._k = self._q if rows.keys is None else rows.keys.to(scale.dtype)
        self._bounded = _are_bounded(self._q, self._k, rows)
        q = self._q
        self._own = torch.arange(len(q), device=q.device)
        self._index = self._own if mask.positive_index is None else mask.positive_index
        self._positive = self._q.new_zeros(len(q))  # the positives' logits, by index
        self._codes: tuple[Tensor, Tensor] | None = None
        if mask.labels is not None and not mask.by_label:
            # As floating-point numbers they are compared, and turned into a term to subtract, ten times as fast.
            self._codes = mask.labels[0].to(scale.dtype), mask.labels[1].to(scale.dtype)
        self._masked = torch.finfo(scale.dtype).max / 4  # subtracted from a bounded logit: its exponential is 0
        self._buffers = 1 if self._codes is not None and self._bounded else 0

    def _for_each(self, rows: Tensor, columns: Tensor, tile: Tile, buffers: int) -> None:
        rounds = rectangle_rounds(blocks(len(rows), rows.device), blocks(len(columns), columns.device))
        for_each_tile(rounds, tile, rows, buffers, len(columns))

    def _for_each_pair(self, tile: Tile, buffers: int) -> None:
        for_each_tile(pair_rounds(blocks(len(self._q), self._q.device)), tile, self._q, buffers)

    def _own_negatives(self, rows: slice, cols: slice, workspace: Workspace) -> Tensor:
        """The logits of own queries and keys that the queries' sums are made of; positives by index are taken out."""
        X = product(self._q[rows], self._k[cols]).mul_(self._scale)
        meets_own = rows.start < cols.stop and cols.start < rows.stop
        if not self._mask.by_label and (meets_own or self._index is not self._own):
            self._positive[rows] = _take_out(X, self._index[rows], cols.start, self._positive[rows])
        if self._mask.exclude_self and meets_own:
            _take_out(X, self._own[rows], cols.start, self._positive[rows])
        if self._codes is not None:
            self._drop_equal(X, self._codes[0][rows, None], self._codes[1][cols], rows, cols, workspace)
        return X

    def _drop_equal(
        self, X: Tensor, left: Tensor, right: Tensor, rows: slice, cols: slice, workspace: Workspace
    ) -> None:
        """Take the logits of equal labels out of a tile."""
        if not self._bounded:
            X.masked_fill_(left == right, -torch.inf)
            return
        (same,) = workspace(rows, cols)
        torch.eq(left, right, out=same)
        X.sub_(same, alpha=self._masked)


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


class Forward(_Pass):
    """Losses and numbers of a rank's queries, accumulated over the keys."""

    def __init__(self, rows: ContrastRows) -> None:
        super().__init__(rows)
        self._sums = (PlainSums if self._bounded else OnlineSums)(self._q)
        self._positives: LabelSums | None = None
        if rows.mask.by_label:
            assert rows.mask.labels is not None
            self._positives = LabelSums(torch.cat(rows.mask.labels), self._q.shape[1])

    def add_own(self) -> None:
        """Add this rank's own keys."""
        if self._is_self and self._mask.by_label:
            self._for_each_pair(self._pair, self._buffers)
        else:
            self._for_each(self._q, self._k, self._tile, self._buffers)
        self._add_positives(self._k, slice(0, len(self._k)))

    def _pair(self, rows: slice, cols: slice, workspace: Workspace) -> None:
        self._sums.add_pair(rows, cols, self._own_negatives(rows, cols, workspace))

    def _tile(self, rows: slice, cols: slice, workspace: Workspace) -> None:
        self._sums.add(rows, self._own_negatives(rows, cols, workspace))

    def add(self, block: Tensor, cols: slice) -> None:
        """Add keys [m, D] of other ranks; ``cols``: their places among all keys."""
        k, start = block.to(self._scale.dtype), cols.start

        def tile(rows: slice, cols: slice, workspace: Workspace) -> None:
            X = product(self._q[rows], k[cols]).mul_(self._scale)
            if self._codes is not None:
                queries, keys = self._codes[0][rows, None], self._codes[1][_shifted(cols, start)]
                self._drop_equal(X, queries, keys, rows, cols, workspace)
            self._sums.add(rows, X)

        self._for_each(self._q, k, tile, self._buffers)
        self._add_positives(k, cols)

    def _add_positives(self, k: Tensor, cols: slice) -> None:
        if self._positives is not None:
            assert self._mask.labels is not None
            self._positives.add(k, self._mask.labels[1][cols])

    def finish(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weighted sum of the losses, and two numbers per query, [2, n].

        By index: the query's loss and its positive's logit; by label: its log-sum-exp and its number of positives.
        """
        lse = self._sums.logsumexp()
        if self._positives is None:
            loss = beyond_positive(lse, self._positive)
            # An infinite positive would make the other logits vanish.
            loss = loss.where(self._positive.isfinite(), torch.nan)
            return weighted_sum(loss, weight), torch.stack([loss, self._positive])
        assert self._mask.labels is not None
        count = self._mask.positive_counts(len(self._q)).to(lse.dtype)
        mean = lse.new_empty(len(self._q), dtype=torch.float64)  # of the positives' logits
        for block in row_blocks(self._q):
            sums = self._positives.of(self._mask.labels[0][block][: len(self._q[block])])
            if self._is_self:
                sums -= self._q[block]
            mean[block] = (sums * self._q[block]).sum(dim=1)
        mean = mean * self._scale / count.clamp_min(1)
        loss = (lse - mean).to(lse.dtype).masked_fill(count == 0, 0)
        return weighted_sum(loss, weight), torch.stack([lse, count])


class _Probabilities:
    """``w_i p_ij`` of a tile of negatives' logits, from the log-sum-exps of the queries' D_i; tiles are overwritten."""

    def __init__(self, mask: Mask, stats: Tensor, w: Tensor, shared: bool) -> None:
        lse = stats[0] + stats[1]
        if mask.by_label:
            without = stats[1] == 0
            lse, w = stats[0].masked_fill(without, torch.inf), w.masked_fill(without, 0)
        self._lse, self._shared = lse, shared
        self._factor = w * (-lse).exp() if shared else w

    def of_rows(self, X: Tensor, queries: slice) -> Tensor:
        """Of a tile whose rows are these queries."""
        if not self._shared:
            X.sub_(self._lse[queries, None])
        return X.exp_().mul_(self._factor[queries, None])

    def of_columns(self, X: Tensor, queries: slice) -> Tensor:
        """Of a tile whose columns are these queries: ``w_j p_ji``."""
        if not self._shared:
            X.sub_(self._lse[queries])
        return X.exp_().mul_(self._factor[queries])

    def of_pair(self, X: Tensor, rows: slice, cols: slice, scratch: Tensor) -> Tensor:
        """``w_i p_ij + w_j p_ji`` of a tile in which ``x_ij = x_ji``."""
        factor, lse = self._factor, self._lse
        if self._shared:
            return X.exp_().mul_(torch.add(factor[rows, None], factor[cols], out=scratch))
        torch.sub(X, lse[cols], out=scratch).exp_().mul_(factor[cols])
        return X.sub_(lse[rows, None]).exp_().mul_(factor[rows, None]).add_(scratch)


class Backward(_Pass):
    """``sum_j G_ij k_j`` of a rank's queries and ``sum_i G_ij q_i`` of its keys.

    ``G_ij = w_i (p_ij - [j in P_i] / |P_i|)``. ``stats`` [2, n] and ``weight`` [n] are those of its queries; those of
    all ranks' queries, its own first, if keys need a gradient. ``need_query`` stands for both sides where queries are
    contrasted with each other.
    """

    def __init__(self, rows: ContrastRows, upstream: ContrastUpstream, need_query: bool, need_key: bool) -> None:
        super().__init__(rows)
        stats, mask, D = upstream.stats, rows.mask, self._q.shape[1]
        self._w, self._stats = row_weights(upstream.weight, upstream.grad_loss, stats[0]), stats
        self._probabilities = _Probabilities(mask, stats, self._w, self._bounded)
        self._is_pair = self._is_self and mask.by_label
        self._of_queries = RowGradient(self._q, self._k) if need_query or self._is_self else None
        self._of_keys = RowGradient(self._k, self._q) if need_key or self._is_self else None
        self._key_sums: LabelSums | None = None
        self._query_sums: LabelSums | None = None
        if mask.by_label:
            assert mask.labels is not None
            self._share = (self._w.double() / stats[1]).masked_fill(stats[1] == 0, 0)  # w_i / |P_i|
            codes = torch.cat(mask.labels)
            self._key_sums, self._query_sums = (LabelSums(codes, D) for _ in range(2))

    def add_own(self) -> None:
        """Add the products of own queries and own keys, for both gradients."""
        if self._is_pair:
            self._for_each_pair(self._pair, max(1, self._buffers))
        else:
            self._for_each(self._q, self._k, self._tile, self._buffers)
        self._add_positives(self._k, slice(0, len(self._k)), self._q, slice(0, len(self._q)))

    def _pair(self, rows: slice, cols: slice, workspace: Workspace) -> None:
        X = self._own_negatives(rows, cols, workspace)
        (scratch,) = workspace(rows, cols)
        H = self._probabilities.of_pair(X, rows, cols, scratch)
        assert self._of_queries is not None
        self._of_queries.add_rows(rows, cols, H)
        if rows != cols:
            self._of_queries.add_cols(rows, cols, H)

    def _tile(self, rows: slice, cols: slice, workspace: Workspace) -> None:
        G = self._probabilities.of_rows(self._own_negatives(rows, cols, workspace), rows)
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
            X = product(self._q[rows], k[cols]).mul_(self._scale)
            if self._codes is not None:
                self._drop_equal(X, self._codes[0][rows, None], self._codes[1][others], rows, cols, workspace)
            if self._is_self:
                (scratch,) = workspace(rows, cols)
                G = self._probabilities.of_pair(X, rows, others, scratch)
            else:
                G = self._probabilities.of_rows(X, rows)
            gradient.add(rows, G, k[cols])

        self._for_each(self._q, k, tile, max(int(self._is_self), self._buffers))
        self._add_positives(k, cols, *((k, cols) if self._is_self else (None, cols)))

    def add_queries(self, block: Tensor, queries: slice) -> None:
        """Add queries [m, D] of other ranks, for the gradient of this rank's keys."""
        q, start, gradient = block.to(self._scale.dtype), queries.start, self._of_keys
        if gradient is None:
            return

        def tile(rows: slice, cols: slice, workspace: Workspace) -> None:
            others = _shifted(cols, start)
            X = product(self._k[rows], q[cols]).mul_(self._scale)
            if self._codes is not None:
                self._drop_equal(X, self._codes[1][rows, None], self._codes[0][others], rows, cols, workspace)
            gradient.add(rows, self._probabilities.of_columns(X, others), q[cols])

        self._for_each(self._k, q, tile, self._buffers)
        self._add_positives(None, queries, q, queries)

    def _add_positives(self, k: Tensor | None, keys: slice, q: Tensor | None, queries: slice) -> None:
        if self._key_sums is None or self._query_sums is None or self._mask.labels is None:
            return
        if k is not None:
            self._key_sums.add(k, self._mask.labels[1][keys])
        if q is not None and self._of_keys is not None:
            self._query_sums.add(q, self._mask.labels[0][queries], self._share[queries])

    def finish(
        self, inverse_q: Tensor | None, inverse_k: Tensor | None, dtype: torch.dtype, D: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the raw queries and keys (empty if not needed) and this rank's part of the scale's."""
        grad_q = None if self._of_queries is None else self._of_queries.total()
        grad_k = None if self._of_keys is None or self._is_pair else self._of_keys.total()
        if self._mask.by_label:
            self._subtract_labels(grad_q, grad_q if self._is_pair else grad_k)
        else:
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

    def _subtract_labels(self, grad_q: Tensor | None, grad_k: Tensor | None) -> None:
        """Subtract ``sum_{j in P_i} w_i / |P_i| k_j`` from queries, ``sum_{i: j in P_i} w_i / |P_i| q_i`` from keys."""
        assert self._mask.labels is not None
        assert self._key_sums is not None
        assert self._query_sums is not None
        n, share = len(self._q), self._share[: len(self._q)]
        queries, keys = self._mask.labels[0][:n], self._mask.labels[1][: len(self._k)]
        for block in [] if grad_q is None else row_blocks(grad_q):
            sums = self._key_sums.of(queries[block])
            if self._is_self:
                sums -= self._q[block]
            grad_q[block] -= sums.mul_(share[block, None])  # type: ignore[index]
        for block in [] if grad_k is None else row_blocks(grad_k):
            sums = self._query_sums.of(keys[block])
            if self._is_self:
                sums -= self._q[block] * share[block, None]
            grad_k[block] -= sums  # type: ignore[index]

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
