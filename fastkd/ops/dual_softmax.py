"""``dual_softmax``: contrast and consistency of DCD, over the rows of one rank or of several.

:func:`forward` and :func:`backward` are the operation; a backend gives them one ``Forward`` and one ``Backward`` to which
columns are added. On one rank the columns are the rows themselves, and both are custom ops that torch.compile sees through.
On several, other ranks' columns arrive by :mod:`fastkd.distributed.exchange`; every rank returns the sums over its own rows and computes
the whole gradient of these, from three numbers a column. The upstream gradients must then be equal on all ranks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastkd.backends import implementation
from fastkd.distributed.agree import Peers
from fastkd.distributed.group import Alone, exchange_dtype
from fastkd.numerics import accumulation_dtype

STATISTICS = {"blocked": 4, "triton": 3}  # numbers a row that a backend keeps for its backward


def forward(exchange, units, gathered, scale, weight, consistency, scale_bound, backend):
    """``sum_i w_i contrast_i``, ``sum_i w_i consistency_i`` and the statistics of the rows ``units``."""
    state = backend.Forward(units, scale, scale_bound)
    for cols, block in exchange.columns(units, gathered):
        state.add_own() if cols == exchange.own else state.add(block)
    return state.finish(weight, consistency == "student||teacher")


def backward(
    exchange,
    units,
    gathered,
    inverse_norm,
    scale,
    scale_bound,
    stats,
    everyone,
    weight,
    grads,
    consistency,
    needs,
    dtype,
    D,
    backend,
):
    need_a, need_b, need_scale = needs
    # The gradient of logit_scale falls out of either side's; on all ranks the same side must yield it.
    state = backend.Backward(
        units, scale, scale_bound, stats, everyone, weight, grads, consistency == "student||teacher",
        need_a or need_scale or not need_b, need_b,
    )  # fmt: skip
    for cols, block in exchange.columns(units, gathered):
        state.add_own() if cols == exchange.own else state.add(block, cols.start)
    return state.finish(inverse_norm, dtype, D)


def _pair(student, teacher, consistency):
    """KL(q || p) is KL(p || q) with student and teacher exchanged; only the contrast then reads q instead of p."""
    return (student, teacher) if consistency == "student||teacher" else (teacher, student)


@torch.library.custom_op("fastkd::dual_softmax", mutates_args=())
def dual_softmax(
    student: Tensor, teacher: Tensor, logit_scale: Tensor, weight: Tensor | None, consistency: str, scale_bound: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The two sums, and what the backward needs, a few numbers a row. logit_scale: 0-dim, at most ``scale_bound``."""
    with torch.autocast(student.device.type, enabled=False):
        module = implementation("dual_softmax", backend)
        units, _ = module.units(*_pair(student, teacher, consistency))
        scale = logit_scale.to(accumulation_dtype(student.dtype))
        return forward(Alone(len(student)), units, None, scale, weight, consistency, scale_bound, module)


