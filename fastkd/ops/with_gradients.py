"""Operations whose forward computes one number and its gradients, for an upstream gradient of 1.

That pays where the gradients cost little beside the number, or need what its computation has at hand.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.eager import differentiable_once, is_traced

# Returns the number, 0-dim, and the gradients of the first inputs, as many as it has.
Computation = Callable[..., tuple[Tensor, ...]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.rest = len(inputs) - len(output) + 1  # inputs without a gradient
    ctx.save_for_backward(*inputs[: len(output) - 1], *output[1:])


def _gradients(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    return *(grad * found for found in saved[len(saved) // 2 :]), *[None] * ctx.rest


class WithGradients(torch.autograd.Function):
    """The number as a plain autograd function, which starts quicker than a custom op."""

    @staticmethod
    def forward(ctx: Any, compute: Computation, *inputs: Any) -> Tensor:
        output = compute(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx, saved, grad)


def custom_op(name: str, compute: Computation) -> Any:
    """The custom op of a computation, with its fake and its gradient. ``compute`` has an annotation for every input."""
    operation = torch.library.custom_op(f"fastkd::{name}", compute, mutates_args=())

    @operation.register_fake
    def _(*inputs: Any) -> tuple[Tensor, ...]:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        return tensors[0].new_empty(()), *(torch.empty_like(x) for x in tensors[: len(tensors) // 2])

    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, ctx.saved_tensors, grad)

    operation.register_autograd(backward, setup_context=_setup_context)
    return operation


def number(operation: Any, compute: Computation, *inputs: Any) -> Tensor:
    """The number, by the custom op where something traces it, and as a plain autograd function elsewhere."""
    is_op = is_traced(*(x for x in inputs if isinstance(x, Tensor)))
    return operation(*inputs)[0] if is_op else WithGradients.apply(compute, *inputs)
