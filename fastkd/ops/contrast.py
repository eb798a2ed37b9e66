"""``fastkd::contrast``: InfoNCE of query rows against key rows, the positive of row i being key i."""

from typing import Any

import torch
from torch import Tensor

from fastkd.backends import STREAMING
from fastkd.backends.reference import accumulation_dtype


@torch.library.custom_op("fastkd::contrast", mutates_args=())
def contrast(
    query: Tensor, key: Tensor, logit_scale: Tensor, weight: Tensor | None, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """``sum_i w_i (-log softmax_j(logit_scale q_i . k_j)_i)`` and two numbers a row for the backward, [2, n].

    query, key: [n, D]. logit_scale: 0-dim. weight: [n] or None for ones.
    """
    with torch.autocast(query.device.type, enabled=False):
        return STREAMING[backend].contrast_forward(query, key, logit_scale, weight, normalize)


@contrast.register_fake
def _(
    query: Tensor, key: Tensor, logit_scale: Tensor, weight: Tensor | None, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    return query.new_empty((), dtype=dtype), query.new_empty((2, query.shape[0]), dtype=dtype)


@torch.library.custom_op("fastkd::contrast_backward", mutates_args=())
def contrast_backward(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    grad_loss: Tensor,
    normalize: bool,
    need_query: bool,
    need_key: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query and key (empty where not needed) and of logit_scale, in their inputs' dtypes."""
    with torch.autocast(query.device.type, enabled=False):
        return STREAMING[backend].contrast_backward(
            query, key, logit_scale, weight, stats, grad_loss, normalize, need_query, need_key
        )


@contrast_backward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    grad_loss: Tensor,
    normalize: bool,
    need_query: bool,
    need_key: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(query, memory_format=torch.contiguous_format) if need_query else query.new_empty(0),
        torch.empty_like(key, memory_format=torch.contiguous_format) if need_key else key.new_empty(0),
        torch.empty_like(logit_scale),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, logit_scale, weight, ctx.normalize, ctx.backend = inputs
    ctx.save_for_backward(query, key, logit_scale, weight, output[1])


def _backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    need_query, need_key, need_scale = ctx.needs_input_grad[:3]
    grad_query, grad_key, grad_scale = contrast_backward(
        *ctx.saved_tensors, grad_loss, ctx.normalize, need_query, need_key, ctx.backend
    )
    return (
        grad_query if need_query else None,
        grad_key if need_key else None,
        grad_scale if need_scale else None,
        None,
        None,
        None,
    )


contrast.register_autograd(_backward, setup_context=_setup_context)
