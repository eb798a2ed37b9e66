"""``dual_softmax``: contrast and consistency of DCD, over the rows of one rank or of several.

:func:`forward` and :func:`backward` are the operation. They hand blocks of columns to a backend's ``Forward`` or
``Backward``. On one rank the rows themselves are all the columns; custom ops let torch.compile see through that case.
On several ranks the columns of the others arrive through an exchange. Then every rank returns the sums over its own
rows, and computes their whole gradient alone, from three numbers per column. For that the upstream gradients must be
equal on all ranks, as they are when every rank calls ``backward`` on its loss.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastkd.backends import implementation
from fastkd.backends.inputs import DualRows, DualUpstream
from fastkd.distributed.agree import Peers
from fastkd.distributed.exchange import Alone, Exchange, start, start_numbers
from fastkd.distributed.group import exchange_dtype
from fastkd.numerics import accumulation_dtype

STATISTICS = {"blocked": 4, "triton": 3}  # numbers per row that a backend keeps for its backward
Value = TypeVar("Value")


class _Options(NamedTuple):
    """Which KL divergence, what is known of the scale, and who computes."""

    consistency: str
    scale_bound: float  # logit_scale is at most this; inf if nothing is known
    backend: str

    @property
    def is_swapped(self) -> bool:
        return self.consistency == "teacher||student"

    def pair(self, student: Value, teacher: Value) -> tuple[Value, Value]:
        """The pair (a, b) of which a backend computes ``KL(softmax_j a_i . b_j || softmax_j b_i . a_j)``.

        KL(q || p) is KL(p || q) with student and teacher exchanged. Only the contrast then reads the other softmax.
        """
        return (teacher, student) if self.is_swapped else (student, teacher)

    @property
    def module(self) -> Any:
        return implementation("dual_softmax", self.backend)


def _rows(exchange: Exchange | Alone, units: Any, logit_scale: Tensor, like: Tensor, options: _Options) -> DualRows:
    scale = logit_scale.to(accumulation_dtype(like.dtype))
    return DualRows(units, scale, options.scale_bound, exchange.total, exchange.is_packed)


def forward(
    exchange: Exchange | Alone, rows: DualRows, gathered: Tensor | None, weight: Tensor | None, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sums of contrast and consistency, and the statistics of the rank's rows."""
    state = options.module.Forward(rows)
    for cols, block in exchange.columns(rows.units, gathered):
        state.add_own() if cols == exchange.own else state.add(block, cols)
    return state.finish(weight, options.is_swapped)


