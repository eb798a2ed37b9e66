"""``fastkd::contrast``: InfoNCE of query rows against key rows; :class:`Mask` says which keys count as what."""

from typing import Any

import torch
from torch import Tensor

from fastkd.backends import implementation
from fastkd.backends.masks import Mask
from fastkd.numerics import accumulation_dtype


@torch.library.custom_op("fastkd::contrast", mutates_args=())
def contrast(
    query: Tensor,
    key: Tensor | None,
    logit_scale: Tensor,
    weight: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive_index: Tensor | None,
    by_label: bool,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The weighted sum over the queries, and two numbers a query for the backward, [2, n].

    ``sum_i w_i (logsumexp_{j in D_i} x_ij - mean_{j in P_i} x_ij)`` with ``x_ij = logit_scale q_i . k_j``.

    query [n, D], key [N, D]; without ``key`` the queries are contrasted with each other, none with itself, and
    ``key_labels`` is None. logit_scale: 0-dim. weight: [n] or None for ones. The rest is described at
    :class:`fastkd.backends.masks.Mask`.

    The two numbers: by index, the query's loss and its positive's logit; by label, its log-sum-exp and its number of
    positives.
    """
    mask = _mask(key, query_labels, key_labels, positive_index, by_label)
    with torch.autocast(query.device.type, enabled=False):
        return implementation("contrast", backend).contrast_forward(query, key, logit_scale, weight, mask, normalize)


@contrast.register_fake
def _(
    query: Tensor,
    key: Tensor | None,
    logit_scale: Tensor,
    weight: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive_index: Tensor | None,
    by_label: bool,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(query.dtype)
    return query.new_empty((), dtype=dtype), query.new_empty((2, query.shape[0]), dtype=dtype)


@torch.library.custom_op("fastkd::contrast_backward", mutates_args=())
def contrast_backward(
    query: Tensor,
    key: Tensor | None,
    logit_scale: Tensor,
    weight: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive_index: Tensor | None,
    stats: Tensor,
    grad_loss: Tensor,
    by_label: bool,
    normalize: bool,
    need_query: bool,
    need_key: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query and key (empty where not needed, or absent) and of logit_scale, in their inputs' dtypes."""
    mask = _mask(key, query_labels, key_labels, positive_index, by_label)
    with torch.autocast(query.device.type, enabled=False):
        return implementation("contrast", backend).contrast_backward(
            query, key, logit_scale, weight, mask, stats, grad_loss, normalize, need_query, need_key
        )


@contrast_backward.register_fake
def _(
    query: Tensor,
    key: Tensor | None,
    logit_scale: Tensor,
    weight: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive_index: Tensor | None,
    stats: Tensor,
    grad_loss: Tensor,
    by_label: bool,
    normalize: bool,
    need_query: bool,
    need_key: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dense = torch.contiguous_format
    return (
        torch.empty_like(query, memory_format=dense) if need_query else query.new_empty(0),
        torch.empty_like(key, memory_format=dense) if need_key and key is not None else query.new_empty(0),
        torch.empty_like(logit_scale),
    )


def _mask(
    key: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive_index: Tensor | None,
    by_label: bool,
) -> Mask:
    return Mask(
        query_labels=query_labels,
        key_labels=query_labels if key is None else key_labels,
        positive_index=positive_index,
        by_label=by_label,
        exclude_self=key is None,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.by_label, ctx.normalize, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    need_query, need_key, need_scale = ctx.needs_input_grad[:3]
    grad_query, grad_key, grad_scale = contrast_backward(
        *ctx.saved_tensors, grad_loss, ctx.by_label, ctx.normalize, need_query, need_key, ctx.backend
    )
    return (
        grad_query if need_query else None,
        grad_key if need_key else None,
        grad_scale if need_scale else None,
        *[None] * 7,
    )


contrast.register_autograd(_backward, setup_context=_setup_context)
