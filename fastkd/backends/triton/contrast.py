"""``contrast`` through the Triton kernels; :mod:`fastkd.backends.triton` exports both functions.

Labels become int32 numbers: a tile compares them element by element, which costs an instruction a pair. The other way
to the positives of a label, sums of the keys of each label, would add up rounded p_ij and 1 / |P_i| apart, and lose the
digits of their difference where a loss has almost converged.
"""

import dataclasses
from types import ModuleType

import torch
import triton
from torch import Tensor

from fastkd.backends.masks import Mask
from fastkd.kernels.contrast import streaming as contrast
from fastkd.kernels.contrast import wide as contrast_wide
from fastkd.kernels.contrast.per_row import Side, coefficients, gradients, statistics
from fastkd.kernels.launch import allows_tf32, fits, hardware_of
from fastkd.kernels.normalize import padded_width, vectors


def is_wide(rows: Tensor) -> bool:
    """Whether dot products come from torch.mm: rows too wide for a tile, or fp32 products that must not be tf32."""
    if not fits(rows.dtype, padded_width(rows.shape[1]), hardware_of(rows.device)):
        return True
    return rows.is_cuda and rows.dtype == torch.float32 and not allows_tf32()


def rounds_to_tf32(rows: Tensor) -> bool:
    """The streaming kernels' tf32 products would truncate; the interpreter's are exact."""
    return rows.is_cuda and rows.dtype == torch.float32 and not is_wide(rows)


def numbered(query_labels: Tensor, key_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of queries and keys as int32, equal where they are, and each query's number of keys of its label [n]."""
    query_labels, key_labels = query_labels.contiguous(), key_labels.contiguous()
    in_order = key_labels.sort().values
    first = torch.searchsorted(in_order, query_labels, out_int32=True)
    count = torch.searchsorted(in_order, query_labels, right=True, out_int32=True) - first
    # A label that no key has would get the number of the next larger one.
    return first.masked_fill_(count == 0, -1), torch.searchsorted(in_order, key_labels, out_int32=True), count


def _sides(
    query: Tensor, key: Tensor | None, mask: Mask, normalize: bool
) -> tuple[ModuleType, Side, Side, Tensor | None, Tensor | None, Tensor | None]:
    """The kernels to use, queries, keys, their inverse norms, and the numbers of positives if those are by label."""
    D = query.shape[1]
    width = triton.cdiv(D, 8) * 8 if is_wide(query) else padded_width(D)
    q, inverse_q = vectors(query, width, normalize=normalize, to_tf32=rounds_to_tf32(query))
    k, inverse_k = q, inverse_q
    if key is not None:
        k, inverse_k = vectors(key, width, normalize=normalize, to_tf32=rounds_to_tf32(query))
    query_ids, key_ids, count = None, None, None
    if mask.query_labels is not None and mask.key_labels is not None:
        query_ids, key_ids, count = numbered(mask.query_labels, mask.key_labels)
        if mask.exclude_self:
            count -= 1
    positive = None if mask.positive_index is None else mask.positive_index.contiguous()
    queries = Side(vectors=q, labels=query_ids, positive=positive)
    keys = Side(vectors=k, labels=key_ids)
    kernels = contrast_wide if is_wide(query) else contrast
    return kernels, queries, keys, inverse_q, inverse_k, count if mask.by_label else None


def contrast_forward(
    query: Tensor, key: Tensor | None, logit_scale: Tensor, weight: Tensor | None, mask: Mask, normalize: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`fastkd.backends.blocked.contrast_forward`."""
    weight = None if weight is None else weight.contiguous()
    with torch.cuda.device_of(query):
        kernels, queries, keys, _, _, count = _sides(query, key, mask, normalize)
        state = kernels.running_statistics(
            queries, keys, logit_scale, by_label=mask.by_label, exclude_self=mask.exclude_self
        )
        loss, stats = statistics(state, weight, count)
        return loss.sum(), stats


def contrast_backward(
    query: Tensor,
    key: Tensor | None,
    logit_scale: Tensor,
    weight: Tensor | None,
    mask: Mask,
    stats: Tensor,
    grad_loss: Tensor,
    normalize: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fastkd.backends.blocked.contrast_backward`."""
    weight = None if weight is None else weight.contiguous()
    options = {"by_label": mask.by_label, "exclude_self": mask.exclude_self}
    grad_query, grad_key = query.new_empty(0), query.new_empty(0)
    with torch.cuda.device_of(query):
        kernels, queries, keys, inverse_q, inverse_k, _ = _sides(query, key, mask, normalize)
        coef, unscale = coefficients(stats, weight, grad_loss, by_label=mask.by_label)
        queries = dataclasses.replace(queries, coef=coef)

        def gradient_of(rows: Side, columns: Side, inverse_norm: Tensor | None) -> tuple[Tensor, Tensor]:
            partial = kernels.gradient_sums(rows, columns, logit_scale, **options)
            return gradients(
                partial, rows.vectors, inverse_norm, logit_scale, unscale, D=query.shape[1], dtype=query.dtype
            )

        # The gradient of logit_scale falls out of either side's, so one side is always computed.
        if key is None:
            grad_query, dots = gradient_of(queries, queries, inverse_q)
            dots = dots / 2  # a logit counts in both of its rows
        elif need_query or not need_key:
            grad_query, dots = gradient_of(queries, keys, inverse_q)
            if need_key:
                grad_key, _ = gradient_of(keys, queries, inverse_k)
        else:
            grad_key, dots = gradient_of(keys, queries, inverse_k)
        grad_scale = dots.sum().to(logit_scale.dtype)
    if not need_query:
        grad_query = query.new_empty(0)
    return grad_query, grad_key, grad_scale
