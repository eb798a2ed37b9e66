"""What the ranks agree on before their rows travel: one exchange of 32 bytes per rank.

    with agreeing(group, "dcd_loss") as ranks:
        ...                     # check the arguments: an error on one rank is raised on every rank
        ranks.describe(...)     # what must be equal on all ranks
    total * ranks.part_per_row(n)

With one rank there is nothing to agree on, and the same lines check the arguments and take the mean.
"""

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.distributed.group import settings
from fastkd.distributed.reduce import max_over_ranks, sum_over_ranks

_FAILED, _HAS_WEIGHT, _NEEDS_GRAD, _NEEDS_KEY_GRAD = 1, 2, 4, 8
SCALE_TOLERANCE = 1e-4  # relative; ranks whose scales differ by more are not computing one loss
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class Call:
    """What a rank is about to compute.

    ``options``: everything that must be equal on all ranks, by the name that an error gives it. ``scale``: NaN where
    reading it would wait for a device. ``key_rows``: None where there are as many keys as other rows.
    ``needs_key_grad``: of the keys, where they are exchanged apart.
    """

    rows: int = 0
    key_rows: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    scale: float = float("nan")
    has_weight: bool = False
    needs_grad: bool = False
    needs_key_grad: bool = False
    error: Exception | None = None


