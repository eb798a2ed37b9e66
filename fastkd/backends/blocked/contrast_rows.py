"""``contrast`` of the blocked backend for several ranks: own rows against blocks of others' that arrive one by one.

Legend as in ``blocked_contrast``. Columns are numbered in the order in which they arrive, a rank's own first: query i's
positive by index, and itself, are among the first. The owner of query i computes ``sum_j G_ij k_j`` from the keys; the
owner of key j computes ``sum_i G_ij q_i`` from the queries and their numbers: no gradient travels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.backends.blocked.contrast import IndexedPositives, Negatives, label_codes, to_raw_rows
from fastkd.backends.blocked.gemm import product
from fastkd.backends.blocked.sums import OnlineSums, beyond_positive, row_weights
from fastkd.backends.blocked.tiles import Workspace, tile_slices
from fastkd.backends.masks import Mask


def shifted(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


class LabelPositives:
    """Positives by label of a tile of queries and keys, each numbered as in the mask; a query itself is none."""

    def __init__(self, mask: Mask, dtype: torch.dtype) -> None:
        assert mask.query_labels is not None
        assert mask.key_labels is not None
        queries, keys, labels = label_codes(mask.query_labels, mask.key_labels)
        members = torch.zeros(labels, dtype=torch.int64, device=keys.device).index_add_(0, keys, torch.ones_like(keys))
        self.count = (members[queries] - int(mask.exclude_self)).to(dtype)
        self._queries, self._keys = queries.to(dtype), keys.to(dtype)
        self._excludes_self = mask.exclude_self

    def tile(self, rows: slice, cols: slice) -> Tensor:
        """1 where a key is a positive of the query, else 0."""
        same = torch.eq(self._queries[rows, None], self._keys[cols]).to(self._queries.dtype)
        first, last = max(rows.start, cols.start), min(rows.stop, cols.stop)
        if self._excludes_self and first < last:
            same[first - rows.start : last - rows.start, first - cols.start : last - cols.start].fill_diagonal_(0)
        return same


class ContrastStatistics:
    """Loss and numbers of a rank's queries, accumulated over blocks of keys.

    ``mask``: of these queries and all ranks' keys.
    """

    def __init__(self, q: Tensor, scale: Tensor, mask: Mask) -> None:
        self._q, self._scale = q.to(scale.dtype), scale
        self._sums, self._negatives = OnlineSums(self._q), Negatives(mask, self._q)
        self._positives = LabelPositives(mask, scale.dtype) if mask.by_label else None
        self._of_positives = self._q.new_zeros(len(q))

    def add(self, block: Tensor, cols: slice) -> None:
        """``block``: the keys ``cols``."""
        k = block.to(self._q.dtype)
        for rows, part, workspace in _tiles(self._q, k, self._negatives.buffers):
            place = shifted(part, cols.start)
            X = product(self._q[rows], k[part]).mul_(self._scale)
            if self._positives is not None:
                # torch.where, because a logit that is not finite times 0 is NaN.
                same = self._positives.tile(rows, place)
                self._of_positives[rows] += torch.where(same > 0, X, 0).sum(dim=1)
            self._sums.add(rows, self._negatives.select(X, rows, place, workspace))

    def stats(self) -> tuple[Tensor, Tensor]:
        """The losses [n], and two numbers a query, [2, n], as in ``blocked_contrast``."""
        if self._positives is not None:
            lse, count = self._sums.logsumexp(), self._positives.count
            loss = (lse - self._of_positives / count.clamp_min(1)).masked_fill(count == 0, 0)
            return loss, torch.stack([lse, count])
        positive = self._negatives.positive
        loss = beyond_positive(self._sums.logsumexp(), positive)
        loss = loss.where(positive.isfinite(), torch.nan)
        return loss, torch.stack([loss, positive])


class _Gradient:
    """``G_ij`` of tiles, from the numbers [2, n] and weights [n] of their queries."""

    def __init__(self, like: Tensor, scale: Tensor, mask: Mask, stats: Tensor, w: Tensor) -> None:
        self._scale = scale
        self._negatives = Negatives(mask, like)
        self._positives = LabelPositives(mask, scale.dtype) if mask.by_label else None
        self._lse, self._w = stats[0] if mask.by_label else stats.sum(dim=0), w
        if mask.by_label:
            self._w = w.masked_fill(stats[1] == 0, 0)
            self._lse = self._lse.masked_fill(stats[1] == 0, torch.inf)  # no key is left: its logits' sum is no sum
            self._share = self._w / stats[1].clamp_min(1)

    def tile(self, q: Tensor, k: Tensor, rows: slice, cols: slice, workspace: Workspace) -> Tensor:
        X = self._negatives.select(product(q, k).mul_(self._scale), rows, cols, workspace)
        G = X.sub_(self._lse[rows, None]).exp_().mul_(self._w[rows, None])
        if self._positives is not None:
            G.sub_(self._positives.tile(rows, cols).mul_(self._share[rows, None]))
        return G

    @property
    def buffers(self) -> int:
        return self._negatives.buffers


class QueryGradient:
    """Gradients of a rank's queries and of the scale, ``sum_j G_ij k_j`` accumulated over blocks of keys.

    ``stats`` [2, n], ``weight`` [n] or None and the upstream gradient ``grad_loss`` are those of these queries.
    """

    def __init__(
        self, q: Tensor, scale: Tensor, mask: Mask, stats: Tensor, weight: Tensor | None, grad_loss: Tensor
    ) -> None:
        self._q, self._scale, self._mask = q.to(scale.dtype), scale, mask
        self._w, self._loss = row_weights(weight, grad_loss, stats[0]), stats[0]
        self._gradient = _Gradient(self._q, scale, mask, stats, self._w)
        self._sums = torch.zeros_like(self._q)

    def add(self, block: Tensor, cols: slice) -> None:
        """``block``: the keys ``cols``."""
        k = block.to(self._q.dtype)
        for rows, part, workspace in _tiles(self._q, k, self._gradient.buffers):
            G = self._gradient.tile(self._q[rows], k[part], rows, shifted(part, cols.start), workspace)
            self._sums[rows] += product(G, k[part].T)

    def finish(self, own: Tensor, inverse_norm: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``own``: this rank's keys, where the positives by index are."""
        if not self._mask.by_label:
            pull = (-self._loss).expm1()
            positives = IndexedPositives(self._mask, self._q, own.to(self._q.dtype), pull)
            positives.add_to_queries(self._sums, self._w)
        return to_raw_rows(self._q.new_empty(0, dtype=dtype), self._sums, self._q, inverse_norm, self._scale)


