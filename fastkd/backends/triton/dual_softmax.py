"""``dual_softmax`` through the Triton kernels: as the blocked backend, on CUDA or in Triton's interpreter.

The kernels carry the statistics of the columns seen so far, and the sums of the gradients, from one block to the next.
"""

from typing import Any

import torch
from torch import Tensor

from fastkd.backends.blocked.sums import MAX_SHARED_SCALE
from fastkd.backends.inputs import DualRows, DualUpstream
from fastkd.backends.triton.rows import is_wide, ready, rounds_to_tf32, width_of
from fastkd.kernels.dual_softmax import streaming, wide
from fastkd.kernels.dual_softmax.per_row import coefficients, gradients, statistics
from fastkd.kernels.normalize import unit_rows


def units(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The unit rows of both sides as the kernels multiply them, [2, n, width], and their inverse norms [2, n]."""
    return unit_rows(a, b, width=width_of(a), to_tf32=rounds_to_tf32(a))


class _Pass:
    """A rank's rows as the kernels multiply them, and the kernels that fit them."""

    def __init__(self, rows: DualRows) -> None:
        self._kernels = wide if is_wide(rows.units) else streaming
        self._units = ready(rows.units)[0] if rows.is_packed else rows.units
        self._scale, self._columns = rows.scale, rows.columns
        self._bounded = rows.scale_bound <= MAX_SHARED_SCALE
        self._sums: Tensor | None = None  # what the kernels carry; None until there were columns

    def add_own(self) -> None:
        """Add the rows themselves as columns: row i's positive is column i."""
        if self._units.numel():
            self._add(self._units, 0, slice(0, self._units.shape[1]))

    def add(self, block: Tensor, cols: slice) -> None:
        """Add columns [2, m, D] of other ranks. A positive is then ``offset`` columns away, beyond the block."""
        if self._units.numel() and block.numel():
            self._add(ready(block)[0], block.shape[1], cols)

    def _add(self, columns: Tensor, offset: int, cols: slice) -> None:
        raise NotImplementedError


class Forward(_Pass):
    """As :class:`fastkd.backends.blocked.dual_softmax.Forward`."""

    gradients: tuple[Tensor, ...] = ()

    def _add(self, columns: Tensor, offset: int, cols: slice) -> None:
        self._sums = self._kernels.running_statistics(
            self._units,
            columns,
            self._scale,
            offset=offset,
            bounded=self._bounded,
            state=self._sums,
            all_columns=self._columns,
        )

    def finish(
        self, weight: Tensor | None, is_swapped: bool, factors: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sums of contrast and consistency, times the factors, and [3, n]: both log-sum-exps and E."""
        if self._sums is None:
            nothing = self._scale.new_zeros(3, 0)
            return nothing[0].sum(), nothing[1].sum(), nothing
        weight = None if weight is None else weight.contiguous()
        loss, stats = statistics(self._sums, self._scale, weight, swapped=is_swapped, factors=factors)
        return loss[0].sum(), loss[1].sum(), stats


def numbers(stats: Tensor) -> Tensor:
    """What the owner of a column needs of a row, [3, n]: all that the kernels keep."""
    return stats


class Backward(_Pass):
    """As :class:`fastkd.backends.blocked.dual_softmax.Backward`."""

    def __init__(self, rows: DualRows, stats: Tensor, upstream: DualUpstream, need_a: bool, need_b: bool) -> None:
        super().__init__(rows)
        self._needs: dict[str, Any] = {"need_a": need_a, "need_b": need_b}
        self._everyone, weight, *self._grads, self._is_swapped, self._factors = upstream
        self._weight = None if weight is None else weight.contiguous()
        self._largest_weight = None if weight is None else weight.amax()
        self._tile = self._kernels.tile_columns(self._units, bounded=self._bounded)
        if self._units.numel():
            self._coef, self._unscale = self._coefficients(slice(0, self._units.shape[1]))

    def _coefficients(self, cols: slice) -> tuple[Tensor, Tensor]:
        """The factors of G of a block of columns, whose tiles start with the block, and what undoes their scaling."""
        return coefficients(
            self._everyone[:, cols],
            None if self._weight is None else self._weight[cols],
            self._largest_weight,
            *self._grads,
            self._scale,
            swapped=self._is_swapped,
            bounded=self._bounded,
            tile=self._tile,
            factors=self._factors,
        )

    def _add(self, columns: Tensor, offset: int, cols: slice) -> None:
        column_coef = self._coef if columns is self._units else self._coefficients(cols)[0]
        self._sums = self._kernels.gradient_sums(
            self._units,
            columns,
            self._coef,
            column_coef,
            self._scale,
            offset=offset,
            bounded=self._bounded,
            partial=self._sums,
            all_columns=self._columns,
            **self._needs,
        )

    def finish(self, inverse_norm: Tensor, dtype: torch.dtype, D: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the raw rows in ``dtype`` (empty if not needed), and this rank's part of the scale's."""
        if self._sums is None:
            empty = self._units.new_empty((0, D), dtype=dtype)
            return empty, empty, self._scale.new_zeros(())
        grad_a, grad_b, dots = gradients(
            self._sums,
            self._units,
            inverse_norm.reshape(2, -1),
            self._scale,
            self._unscale,
            D=D,
            dtype=dtype,
            **self._needs,
        )
        return grad_a, grad_b, dots.sum()
