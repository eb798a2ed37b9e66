"""Sends this rank's rows to all ranks in chunks; a loss starts on each chunk when it arrives.

A stack [k, n, D] of k row tensors of one shape travels: student and teacher, or one tensor alone. There are three ways:

- Ranks hold equal numbers of rows. The rows are cut into chunks. The asynchronous all-gather of a chunk starts before
  the next chunk is packed. It is waited for when its rows are about to be read.
- Ranks hold unequal numbers of rows. Every rank broadcasts its rows, and one broadcast is waited for at a time. No
  padding travels.
- There are too many rows to hold at once. They are passed on in a ring.

The C++ extension packs the rows and starts the collectives. Where it is absent, this module does the same through
torch.distributed. Columns are numbered in the order in which they are read, and a rank's own rows come first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.distributed.agree import Peers
from fastkd.distributed.group import may_hold
from fastkd.distributed.pack import extension_gathers, pack_rows
from fastkd.native import extension

if TYPE_CHECKING:  # a torch without distributed has no Work
    from torch.distributed import Work

# A chunk of 4 MiB travels for 80 us at 50 GB/s, four times the latency of a collective; beyond four chunks there is
# little left to hide.
CHUNK_BYTES = 4 << 20
MAX_CHUNKS = 4
MERGED_COLUMNS = 4096  # small blocks of neighbouring ranks are joined to about this many columns


class Alone:
    """The exchange of one rank: its own rows are all the columns there are."""

    is_packed = False  # the rows come as a backend makes them, not as pack_rows does
    is_ring = False

    def __init__(self, rows: int) -> None:
        self.own = slice(0, rows)
        self.total = rows

    def columns(self, units: Any, gathered: Tensor | None) -> Iterator[tuple[slice, Any]]:
        """The rank's own rows, as :meth:`Exchange.columns` gives them first."""
        yield self.own, units


