"""Which rows count as in-batch: this rank's, or those of a process group."""

import torch.distributed as dist

Group = dist.ProcessGroup | str | None


def check_group(group: Group) -> None:
    """Raise ValueError for an unknown string, TypeError for anything that names no group."""
    if isinstance(group, str):
        if group != "local":
            raise ValueError(f"group: got {group!r}, expected None, 'local' or a torch.distributed.ProcessGroup")
    elif group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}, expected None, 'local' or a ProcessGroup")


def require_local(group: Group) -> None:
    """Raise NotImplementedError unless the global batch is this rank's batch.

    ``group=None`` means the default process group when torch.distributed is initialised; ``group="local"`` this rank
    alone. Negatives from other ranks are not implemented, and a silent local loss would be a wrong one.
    """
    check_group(group)
    if isinstance(group, str) or (group is None and not (dist.is_available() and dist.is_initialized())):
        return
    world_size = dist.get_world_size(group)
    if world_size > 1:
        raise NotImplementedError(
            f"group: negatives across {world_size} ranks are not implemented; pass group='local' to contrast within "
            "each rank's own rows"
        )
