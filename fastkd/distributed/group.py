"""Which ranks' rows count as in-batch, and how rows are exchanged.

``group=None`` means the default process group when torch.distributed is initialised. With several ranks every call of a
contrastive loss communicates in three steps:

1. The ranks agree on what they compute (``fastkd.distributed.agree``): 32 bytes per rank.
2. They gather the embeddings in a few chunks (``fastkd.distributed.exchange``).
3. They gather the few numbers per row that the backward needs.

The backward itself communicates nothing. Only in ring mode does it pass the embeddings round once more.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | Literal["local"] | None

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Config:
    exchange_dtype: torch.dtype | None = None
    max_gathered_bytes: int = 1 << 30


_config = _Config()


def configure(*, exchange_dtype: torch.dtype | None = None, max_gathered_bytes: int = 1 << 30) -> None:
    """Set how the rows of several ranks are exchanged, in this process; every rank must set the same.

    Args:
        exchange_dtype: the dtype that rows are rounded to, exchanged and multiplied in. ``None``, the default: the
            inputs' own. ``torch.bfloat16`` halves the traffic of float32 inputs, at bfloat16's precision. Losses of raw
            rows (``normalize=False``, PCKD's relations) round those too, whose range float16 may not hold.
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


def settings() -> _Config:
    """What :func:`configure` has set, which must be equal on all ranks."""
    return _config


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


def may_hold(size: int) -> bool:
    """Whether a rank may hold ``size`` bytes of gathered rows."""
    return size <= _config.max_gathered_bytes
