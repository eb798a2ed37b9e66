"""``dual_softmax`` over the rows of several ranks; every rank returns the sums over its own rows.

The upstream gradients of these sums must be equal on all ranks, as they are when every rank calls ``backward`` on its
loss: an owner computes the complete gradient of its rows from the other ranks' numbers and its own upstream gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastkd.backends import STREAMING
from fastkd.distributed import Peers, exchange_dtype
from fastkd.exchange import Numbers, start, start_numbers


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
            ctx.scale_bound, ctx.dtype, ctx.weighted = scale_bound, student.dtype, weight is not None
            ctx.backend = STREAMING[f"{backend}_rows"]
            ctx.forward_kl = consistency == "student||teacher"
            # KL(q || p) is KL(p || q) with student and teacher exchanged; only the contrast then reads q instead of p.
            pair = (student, teacher) if ctx.forward_kl else (teacher, student)
            exchange, units, inverse_norm, gathered = start(peers, pair, exchange_dtype(student.dtype))
            state = ctx.backend.DualStatistics(units, logit_scale.to(inverse_norm.dtype), scale_bound)
            for cols, block in exchange.columns(units, gathered):
                state.add(block, is_own=cols == exchange.own)
            contrast, consistency_sum, numbers, own = state.finish(weight, ctx.forward_kl)
            ctx.exchange, ctx.numbers = exchange, _start_numbers(peers, numbers, weight)
            ctx.save_for_backward(logit_scale, units, inverse_norm, gathered, own)
            return contrast, consistency_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_contrast: Tensor, grad_consist: Tensor) -> tuple[Tensor | None, ...]:
        logit_scale, units, inverse_norm, gathered, own = ctx.saved_tensors
        with torch.autocast(units.device.type, enabled=False):
            numbers, weight = _numbers_and_weight(ctx)
            need_student, need_teacher, need_scale = ctx.needs_input_grad[:3]
            need_a, need_b = (need_student, need_teacher) if ctx.forward_kl else (need_teacher, need_student)
            sums = ctx.backend.DualGradients(
                units,
                logit_scale.to(inverse_norm.dtype),
                ctx.scale_bound,
                ctx.exchange.own,
                numbers,
                own,
                weight,
                (grad_contrast, grad_consist),
                ctx.forward_kl,
                # On every rank the same side yields the gradient of logit_scale: its parts differ between the sides.
                need_a or need_scale,
                need_b,
            )
            for cols, block in ctx.exchange.columns(units, gathered):
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


def _start_numbers(peers: Peers, stats: Tensor, weight: Tensor | None) -> Numbers | None:
    """Start to gather the numbers [S, n] and weights of every row, where a rank's backward will need them."""
    if weight is not None:
        stats = torch.cat([stats, weight.to(stats.dtype)[None]])
    return start_numbers(peers, stats.T) if peers.needs_grad else None


def _numbers_and_weight(ctx: Any) -> tuple[Tensor, Tensor | None]:
    """What :func:`_start_numbers` gathered, in the order of the columns: [S, N] and the weights [N]."""
    numbers = ctx.numbers.wait(ctx.exchange).T.contiguous()
    return (numbers[:-1], numbers[-1]) if ctx.weighted else (numbers, None)
