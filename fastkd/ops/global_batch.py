"""``dual_softmax`` and ``contrast`` over the rows of several ranks; every rank returns the sums over its own rows.

The upstream gradients of these sums must be equal on all ranks, as they are when every rank calls ``backward`` on its
loss: an owner computes the complete gradient of its rows from the other ranks' numbers and its own upstream gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastkd.backends import STREAMING
from fastkd.backends.blocked import finish, row_weights
from fastkd.backends.blocked_rows import ContrastGradients, ContrastStatistics
from fastkd.backends.reference import weighted_sum
from fastkd.distributed import Peers, columns, exchange_dtype, fits, start_gather
from fastkd.pack import pack_rows


def global_dual_softmax(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    consistency: str,
    scale_bound: float,
    peers: Peers,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``sum_i w_i contrast_i`` and ``sum_i w_i consistency_i`` over this rank's rows i, against all ranks' rows."""
    if peers.has_weight and weight is None:
        weight = student.new_ones(len(student))
    return _DualSoftmax.apply(student, teacher, logit_scale, weight, consistency, scale_bound, peers, backend)


def global_contrast(
    query: Tensor, key: Tensor, logit_scale: Tensor, weight: Tensor | None, normalize: bool, peers: Peers
) -> Tensor:
    """``sum_i w_i (-log softmax_j(logit_scale q_i . k_j)_i)`` over this rank's rows i, all ranks' keys j."""
    if peers.has_weight and weight is None:
        weight = query.new_ones(len(query))
    return _Contrast.apply(query, key, logit_scale, weight, normalize, peers)


