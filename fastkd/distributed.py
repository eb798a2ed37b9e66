"""Which rows count as in-batch, and how the rows of several ranks reach each other.

``group=None`` means the default process group when torch.distributed is initialised. With W > 1 ranks every call of a
contrastive loss is: one exchange of 32 bytes a rank in which the ranks agree on what they compute (:func:`agree`), one
all-gather of the embeddings, one of the numbers a row that the backward needs. The backward itself communicates
nothing, except in ring mode, where it passes the embeddings round once more.
"""

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | str | None

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FAILED, _HAS_WEIGHT, _NEEDS_GRAD = 1, 2, 4
SCALE_TOLERANCE = 1e-4  # relative; ranks whose scales differ by more are not computing one loss
MERGED_COLUMNS = 4096  # small blocks of neighbouring ranks are joined up to about this many columns


@dataclass(frozen=True)
class _Config:
    exchange_dtype: torch.dtype | None = None
    max_gathered_bytes: int = 1 << 30


_config = _Config()


def configure(*, exchange_dtype: torch.dtype | None = None, max_gathered_bytes: int = 1 << 30) -> None:
    """Set how the rows of several ranks are exchanged, in this process; every rank must set the same.

    Args:
        exchange_dtype: the dtype that unit rows are rounded to, exchanged and multiplied in. ``None``, the default:
            the inputs' own. ``torch.bfloat16`` halves the traffic of float32 inputs, at bfloat16's precision.
        max_gathered_bytes: above this size of all ranks' embeddings, ``N * 2 * D * itemsize``, a rank does not hold
            them all: they are passed on in a ring, and once more in the backward, which doubles their traffic.

    Raises:
        TypeError, ValueError: a bad argument.
    """
    global _config
    if exchange_dtype is not None and exchange_dtype not in _DTYPES:
        raise ValueError(f"exchange_dtype: got {exchange_dtype}, expected None or one of {_DTYPES}")
    if isinstance(max_gathered_bytes, bool) or not isinstance(max_gathered_bytes, int):
        raise TypeError(f"max_gathered_bytes: got {type(max_gathered_bytes).__name__}, expected an int >= 0")
    if max_gathered_bytes < 0:
        raise ValueError(f"max_gathered_bytes: got {max_gathered_bytes}, expected an int >= 0")
    _config = _Config(exchange_dtype, max_gathered_bytes)


def exchange_dtype(dtype: torch.dtype) -> torch.dtype:
    """What inputs of ``dtype`` are exchanged and multiplied in."""
    return _config.exchange_dtype or dtype


def check_group(group: Group) -> None:
    """Raise ValueError for an unknown string, TypeError for anything that names no group."""
    if isinstance(group, str):
        if group != "local":
            raise ValueError(f"group: got {group!r}, expected None, 'local' or a torch.distributed.ProcessGroup")
    elif group is not None and not isinstance(group, dist.ProcessGroup):
        if dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: got a group that this rank is not a member of")
        raise TypeError(f"group: got {type(group).__name__}, expected None, 'local' or a ProcessGroup")


def resolve_group(group: Group) -> dist.ProcessGroup | None:
    """The process group whose rows count as in-batch; None when that is this rank alone."""
    check_group(group)
    if isinstance(group, str) or (group is None and not (dist.is_available() and dist.is_initialized())):
        return None
    if dist.get_world_size(group) == 1:
        return None
    return dist.group.WORLD if group is None else group


@dataclass
class Call:
    """What a rank is about to compute.

    ``options``: everything that must be equal on all ranks, by the name that an error gives it. ``scale``: NaN where
    reading it would wait for a device.
    """

    rows: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    scale: float = float("nan")
    has_weight: bool = False
    needs_grad: bool = False
    error: Exception | None = None