@dataclass(frozen=True)
class Peers:
    """The ranks of a group and how many rows each holds, as :func:`agree` found them."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]
    key_sizes: tuple[int, ...]
    has_weight: bool
    needs_grad: bool
    all_need_grad: bool
    needs_key_grad: bool = False

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        """N, the rows of the global batch."""
        return sum(self.sizes)

    @property
    def keys(self) -> "Peers":
        """The same ranks with their numbers of keys."""
        return replace(self, sizes=self.key_sizes)

    def global_rank(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


class Agreement:
    """This rank among those of a group, or, with ``group=None``, alone: then there is nobody to agree with.

    As a context it is the place to check the arguments and to :meth:`describe` what is computed. Afterwards it knows
    the ``peers`` (None if alone), and takes sums and means over the rows of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, operation: str) -> None:
        self._group, self._operation = group, operation
        self._call = Call()
        self.peers: Peers | None = None

    @property
    def several(self) -> bool:
        """Whether there are other ranks. Then this rank may hold no rows."""
        return self._group is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._group is not None and (error is None or isinstance(error, Exception)):
            call = self._call if error is None else Call(error=error)
            self.peers = agree(self._group, self._operation, call)

    def describe(
        self,
        rows: Tensor,
        options: dict[str, Any],
        *,
        other: Tensor | None = None,
        scale: Tensor | None = None,
        weight: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        """Say what this rank is about to compute.

        ``options``: what must be equal on all ranks, by the name that an error gives it. ``other``: the second rows,
        which may differ in number.
        """
        if self._group is None:
            return
        if backend == "reference":
            raise ValueError(
                "backend: got 'reference', expected None, 'blocked' or 'triton' for a group of several ranks"
            )
        needs = [x is not None and torch.is_grad_enabled() and x.requires_grad for x in (rows, other, scale)]
        self._call = Call(
            rows=len(rows),
            key_rows=None if other is None else len(other),
            options={"device": rows.device.type, **options},
            scale=math.nan if scale is None or scale.is_cuda else scale.item(),
            has_weight=weight is not None,
            needs_grad=any(needs),
            needs_key_grad=needs[1],
        )

    def part_per_row(self, rows: int) -> float:
        """The factor that turns a sum over these ``rows`` into this rank's part of the mean over all rows.

        On several ranks it is W / N: then the average over the ranks is the mean over the global batch.
        """
        return 1 / rows if self.peers is None else self.peers.world_size / self.peers.total

    def mean_over(self, total: Tensor, count: Tensor) -> Tensor:
        """This rank's part of a mean whose number of rows the device alone knows; ``count`` is overwritten."""
        if self._group is None:
            return total / count.clamp_min(1)
        dist.all_reduce(count, group=self._group)
        return total * dist.get_world_size(self._group) / count.clamp_min(1)

    def mean_of_all(self, rows: Tensor) -> Tensor:
        """The mean over the rows of all ranks, the same on every rank."""
        return rows.mean() if self.peers is None else self.sum(rows.sum()) / self.peers.total

    def sum(self, x: Tensor) -> Tensor:
        """``x`` summed over the ranks, for terms that every rank then computes alike: see :func:`sum_over_ranks`."""
        return x if self._group is None else sum_over_ranks(x, self._group)

    def largest(self, x: Tensor) -> Tensor:
        """The largest of every element over the ranks, without gradient."""
        return x.detach() if self._group is None else max_over_ranks(x, self._group)


def agreeing(group: dist.ProcessGroup | None, operation: str) -> Agreement:
    """A context in which this rank checks its arguments, and at whose end the ranks of ``group`` have agreed."""
    return Agreement(group, operation)


def kind_of(rows: Tensor) -> dict[str, Any]:
    """What rows that meet each other must have in common, by the name that an error gives it."""
    return {"width of the rows": rows.shape[1], "dtype": rows.dtype}


def eagerly(group: dist.ProcessGroup | None, function: Function) -> Function:
    """``function`` itself, kept out of torch.compile where several ranks take part: an exchange cannot be traced.

    Only then is the compiler imported, which a single process may never need.
    """
    return function if group is None else torch.compiler.disable(function)


def agree(group: dist.ProcessGroup, operation: str, call: Call) -> Peers:
    """Exchange 32 bytes per rank; returns who holds how many rows once all ranks compute the same thing.

    The error in a rank's ``call``, and what differs between ranks, is raised on every rank, so that none is left
    waiting. On a group that has no CPU backend this waits for the device.

    Raises:
        TypeError, ValueError: an argument that a rank rejects, options that differ, or no rows at all.
    """
    if call.error is None:
        call.error = _wrong_device(group, call)
    if call.error is not None:
        call = Call(error=call.error)
    call.options = {"operation": operation, **call.options, "configure": repr(settings())}
    flags = _FAILED * (call.error is not None) + _HAS_WEIGHT * call.has_weight
    flags += _NEEDS_GRAD * call.needs_grad + _NEEDS_KEY_GRAD * call.needs_key_grad
    digest = hashlib.sha256(repr(call.options).encode()).digest()
    (scale_bits,) = struct.unpack("<q", struct.pack("<d", call.scale))
    # Two numbers of rows in one: what the ranks agree on stays at 32 bytes.
    both_rows = (call.rows if call.key_rows is None else call.key_rows) << 32 | call.rows
    own = torch.tensor([both_rows, flags, int.from_bytes(digest[:8], "little", signed=True), scale_bits])
    own = own.to(_metadata_device(group))
    world_size = dist.get_world_size(group)
    everyone = own.new_empty(world_size * 4)
    dist.all_gather_into_tensor(everyone, own, group=group)
    rows, all_flags, digests, scales = everyone.view(world_size, 4).cpu().unbind(1)
    scales = scales.contiguous().view(torch.float64)
    known = scales[~scales.isnan()]
    scales_differ = len(known) > 0 and bool((known.max() - known.min()) > SCALE_TOLERANCE * known.min())
    if bool((all_flags & _FAILED).any()) or len(digests.unique()) > 1 or scales_differ:
        _raise_everywhere(group, call)
    sizes, key_sizes = rows & 0xFFFFFFFF, rows >> 32
    if 0 in (int(sizes.sum()), int(key_sizes.sum())):
        raise ValueError(f"{operation}: got no rows on any of the {world_size} ranks, expected at least one")
    return Peers(
        group,
        dist.get_rank(group),
        tuple(sizes.tolist()),
        tuple(key_sizes.tolist()),
        has_weight=bool((all_flags & _HAS_WEIGHT).any()),
        needs_grad=bool((all_flags & _NEEDS_GRAD).any()),
        all_need_grad=bool((all_flags & _NEEDS_GRAD).all()),
        needs_key_grad=bool((all_flags & _NEEDS_KEY_GRAD).any()),
    )


def _raise_everywhere(group: dist.ProcessGroup, call: Call) -> None:
    """Raise one and the same error on every rank: the lowest failing rank's, or what the ranks disagree on."""
    own = (type(call.error).__name__, str(call.error)) if call.error is not None else None
    world_size = dist.get_world_size(group)
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, (own, {**call.options, "logit_scale": call.scale}), group=group)
    for rank, (error, _) in enumerate(everyone):
        if error is not None:
            kind = {"TypeError": TypeError, "ValueError": ValueError}.get(error[0], RuntimeError)
            raise kind(f"{error[1]} (on rank {rank} of {world_size})") from call.error
    options = [options for _, options in everyone]
    differing = []
    for name in dict.fromkeys(name for one in options for name in one):
        values = [one.get(name) for one in options]
        if len({repr(value) for value in values}) > 1:
            shown = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            differing.append(f"{name}: got {shown}")
    raise ValueError(f"group: the ranks disagree: {'; '.join(differing)}; expected the same on every rank")


def _metadata_device(group: dist.ProcessGroup) -> torch.device:
    """Where metadata is exchanged: on the CPU where the group can, so that no device has to be waited for."""
    if "cpu:" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _wrong_device(group: dist.ProcessGroup, call: Call) -> ValueError | None:
    device, available = call.options["device"], dist.get_backend_config(group)
    if f"{device}:" in available:
        return None
    return ValueError(f"group: got a process group for {available}, expected one for the inputs' device, {device}")
