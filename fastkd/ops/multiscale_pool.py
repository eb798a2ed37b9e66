"""``fastkd::multiscale_pool``: the averages of every window of every scale of a feature map, as rows of channels."""

from typing import Any

import torch
from torch import Tensor

from fastkd.backends import implementation
from fastkd.numerics import accumulation_dtype, window_counts


@torch.library.custom_op("fastkd::multiscale_pool", mutates_args=())
def multiscale_pool(
    features: Tensor, windows: list[int], strides: list[int], normalize: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """Rows [B, M, C] in ``dtype`` and their inverse norms for the backward, [B, M], or [B, 0] if not ``normalize``.

    features: [B, C, H, W]. windows, strides: height and width of every scale in turn.
    """
    with torch.autocast(features.device.type, enabled=False):
        return implementation("multiscale_pool", backend).multiscale_pool_forward(
            features, windows, strides, normalize, dtype
        )


@multiscale_pool.register_fake
def _(
    features: Tensor, windows: list[int], strides: list[int], normalize: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    B, C, H, W = features.shape
    M = sum(rows * columns for rows, columns in window_counts(H, W, windows, strides))
    inverse_norm = features.new_empty((B, M if normalize else 0), dtype=accumulation_dtype(features.dtype))
    return features.new_empty((B, M, C), dtype=dtype), inverse_norm


@torch.library.custom_op("fastkd::multiscale_pool_backward", mutates_args=())
def multiscale_pool_backward(
    grad: Tensor,
    unit: Tensor | None,
    inverse_norm: Tensor,
    size: list[int],
    windows: list[int],
    strides: list[int],
    channels_last: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Gradient [B, C, H, W] of the features, in ``dtype`` and their memory format, from the rows' gradient.

    unit: the forward's rows if it normalised them. size: height and width of the map.
    """
    with torch.autocast(grad.device.type, enabled=False):
        grad_features = _empty_gradient(grad, size, channels_last, dtype)
        implementation("multiscale_pool", backend).multiscale_pool_backward(
            grad, unit, inverse_norm, windows, strides, grad_features
        )
    return grad_features


@multiscale_pool_backward.register_fake
def _(grad: Tensor, _unit: Tensor | None, _inverse_norm: Tensor, size: list[int], *inputs: Any) -> Tensor:
    channels_last, dtype = inputs[-3:-1]
    return _empty_gradient(grad, size, channels_last, dtype)


def _empty_gradient(grad: Tensor, size: list[int], channels_last: bool, dtype: torch.dtype) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = grad.shape[0], grad.shape[2], *size
    return torch.empty(shape, dtype=dtype, device=grad.device, memory_format=memory_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, ctx.windows, ctx.strides, normalize, _, ctx.backend = inputs
    ctx.size, ctx.dtype = list(features.shape[2:]), features.dtype
    # Whichever of the two is nearer: also for slices, which are neither.
    ctx.channels_last = features.stride(1) < features.stride(3)
    ctx.save_for_backward(output[0] if normalize else None, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    unit, inverse_norm = ctx.saved_tensors
    grad_features = multiscale_pool_backward(
        grad, unit, inverse_norm, ctx.size, ctx.windows, ctx.strides, ctx.channels_last, ctx.dtype, ctx.backend
    )
    return grad_features, None, None, None, None, None


multiscale_pool.register_autograd(_backward, setup_context=_setup_context)
