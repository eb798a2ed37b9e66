"""``contrast`` of the blocked backend: any positives and masks, in tiles of queries and keys.

Legend: ``q`` [n, D], ``k`` [N, D] are the rows that the logits ``x_ij = scale q_i . k_j`` are made of; ``p_ij`` is the
softmax over D_i, ``w_i`` the upstream gradient of query i's loss, ``G_ij`` that of ``x_ij``.

Positives by index are kept apart from the sums, as in ``blocked``: their logit is taken out of the tile that holds it.
``loss_i = log(1 + sum_{j != p} exp(x_ij - x_ip))`` and ``G_ip = w_i expm1(-loss_i)``.

Positives by label never meet the tiles: the mean of their logits is ``scale q_i . mean_{j in P_i} k_j``, and their part
of the gradients is such a sum by label too, N D operations in all. Queries contrasted with each other have
``x_ij = x_ji``: a tile serves its rows and its columns, and ``sum_j (G_ij + G_ji) q_j`` is the whole gradient. That is
N^2 D operations forward and 3 N^2 D backward, instead of 2 and 6.
"""

import torch
from torch import Tensor

from fastkd.backends.blocked.gemm import product
from fastkd.backends.blocked.sums import (
    MAX_SHARED_SCALE,
    OnlineSums,
    PlainSums,
    RowGradient,
    beyond_positive,
    row_weights,
)
from fastkd.backends.blocked.tiles import Workspace, blocks, for_each_tile, pair_rounds, rectangle_rounds
from fastkd.backends.masks import Mask
from fastkd.numerics import accumulation_dtype, unit_rows, weighted_sum

BLOCK_ELEMENTS = 1 << 18  # of the rows in a row-wise step: 1 MiB in float32


def _row_blocks(x: Tensor) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // x.shape[1])
    return [slice(start, start + size) for start in range(0, len(x), size)]


