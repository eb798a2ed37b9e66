"""``gram_sums``: sums over the rows of two Gram matrices, of which only a tile is held. The teacher gets no gradient.

:func:`sums_of_rows` runs it as a plain autograd function. Under torch.compile custom ops take its place. There is no
Triton kernel: the work is matrix products, for which the libraries are there.
"""

from typing import Any

import torch
from torch import Tensor

from fastkd.backends.blocked import gram_sums as blocked
from fastkd.ops.eager import computing, differentiable_once, is_traced


def _forward(student: Tensor, teacher: Tensor, rank: int, world_size: int) -> Tensor:
    """For every row i the sums over j of ``S_ij^2``, ``T_ij^2`` and ``S_ij T_ij``, [3, N] in float64.

    ``S_ij``, ``T_ij``: the products of rows i and j of student [N, D_s] and teacher [N, D_t], in one dtype. ``rank``
    and ``world_size``: which share of the pairs of rows is summed; the shares of all ranks make the whole.
    """
    with computing(student):
        return blocked.gram_sums(student, teacher, rank, world_size)


gram_sums = torch.library.custom_op("fastkd::gram_sums", _forward, mutates_args=())


@gram_sums.register_fake
def _(student: Tensor, *_: Any) -> Tensor:
    return student.new_empty((3, len(student)), dtype=torch.float64)


def _gradient(student: Tensor, teacher: Tensor, grad: Tensor, rank: int, world_size: int) -> Tensor:
    """The gradient of the student's rows, from the upstream gradient [3, N] of the sums."""
    with computing(student):
        return blocked.gram_sums_backward(student, teacher, grad, rank, world_size)


gram_sums_backward = torch.library.custom_op("fastkd::gram_sums_backward", _gradient, mutates_args=())


@gram_sums_backward.register_fake
def _(student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teacher, *ctx.share = inputs
    ctx.save_for_backward(student, teacher)


def _op_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return gram_sums_backward(*ctx.saved_tensors, grad, *ctx.share), None, None, None


gram_sums.register_autograd(_op_backward, setup_context=_setup_context)


class GramSums(torch.autograd.Function):
    """The sums as a plain autograd function, which starts quicker than the custom op."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(saved[0], saved[1], grad, *ctx.share), None, None, None


def sums_of_rows(student: Tensor, teacher: Tensor, rank: int, world_size: int) -> Tensor:
    """The sums [3, N], as ``fastkd::gram_sums`` says."""
    inputs = student.contiguous(), teacher.contiguous(), rank, world_size
    return gram_sums(*inputs) if is_traced(student, teacher) else GramSums.apply(*inputs)
