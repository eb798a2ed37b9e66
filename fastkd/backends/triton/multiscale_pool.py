"""``multiscale_pool`` through the Triton kernels."""

import torch
from torch import Tensor

from fastkd.kernels.multiscale_pool import pooled, spread_gradients


def multiscale_pool_forward(
    features: Tensor, windows: list[int], strides: list[int], normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As :func:`fastkd.backends.blocked.multiscale_pool.multiscale_pool_forward`."""
    return pooled(features, windows, strides, normalize=normalize, dtype=dtype)


def multiscale_pool_backward(
    grad: Tensor, unit: Tensor | None, inverse_norm: Tensor, windows: list[int], strides: list[int],
    grad_features: Tensor,
) -> None:  # fmt: skip
    """As :func:`fastkd.backends.blocked.multiscale_pool.multiscale_pool_backward`."""
    spread_gradients(grad.contiguous(), unit, inverse_norm, windows, strides, grad_features)