@dual_softmax.register_fake
def _(student: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, backend = accumulation_dtype(student.dtype), inputs[-1]
    sums = [student.new_empty((), dtype=dtype) for _ in range(2)]
    return sums[0], sums[1], student.new_empty((STATISTICS[backend], student.shape[0]), dtype=dtype)


@torch.library.custom_op("fastkd::dual_softmax_backward", mutates_args=())
def dual_softmax_backward(
    student: Tensor, teacher: Tensor, logit_scale: Tensor, weight: Tensor | None, stats: Tensor, grad_contrast: Tensor,
    grad_consistency: Tensor, consistency: str, scale_bound: float, need_student: bool, need_teacher: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of student and teacher (empty where not needed) and of logit_scale, in their inputs' dtypes."""
    with torch.autocast(student.device.type, enabled=False):
        module = implementation("dual_softmax", backend)
        units, inverse_norm = module.units(*_pair(student, teacher, consistency))
        needs = (*_pair(need_student, need_teacher, consistency), False)
        grad_a, grad_b, grad_scale = backward(
            Alone(len(student)), units, None, inverse_norm, logit_scale.to(accumulation_dtype(student.dtype)), scale_bound, stats,
            module.numbers(stats), weight, (grad_contrast, grad_consistency), consistency, needs, student.dtype,
            student.shape[1], module,
        )  # fmt: skip
        if not needs[0]:
            grad_a = grad_a.new_empty(0)
        grads = _pair(grad_a, grad_b, consistency)
        return grads[0], grads[1], grad_scale.to(logit_scale.dtype)


@dual_softmax_backward.register_fake
def _(student: Tensor, teacher: Tensor, logit_scale: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_student, need_teacher = inputs[-3:-1]
    dense = torch.contiguous_format
    return (
        torch.empty_like(student, memory_format=dense) if need_student else student.new_empty(0),
        torch.empty_like(teacher, memory_format=dense) if need_teacher else teacher.new_empty(0),
        torch.empty_like(logit_scale),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.consistency, ctx.scale_bound, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    found = dual_softmax_backward(
        *ctx.saved_tensors, *grads[:2], ctx.consistency, ctx.scale_bound, needs[0], needs[1], ctx.backend
    )
    return *(grad if need else None for grad, need in zip(found, needs, strict=True)), *[None] * 4


dual_softmax.register_autograd(_backward, setup_context=_setup_context)


class GlobalDualSoftmax(torch.autograd.Function):
    """The two sums over this rank's rows, against the rows of all ``peers``."""

    @staticmethod
    def forward(ctx, student, teacher, logit_scale, weight, consistency, scale_bound, peers: Peers, backend):
        from fastkd.distributed.exchange import start, start_numbers

        if peers.has_weight and weight is None:
            weight = student.new_ones(len(student))
        with torch.autocast(student.device.type, enabled=False):
            ctx.backend, ctx.consistency, ctx.scale_bound = (
                implementation("dual_softmax", backend),
                consistency,
                scale_bound,
            )
            pair = _pair(student, teacher, consistency)
            exchange, units, inverse_norm, gathered = start(peers, pair, exchange_dtype(student.dtype))
            scale = logit_scale.to(inverse_norm.dtype)
            *sums, stats = forward(exchange, units, gathered, scale, weight, consistency, scale_bound, ctx.backend)
            numbers = ctx.backend.numbers(stats)
            if weight is not None:
                numbers = torch.cat([numbers, weight.to(stats.dtype)[None]])
            ctx.exchange, ctx.weighted, ctx.dtype = exchange, weight is not None, student.dtype
            # Not saved: it is still being received, and autograd would take that for a change of a saved tensor.
            ctx.numbers = start_numbers(peers, numbers.T) if peers.needs_grad else None
            ctx.save_for_backward(logit_scale, units, inverse_norm, gathered, stats)
            return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logit_scale, units, inverse_norm, gathered, stats = ctx.saved_tensors
        with torch.autocast(units.device.type, enabled=False):
            everyone = ctx.numbers.wait(ctx.exchange).T.contiguous()
            everyone, weight = (everyone[:-1], everyone[-1]) if ctx.weighted else (everyone, None)
            needs = (*_pair(*ctx.needs_input_grad[:2], ctx.consistency), ctx.needs_input_grad[2])
            grad_a, grad_b, grad_scale = backward(
                ctx.exchange, units, gathered, inverse_norm, logit_scale.to(inverse_norm.dtype), ctx.scale_bound, stats,
                everyone, weight, grads, ctx.consistency, needs, ctx.dtype, units.shape[2], ctx.backend,
            )  # fmt: skip
            found = (*_pair(grad_a, grad_b, ctx.consistency), grad_scale.to(logit_scale.dtype))
        return *(grad if need else None for grad, need in zip(found, ctx.needs_input_grad[:3], strict=True)), *[
            None
        ] * 5
