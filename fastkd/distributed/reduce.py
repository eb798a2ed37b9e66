"""What the modules need to be exact over several ranks beside the contrastive operations: means and sums over ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from fastkd.distributed.agree import Call, Peers, agree


@torch.compiler.disable
def agree_on_rows(group: ProcessGroup, name: str, check: Callable[[], dict[str, Any]], rows: Tensor) -> Peers:
    """Who holds how many ``rows``, once ``check`` passed on every rank; what it raises on one is raised on all.

    ``check`` returns what must be equal on all ranks, by the name that an error gives it.
    """
    try:
        call = Call(rows=len(rows), options={"device": rows.device.type, **check()})
    except Exception as error:
        call = Call(error=error)
    return agree(group, name, call)


@torch.compiler.disable
def sum_over_ranks(x: Tensor, peers: Peers) -> Tensor:
    """``X = sum_r x_r``, the same on every rank, for terms that every rank then computes alike from ``X``.

    Such a term is the global loss ``L(X)`` itself on every rank, and so is the average over the ranks. Averaging the
    ranks' gradients divides by W, as DistributedDataParallel does; the exact gradient is ``sum_r dL/dX dx_r/dp``. So
    the gradient that reaches x_r here is ``W dL/dX``.
    """
    total: Tensor = _SumOverRanks.apply(x, peers)
    return total


@torch.compiler.disable
def max_over_ranks(x: Tensor, peers: Peers) -> Tensor:
    """The largest of every element over the ranks, the same on every rank; no gradient passes."""
    largest = x.detach().contiguous().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=peers.group)
    return largest


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.world_size = peers.world_size
        total = x.contiguous().clone()
        dist.all_reduce(total, group=peers.group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.world_size * grad, None
