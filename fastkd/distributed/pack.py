"""Makes the rows of student and teacher ready for the exchange: normalised, cast and packed into one buffer.

The C++/CUDA extension of ``csrc/`` does it in one pass; where it is absent, or does not fit the installed torch, plain
PyTorch does the same. Nothing is ever built here.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.native import extension
from fastkd.numerics import NORM_EPS, accumulation_dtype, unit_rows

LANES = 16  # partial sums of a row, kLanes in csrc


def pack_rows(rows: Sequence[Tensor], dtype: torch.dtype, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """The k = 1 or 2 tensors [n, D], L2-normalised if asked, as [k, n, D] in ``dtype``; and [k, n, 1].

    The second result holds the inverse norms in the accumulation dtype, or ones. Rows that count as zero give 0.
    Rows of any dtype may be packed as they are. On a CPU the extension and this give the same bits.
    """
    first = rows[0]
    if extension_covers(first.device.type):
        return torch.ops.fastkd_native.pack_rows(list(rows), dtype, normalize)
    accumulate = accumulation_dtype(first.dtype)
    inverse_norm = first.new_ones((len(rows), len(first), 1), dtype=accumulate)
    if not normalize:
        return torch.stack([x.to(dtype) for x in rows]), inverse_norm
    packed = first.new_empty((len(rows), *first.shape), dtype=dtype)
    normalized = _unit_rows_in_lanes if first.device.type == "cpu" else unit_rows
    for side, x in enumerate(rows):
        units, inverse_norm[side] = normalized(x.to(accumulate))
        packed[side] = units
    return packed, inverse_norm


def _unit_rows_in_lanes(x: Tensor) -> tuple[Tensor, Tensor]:
    """As ``unit_rows``, operation by operation what the extension does on a CPU (``pack_row`` in csrc)."""
    low, high = (1e-100, 1e300) if x.dtype == torch.float64 else (1e-20, 1e30)
    largest = x.abs().amax(dim=1, keepdim=True)
    divisor = largest.clamp(low, high)
    inverse_divisor = divisor.reciprocal()
    squares = F.pad((x * inverse_divisor).square(), (0, -x.shape[1] % LANES)).unflatten(1, (-1, LANES))
    lanes = sum(squares.unbind(1), x.new_zeros(len(x), LANES))
    poison = largest - largest  # NaN if an element is not finite
    # Not sqrt: torch's is not always correctly rounded.
    inverse_scaled_norm = (sum(lanes.unbind(1), x.new_zeros(len(x)))[:, None] + poison).rsqrt()
    is_zero = divisor <= NORM_EPS * inverse_scaled_norm
    units = x * inverse_divisor * inverse_scaled_norm
    return units.masked_fill(is_zero, 0), (inverse_divisor * inverse_scaled_norm).masked_fill(is_zero, 0)


@functools.cache
def extension_covers(device_type: str) -> bool:
    """Whether the extension is there, loads, and has code for ``device_type``."""
    if device_type not in ("cpu", "cuda") or extension() is None:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key("fastkd_native::pack_rows", device_type.upper())


def extension_gathers(device_type: str) -> bool:
    """Whether the extension also starts the collectives; built for a torch without distributed it does not."""
    return extension_covers(device_type) and hasattr(extension(), "start_gather")