def backward(
    exchange: Exchange | Alone,
    rows: DualRows,
    gathered: Tensor | None,
    inverse_norm: Tensor,
    stats: Tensor,
    upstream: DualUpstream,
    needs: tuple[bool, bool, bool],
    like: Tensor,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of student and teacher (empty where not needed), as wide as ``like`` and in its dtype; of the scale."""
    need_a, need_b = options.pair(needs[0], needs[1])
    # The gradient of logit_scale falls out of either side's. On all ranks the same side must yield it.
    with_a = need_a or needs[2] or not need_b
    state = options.module.Backward(rows, stats, upstream, with_a, need_b)
    for cols, block in exchange.columns(rows.units, gathered):
        state.add_own() if cols == exchange.own else state.add(block, cols)
    grad_a, grad_b, grad_scale = state.finish(inverse_norm, like.dtype, like.shape[1])
    if not need_a:
        grad_a = grad_a.new_empty(0)
    return *options.pair(grad_a, grad_b), grad_scale


@torch.library.custom_op("fastkd::dual_softmax", mutates_args=())
def dual_softmax(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    consistency: str,
    scale_bound: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_i w_i contrast_i``, ``sum_i w_i consistency_i`` and the statistics that the backward needs.

    student, teacher: [n, D]. logit_scale: 0-dim, at most ``scale_bound`` (inf: unknown). weight: [n] or None for ones.
    """
    options = _Options(consistency, scale_bound, backend)
    with torch.autocast(student.device.type, enabled=False):
        units, _ = options.module.units(*options.pair(student, teacher))
        alone = Alone(len(student))
        return forward(alone, _rows(alone, units, logit_scale, student, options), None, weight, options)


@dual_softmax.register_fake
def _(student: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, backend = accumulation_dtype(student.dtype), inputs[-1]
    sums = [student.new_empty((), dtype=dtype) for _ in range(2)]
    return sums[0], sums[1], student.new_empty((STATISTICS[backend], student.shape[0]), dtype=dtype)


@torch.library.custom_op("fastkd::dual_softmax_backward", mutates_args=())
def dual_softmax_backward(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    grad_contrast: Tensor,
    grad_consistency: Tensor,
    consistency: str,
    scale_bound: float,
    need_student: bool,
    need_teacher: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of student and teacher (empty where not needed) and of logit_scale, in their inputs' dtypes."""
    options, needs = _Options(consistency, scale_bound, backend), (need_student, need_teacher, False)
    with torch.autocast(student.device.type, enabled=False):
        units, inverse_norm = options.module.units(*options.pair(student, teacher))
        upstream = DualUpstream(
            options.module.numbers(stats), weight, grad_contrast, grad_consistency, options.is_swapped
        )
        alone = Alone(len(student))
        rows = _rows(alone, units, logit_scale, student, options)
        *grads, grad_scale = backward(alone, rows, None, inverse_norm, stats, upstream, needs, student, options)
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


def _op_backward(ctx: Any, grad_contrast: Tensor, grad_consistency: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    found = dual_softmax_backward(
        *ctx.saved_tensors, grad_contrast, grad_consistency, ctx.consistency, ctx.scale_bound, *needs[:2], ctx.backend
    )
    return *(grad if need else None for grad, need in zip(found, needs, strict=True)), *[None] * 4


dual_softmax.register_autograd(_op_backward, setup_context=_setup_context)


class GlobalDualSoftmax(torch.autograd.Function):
    """The sums over this rank's rows, against the rows of all ``peers``; a process group cannot cross a custom op."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        logit_scale: Tensor,
        weight: Tensor | None,
        consistency: str,
        scale_bound: float,
        backend: str,
        peers: Peers,
    ) -> tuple[Tensor, Tensor]:
        options = ctx.options = _Options(consistency, scale_bound, backend)
        if peers.has_weight and weight is None:
            weight = student.new_ones(len(student))
        with torch.autocast(student.device.type, enabled=False):
            pair = options.pair(student, teacher)
            exchange, units, inverse_norm, gathered = start(peers, pair, exchange_dtype(student.dtype))
            rows = _rows(exchange, units, logit_scale, student, options)
            contrast, consistency_sum, stats = forward(exchange, rows, gathered, weight, options)
            ctx.exchange, ctx.weighted, ctx.like = exchange, weight is not None, student.new_empty(0, student.shape[1])
            numbers = options.module.numbers(stats)
            if weight is not None:
                numbers = torch.cat([numbers, weight.to(numbers.dtype)[None]])
            # Not among the saved tensors: they are still arriving, and autograd would take that for a change.
            ctx.numbers = start_numbers(peers, numbers.T) if peers.needs_grad else None
            ctx.save_for_backward(logit_scale, units, inverse_norm, gathered, stats)
        return contrast, consistency_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_contrast: Tensor, grad_consistency: Tensor) -> tuple[Tensor | None, ...]:
        logit_scale, units, inverse_norm, gathered, stats = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with torch.autocast(units.device.type, enabled=False):
            numbers, weight = ctx.numbers.wait(ctx.exchange).T.contiguous(), None
            if ctx.weighted:
                numbers, weight = numbers[:-1], numbers[-1]
            upstream = DualUpstream(numbers, weight, grad_contrast, grad_consistency, ctx.options.is_swapped)
            rows = _rows(ctx.exchange, units, logit_scale, ctx.like, ctx.options)
            *grads, grad_scale = backward(
                ctx.exchange, rows, gathered, inverse_norm, stats, upstream, needs, ctx.like, ctx.options
            )
        grads.append(grad_scale.to(logit_scale.dtype))
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 5
