"""Which rows count as in-batch: this rank's, or those of a process group."""

import torch.distributed as dist

Group = dist.ProcessGroup | str | None


def require_local(group: Group) -> None:
    """Raise unless the global batch is this rank's batch.

    ``group=None`` means the default process group when torch.distributed is initialised; ``group="local"`` this rank
    alone. Negatives from other ranks are not implemented, and a silent local loss would be a wrong one.

    Raises ValueError for an unknown string, TypeError for another type, NotImplementedError for a group of several
    ranks.
    """
    if isinstance(group, str):
        if group != "local":
            raise ValueError(f"group: got {group!r}, expected None, 'local' or a torch.distributed.ProcessGroup")
        return
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return
    elif not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}, expected None, 'local' or a ProcessGroup")
    if dist.get_world_size(group) > 1:
        raise NotImplementedError(
            f"group: negatives across {dist.get_world_size(group)} ranks are not implemented; "
            "pass group='local' to contrast within each rank's own rows"
        )