def accumulated_rows(raw_rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Contiguous rows in the accumulation dtype; if asked, as unit rows with their inverse norms [n, 1]."""
    dtype = accumulation_dtype(raw_rows.dtype)
    if not normalize:
        return raw_rows.to(dtype).contiguous(), None
    rows = raw_rows.new_empty(raw_rows.shape, dtype=dtype)
    inverse_norm = rows.new_empty(len(rows), 1)
    for block in _row_blocks(rows):
        rows[block], inverse_norm[block] = unit_rows(raw_rows[block].to(dtype))
    return rows, inverse_norm


def to_raw_rows(
    raw_rows: Tensor, grad: Tensor, rows: Tensor, inverse_norm: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """From ``grad``, the sums ``sum_j G_ij other_j``, to the gradient of the raw rows and that of the scale.

    ``grad`` is overwritten. Its dot products with the rows, which the normalisation needs, sum to the scale's.
    """
    dots = grad.new_empty(len(grad), 1)
    for block in _row_blocks(grad):
        part, row = grad[block], rows[block]
        dot = torch.sum(part * row, dim=1, keepdim=True, out=dots[block])
        if inverse_norm is not None:
            part.addcmul_(dot, row, value=-1).mul_(inverse_norm[block])
        part.mul_(scale)
    return grad.to(raw_rows.dtype), dots.sum()


def bounded_logits(q: Tensor, k: Tensor, scale: Tensor, normalize: bool) -> bool:
    """Whether one plain exponential a logit is safe; looks only where that costs no wait, on a CPU."""
    if q.device.type != "cpu":
        return False
    bound = abs(scale.item())
    if not normalize:
        longest = [torch.linalg.vector_norm(rows, dim=1).amax().item() for rows in ((q,) if q is k else (q, k))]
        bound *= longest[0] * longest[-1]
    return bound <= MAX_SHARED_SCALE


class Negatives:
    """Leaves in a tile the logits that a row's sum is made of, and takes its positive's out.

    By index, the sum is over D_i without p_i; by label, over D_i. Key j is column j, and row i is query ``start + i``:
    columns may be a part of all keys, and rows a part of all queries, if the mask describes all keys and these rows.
    ``bounded`` promises logits far below the dtype's largest number.
    """

    def __init__(self, mask: Mask, rows: Tensor, start: int = 0, *, bounded: bool = False) -> None:
        n = len(rows)
        self._start = start
        self._own = torch.arange(start, start + n, device=rows.device)
        self._excludes_self = mask.exclude_self
        self._index = None
        if not mask.by_label:
            self._index = self._own if mask.positive_index is None else mask.positive_index
        self.positive = rows.new_zeros(n)  # the positives' logits, by index
        self._codes: tuple[Tensor, Tensor] | None = None
        if not mask.by_label and mask.query_labels is not None and mask.key_labels is not None:
            # As floating-point numbers they are compared, and turned into a term to subtract, ten times as fast.
            queries, keys, _ = label_codes(mask.query_labels, mask.key_labels)
            self._codes = queries.to(rows.dtype), keys.to(rows.dtype)
        self._masked = torch.finfo(rows.dtype).max / 4 if bounded else None
        self.buffers = 0 if self._codes is None or self._masked is None else 1

    def select(self, X: Tensor, rows: slice, cols: slice, workspace: Workspace) -> Tensor:
        meets_own = self._start + rows.start < cols.stop and cols.start < self._start + rows.stop
        if self._index is not None and (meets_own or self._index is not self._own):
            found = _take_out(X, self._index[rows], cols.start, self.positive[rows])
            self.positive[rows] = found
        if self._excludes_self and meets_own:
            _take_out(X, self._own[rows], cols.start, self.positive[rows])
        if self._codes is not None:
            queries, keys = self._codes[0][rows, None], self._codes[1][cols]
            if self._masked is None:
                return X.masked_fill_(queries == keys, -torch.inf)
            (same,) = workspace(rows, cols)
            torch.eq(queries, keys, out=same)
            X.sub_(same, alpha=self._masked)
        return X


def _take_out(X: Tensor, columns: Tensor, start: int, default: Tensor) -> Tensor:
    """The logit in every row's column (``default`` where that is in another tile), which becomes -inf in the tile."""
    local = columns - start
    inside = (local >= 0) & (local < X.shape[1])
    local = local.clamp_(0, X.shape[1] - 1)[:, None]
    logits = X.gather(1, local)
    X.scatter_(1, local, logits.masked_fill(inside[:, None], -torch.inf))
    return logits[:, 0].where(inside, default)


def label_codes(query_labels: Tensor, key_labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Both as numbers 0, 1, ... for the different labels, and an upper bound of how many there are."""
    labels, order = torch.cat([query_labels, key_labels]).sort()
    is_new = torch.ones_like(labels)
    is_new[1:] = labels[1:] != labels[:-1]
    rank = is_new.cumsum(0) - 1
    codes = torch.empty_like(rank).scatter_(0, order, rank)
    # The number itself would have to be waited for on an accelerator.
    count = int(rank[-1].item()) + 1 if rank.device.type == "cpu" else len(rank)
    return codes[: len(query_labels)], codes[len(query_labels) :], count


def _add_rows(sums: Tensor, index: Tensor, rows: Tensor) -> None:
    """``sums[index_i] += rows_i``, in an order that is the same every time."""
    if sums.device.type == "cpu":
        sums.index_add_(0, index, rows)
    else:
        sums.index_put_((index,), rows, accumulate=True)


class LabelSums:
    """What the positives by label bring to losses and gradients: sums of rows by label, in float64.

    Own rows are subtracted from their label's sum, which would lose the others' digits in float32 if they are short.
    """

    def __init__(self, mask: Mask, q: Tensor, k: Tensor) -> None:
        assert mask.query_labels is not None
        assert mask.key_labels is not None
        self._q, self._k = q, k
        self._queries, self._keys, self._labels = label_codes(mask.query_labels, mask.key_labels)
        self._excludes_self = mask.exclude_self
        members = q.new_zeros(self._labels).index_add_(0, self._keys, q.new_ones(len(k)))
        self.count = members[self._queries] - float(mask.exclude_self)  # [n]
        self._key_sums = self._by_label(k, self._keys, None)

    def _by_label(self, rows: Tensor, codes: Tensor, factor: Tensor | None) -> Tensor:
        """``sum_{i of the label} factor_i rows_i`` [labels, D]."""
        sums = rows.new_zeros(self._labels, rows.shape[1], dtype=torch.float64)
        for block in _row_blocks(rows):
            part = rows[block].double() if factor is None else rows[block] * factor[block, None]
            _add_rows(sums, codes[block], part)
        return sums

    def _of_positives(self, block: slice) -> Tensor:
        """``sum_{j in P_i} k_j`` of a block of queries."""
        sums = self._key_sums[self._queries[block]]
        return sums.sub_(self._k[block]) if self._excludes_self else sums

    def mean_logits(self, scale: Tensor) -> Tensor:
        """``mean_{j in P_i} x_ij`` [n], in float64; 0 without positives."""
        dots = self._q.new_empty(len(self._q), dtype=torch.float64)
        for block in _row_blocks(self._q):
            dots[block] = (self._of_positives(block) * self._q[block]).sum(dim=1)
        return dots * scale / self.count.clamp_min(1)

    def _shares(self, w: Tensor) -> Tensor:
        return (w.double() / self.count).masked_fill(self.count == 0, 0)

    def add_to_queries(self, grad: Tensor, w: Tensor) -> None:
        """Add ``-sum_{j in P_i} w_i / |P_i| k_j``."""
        share = self._shares(w)
        for block in _row_blocks(grad):
            grad[block] -= self._of_positives(block).mul_(share[block, None])

    def add_to_keys(self, grad: Tensor, w: Tensor) -> None:
        """Add ``-sum_{i: j in P_i} w_i / |P_i| q_i``."""
        share = self._shares(w)
        sums = self._by_label(self._q, self._queries, share)
        for block in _row_blocks(grad):
            part = sums[self._keys[block]]
            if self._excludes_self:
                part -= self._q[block] * share[block, None]
            grad[block] -= part


class Probabilities:
    """``w_i p_ij`` of a tile of negatives' logits, from the log-sum-exps of the rows' D_i."""

    def __init__(self, lse: Tensor, w: Tensor, shared: bool) -> None:
        self._lse, self._shared = lse, shared
        self._factor = w * (-lse).exp() if shared else w

    def of(self, X: Tensor, rows: slice) -> Tensor:
        """Overwrites ``X``."""
        if not self._shared:
            X.sub_(self._lse[rows, None])
        return X.exp_().mul_(self._factor[rows, None])

    def of_pair(self, X: Tensor, rows: slice, cols: slice, scratch: Tensor) -> Tensor:
        """``w_i p_ij + w_j p_ji`` of a tile in which ``x_ij = x_ji``; overwrites ``X``."""
        factor, lse = self._factor, self._lse
        if self._shared:
            return X.exp_().mul_(torch.add(factor[rows, None], factor[cols], out=scratch))
        torch.sub(X, lse[cols], out=scratch).exp_().mul_(factor[cols])
        return X.sub_(lse[rows, None]).exp_().mul_(factor[rows, None]).add_(scratch)


class IndexedPositives:
    """What the positives by index bring to the gradients: ``G_ip = w_i pull_i`` with ``pull_i = p_ip - 1``."""

    def __init__(self, mask: Mask, q: Tensor, k: Tensor, pull: Tensor) -> None:
        self._q, self._k, self._pull = q, k, pull
        index = torch.arange(len(q), device=q.device) if mask.positive_index is None else mask.positive_index
        self._index = index.clamp(0, len(k) - 1)  # one out of range has a weight of NaN

    def add_to_queries(self, grad: Tensor, w: Tensor) -> None:
        G = w * self._pull
        for block in _row_blocks(grad):
            grad[block].addcmul_(G[block, None], self._k[self._index[block]])

    def add_to_keys(self, grad: Tensor, w: Tensor) -> None:
        G = w * self._pull
        for block in _row_blocks(self._q):
            _add_rows(grad, self._index[block], self._q[block] * G[block, None])


def contrast_forward(
    query: Tensor, key: Tensor | None, logit_scale: Tensor, weight: Tensor | None, mask: Mask, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the losses, and two numbers a query for the backward, [2, n].

    By index: the query's loss and its positive's logit; by label: its log-sum-exp and its number of positives.
    """
    q, _ = accumulated_rows(query, normalize)
    k = q if key is None else accumulated_rows(key, normalize)[0]
    scale = logit_scale.to(q.dtype)
    bounded = bounded_logits(q, k, scale, normalize)
    sums = (PlainSums if bounded else OnlineSums)(q)
    negatives = Negatives(mask, q, bounded=bounded)
    is_symmetric = key is None and mask.by_label

    def add_tile(rows: slice, cols: slice, workspace: Workspace) -> None:
        X = negatives.select(product(q[rows], k[cols]).mul_(scale), rows, cols, workspace)
        sums.add(rows, X)

    def add_pair(rows: slice, cols: slice, workspace: Workspace) -> None:
        X = negatives.select(product(q[rows], q[cols]).mul_(scale), rows, cols, workspace)
        sums.add_pair(rows, cols, X)

    if is_symmetric:
        for_each_tile(pair_rounds(blocks(len(q), q.device)), add_pair, q, buffers=0)
    else:
        rounds = rectangle_rounds(blocks(len(q), q.device), blocks(len(k), k.device))
        for_each_tile(rounds, add_tile, q, negatives.buffers, len(k))
    if not mask.by_label:
        loss = beyond_positive(sums.logsumexp(), negatives.positive)
        # An infinite positive would make the other logits vanish.
        loss = loss.where(negatives.positive.isfinite(), torch.nan)
        return weighted_sum(loss, weight), torch.stack([loss, negatives.positive])
    lse, positives = sums.logsumexp(), LabelSums(mask, q, k)
    loss = (lse - positives.mean_logits(scale)).to(q.dtype).masked_fill(positives.count == 0, 0)
    return weighted_sum(loss, weight), torch.stack([lse, positives.count])


def contrast_backward(
    query: Tensor,
    key: Tensor | None,
    logit_scale: Tensor,
    weight: Tensor | None,
    mask: Mask,
    stats: Tensor,
    grad_loss: Tensor,
    normalize: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key (empty if not needed) and logit_scale: ``G_ij = w_i (p_ij - [j in P_i] / |P_i|)``."""
    q, inverse_q = accumulated_rows(query, normalize)
    k, inverse_k = (q, inverse_q) if key is None else accumulated_rows(key, normalize)
    scale = logit_scale.to(q.dtype)
    w = row_weights(weight, grad_loss, q)
    shared = bounded_logits(q, k, scale, normalize)
    if key is None:
        sums = (_pair_gradient if mask.by_label else _both_gradients)(q, scale, mask, stats, w, shared)
        grad_query, grad_scale = to_raw_rows(query, sums, q, inverse_q, scale)
        # G_ij is in the sums of row i and of row j, and once in the scale's gradient.
        grad_scale, grad_key = grad_scale / 2, query.new_empty(0)
    else:
        # The gradient of logit_scale falls out of either side's, so one side is always computed.
        of_query = need_query or not need_key
        sums_q, sums_k = _gradients(q, k, scale, mask, stats, w, shared, of_query, need_key)
        grad_query = grad_key = query.new_empty(0)
        if sums_q is not None:
            grad_query, grad_scale = to_raw_rows(query, sums_q, q, inverse_q, scale)
        if sums_k is not None:
            grad_key, grad_scale = to_raw_rows(key, sums_k, k, inverse_k, scale)
    if not need_query:
        grad_query = query.new_empty(0)
    return grad_query, grad_key, grad_scale.to(logit_scale.dtype)


def _probabilities(mask: Mask, stats: Tensor, w: Tensor, shared: bool) -> Probabilities:
    if not mask.by_label:
        return Probabilities(stats[0] + stats[1], w, shared)
    without = stats[1] == 0
    return Probabilities(stats[0].masked_fill(without, torch.inf), w.masked_fill(without, 0), shared)


def _pair_gradient(q: Tensor, scale: Tensor, mask: Mask, stats: Tensor, w: Tensor, shared: bool) -> Tensor:
    """``sum_j (G_ij + G_ji) q_j`` [n, D] of queries contrasted with each other, positives by label."""
    row_blocks = blocks(len(q), q.device)
    gradient = RowGradient(q, q, row_blocks)
    negatives, probabilities = Negatives(mask, q, bounded=shared), _probabilities(mask, stats, w, shared)

    def add_pair(rows: slice, cols: slice, workspace: Workspace) -> None:
        X = negatives.select(product(q[rows], q[cols]).mul_(scale), rows, cols, workspace)
        (scratch,) = workspace(rows, cols)
        H = probabilities.of_pair(X, rows, cols, scratch)
        gradient.add_rows(rows, cols, H)
        if rows != cols:
            gradient.add_cols(rows, cols, H)

    for_each_tile(pair_rounds(row_blocks), add_pair, q, buffers=1)
    sums, positives = gradient.total(), LabelSums(mask, q, q)
    positives.add_to_queries(sums, w)
    positives.add_to_keys(sums, w)
    return sums


def _both_gradients(q: Tensor, scale: Tensor, mask: Mask, stats: Tensor, w: Tensor, shared: bool) -> Tensor:
    """The same with positives by index."""
    of_queries, of_keys = _gradients(q, q, scale, mask, stats, w, shared, True, True)
    assert of_queries is not None
    assert of_keys is not None
    return of_queries.add_(of_keys)


def _gradients(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    mask: Mask,
    stats: Tensor,
    w: Tensor,
    shared: bool,
    of_queries: bool,
    of_keys: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``sum_j G_ij k_j`` [n, D] and ``sum_i G_ij q_i`` [N, D]."""
    row_blocks, col_blocks = blocks(len(q), q.device), blocks(len(k), k.device)
    rows_gradient = RowGradient(q, k, row_blocks, by_cols=False) if of_queries else None
    cols_gradient = RowGradient(k, q, row_blocks, by_rows=False) if of_keys else None
    negatives, probabilities = Negatives(mask, q, bounded=shared), _probabilities(mask, stats, w, shared)

    def add_tile(rows: slice, cols: slice, workspace: Workspace) -> None:
        X = negatives.select(product(q[rows], k[cols]).mul_(scale), rows, cols, workspace)
        G = probabilities.of(X, rows)
        if rows_gradient is not None:
            rows_gradient.add_rows(rows, cols, G)
        if cols_gradient is not None:
            cols_gradient.add_cols(rows, cols, G)

    for_each_tile(rectangle_rounds(row_blocks, col_blocks), add_tile, q, negatives.buffers, len(k))
    sums_q, sums_k = (None if gradient is None else gradient.total() for gradient in (rows_gradient, cols_gradient))
    positives = LabelSums(mask, q, k) if mask.by_label else IndexedPositives(mask, q, k, (-stats[0]).expm1())
    if sums_q is not None:
        positives.add_to_queries(sums_q, w)
    if sums_k is not None:
        positives.add_to_keys(sums_k, w)
    return sums_q, sums_k