@dataclass
class Exchange:
    """A running exchange. It knows which columns belong to which rank, and what must finish before a block is read.

    ``bounds``: the rows 0, ..., n at which every rank's rows are cut into chunks; empty where ranks hold unequal
    numbers. ``works``: the running collectives, one per chunk, or one per rank that holds rows.
    """

    is_packed: ClassVar[bool] = True
    peers: Peers
    is_ring: bool
    bounds: list[int]
    works: "list[Work | None]"

    @property
    def total(self) -> int:
        """N, the rows of all ranks."""
        return self.peers.total

    @property
    def own(self) -> slice:
        """This rank's columns."""
        return slice(0, self.peers.sizes[self.peers.rank])

    def columns(self, units: Tensor, gathered: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """All ranks' rows as (columns, block [k, m, D]): this rank's first, while the others' travel.

        ``units`` and ``gathered`` are what :func:`start` returned. Without ``gathered`` the blocks go round in a ring,
        which every rank must go through to its end.
        """
        start = 0
        for block in self._passed_on(units) if gathered is None else self._arriving(units, gathered):
            stop = start + block.shape[1]
            yield slice(start, stop), block
            start = stop
        for index in range(len(self.works)):
            self._wait(index)

    def _arriving(self, units: Tensor, gathered: Tensor) -> Iterator[Tensor]:
        yield units
        (k, n, D), rank, world_size = units.shape, self.peers.rank, self.peers.world_size
        if self.bounds:
            rows = gathered.view(world_size * n, k * D)
            for index, (a, b) in enumerate(pairwise(self.bounds)):
                self._wait(index)
                by_rank = rows[world_size * a : world_size * b].view(world_size, k, b - a, D)
                step = -(-MERGED_COLUMNS // (b - a))
                for first, last in ((0, rank), (rank + 1, world_size)):
                    for begin in range(first, last, step):
                        yield by_rank[begin : min(begin + step, last)].transpose(0, 1).flatten(1, 2)
            return
        pending: list[Tensor] = []
        parts = gathered.view(-1, k * D).split(list(self.peers.sizes))
        for index, holder in enumerate(_holders(self.peers)):
            if holder == rank:
                continue
            self._wait(index)
            pending.append(parts[holder].view(k, -1, D))
            if sum(block.shape[1] for block in pending) >= MERGED_COLUMNS:
                yield _joined(pending)
                pending = []
        if pending:
            yield _joined(pending)

    def _passed_on(self, units: Tensor) -> Iterator[Tensor]:
        """Passes blocks to the next rank; while one is being computed with, it is sent on and the next one arrives."""
        peers = self.peers
        following = peers.global_rank((peers.rank + 1) % peers.world_size)
        preceding = peers.global_rank((peers.rank - 1) % peers.world_size)
        block = units
        for step in range(peers.world_size):
            transfers, incoming = [], block
            if step < peers.world_size - 1:
                incoming = units.new_empty(len(units), peers.sizes[peers.rank - step - 1], units.shape[2])
                if block.numel():
                    transfers.append(dist.P2POp(dist.isend, _bytes(block), following, peers.group))
                if incoming.numel():
                    transfers.append(dist.P2POp(dist.irecv, _bytes(incoming), preceding, peers.group))
            works = dist.batch_isend_irecv(transfers) if transfers else []
            if block.numel():
                yield block
            for work in works:
                work.wait()
            block = incoming

    def _wait(self, index: int) -> None:
        work = self.works[index] if self.works else None
        if work is not None:
            work.wait()
            self.works[index] = None

    def in_order(self, x: Tensor) -> Tensor:
        """Brings rows [N, ...] that lie rank after rank into the order of the columns."""
        rank, world_size = self.peers.rank, self.peers.world_size
        if self.bounds:
            by_rank = x.unflatten(0, (world_size, -1))
            others = torch.cat([by_rank[:rank], by_rank[rank + 1 :]])
            return torch.cat([by_rank[rank], *(others[:, a:b].flatten(0, 1) for a, b in pairwise(self.bounds))])
        parts = x.split(list(self.peers.sizes))
        if self.is_ring:
            return torch.cat([parts[rank - step] for step in range(world_size)])  # an index of -1 is the last rank
        return torch.cat([parts[rank], *parts[:rank], *parts[rank + 1 :]])


def start(
    peers: Peers, rows: Sequence[Tensor], dtype: torch.dtype, normalize: bool = True
) -> tuple[Exchange, Tensor, Tensor, Tensor | None]:
    """Start to exchange the stack of ``rows``, each [n, D], in ``dtype``, L2-normalised if asked.

    Returns the exchange, this rank's packed rows [k, n, D] and inverse norms [k, n, 1], and the memory that the rows of
    all ranks arrive in, None in ring mode. :meth:`Exchange.columns` reads both.

    Raises:
        ValueError: in ring mode, inputs that need a gradient on some ranks only.
    """
    row_bytes = len(rows) * rows[0].shape[1] * dtype.itemsize
    if may_hold(peers.total * row_bytes):
        bounds = chunk_bounds(peers, row_bytes)
        units, inverse_norm, gathered, works = start_gather(peers, rows, dtype, normalize, bounds)
        return Exchange(peers, False, bounds, [*works]), units, inverse_norm, gathered
    if peers.needs_grad and not peers.all_need_grad:
        raise ValueError("group: got inputs that need a gradient on some ranks only, expected all in ring mode")
    return Exchange(peers, True, [], []), *pack_rows(rows, dtype, normalize), None


def chunk_bounds(peers: Peers, row_bytes: int) -> list[int]:
    """The row numbers 0, ..., n at which every rank cuts its rows into chunks; none where ranks hold unequal numbers.

    A rank receives at least ``CHUNK_BYTES`` per chunk, and at most ``MAX_CHUNKS`` chunks.
    """
    n = peers.sizes[peers.rank]
    if set(peers.sizes) != {n}:
        return []
    received = (peers.world_size - 1) * n * row_bytes
    count = max(1, min(received // CHUNK_BYTES, MAX_CHUNKS, n))
    return [n * chunk // count for chunk in range(count + 1)]


@dataclass
class Numbers:
    """A running gather of a few numbers per row.

    It belongs on an autograd context, and not among its saved tensors: a tensor that is still being received changes.
    """

    gathered: Tensor
    works: "list[Work]"

    def wait(self, exchange: Exchange) -> Tensor:
        """[N, S], in the order of the columns of ``exchange``."""
        for work in self.works:
            work.wait()
        self.works = []
        return exchange.in_order(self.gathered)


def start_numbers(peers: Peers, numbers: Tensor) -> Numbers:
    """Start to gather ``numbers`` [n, S] of any dtype: statistics of rows for a backward, or their labels."""
    n = len(numbers)
    bounds = [0, n] if set(peers.sizes) == {n} else []
    _, _, gathered, works = start_gather(peers, [numbers], numbers.dtype, False, bounds)
    return Numbers(gathered.view(peers.total, -1), works)


def start_gather(
    peers: Peers, rows: Sequence[Tensor], dtype: torch.dtype, normalize: bool, bounds: list[int]
) -> "tuple[Tensor, Tensor, Tensor, list[Work]]":
    """Pack the stack of ``rows`` and start its collectives.

    Returns this rank's packed rows [k, n, D] and inverse norms [k, n, 1], the flat memory for the rows of all ranks,
    and the works. The memory holds chunk after chunk [W, k, m, D], or, without ``bounds``, rank after rank [k, n, D].
    It is complete when the works have been waited for.
    """
    assert len(rows[0]) == peers.sizes[peers.rank]
    if extension_gathers(rows[0].device.type):
        return extension().start_gather(list(rows), dtype, normalize, peers.sizes, bounds, peers.group)
    width = len(rows) * rows[0].shape[1]
    gathered = rows[0].new_empty(peers.total * width, dtype=dtype)
    works = []
    if not bounds:
        units, inverse_norm = pack_rows(rows, dtype, normalize)
        parts = gathered.split([size * width for size in peers.sizes])
        parts[peers.rank].copy_(units.view(-1))
        for rank in _holders(peers):
            source = peers.global_rank(rank)
            works.append(dist.broadcast(_bytes(parts[rank]), source, group=peers.group, async_op=True))
        return units, inverse_norm, gathered, works
    packed = []
    parts = gathered.split([peers.world_size * (b - a) * width for a, b in pairwise(bounds)])
    for part, (a, b) in zip(parts, pairwise(bounds), strict=True):
        packed.append(pack_rows([x[a:b] for x in rows], dtype, normalize))
        local = _bytes(packed[-1][0])
        works.append(dist.all_gather_into_tensor(_bytes(part), local, group=peers.group, async_op=True))
    if len(packed) == 1:
        return *packed[0], gathered, works
    units, inverse_norm = (torch.cat(chunks, dim=1) for chunks in zip(*packed, strict=True))
    return units, inverse_norm, gathered, works


def _holders(peers: Peers) -> list[int]:
    """The ranks that hold rows."""
    return [rank for rank, size in enumerate(peers.sizes) if size]


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _bytes(x: Tensor) -> Tensor:
    """The memory of ``x``: every backend moves bytes, not every one moves every dtype."""
    return x.view(-1).view(torch.uint8)
