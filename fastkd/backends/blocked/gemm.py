"""Matrix products of the CPU tiles."""

import torch
from torch import Tensor

_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def product(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T``; x [m, k] contiguous, w [n, k] or its transpose contiguous, for the sake of speed.

    float32 on a CPU goes through oneDNN, which torch.mm uses for narrower types only: where MKL falls back to AVX2 (AMD
    Zen 5, 512 x 512 x 128) it runs about twice as fast. The operator is the one that torch.compile emits for
    linear layers; without it, torch.mm computes the same.
    """
    if _LINEAR is None or x.dtype != torch.float32 or x.device.type != "cpu":
        return torch.mm(x, w.T)
    return _LINEAR(x, w, None, "none", [], "")
