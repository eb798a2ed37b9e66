"""Rows as the kernels multiply them: padded to a tile's width, and rounded to tf32 where products are tf32."""

import torch
from torch import Tensor

from fastkd.kernels.launch import allows_tf32, cdiv, fits, hardware_of
from fastkd.kernels.normalize import padded_width, vectors


def is_wide(rows: Tensor) -> bool:
    """Whether dot products come from torch.mm: rows too wide for a tile, or fp32 products that must not be tf32."""
    if not fits(rows.dtype, padded_width(rows.shape[-1]), hardware_of(rows.device)):
        return True
    return rows.is_cuda and rows.dtype == torch.float32 and not allows_tf32()


def width_of(rows: Tensor) -> int:
    """The width that the kernels want rows padded to."""
    D = rows.shape[-1]
    return cdiv(D, 8) * 8 if is_wide(rows) else padded_width(D)


def rounds_to_tf32(rows: Tensor) -> bool:
    """Whether rows must be rounded to tf32: the streaming kernels' products would truncate them on a GPU."""
    return rows.is_cuda and rows.dtype == torch.float32 and not is_wide(rows)


def ready(rows: Tensor, normalize: bool = False) -> tuple[Tensor, Tensor | None]:
    """Rows [..., n, D] as the kernels multiply them, and their inverse norms [..., n] if they are normalised.

    Rows that need neither padding nor rounding nor normalisation are not copied.
    """
    if not rows.numel() and not normalize:
        return rows.contiguous(), None
    return vectors(rows, width_of(rows), normalize=normalize, to_tf32=rounds_to_tf32(rows))
