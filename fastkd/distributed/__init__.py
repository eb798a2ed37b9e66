"""Several ranks: which rows count as in-batch, what the ranks agree on, and how rows travel between them."""

from fastkd.distributed.group import Group, configure

__all__ = ["Group", "configure"]
