"""``contrast`` through the Triton kernels: as the blocked backend, on CUDA or in Triton's interpreter.

A tile compares labels element by element, which costs an instruction per pair. The other way to the positives of a
label, sums of the keys of each label, would add up rounded p_ij and 1 / |P_i| apart, and lose the digits of their
difference where a loss has almost converged.
"""

import dataclasses

import torch
from torch import Tensor

from fastkd.backends.inputs import ContrastRows, ContrastUpstream
from fastkd.backends.triton.rows import is_wide, ready, rounds_to_tf32, width_of
from fastkd.kernels.contrast import streaming, wide
from fastkd.kernels.contrast.per_row import Side, coefficients, gradients, statistics
from fastkd.kernels.normalize import unit_rows


def rows(raw_rows: tuple[Tensor, ...], normalize: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Rows of each side as the kernels multiply them, [n, width], and inverse norms [n] if they are normalised."""
    first, last = raw_rows[0], raw_rows[-1]
    if normalize and len(raw_rows) == 2 and first.shape == last.shape:
        units, inverse_norm = unit_rows(first, last, width=width_of(first), to_tf32=rounds_to_tf32(first))
        return list(zip(units.unbind(), inverse_norm.unbind(), strict=True))
    return [ready(x, normalize) for x in raw_rows]


class _Pass:
    """A rank's queries and keys as the kernels take them; without ``k``, queries are contrasted with each other."""

    def __init__(self, rows: ContrastRows) -> None:
        self._kernels = wide if is_wide(rows.queries) else streaming
        self._scale, self._mask, self._is_self = rows.scale, rows.mask.coded, rows.keys is None
        self._options = {"by_label": rows.mask.by_label, "exclude_self": rows.mask.exclude_self}
        self._columns = rows.columns
        # On several ranks the factors of all queries are needed, and known later.
        self._keeps_factors = rows.needs is not None and not rows.is_packed
        q, k = rows.queries, rows.queries if rows.keys is None else rows.keys
        if rows.is_packed:
            q, k = ready(q)[0], ready(k)[0]
        self._labels = self._mask.labels or (None, None)
        index = rows.mask.positive_index
        positive = None if index is None else index.contiguous()
        self._queries = Side(vectors=q, labels=self._part(0, slice(0, q.shape[0])), positive=positive)
        self._keys = Side(vectors=k, labels=self._part(1, slice(0, k.shape[0])))

    def _part(self, side: int, rows: slice) -> Tensor | None:
        labels = self._labels[side]
        return None if labels is None else labels[rows]

    def _other_keys(self, block: Tensor, cols: slice) -> Side:
        return Side(vectors=ready(block)[0], first=cols.start, labels=self._part(1, cols))


class Forward(_Pass):
    """As :class:`fastkd.backends.blocked.contrast.Forward`."""

    gradients: tuple[Tensor, ...] = ()
    kept: tuple[Tensor, ...] = ()  # the factors of the backward, on one rank
    _state: Tensor | None = None  # what the kernels carry; None until there were keys

    def add_own(self) -> None:
        """Add this rank's own keys."""
        self._add(self._keys)

    def add(self, block: Tensor, cols: slice) -> None:
        """Add keys [m, D] of other ranks; ``cols``: their places among all keys."""
        self._add(self._other_keys(block, cols))

    def _add(self, keys: Side) -> None:
        if self._queries.vectors.shape[0] and keys.vectors.shape[0]:
            self._state = self._kernels.running_statistics(
                self._queries, keys, self._scale, state=self._state, all_columns=self._columns, **self._options
            )

    def finish(self, weight: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
        """The weighted sum of the losses times ``factor``, and two numbers per query, [2, n]."""
        if self._state is None:
            return self._scale.new_zeros(()), self._scale.new_zeros(2, 0)
        count = self._mask.positive_counts(self._queries.vectors.shape[0]) if self._mask.by_label else None
        weight = None if weight is None else weight.contiguous()
        loss, stats, self.kept = statistics(self._state, weight, count, factor=factor, needs_coef=self._keeps_factors)
        return loss.sum(), stats


class Backward(_Pass):
    """As :class:`fastkd.backends.blocked.contrast.Backward`. The tiles hold the positives by index too."""

    def __init__(
        self,
        rows: ContrastRows,
        upstream: ContrastUpstream,
        need_query: bool,
        need_key: bool,
        kept: tuple[Tensor, ...] = (),
    ) -> None:
        super().__init__(rows)
        self._needs = need_query or self._is_self, need_key and not self._is_self
        self._of_queries: Tensor | None = None  # sums of the gradients; None until there was something to add
        self._of_keys: Tensor | None = None
        stats, weight, self._grad_loss, factor = upstream
        if stats.shape[1]:
            if not kept:
                weight = None if weight is None else weight.contiguous()
                kept = coefficients(stats, weight, by_label=rows.mask.by_label, factor=factor)
            self._coef, self._unscale = kept
            self._queries = dataclasses.replace(self._queries, coef=self._coef[:, : rows.queries.shape[0]])

    def _sums(self, rows: Side, columns: Side, sums: Tensor | None, all_columns: int) -> Tensor | None:
        if not (rows.vectors.shape[0] and columns.vectors.shape[0]):
            return sums
        return self._kernels.gradient_sums(
            rows, columns, self._scale, partial=sums, all_columns=all_columns, **self._options
        )

    def add_own(self) -> None:
        """Add the products of own queries and own keys, for both gradients."""
        if self._needs[0]:
            keys = self._queries if self._is_self else self._keys
            self._of_queries = self._sums(self._queries, keys, self._of_queries, self._columns)
        if self._needs[1]:
            self._of_keys = self._sums(self._keys, self._queries, self._of_keys, self._coef.shape[1])

    def add(self, block: Tensor, cols: slice) -> None:
        """Add keys [m, D] of other ranks, which are queries too where queries are contrasted with each other."""
        if self._needs[0]:
            keys = self._other_keys(block, cols)
            if self._is_self:
                keys = dataclasses.replace(keys, coef=self._coef[:, cols], positive=self._no_positive(len(block)))
            self._of_queries = self._sums(self._queries, keys, self._of_queries, self._columns)

    def add_queries(self, block: Tensor, queries: slice) -> None:
        """Add queries [m, D] of other ranks, for the gradient of this rank's keys."""
        if self._needs[1]:
            columns = Side(
                vectors=ready(block)[0],
                first=queries.start,
                labels=self._part(0, queries),
                positive=self._no_positive(len(block)),
                coef=self._coef[:, queries],
            )
            self._of_keys = self._sums(self._keys, columns, self._of_keys, self._coef.shape[1])

    def _no_positive(self, n: int) -> Tensor | None:
        """Queries of other ranks have no positive by index among this rank's keys."""
        index = self._mask.positive_index
        return None if index is None else index.new_full((n,), -1)

    def finish(
        self, inverse_q: Tensor | None, inverse_k: Tensor | None, dtype: torch.dtype, D: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the raw queries and keys (empty if not needed) and this rank's part of the scale's."""
        grad_query = grad_key = self._queries.vectors.new_empty(0, dtype=dtype)
        if self._needs[1]:
            grad_key, grad_scale = self._raw(self._of_keys, self._keys, inverse_k, dtype, D)
        if self._needs[0]:  # on all ranks the same side must yield the gradient of the scale, also where it is zero
            grad_query, grad_scale = self._raw(self._of_queries, self._queries, inverse_q, dtype, D)
        return grad_query, grad_key, grad_scale / 2 if self._is_self else grad_scale

    def _raw(
        self, sums: Tensor | None, side: Side, inverse_norm: Tensor | None, dtype: torch.dtype, D: int
    ) -> tuple[Tensor, Tensor]:
        """The gradient of a side's raw rows, and its part of the scale's."""
        if sums is None:
            return side.vectors.new_zeros(side.vectors.shape[0], D, dtype=dtype), self._scale.new_zeros(())
        inverse_norm = None if inverse_norm is None else inverse_norm.reshape(-1)
        grad, dots = gradients(
            sums, side.vectors, inverse_norm, self._scale, self._unscale, self._grad_loss, D=D, dtype=dtype
        )
        return grad, dots.sum()
