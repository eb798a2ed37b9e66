"""``contrast`` through the Triton kernels for several ranks: as ``blocked_contrast_rows``, on CUDA or interpreted.

The kernels carry the statistics of the keys seen so far, and the sums of a gradient, from one block to the next; a
block's rows are numbered from its first column on.
"""

import torch
import triton
from torch import Tensor

from fastkd.backends.masks import Mask
from fastkd.backends.triton.contrast import is_wide, numbered, rounds_to_tf32
from fastkd.kernels.contrast import streaming as contrast
from fastkd.kernels.contrast import wide as contrast_wide
from fastkd.kernels.contrast.per_row import Side, coefficients, gradients, statistics
from fastkd.kernels.normalize import padded_width, vectors


class _Rows:
    """A rank's packed rows and the mask as the kernels want them: vectors of a tile's width, labels as int32."""

    def __init__(self, rows: Tensor, scale: Tensor, mask: Mask) -> None:
        self.D, self.scale = rows.shape[1], scale
        self.kernels = contrast_wide if is_wide(rows) else contrast
        self.options = {"by_label": mask.by_label, "exclude_self": mask.exclude_self}
        self._width = triton.cdiv(self.D, 8) * 8 if is_wide(rows) else padded_width(self.D)
        self._to_tf32 = rounds_to_tf32(rows)
        self.positive = None if mask.positive_index is None else mask.positive_index.contiguous()
        with torch.cuda.device_of(rows):
            self.vectors = self.padded(rows)
            self.query_labels, self.key_labels, self.count = None, None, None
            if mask.query_labels is not None and mask.key_labels is not None:
                self.query_labels, self.key_labels, count = numbered(mask.query_labels, mask.key_labels)
                self.count = count - int(mask.exclude_self) if mask.by_label else None

    def padded(self, rows: Tensor) -> Tensor:
        if not len(rows) or (self._width == self.D and not self._to_tf32):
            return rows.contiguous()
        return vectors(rows, self._width, normalize=False, to_tf32=self._to_tf32)[0]

    def keys(self, block: Tensor, cols: slice) -> Side:
        labels = None if self.key_labels is None else self.key_labels[cols]
        return Side(vectors=self.padded(block), first=cols.start, labels=labels)


class ContrastStatistics(_Rows):
    """As :class:`fastkd.backends.blocked.contrast_rows.ContrastStatistics`."""

    def __init__(self, q: Tensor, scale: Tensor, mask: Mask) -> None:
        super().__init__(q, scale, mask)
        self._queries = Side(vectors=self.vectors, labels=self.query_labels, positive=self.positive)
        self._state: Tensor | None = None

    def add(self, block: Tensor, cols: slice) -> None:
        if not (len(self.vectors) and len(block)):
            return
        with torch.cuda.device_of(block):
            self._state = self.kernels.running_statistics(
                self._queries, self.keys(block, cols), self.scale, state=self._state, **self.options
            )

    def stats(self) -> tuple[Tensor, Tensor]:
        if self._state is None:
            return self.scale.new_zeros(0), self.scale.new_zeros(2, 0)
        with torch.cuda.device_of(self._state):
            return statistics(self._state, None, self.count)


class _Gradient(_Rows):
    """The sums of a side's gradient. The tiles hold the positives by index too, so that :meth:`finish` adds none."""

    def __init__(
        self, rows: Tensor, scale: Tensor, mask: Mask, stats: Tensor, weight: Tensor | None, grad_loss: Tensor
    ) -> None:
        super().__init__(rows, scale, mask)
        self._partial: Tensor | None = None
        if stats.shape[1]:
            weight = None if weight is None else weight.contiguous()
            with torch.cuda.device_of(rows):
                self.coef, self._unscale = coefficients(stats, weight, grad_loss, by_label=mask.by_label)

    def _add(self, rows: Side, columns: Side) -> None:
        self._partial = self.kernels.gradient_sums(rows, columns, self.scale, partial=self._partial, **self.options)

    def finish(self, own: Tensor, inverse_norm: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._partial is None:
            return self.vectors.new_zeros(len(self.vectors), self.D, dtype=dtype), self.scale.new_zeros(())
        inverse_norm = None if inverse_norm is None else inverse_norm.reshape(-1)
        with torch.cuda.device_of(self._partial):
            grad, dots = gradients(
                self._partial, self.vectors, inverse_norm, self.scale, self._unscale, D=self.D, dtype=dtype
            )
        return grad, dots.sum()


class QueryGradient(_Gradient):
    """As :class:`fastkd.backends.blocked.contrast_rows.QueryGradient`."""

    def add(self, block: Tensor, cols: slice) -> None:
        if not (len(self.vectors) and len(block)):
            return
        with torch.cuda.device_of(block):
            queries = Side(vectors=self.vectors, labels=self.query_labels, positive=self.positive, coef=self.coef)
            self._add(queries, self.keys(block, cols))


class KeyGradient(_Gradient):
    """As :class:`fastkd.backends.blocked.contrast_rows.KeyGradient`."""

    def add(self, block: Tensor, queries: slice) -> None:
        if not (len(self.vectors) and len(block)):
            return
        with torch.cuda.device_of(block):
            columns = Side(
                vectors=self.padded(block),
                first=queries.start,
                labels=None if self.query_labels is None else self.query_labels[queries],
                positive=None if self.positive is None else self.positive[queries],
                coef=self.coef[:, queries],
            )
            self._add(Side(vectors=self.vectors, labels=self.key_labels), columns)
