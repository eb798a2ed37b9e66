"""Student and teacher rows made ready for the exchange: normalised, cast and packed into one buffer."""

import torch
from torch import Tensor

from fastkd.backends.reference import accumulation_dtype, unit_rows


def pack_rows(first: Tensor, second: Tensor, dtype: torch.dtype, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """The rows of ``first`` and ``second`` [n, D], L2-normalised if asked, as [2, n, D] in ``dtype``; and [2, n, 1].

    The latter are the inverse norms in the accumulation dtype (ones if not normalised); rows that count as zero give 0.
    """
    accumulate = accumulation_dtype(first.dtype)
    packed = first.new_empty((2, *first.shape), dtype=dtype)
    inverse_norm = first.new_ones((2, len(first), 1), dtype=accumulate)
    for side, x in enumerate((first, second)):
        if normalize:
            units, inverse_norm[side] = unit_rows(x.to(accumulate))
            packed[side] = units
        else:
            packed[side] = x
    return packed, inverse_norm