class KeyGradient:
    """Gradients of a rank's keys and of the scale, ``sum_i G_ij q_i`` accumulated over blocks of queries.

    ``mask`` describes all ranks' queries against these keys, with an index of -1 for those of others; ``stats`` and
    ``weight`` are of all queries too.
    """

    def __init__(
        self, k: Tensor, scale: Tensor, mask: Mask, stats: Tensor, weight: Tensor | None, grad_loss: Tensor
    ) -> None:
        self._k, self._scale, self._mask = k.to(scale.dtype), scale, mask
        self._w, self._loss = row_weights(weight, grad_loss, stats[0]), stats[0]
        self._gradient = _Gradient(self._w, scale, mask, stats, self._w)
        self._sums = torch.zeros_like(self._k)

    def add(self, block: Tensor, queries: slice) -> None:
        """``block``: these queries."""
        q = block.to(self._k.dtype)
        for part, cols, workspace in _tiles(q, self._k, self._gradient.buffers):
            G = self._gradient.tile(q[part], self._k[cols], shifted(part, queries.start), cols, workspace)
            self._sums[cols] += product(q[part].T.contiguous(), G.T).T

    def finish(self, own: Tensor, inverse_norm: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``own``: this rank's queries, the only ones with a positive by index among its keys."""
        if not self._mask.by_label:
            n, index = len(own), self._mask.positive_index
            mask = Mask(positive_index=None if index is None else index[:n])
            positives = IndexedPositives(mask, own.to(self._k.dtype), self._k, (-self._loss[:n]).expm1())
            positives.add_to_keys(self._sums, self._w[:n])
        return to_raw_rows(self._k.new_empty(0, dtype=dtype), self._sums, self._k, inverse_norm, self._scale)


def _tiles(rows: Tensor, columns: Tensor, buffers: int) -> Iterator[tuple[slice, slice, Workspace]]:
    """Column blocks outside: one stays in the cache while the rows pass."""
    row_blocks, col_blocks = tile_slices(len(rows), rows.device), tile_slices(len(columns), columns.device)
    if row_blocks and col_blocks:
        workspace = Workspace(rows, buffers, row_blocks[0].stop, col_blocks[0].stop)
        yield from ((i, j, workspace) for j in col_blocks for i in row_blocks)
