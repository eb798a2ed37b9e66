"""Counts the bytes that a rank sends, at the collectives."""

from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class CountedBytes(TorchDispatchMode):
    """Counts in ``sent`` the bytes that this rank sends to the others of a group, by collective.

    They are counted where c10d dispatches a collective to its backend, whether Python or C++ issued it. A rank that
    sends n bytes to all W ranks sends ``(W - 1) n``. A reduce-scatter of n bytes sends ``(W - 1) / W`` of them, and an
    all-reduce twice that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.strip("_")
            if name == "allgather_base":
                self._count(name, args[1].nbytes, args[2])
            elif name == "reduce_scatter_base":
                self._count(name, args[0].nbytes, args[2])
            elif name == "broadcast" and args[2] == dist.ProcessGroup.unbox(args[1]).rank():
                self._count(name, args[0][0].nbytes, args[1])
            elif name == "allreduce":
                self._count(name, 2 * args[0][0].nbytes / dist.ProcessGroup.unbox(args[1]).size(), args[1])
            elif name == "send":
                self.sent[name] = self.sent.get(name, 0) + args[0][0].nbytes
            elif name not in ("broadcast", "recv", "barrier"):
                raise NotImplementedError(f"CountedBytes: got {func}, of which it cannot tell the bytes")
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, to_each: float, group: Any) -> None:
        others = dist.ProcessGroup.unbox(group).size() - 1
        self.sent[name] = self.sent.get(name, 0) + round(to_each * others)
