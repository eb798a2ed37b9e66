"""``dual_softmax`` through the Triton kernels: as :mod:`fastkd.backends.blocked.dual_softmax`, on CUDA or in the interpreter.

The kernels carry the statistics of the columns seen so far, and the sums of the gradients, from one block to the next.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fastkd.backends.blocked.sums import MAX_SHARED_SCALE
from fastkd.kernels.dual_softmax import streaming as dual_softmax
from fastkd.kernels.dual_softmax import wide as dual_softmax_wide
from fastkd.kernels.dual_softmax.per_row import coefficients, gradients, statistics
from fastkd.kernels.launch import allows_tf32, fits, hardware_of
from fastkd.kernels.normalize import padded_width, unit_rows


def _is_wide(rows: Tensor) -> bool:
    """Whether the cosines come from torch.mm: rows too wide for a tile, or fp32 products that must not be tf32."""
    if not fits(rows.dtype, padded_width(rows.shape[1]), hardware_of(rows.device)):
        return True
    return rows.is_cuda and rows.dtype == torch.float32 and not allows_tf32()


def _width(rows: Tensor) -> int:
    D = rows.shape[1]
    return triton.cdiv(D, 8) * 8 if _is_wide(rows) else padded_width(D)


def units(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    to_tf32 = a.is_cuda and a.dtype == torch.float32 and not _is_wide(a)
    with torch.cuda.device_of(a):
        return unit_rows(a, b, width=_width(a), to_tf32=to_tf32)


class _Pass:
    """A rank's rows, padded with zeros to a tile's width, and the kernels that fit them."""

    def __init__(self, units: Tensor, scale: Tensor, scale_bound: float) -> None:
        self._kernels = dual_softmax_wide if _is_wide(units[0]) else dual_softmax
        self._padded = max(units.shape[2], _width(units[0]))
        self._units, self._scale = self._pad(units), scale
        self._bounded = scale_bound <= MAX_SHARED_SCALE
        self._sums: Tensor | None = None  # STATE or PARTIAL; None until there were columns

    def _pad(self, columns: Tensor) -> Tensor:
        missing = self._padded - columns.shape[2]
        return F.pad(columns, (0, missing)) if missing else columns.contiguous()

    def add_own(self) -> None:
        if self._units.numel():
            self._add(self._units, 0, 0)

    def add(self, columns: Tensor, start: int = 0) -> None:
        """Row i's positive is column ``i + offset``: beyond the columns of other ranks."""
        if self._units.numel() and columns.numel():
            self._add(self._pad(columns), columns.shape[1], start)


class Forward(_Pass):
    """As :class:`fastkd.backends.blocked.dual_softmax.Forward`."""

    def _add(self, columns: Tensor, offset: int, start: int) -> None:
        with torch.cuda.device_of(columns):
            self._sums = self._kernels.running_statistics(
                self._units, columns, self._scale, offset=offset, bounded=self._bounded, state=self._sums
            )

    def finish(self, weight: Tensor | None, forward_kl: bool) -> tuple[Tensor, Tensor, Tensor]:
        if self._sums is None:
            nothing = self._scale.new_zeros(3, 0)
            return nothing[0].sum(), nothing[1].sum(), nothing
        weight = None if weight is None else weight.contiguous()
        with torch.cuda.device_of(self._sums):
            loss, stats = statistics(self._sums, self._scale, weight, swapped=not forward_kl)
            return loss[0].sum(), loss[1].sum(), stats


def numbers(stats: Tensor) -> Tensor:
    return stats


class Backward(_Pass):
    """As :class:`fastkd.backends.blocked.dual_softmax.Backward`."""

    def __init__(
        self, units: Tensor, scale: Tensor, scale_bound: float, stats: Tensor, everyone: Tensor, weight: Tensor | None,
        grads: tuple[Tensor, Tensor], forward_kl: bool, need_a: bool, need_b: bool,
    ) -> None:  # fmt: skip
        super().__init__(units, scale, scale_bound)
        self._needs: dict[str, Any] = {"need_a": need_a, "need_b": need_b}
        weight = None if weight is None else weight.contiguous()
        with torch.cuda.device_of(units):
            self._coef, self._unscale = coefficients(
                everyone, weight, *grads, scale, swapped=not forward_kl, bounded=self._bounded
            )

    def _add(self, columns: Tensor, offset: int, start: int) -> None:
        with torch.cuda.device_of(columns):
            self._sums = self._kernels.gradient_sums(
                self._units, columns, self._coef[:, : self._units.shape[1]],
                self._coef[:, start : start + columns.shape[1]], self._scale, offset=offset, bounded=self._bounded,
                partial=self._sums, **self._needs,
            )  # fmt: skip

    def finish(self, inverse_norm: Tensor, dtype: torch.dtype, D: int) -> tuple[Tensor, Tensor, Tensor]:
        if self._sums is None:
            empty = self._units.new_empty((0, D), dtype=dtype)
            return empty, empty, self._scale.new_zeros(())
        with torch.cuda.device_of(self._sums):
            grad_a, grad_b, dots = gradients(
                self._sums, self._units, inverse_norm.reshape(2, -1), self._scale, self._unscale, D=D, dtype=dtype,
                **self._needs,
            )  # fmt: skip
        return grad_a, grad_b, dots.sum()
