"""What all losses as modules have in common: the type of a call, and the sum of the terms."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn


class LossModule(nn.Module):
    """A loss as a module. Calling it returns its named terms, each 0-dim, whose sum is the loss."""

    if TYPE_CHECKING:  # nn.Module says Any
        __call__: Callable[..., dict[str, Tensor]]


def total_loss(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of a loss's named terms, 0-dim. For a type checker it is a Tensor, which ``sum(terms.values())`` is not.

    Args:
        terms: what a loss module returned, at least one term; also of several modules: ``{**kd(...), **dcd(...)}``.

    Raises:
        ValueError: there is no term.

    Example:
        >>> import torch
        >>> from fastkd import DCDLoss, total_loss
        >>> terms = DCDLoss(student_dim=8, teacher_dim=16)(torch.randn(6, 8), torch.randn(6, 16))
        >>> total_loss(terms).backward()
    """
    if not terms:
        raise ValueError("terms: got none, expected at least one")
    return torch.stack(tuple(terms.values())).sum()
