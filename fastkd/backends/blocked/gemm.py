"""Matrix products of the CPU tiles."""

import math

import torch
from torch import Tensor

_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
MIN_LINEAR = 1 << 20  # multiplications below which torch.mm starts faster than oneDNN multiplies


def product(x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """``scale x @ w.T``; x [m, k] contiguous, w [n, k] or its transpose contiguous, for the sake of speed.

    float32 on a CPU goes through oneDNN, which torch.mm uses for narrower types only: where MKL falls back to AVX2 (AMD
    Zen 5, 512 x 512 x 128) it runs about twice as fast. The operator is the one that torch.compile emits for
    linear layers; without it, torch.mm computes the same.
    """
    if torch.finfo(x.dtype).max < abs(scale) < math.inf:
        scale = math.copysign(torch.finfo(x.dtype).max, scale)
    if _LINEAR is None or not _suits_linear(x, len(w)):
        return torch.mm(x, w.T) if scale == 1.0 else torch.addmm(x.new_empty(()), x, w.T, beta=0, alpha=scale)
    return _LINEAR(x if scale == 1.0 else x * scale, w, None, "none", [], "")


def min_linear() -> int:
    """The number of multiplications from which oneDNN serves for a product of float32 numbers on a CPU."""
    return MIN_LINEAR if _LINEAR is not None else 1 << 62


def transposed_product(x: Tensor, w: Tensor) -> Tensor:
    """``x.T @ w``, contiguous; x [m, n] and w [m, k] contiguous."""
    return product(x.T.contiguous(), w.T) if _suits_linear(x, w.shape[1]) else torch.mm(x.T, w)


def _suits_linear(x: Tensor, columns: int) -> bool:
    """Whether oneDNN should serve for a product of ``x`` that has so many columns: float32 on a CPU, and not small."""
    return x.numel() * columns >= min_linear() and x.dtype == torch.float32 and x.device.type == "cpu"
