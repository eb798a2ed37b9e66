"""The rows of all ranks on every rank, for small losses that every rank then computes whole."""

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
    rows: Tensor = _GatherRows.apply(x, peers)
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        longest = max(peers.sizes)  # all ranks send as many rows
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        everyones = x.new_empty(peers.world_size * longest, *x.shape[1:])
        dist.all_gather_into_tensor(everyones, padded, group=peers.group)
        blocks = zip(everyones.split(longest), peers.sizes, strict=True)
        return torch.cat([block[:size] for block, size in blocks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        peers = ctx.peers
        return peers.world_size * grad.split(list(peers.sizes))[peers.rank], None
