"""``dual_softmax``: contrast and consistency of DCD, over the rows of one rank or of several.

:func:`forward` and :func:`backward` are the operation. They hand blocks of columns to a backend's ``Forward`` or
``Backward``. :func:`means` runs them as a plain autograd function. Under torch.compile, on one rank, custom ops take
its place.

On one rank the rows themselves are all the columns. On several ranks the columns of the others arrive through an
exchange. Then every rank returns the sums over its own rows, and computes their whole gradient alone, from three
numbers per column. For that the upstream gradients must be equal on all ranks, as they are when every rank calls
``backward`` on its loss.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastkd.backends import implementation
from fastkd.backends.inputs import DualRows, DualUpstream
from fastkd.distributed.agree import Peers
from fastkd.distributed.exchange import Alone, Exchange, start, start_numbers
from fastkd.distributed.group import exchange_dtype
from fastkd.numerics import accumulation_dtype
from fastkd.ops.eager import computing, differentiable_once, is_traced

STATISTICS = {"blocked": 5, "triton": 3}  # numbers per row that a backend keeps for its backward
Value = TypeVar("Value")


class _Options(NamedTuple):
    """Which KL divergence, what is known of the scale, who computes, and what the two sums are multiplied by."""

    consistency: str
    scale_bound: float  # logit_scale is at most this; inf if nothing is known
    backend: str
    factors: tuple[float, float] = (1.0, 1.0)  # of contrast and consistency: 1 / n makes means of them

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


def _rows(
    exchange: Exchange | Alone,
    units: Any,
    logit_scale: Tensor,
    like: Tensor,
    options: _Options,
    inverse_norm: Tensor | None = None,
    needs: tuple[bool, bool] | None = None,
) -> DualRows:
    scale = logit_scale.to(accumulation_dtype(like.dtype))
    return DualRows(units, scale, options.scale_bound, exchange.total, exchange.is_packed, inverse_norm, needs)


def _needed(needs: tuple[bool, bool, bool], options: _Options) -> tuple[bool, bool]:
    """Whether the gradients of a and b must be computed, for student, teacher and scale that need theirs or not."""
    need_a, need_b = options.pair(needs[0], needs[1])
    # The gradient of logit_scale falls out of either side's. On all ranks the same side must yield it.
    return need_a or needs[2] or not need_b, need_b


def forward(
    exchange: Exchange | Alone, rows: DualRows, gathered: Tensor | None, weight: Tensor | None, options: _Options
) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]:
    """The weighted sums of contrast and consistency, the statistics of the rank's rows, and gradients, if any.

    The gradients are those of a and b (empty where not needed) and of the scale, for upstream gradients of 1. A backend
    gives them where they cost less now than later.
    """
    state = options.module.Forward(rows)
    for cols, block in exchange.columns(rows.units, gathered):
        state.add_own() if cols == exchange.own else state.add(block, cols)
    return *state.finish(weight, options.is_swapped, options.factors), state.gradients


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
    state = options.module.Backward(rows, stats, upstream, *_needed(needs, options))
    for cols, block in exchange.columns(rows.units, gathered):
        state.add_own() if cols == exchange.own else state.add(block, cols)
    grad_a, grad_b, grad_scale = state.finish(inverse_norm, like.dtype, like.shape[1])
    if not options.pair(needs[0], needs[1])[0]:
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
    with computing(student):
        units, _ = options.module.units(*options.pair(student, teacher))
        alone = Alone(student.shape[0])
        return forward(alone, _rows(alone, units, logit_scale, student, options), None, weight, options)[:3]


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
    with computing(student):
        units, inverse_norm = options.module.units(*options.pair(student, teacher))
        upstream = DualUpstream(
            options.module.numbers(stats), weight, grad_contrast, grad_consistency, options.is_swapped, options.factors
        )
        alone = Alone(student.shape[0])
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


class DualSoftmax(torch.autograd.Function):
    """The weighted sums over this rank's rows, times the factors, against the rows of all ``peers``, if there are any.

    Unlike the custom op it may take a process group, keep what it likes for its backward, and start quickly.
    ``keeps``: whether gradients are enabled, so that a backward may come.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        logit_scale: Tensor,
        weight: Tensor | None,
        options: _Options,
        peers: Peers | None,
        keeps: bool,
    ) -> tuple[Tensor, Tensor]:
        exchange: Exchange | Alone = Alone(student.shape[0])
        gathered = running = None
        with computing(student):
            pair = options.pair(student, teacher)
            if peers is None:
                units, inverse_norm = options.module.units(*pair)
            else:
                if peers.has_weight and weight is None:
                    weight = student.new_ones(student.shape[0])
                exchange, units, inverse_norm, gathered = start(peers, pair, exchange_dtype(student.dtype))
            needs = _needed(ctx.needs_input_grad[:3], options) if keeps and any(ctx.needs_input_grad[:3]) else None
            rows = _rows(exchange, units, logit_scale, student, options, inverse_norm, needs)
            contrast, consistency, stats, gradients = forward(exchange, rows, gathered, weight, options)
            if peers is not None and peers.needs_grad:
                numbers = options.module.numbers(stats)
                if weight is not None:
                    numbers = torch.cat([numbers, weight.to(numbers.dtype)[None]])
                running = start_numbers(peers, numbers.T)
        ctx.options, ctx.exchange = options, exchange
        # Not among the saved tensors: they are still arriving, and autograd would take that for a change.
        ctx.numbers = running
        inputs = student, teacher, logit_scale, weight
        ctx.save_for_backward(*inputs, units, inverse_norm, gathered, stats, *gradients)
        return contrast, consistency

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_contrast: Tensor, grad_consistency: Tensor
    ) -> tuple[Tensor | None, ...]:
        student, _, logit_scale, weight, units, inverse_norm, gathered, stats, *gradients = saved
        options, needs = ctx.options, ctx.needs_input_grad[:3]
        # They serve where both sums have one upstream gradient, as in a loss that is their sum.
        if gradients and grad_contrast.item() == grad_consistency.item():
            dtypes = student.dtype, student.dtype, logit_scale.dtype
            found = zip((*options.pair(*gradients[:2]), gradients[2]), needs, dtypes, strict=True)
            return *((x * grad_contrast).to(dtype) if need else None for x, need, dtype in found), *[None] * 4
        with computing(units):
            if ctx.numbers is None:
                numbers = options.module.numbers(stats)
            else:
                numbers = ctx.numbers.wait(ctx.exchange).T.contiguous()
                if weight is not None:
                    numbers, weight = numbers[:-1], numbers[-1]
            upstream = DualUpstream(
                numbers, weight, grad_contrast, grad_consistency, options.is_swapped, options.factors
            )
            rows = _rows(ctx.exchange, units, logit_scale, student, options)
            *grads, grad_scale = backward(
                ctx.exchange, rows, gathered, inverse_norm, stats, upstream, needs, student, options
            )
        grads.append(grad_scale.to(logit_scale.dtype))
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 4


def means(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor,
    weight: Tensor | None,
    *,
    consistency: str,
    scale_bound: float,
    backend: str,
    factors: tuple[float, float],
    peers: Peers | None,
) -> tuple[Tensor, Tensor]:
    """The weighted sums of contrast and consistency over this rank's rows, each times its factor."""
    if peers is None and is_traced(student, teacher, logit_scale):
        sums = dual_softmax(student, teacher, logit_scale, weight, consistency, scale_bound, backend)
        return sums[0] * factors[0], sums[1] * factors[1]
    options = _Options(consistency, scale_bound, backend, factors)
    return DualSoftmax.apply(student, teacher, logit_scale, weight, options, peers, torch.is_grad_enabled())
