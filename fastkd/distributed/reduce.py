"""Sums and maxima over ranks, with the gradient scaling that DistributedDataParallel's averaging requires."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``X = sum_r x_r``, the same on every rank, for terms that every rank then computes alike from ``X``.

    Such a term is the global loss ``L(X)`` itself on every rank, and so is the average over the ranks. Averaging the
    ranks' gradients divides by W, as DistributedDataParallel does; the exact gradient is ``sum_r dL/dX dx_r/dp``. So
    the gradient that reaches x_r here is ``W dL/dX``.
    """
    total: Tensor = _SumOverRanks.apply(x, group)
    return total


def max_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The largest of every element over the ranks, the same on every rank; no gradient passes."""
    largest = x.detach().contiguous().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.world_size = dist.get_world_size(group)
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.world_size * grad, None
