"""Several ranks in one process: every rank's part of an operation is fed all ranks' rows, block after block."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fastkd.backends.inputs import ContrastRows, ContrastUpstream, DualRows, DualUpstream
from fastkd.backends.masks import label_codes
from fastkd.distributed.pack import pack_rows
from fastkd.ops import contrast, dual_softmax
from tests.helpers.contrast_cases import MODES, Problem, problem

Ranges = list[range]
BACKEND = "triton"


class Blocks:
    """An exchange that has all rows: a rank's own first, then the others' in blocks of one, of none and of the rest."""

    is_packed, is_ring = True, False

    def __init__(self, own: int, total: int) -> None:
        self.own, self.total = slice(0, own), total

    def columns(self, units: Tensor, gathered: Tensor) -> Iterator[tuple[slice, Tensor]]:
        own, total = self.own.stop, self.total
        yield self.own, units
        for start, stop in pairwise([own, min(own + 1, total), min(own + 1, total), total]):
            yield slice(start, stop), gathered[:, start - own : stop - own]


def ranges(sizes: tuple[int, ...]) -> Ranges:
    return [range(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True)]


def in_order(of_ranks: Ranges, rank: int) -> Tensor:
    """Numbers of all ranks' rows in the order in which they reach a rank: its own first."""
    others = [number for other, rows in enumerate(of_ranks) if other != rank for number in rows]
    return torch.tensor([*of_ranks[rank], *others], dtype=torch.int64)


def dcd_over_ranks(
    sizes: tuple[int, ...], consistency: str, scale_bound: float, alpha: float = 0.5
) -> Callable[..., Tensor]:
    """``dcd_loss`` of (student, teacher, logit_scale) as these ranks compute it."""
    options = dual_softmax._Options(consistency, scale_bound, BACKEND)

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
            units, inverse_norm = pack_rows(options.pair(student, teacher), student.dtype, True)
            ctx.parts, totals = [], []
            for rank, own in enumerate(ranges(sizes)):
                order = in_order(ranges(sizes), rank)
                exchange = Blocks(len(own), len(order))
                rows = DualRows(units[:, order[: len(own)]], scale, scale_bound, len(order), is_packed=True)
                gathered = units[:, order[len(own) :]]
                *sums, stats, _ = dual_softmax.forward(exchange, rows, gathered, None, options)
                totals.append(sums[0] + alpha * sums[1])
                ctx.parts.append((exchange, rows, gathered, inverse_norm[:, order[: len(own)]], stats, order))
            ctx.like = student
            return torch.stack(totals).sum() / sum(sizes)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            numbers = torch.cat([options.module.numbers(part[4]) for part in ctx.parts], dim=1)
            found = []
            for exchange, rows, gathered, inverse_norm, stats, order in ctx.parts:
                upstream = DualUpstream(
                    numbers[:, order], None, grad / sum(sizes), alpha * grad / sum(sizes), options.is_swapped
                )
                needs = (True, True, True)
                found.append(
                    dual_softmax.backward(
                        exchange, rows, gathered, inverse_norm, stats, upstream, needs, ctx.like, options
                    )
                )
            students, teachers, scales = zip(*found, strict=True)
            return torch.cat(students), torch.cat(teachers), torch.stack(scales).sum()

    return Loss.apply


def contrast_over_ranks(
    mode: str, sizes: tuple[int, ...], key_sizes: tuple[int, ...], D: int, **options: Any
) -> tuple[Problem, Callable[..., Tensor]]:
    """A problem whose positives by index are on the query's rank, and the loss as these ranks compute it."""
    p = problem(mode, sum(sizes), sum(key_sizes), D, **options)
    queries, keys = ranges(sizes), ranges(key_sizes)
    if MODES[mode][2]:
        index = [keys[rank][number * 7 % len(keys[rank])] for rank, own in enumerate(queries) for number in own]
        p = replace(p, positive_index=torch.tensor(index, device=p.inputs[0].device))

    def loss(*inputs: Tensor) -> Tensor:
        query, key, scale = inputs if len(inputs) == 3 else (inputs[0], None, inputs[1])
        return _Contrast.apply(query, key, scale, p, queries, keys)

    return p, loss


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor | None, scale: Tensor, p: Problem, queries: Ranges, keys: Ranges
    ) -> Tensor:
        mask, losses = p.mask(), []
        codes = None if mask.labels is None else label_codes(*mask.labels)
        ctx.parts, ctx.p, ctx.like = [], p, query
        for rank in range(len(queries)):
            of_queries = _side(query, queries, rank, p.normalize)
            of_keys = of_queries if key is None else _side(key, keys, rank, p.normalize)
            own, index = slice(queries[rank].start, queries[rank].stop), mask.positive_index
            labels: tuple[Tensor | None, ...] = None, None
            if codes is not None:
                labels = codes[0][in_order(queries, rank)], codes[1][in_order(keys, rank)]
            own_mask = replace(
                mask,
                query_labels=labels[0],
                key_labels=labels[1],
                positive_index=None if index is None else index[own] - keys[rank].start,
            )
            k = None if key is None else of_keys.rows
            total = of_keys.exchange.total
            rows = ContrastRows(of_queries.rows, k, scale, own_mask, p.normalize, total, is_packed=True)
            weight = None if p.weight is None else p.weight[own]
            loss, stats, _ = contrast.forward(rows, of_keys, weight, BACKEND)
            losses.append(loss)
            ctx.parts.append((rows, of_queries, of_keys, stats, in_order(queries, rank)))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        p, found = ctx.p, []
        numbers = torch.cat([part[3] for part in ctx.parts], dim=1)
        for rows, of_queries, of_keys, _, order in ctx.parts:
            weight = None if p.weight is None else p.weight[order]
            upstream = ContrastUpstream(numbers[:, order], weight, grad_loss)
            needs = (True, True, True)
            found.append(contrast.backward(rows, of_queries, of_keys, upstream, needs, ctx.like, BACKEND))
        grad_query, grad_key, grad_scale = zip(*found, strict=True)
        key = None if len(p.inputs) == 2 else torch.cat(grad_key)
        return torch.cat(grad_query), key, torch.stack(grad_scale).sum(), None, None, None


def _side(x: Tensor, of_ranks: Ranges, rank: int, normalize: bool) -> contrast.Side:
    units, inverse_norm = pack_rows((x,), x.dtype, normalize)
    order, own = in_order(of_ranks, rank), len(of_ranks[rank])
    inverse = inverse_norm[0][order[:own]] if normalize else None
    return contrast.Side(Blocks(own, len(order)), units[0][order[:own]], inverse, units[:, order[own:]])
