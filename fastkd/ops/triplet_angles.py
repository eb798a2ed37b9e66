"""``triplet_angles``: how far the angles of all triplets of rows are from the teacher's, which gets no gradient.

:func:`sum_of_anchors` runs it as a plain autograd function. Under torch.compile a custom op takes its place.
"""

from typing import Any

import torch
from torch import Tensor

from fastkd.backends import implementation
from fastkd.ops.eager import computing, differentiable_once, is_traced


def _forward(
    gram_s: Tensor, inverse_s: Tensor, gram_t: Tensor, inverse_t: Tensor, first: int, last: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_{i, j, k} huber(a^s_ijk - a^t_ijk)`` over the anchors i in [first, last), and its two gradients.

    ``a_ijk = (G_jk - G_ij - G_ik + G_ii) u_ij u_ik``. gram: G, the products of the rows with each other. inverse: u,
    the inverse distances, 0 where a pair has no direction. All are [N, N], in one dtype. The gradients are those of the
    student's two matrices, for an upstream gradient of 1.
    """
    with computing(gram_s):
        given = gram_s, inverse_s, gram_t, inverse_t
        total, ends, of_gram, of_inverse = implementation("triplet_angles", backend).triplet_angles(*given, first, last)
        ends[first:last].sub_(of_gram, alpha=2)
        ends.diagonal()[first:last].add_(of_gram.sum(dim=1))
        u = inverse_s[first:last]
        grad_inverse = torch.zeros_like(ends)
        grad_inverse[first:last] = (2 * of_inverse / u).masked_fill(u == 0, 0)
    return total, ends, grad_inverse


triplet_angles = torch.library.custom_op("fastkd::triplet_angles", _forward, mutates_args=())


@triplet_angles.register_fake
def _(gram_s: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = gram_s.shape
    return gram_s.new_empty(()), gram_s.new_empty(shape), gram_s.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], *output[1:])


def _op_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *_, of_gram, of_inverse = ctx.saved_tensors
    return grad * of_gram, grad * of_inverse, *[None] * 5


triplet_angles.register_autograd(_op_backward, setup_context=_setup_context)


class TripletAngles(torch.autograd.Function):
    """The sum as a plain autograd function, which starts quicker than the custom op."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * saved[2], grad * saved[3], *[None] * 5


def sum_of_anchors(*inputs: Any) -> Tensor:
    """The sum over the anchors, 0-dim, of the ``inputs`` of ``fastkd::triplet_angles``."""
    return triplet_angles(*inputs)[0] if is_traced(*inputs[:4]) else TripletAngles.apply(*inputs)