@dataclass(frozen=True)
class Peers:
    """The ranks of a group and their rows in the global batch, as :func:`agree` found them."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]
    has_weight: bool
    needs_grad: bool
    all_need_grad: bool

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        """N, the rows of the global batch."""
        return sum(self.sizes)

    def rows(self, rank: int) -> slice:
        """The rows of ``rank`` among the global batch's."""
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

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
    flags = _FAILED * (call.error is not None) + _HAS_WEIGHT * call.has_weight + _NEEDS_GRAD * call.needs_grad
    digest = hashlib.sha256(repr(call.options).encode()).digest()
    (scale_bits,) = struct.unpack("<q", struct.pack("<d", call.scale))
    own = torch.tensor([call.rows, flags, int.from_bytes(digest[:8], "little", signed=True), scale_bits])
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
    if int(rows.sum()) == 0:
        raise ValueError(f"{operation}: got no rows on any of the {world_size} ranks, expected at least one")
    return Peers(
        group,
        dist.get_rank(group),
        tuple(rows.tolist()),
        has_weight=bool((all_flags & _HAS_WEIGHT).any()),
        needs_grad=bool((all_flags & _NEEDS_GRAD).any()),
        all_need_grad=bool((all_flags & _NEEDS_GRAD).all()),
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


def fits(peers: Peers, units: Tensor) -> bool:
    """Whether a rank may hold the embeddings of all ranks, each like ``units`` [2, n, D]."""
    return peers.total * 2 * units.shape[2] * units.element_size() <= _config.max_gathered_bytes


def start_gather(peers: Peers, local: Tensor, width: int) -> tuple[Tensor, list[dist.Work]]:
    """Start to gather ``local``, contiguous with ``width`` elements a row of this rank.

    Returns all ranks' elements, one rank after the other, [N * width]; complete once every work has been waited for.
    Ranks with unequal numbers of rows broadcast theirs one by one: no padding travels.
    """
    assert local.is_contiguous()
    assert local.numel() == peers.sizes[peers.rank] * width
    gathered = local.new_empty(peers.total * width)
    if len(set(peers.sizes)) == 1:
        work = dist.all_gather_into_tensor(_bytes(gathered), _bytes(local), group=peers.group, async_op=True)
        return gathered, [work]
    works = []
    for rank in range(peers.world_size):
        part = gathered[_elements(peers, rank, width)]
        if rank == peers.rank:
            part.copy_(local.view(-1))
        if len(part):
            source = peers.global_rank(rank)
            works.append(dist.broadcast(_bytes(part), source, group=peers.group, async_op=True))
    return gathered, works


def columns(
    peers: Peers, units: Tensor, gathered: Tensor | None, works: list[dist.Work]
) -> Iterator[tuple[slice, Tensor]]:
    """Every rank's embeddings as (global rows, block [2, m, D]): this rank's first, while the others' travel.

    ``gathered`` and ``works`` come from :func:`start_gather` of ``units`` [2, n, D]; None passes the blocks on in a
    ring instead, which every rank must go through to its end.
    """
    if gathered is None:
        yield from _ring(peers, units)
        return
    yield peers.rows(peers.rank), units
    for work in works:
        work.wait()
    ranks = list(range(peers.world_size))
    for part in (ranks[peers.rank + 1 :], ranks[: peers.rank]):
        yield from _merged(peers, part, gathered, units.shape[2])


def _merged(peers: Peers, ranks: list[int], gathered: Tensor, D: int) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of neighbouring ranks, small ones joined: a product with few columns is slow."""
    pending: list[Tensor] = []
    start = peers.rows(ranks[0]).start if ranks else 0
    for rank in ranks:
        pending.append(gathered[_elements(peers, rank, 2 * D)].view(2, peers.sizes[rank], D))
        stop = peers.rows(rank).stop
        if stop > start and (rank == ranks[-1] or stop - start + peers.sizes[rank + 1] > MERGED_COLUMNS):
            yield slice(start, stop), pending[0] if len(pending) == 1 else torch.cat(pending, dim=1)
            pending, start = [], stop


def _ring(peers: Peers, units: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Passes blocks to the next rank; while one is being computed with, it is sent on and the next one arrives."""
    following = peers.global_rank((peers.rank + 1) % peers.world_size)
    preceding = peers.global_rank((peers.rank - 1) % peers.world_size)
    block = units
    for step in range(peers.world_size):
        owner = (peers.rank - step) % peers.world_size
        incoming, transfers = block, []
        if step < peers.world_size - 1:
            incoming = units.new_empty(2, peers.sizes[owner - 1], units.shape[2])  # owner - 1 may be -1, the last rank
            if block.numel():
                transfers.append(dist.P2POp(dist.isend, _bytes(block), following, peers.group))
            if incoming.numel():
                transfers.append(dist.P2POp(dist.irecv, _bytes(incoming), preceding, peers.group))
        works = dist.batch_isend_irecv(transfers) if transfers else []
        if block.numel():
            yield peers.rows(owner), block
        for work in works:
            work.wait()
        block = incoming


def _elements(peers: Peers, rank: int, width: int) -> slice:
    rows = peers.rows(rank)
    return slice(rows.start * width, rows.stop * width)


def _bytes(x: Tensor) -> Tensor:
    """The memory of ``x``: every backend moves bytes, not every one moves every dtype."""
    return x.view(-1).view(torch.uint8)
