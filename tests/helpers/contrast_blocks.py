"""``contrast`` of several ranks in one process: every rank's classes are fed all ranks' rows, block after block."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fastkd.backends.masks import Mask
from fastkd.backends.triton import contrast_rows as backend
from fastkd.distributed.pack import pack_rows
from tests.helpers.contrast_cases import MODES, Problem, problem

Ranges = list[range]


def ranks_problem(
    mode: str, sizes: tuple[int, ...], key_sizes: tuple[int, ...], D: int, **options: Any
) -> tuple[Problem, Callable[..., Tensor]]:
    """A problem whose positives by index are on the query's rank, and the loss as these ranks compute it."""
    p = problem(mode, sum(sizes), sum(key_sizes), D, **options)
    queries, keys = _ranges(sizes), _ranges(key_sizes)
    if MODES[mode][2]:
        index = [keys[rank][number * 7 % len(keys[rank])] for rank, own in enumerate(queries) for number in own]
        p = replace(p, positive_index=torch.tensor(index, device=p.inputs[0].device))

    def loss(*inputs: Tensor) -> Tensor:
        query, key, scale = inputs if len(inputs) == 3 else (inputs[0], None, inputs[1])
        return _Ranks.apply(query, key, scale, p, queries, keys)

    return p, loss


def _ranges(sizes: tuple[int, ...]) -> Ranges:
    return [range(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True)]


def _in_order(ranges: Ranges, rank: int) -> Tensor:
    """Numbers of all ranks' rows in the order in which they reach a rank: its own first."""
    others = [number for other, rows in enumerate(ranges) if other != rank for number in rows]
    return torch.tensor([*ranges[rank], *others], dtype=torch.int64)


def _blocks(rows: Tensor, own: int) -> Iterator[tuple[Tensor, slice]]:
    """The own rows whole, the others in blocks of one, of none and of all that are left."""
    cuts = [0, own, min(own + 1, len(rows)), min(own + 1, len(rows)), len(rows)]
    for start, stop in pairwise(cuts):
        yield rows[start:stop], slice(start, stop)


class _Ranks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor | None, scale: Tensor, p: Problem, queries: Ranges, keys: Ranges
    ) -> Tensor:
        q, inverse_q = pack_rows((query,), query.dtype, p.normalize)
        k, inverse_k = (q, inverse_q) if key is None else pack_rows((key,), key.dtype, p.normalize)
        losses, stats = [], []
        for rank, own in enumerate(queries):
            state = backend.ContrastStatistics(q[0][_slice(own)], scale, _own_mask(p, queries, keys, rank))
            for block, cols in _blocks(k[0][_in_order(keys, rank)], len(keys[rank])):
                state.add(block, cols)
            loss, numbers = state.stats()
            losses.append(loss)
            stats.append(numbers)
        ctx.p, ctx.ranges, ctx.scale, ctx.rows = p, (queries, keys), scale, (q[0], inverse_q, k[0], inverse_k)
        ctx.stats = torch.cat(stats, dim=1)
        losses = torch.cat(losses)
        return (losses if p.weight is None else losses * p.weight).sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        p, (queries, keys), (q, inverse_q, k, inverse_k) = ctx.p, ctx.ranges, ctx.rows
        of_queries, of_keys, of_scale = [], [], []
        for rank in range(len(queries)):
            own, own_keys, order = _slice(queries[rank]), _slice(keys[rank]), _in_order(queries, rank)
            weight = None if p.weight is None else p.weight[own]
            mask = _own_mask(p, queries, keys, rank)
            sums = backend.QueryGradient(q[own], ctx.scale, mask, ctx.stats[:, own], weight, grad_loss)
            for block, cols in _blocks(k[_in_order(keys, rank)], len(keys[rank])):
                sums.add(block, cols)
            grad, grad_scale = sums.finish(k[own_keys], inverse_q[0, own] if p.normalize else None, q.dtype)
            of_queries.append(grad)
            of_scale.append(grad_scale)
            weight = None if p.weight is None else p.weight[order]
            everyone = _everyone(p, mask, order, len(keys[rank]))
            sums = backend.KeyGradient(k[own_keys], ctx.scale, everyone, ctx.stats[:, order], weight, grad_loss)
            for block, rows in _blocks(q[order], len(queries[rank])):
                sums.add(block, rows)
            of_keys.append(sums.finish(q[own], inverse_k[0, own_keys] if p.normalize else None, q.dtype)[0])
        grad_query, grad_key, grad_scale = torch.cat(of_queries), torch.cat(of_keys), torch.stack(of_scale).sum()
        if len(p.inputs) == 2:
            grad_query, grad_key = grad_query + grad_key, None
        return grad_query, grad_key, grad_scale, None, None, None


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


def _own_mask(p: Problem, queries: Ranges, keys: Ranges, rank: int) -> Mask:
    """Of a rank's queries and all keys, in the order in which they reach it."""
    mask, own = p.mask(), _slice(queries[rank])
    return replace(
        mask,
        query_labels=None if mask.query_labels is None else mask.query_labels[own],
        key_labels=None if mask.key_labels is None else mask.key_labels[_in_order(keys, rank)],
        positive_index=None if mask.positive_index is None else mask.positive_index[own] - keys[rank].start,
    )


def _everyone(p: Problem, mask: Mask, order: Tensor, own_keys: int) -> Mask:
    """Of all queries, in the order in which they reach a rank, and its own keys."""
    index = mask.positive_index
    return replace(
        mask,
        query_labels=None if p.query_labels is None else p.query_labels[order],
        key_labels=None if mask.key_labels is None else mask.key_labels[:own_keys],
        positive_index=None if index is None else torch.cat([index, index.new_full((len(order) - len(index),), -1)]),
    )
