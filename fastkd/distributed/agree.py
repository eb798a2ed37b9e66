"""What the ranks agree on before their rows travel."""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from fastkd.distributed.group import (
    _config,
)

_FAILED, _HAS_WEIGHT, _NEEDS_GRAD, _NEEDS_KEY_GRAD = 1, 2, 4, 8


SCALE_TOLERANCE = 1e-4  # relative; ranks whose scales differ by more are not computing one loss


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


def agree(group: dist.ProcessGroup, operation: str, describe: Callable[[], Call]) -> Peers:
    """Exchange 32 bytes a rank; returns who holds how many rows once all ranks compute the same thing.

    ``describe`` validates this rank's arguments. What it raises, and what differs between ranks, is raised on every
    rank, so that none is left waiting. On a group that has no CPU backend this waits for the device.

    Raises:
        TypeError, ValueError: an argument that a rank rejects, options that differ, or no rows at all.
    """
    try:
        call = describe()
        _check_device(group, call)
    except Exception as error:
        call = Call(error=error)
    call.options = {"operation": operation, **call.options, "configure": repr(_config)}
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


def _check_device(group: dist.ProcessGroup, call: Call) -> None:
    device = call.options["device"]
    backends = dist.get_backend_config(group)
    if f"{device}:" not in backends:
        raise ValueError(f"group: got a process group for {backends}, expected one for the inputs' device, {device}")