class _DualSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        logit_scale: Tensor,
        weight: Tensor | None,
        consistency: str,
        scale_bound: float,
        peers: Peers,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(student.device.type, enabled=False):
            ctx.peers, ctx.scale_bound, ctx.dtype = peers, scale_bound, student.dtype
            ctx.backend = STREAMING[f"{backend}_rows"]
            ctx.forward_kl = consistency == "student||teacher"
            # KL(q || p) is KL(p || q) with student and teacher exchanged; only the contrast then reads q instead of p.
            pair = (student, teacher) if ctx.forward_kl else (teacher, student)
            units, inverse_norm, gathered, works = _start(*pair, True, peers)
            state = ctx.backend.DualStatistics(units, logit_scale.to(inverse_norm.dtype), scale_bound)
            for cols, block in columns(peers, units, gathered, works):
                state.add(block, is_own=cols == peers.rows(peers.rank))
            contrast, consistency_sum, numbers, own = state.finish(weight, ctx.forward_kl)
            _start_numbers(ctx, numbers, weight, peers)
            ctx.save_for_backward(logit_scale, units, inverse_norm, gathered, own)
            return contrast, consistency_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_contrast: Tensor, grad_consist: Tensor) -> tuple[Tensor | None, ...]:
        logit_scale, units, inverse_norm, gathered, own = ctx.saved_tensors
        peers = ctx.peers
        with torch.autocast(units.device.type, enabled=False):
            numbers, weight = _finish_numbers(ctx, peers)
            need_student, need_teacher, need_scale = ctx.needs_input_grad[:3]
            need_a, need_b = (need_student, need_teacher) if ctx.forward_kl else (need_teacher, need_student)
            sums = ctx.backend.DualGradients(
                units,
                logit_scale.to(inverse_norm.dtype),
                ctx.scale_bound,
                peers.rows(peers.rank),
                numbers,
                own,
                weight,
                (grad_contrast, grad_consist),
                ctx.forward_kl,
                # On every rank the same side yields the gradient of logit_scale: its parts differ between the sides.
                need_a or need_scale,
                need_b,
            )
            for cols, block in columns(peers, units, gathered, []):
                sums.add(block, cols)
            grad_a, grad_b, grad_scale = sums.finish(inverse_norm, ctx.dtype)
            grads = (grad_a, grad_b) if ctx.forward_kl else (grad_b, grad_a)
        return (
            grads[0] if need_student else None,
            grads[1] if need_teacher else None,
            grad_scale.to(logit_scale.dtype) if need_scale and grad_scale is not None else None,
            None,
            None,
            None,
            None,
            None,
        )


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, logit_scale: Tensor, weight: Tensor | None, normalize: bool, peers: Peers
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            ctx.peers, ctx.normalize, ctx.dtype = peers, normalize, query.dtype
            units, inverse_norm, gathered, works = _start(query, key, normalize, peers)
            state = ContrastStatistics(units, logit_scale.to(inverse_norm.dtype))
            for cols, block in columns(peers, units, gathered, works):
                state.add(block, is_own=cols == peers.rows(peers.rank))
            loss, positive = state.stats()
            _start_numbers(ctx, (loss + positive)[None], weight, peers)
            ctx.save_for_backward(logit_scale, units, inverse_norm, gathered, loss)
            return weighted_sum(loss, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        logit_scale, units, inverse_norm, gathered, loss = ctx.saved_tensors
        peers = ctx.peers
        own = peers.rows(peers.rank)
        with torch.autocast(units.device.type, enabled=False):
            numbers, weight = _finish_numbers(ctx, peers)
            scale, lse = logit_scale.to(inverse_norm.dtype), numbers[0]
            w = row_weights(weight, grad_loss, lse)
            need_query, need_key, need_scale = ctx.needs_input_grad[:3]
            # On every rank the queries yield the gradient of logit_scale, as above.
            sums = ContrastGradients(units, scale, own, lse, w, need_query or need_scale, need_key)
            for cols, block in columns(peers, units, gathered, []):
                sums.add(block, cols)
            diagonal, like = (w[own] * (-loss).expm1())[:, None], units.new_empty(0, dtype=ctx.dtype)
            inverse_q, inverse_k = inverse_norm if ctx.normalize else (None, None)
            grad_query, grad_scale = finish(like, sums.grad_a, sums.a, diagonal * sums.b, inverse_q, scale)
            grad_key, _ = finish(like, sums.grad_b, sums.b, diagonal * sums.a, inverse_k, scale)
        return (
            grad_query if need_query else None,
            grad_key if need_key else None,
            grad_scale.to(logit_scale.dtype) if need_scale and grad_scale is not None else None,
            None,
            None,
            None,
        )


def _start(
    first: Tensor, second: Tensor, normalize: bool, peers: Peers
) -> tuple[Tensor, Tensor, Tensor | None, list[Any]]:
    """Packed rows, inverse norms, and the gathered rows with what to wait for (None and nothing in ring mode)."""
    units, inverse_norm = pack_rows(first, second, exchange_dtype(first.dtype), normalize)
    if not fits(peers, units):
        if peers.needs_grad and not peers.all_need_grad:
            raise ValueError("group: got inputs that need a gradient on some ranks only, expected all in ring mode")
        return units, inverse_norm, None, []
    return units, inverse_norm, *start_gather(peers, units, 2 * first.shape[1])


def _start_numbers(ctx: Any, stats: Tensor, weight: Tensor | None, peers: Peers) -> None:
    """Start to gather the numbers [S, n] and weights of every row, for the backward to wait for.

    They stay on ``ctx``: a tensor that is still being received must not be saved, its version counter changes.
    """
    if weight is not None:
        stats = torch.cat([stats, weight.to(stats.dtype)[None]])
    ctx.count = len(stats)
    ctx.numbers, ctx.works = None, []
    if peers.needs_grad:
        ctx.numbers, ctx.works = start_gather(peers, stats.T.contiguous(), ctx.count)


def _finish_numbers(ctx: Any, peers: Peers) -> tuple[Tensor, Tensor | None]:
    """What :func:`_start_numbers` gathered: [S, N] and the weights [N]."""
    for work in ctx.works:
        work.wait()
    ctx.works = []
    numbers = ctx.numbers.view(-1, ctx.count).T.contiguous()
    return (numbers[:-1], numbers[-1]) if peers.has_weight else (numbers, None)
