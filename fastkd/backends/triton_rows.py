"""The Triton kernels for several ranks: as ``blocked_rows``, for a CUDA device or Triton's interpreter.

The kernels carry the statistics of the columns seen so far, and the sums of the gradient, from one block to the next.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fastkd.backends.blocked import MAX_SHARED_SCALE
from fastkd.backends.triton import _is_wide
from fastkd.kernels import dual_softmax, dual_softmax_wide
from fastkd.kernels.dual_softmax_rows import coefficients, gradients, statistics
from fastkd.kernels.normalize import padded_width


class _Rows:
    """A rank's rows as the kernels want them: padded with zeros to a tile's width."""

    def __init__(self, units: Tensor, scale: Tensor, scale_bound: float) -> None:
        self.D = units.shape[2]
        self.kernels = dual_softmax_wide if _is_wide(units[0]) else dual_softmax
        self._width = triton.cdiv(self.D, 8) * 8 if _is_wide(units[0]) else padded_width(self.D)
        self.units = self.padded(units)
        self.scale = scale
        self.bounded = scale_bound <= MAX_SHARED_SCALE

    def padded(self, columns: Tensor) -> Tensor:
        return F.pad(columns, (0, self._width - self.D)).contiguous()

    def offset(self, columns: Tensor, is_own: bool) -> int:
        """Row i's positive is column ``i + offset``: beyond the columns of other ranks."""
        return 0 if is_own else columns.shape[1]


class DualStatistics(_Rows):
    """As :class:`fastkd.backends.blocked_rows.DualStatistics`."""

    def __init__(self, units: Tensor, scale: Tensor, scale_bound: float) -> None:
        super().__init__(units, scale, scale_bound)
        self._state: Tensor | None = None

    def add(self, columns: Tensor, *, is_own: bool) -> None:
        if not self.units.numel():
            return
        with torch.cuda.device_of(columns):
            self._state = self.kernels.running_statistics(
                self.units,
                self.padded(columns),
                self.scale,
                offset=self.offset(columns, is_own),
                bounded=self.bounded,
                state=self._state,
            )

    def finish(self, weight: Tensor | None, forward_kl: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if self._state is None:
            nothing = self.scale.new_zeros(2, 0)
            return nothing[0].sum(), nothing[1].sum(), self.scale.new_zeros(3, 0), None
        weight = None if weight is None else weight.contiguous()
        with torch.cuda.device_of(self._state):
            loss, numbers = statistics(self._state, self.scale, weight, swapped=not forward_kl)
            return loss[0].sum(), loss[1].sum(), numbers, None


class DualGradients(_Rows):
    """As :class:`fastkd.backends.blocked_rows.DualGradients`."""

    def __init__(
        self,
        units: Tensor,
        scale: Tensor,
        scale_bound: float,
        rows: slice,
        numbers: Tensor,
        positives: Tensor | None,
        weight: Tensor | None,
        grads: tuple[Tensor, Tensor],
        forward_kl: bool,
        need_a: bool,
        need_b: bool,
    ) -> None:
        super().__init__(units, scale, scale_bound)
        self._rows, self._needs = rows, (need_a, need_b)
        with torch.cuda.device_of(units):
            self._coef, self._unscale = coefficients(
                numbers, weight, *grads, scale, swapped=not forward_kl, bounded=self.bounded
            )
        self._partial: Tensor | None = None

    def add(self, columns: Tensor, cols: slice) -> None:
        if not self.units.numel():
            return
        with torch.cuda.device_of(columns):
            self._partial = self.kernels.gradient_sums(
                self.units,
                self.padded(columns),
                self._coef[:, self._rows],
                self._coef[:, cols],
                self.scale,
                offset=self.offset(columns, cols == self._rows),
                bounded=self.bounded,
                need_a=self._needs[0],
                need_b=self._needs[1],
                partial=self._partial,
            )

    def finish(self, inverse_norm: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if self._partial is None:
            empty = self.units.new_empty((0, self.D), dtype=dtype)
            return empty, empty, self.scale.new_zeros(())
        with torch.cuda.device_of(self._partial):
            grad_a, grad_b, dots = gradients(
                self._partial,
                self.units,
                inverse_norm.view(2, -1),
                self.scale,
                self._unscale,
                D=self.D,
                dtype=dtype,
                need_a=self._needs[0],
                need_b=self._needs[1],
            )
        return grad_a, grad_b, dots.sum()
