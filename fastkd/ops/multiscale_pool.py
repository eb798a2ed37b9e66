"""``multiscale_pool``: the averages of every window of every scale of a feature map, as rows of channels.

:func:`pooled` runs it as a plain autograd function. Under torch.compile custom ops take its place.
"""

from typing import Any

import torch
from torch import Tensor

from fastkd.backends import implementation
from fastkd.numerics import accumulation_dtype, window_counts
from fastkd.ops.eager import computing, differentiable_once, is_traced


def _forward(
    features: Tensor, windows: list[int], strides: list[int], normalize: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """Rows [B, M, C] in ``dtype`` and their inverse norms for the backward, [B, M], or [B, 0] if not ``normalize``.

    features: [B, C, H, W]. windows, strides: height and width of every scale in turn.
    """
    with computing(features):
        return implementation("multiscale_pool", backend).multiscale_pool_forward(
            features, windows, strides, normalize, dtype
        )


multiscale_pool = torch.library.custom_op("fastkd::multiscale_pool", _forward, mutates_args=())


@multiscale_pool.register_fake
def _(
    features: Tensor, windows: list[int], strides: list[int], normalize: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    B, C, H, W = features.shape
    M = sum(rows * columns for rows, columns in window_counts(H, W, windows, strides))
    inverse_norm = features.new_empty((B, M if normalize else 0), dtype=accumulation_dtype(features.dtype))
    return features.new_empty((B, M, C), dtype=dtype), inverse_norm


def _gradient(
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
    with computing(grad):
        grad_features = _empty_gradient(grad, size, channels_last, dtype)
        implementation("multiscale_pool", backend).multiscale_pool_backward(
            grad, unit, inverse_norm, windows, strides, grad_features
        )
    return grad_features


multiscale_pool_backward = torch.library.custom_op("fastkd::multiscale_pool_backward", _gradient, mutates_args=())


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


def _arguments(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...]:
    """Of the backward's operation."""
    return grad, *saved, ctx.size, ctx.windows, ctx.strides, ctx.channels_last, ctx.dtype, ctx.backend


def _op_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return multiscale_pool_backward(*_arguments(ctx, ctx.saved_tensors, grad)), *[None] * 5


multiscale_pool.register_autograd(_op_backward, setup_context=_setup_context)


class MultiscalePool(torch.autograd.Function):
    """The rows as a plain autograd function, which starts quicker than the custom op."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(*_arguments(ctx, saved, grad)), *[None] * 5


def pooled(*inputs: Any) -> Tensor:
    """Rows [B, M, C] of the ``inputs`` of ``fastkd::multiscale_pool``."""
    return multiscale_pool(*inputs)[0] if is_traced(inputs[0]) else MultiscalePool.apply(*inputs)
