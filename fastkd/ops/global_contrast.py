"""``contrast`` over the rows of several ranks; every rank returns the sum over its own queries.

Keys and their labels are gathered for the forward; queries and their numbers only where a rank's keys need a gradient,
and then for the backward, so that nothing waits for them. Queries that are contrasted with each other travel once. As
in ``global_batch``, the upstream gradients must be equal on all ranks.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastkd.backends.masks import Mask
from fastkd.distributed.agree import Peers
from fastkd.distributed.exchange import Exchange, Numbers, start, start_numbers
from fastkd.distributed.group import exchange_dtype
from fastkd.distributed.pack import pack_rows
from fastkd.numerics import weighted_sum


def global_contrast(
    query: Tensor,
    key: Tensor | None,
    logit_scale: Tensor,
    weight: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive_index: Tensor | None,
    by_label: bool,
    normalize: bool,
    peers: Peers,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The weighted sum over this rank's queries, as ``fastkd::contrast`` has it, and how many have a positive.

    ``positive_index`` counts this rank's keys.
    """
    if peers.has_weight and weight is None:
        weight = query.new_ones(len(query))
    return _Contrast.apply(
        query, key, logit_scale, weight, query_labels, key_labels, positive_index, by_label, normalize, peers,
        backend,
    )  # fmt: skip


@dataclass
class _Travelling:
    """What is under way to the backward: the exchanges, the queries' numbers, and what is known of the masks."""

    keys: Exchange
    queries: Exchange | None
    numbers: Numbers | None
    query_labels: Numbers | None
    mask: Mask  # of this rank's queries and all keys


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor | None,
        logit_scale: Tensor,
        weight: Tensor | None,
        query_labels: Tensor | None,
        key_labels: Tensor | None,
        positive_index: Tensor | None,
        by_label: bool,
        normalize: bool,
        peers: Peers,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(query.device.type, enabled=False):
            ctx.normalize, ctx.dtype, ctx.peers = normalize, query.dtype, peers
            ctx.backend = importlib.import_module(f"fastkd.backends.{backend}.contrast_rows")
            dtype, is_self = exchange_dtype(query.dtype), key is None
            own_labels = query_labels if is_self else key_labels
            labels = None if own_labels is None else start_numbers(peers.keys, own_labels[:, None])
            rows = query if key is None else key
            keys, k, inverse_k, all_keys = start(peers.keys, (rows,), dtype, normalize)
            queries, q, inverse_q, all_queries = keys, k, inverse_k, all_keys
            needs_key_grad = peers.needs_key_grad
            if not is_self and needs_key_grad:
                queries, q, inverse_q, all_queries = start(peers, (query,), dtype, normalize)
            elif not is_self:
                q, inverse_q = pack_rows((query,), dtype, normalize)
                all_queries = None
            mask = Mask(
                query_labels=query_labels,
                key_labels=None if labels is None else labels.wait(keys)[:, 0],
                positive_index=positive_index,
                by_label=by_label,
                exclude_self=is_self,
            )
            scale = logit_scale.to(inverse_q.dtype)
            state = ctx.backend.ContrastStatistics(q[0], scale, mask)
            for cols, block in keys.columns(k, all_keys):
                state.add(block[0], cols)
            loss, stats = state.stats()
            ctx.travelling = _Travelling(keys, queries if needs_key_grad else None, None, None, mask)
            if needs_key_grad:
                numbers = stats if weight is None else torch.cat([stats, weight.to(stats.dtype)[None]])
                ctx.travelling.numbers = start_numbers(peers, numbers.T)
                if query_labels is not None and not is_self:
                    ctx.travelling.query_labels = start_numbers(peers, query_labels[:, None])
            # Not saved: it is still being written, and autograd would take that for a change of a saved tensor.
            ctx.all_queries = all_queries
            ctx.save_for_backward(logit_scale, q, inverse_q, k, inverse_k, all_keys, stats, weight)
            has_positive = (stats[1] > 0).sum() if by_label else torch.tensor(len(q[0]), device=query.device)
            ctx.mark_non_differentiable(has_positive)
            return weighted_sum(loss, weight), has_positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logit_scale, q, inverse_q, k, inverse_k, all_keys, stats, weight = ctx.saved_tensors
        travelling, mask = ctx.travelling, ctx.travelling.mask
        need_query, need_key, need_scale = ctx.needs_input_grad[:3]
        is_self = mask.exclude_self
        grad_query = grad_key = grad_scale = None
        with torch.autocast(q.device.type, enabled=False):
            scale = logit_scale.to(inverse_q.dtype)
            # In a ring every rank must take part, whatever it needs itself.
            if need_query or need_scale or travelling.keys.is_ring:
                of_queries = ctx.backend.QueryGradient(q[0], scale, mask, stats, weight, grad_loss)
                for cols, block in travelling.keys.columns(k, all_keys):
                    of_queries.add(block[0], cols)
                inverse = inverse_q[0] if ctx.normalize else None
                grad_query, grad_scale = of_queries.finish(k[0], inverse, ctx.dtype)
            if travelling.queries is not None and (need_key or is_self or travelling.queries.is_ring):
                everyone = _every_query(travelling, ctx.peers)
                numbers = travelling.numbers.wait(travelling.queries).T.contiguous()
                all_weights = None if weight is None else numbers[2]
                of_keys = ctx.backend.KeyGradient(k[0], scale, everyone, numbers[:2], all_weights, grad_loss)
                for rows, block in travelling.queries.columns(q, ctx.all_queries):
                    of_keys.add(block[0], rows)
                inverse = inverse_k[0] if ctx.normalize else None
                grad_key, _ = of_keys.finish(q[0], inverse, ctx.dtype)
        if is_self and grad_query is not None and grad_key is not None:
            grad_query, grad_key = grad_query + grad_key, None
        return (
            grad_query if need_query else None,
            grad_key if need_key else None,
            grad_scale.to(logit_scale.dtype) if need_scale and grad_scale is not None else None,
            *[None] * 8,
        )


def _every_query(travelling: _Travelling, peers: Peers) -> Mask:
    """All ranks' queries against this rank's keys: the positives by index of its own queries alone are among them."""
    mask, queries = travelling.mask, travelling.queries
    assert queries is not None
    labels = mask.key_labels if mask.exclude_self else None
    if travelling.query_labels is not None:
        labels = travelling.query_labels.wait(queries)[:, 0]
    own = peers.keys.sizes[peers.rank]
    index = mask.positive_index
    if index is not None:
        index = torch.cat([index, index.new_full((peers.total - len(index),), -1)])
    return Mask(
        query_labels=labels,
        key_labels=None if mask.key_labels is None else mask.key_labels[:own],
        positive_index=index,
        by_label=mask.by_label,
        exclude_self=mask.exclude_self,
    )
