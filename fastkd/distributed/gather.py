"""The rows of all ranks on every rank, for losses that every rank computes whole, or that the ranks share out."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastkd.distributed.agree import Peers


def gather_rows(x: Tensor, peers: Peers) -> Tensor:
    """The rows [N, ...] of all ranks, in the order of the ranks; ``x``: this rank's rows [n, ...].

    Every rank then computes the same global loss L. Averaging the ranks' gradients divides by W, as
    DistributedDataParallel does. So the gradient that reaches a rank's own rows here is W times that of L.
    """
    rows: Tensor = _GatherRows.apply(x, peers, False)
    return rows


def gather_shared_rows(x: Tensor, peers: Peers | None) -> Tensor:
    """As :func:`gather_rows`, for a loss of which every rank computes a part; ``x`` itself where a rank is alone.

    The parts are added by :func:`fastkd.distributed.reduce.sum_over_ranks`, whose gradient is W times that of L. Here
    the gradients of all ranks' parts are added, in the backward, and a rank keeps those of its own rows.

    Raises:
        ValueError: the rows need a gradient on some ranks only. The others would wait for them.
    """
    if peers is None:
        return x
    if peers.needs_grad and not peers.all_need_grad:
        raise ValueError("group: got rows that need a gradient on some ranks only, expected all or none")
    rows: Tensor = _GatherRows.apply(x, peers, True)
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, is_shared: bool) -> Tensor:
        ctx.peers, ctx.is_shared = peers, is_shared
        longest = max(peers.sizes)  # all ranks send as many rows
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        everyones = x.new_empty(peers.world_size * longest, *x.shape[1:])
        dist.all_gather_into_tensor(everyones, padded, group=peers.group)
        blocks = zip(everyones.split(longest), peers.sizes, strict=True)
        return torch.cat([block[:size] for block, size in blocks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        peers = ctx.peers
        if ctx.is_shared:
            grad = grad.contiguous().clone()
            dist.all_reduce(grad, group=peers.group)
        own = grad.split(list(peers.sizes))[peers.rank]
        return own if ctx.is_shared else peers.world_size * own, None, None
