"""What the operations hand to a backend's ``Forward`` and ``Backward``."""

from typing import Any, NamedTuple

from torch import Tensor

from fastkd.backends.masks import Mask


class DualRows(NamedTuple):
    """The rows of ``dual_softmax``: what the backend's ``units`` made, or, if ``is_packed``, rows of an exchange."""

    units: Any  # [2, n, D], or one [n, D] per side
    scale: Tensor  # 0-dim, in the accumulation dtype
    scale_bound: float  # the scale is at most this; inf if nothing is known
    columns: int  # how many there are on all ranks
    is_packed: bool
    inverse_norm: Tensor | None = None  # [2, n, 1] of the rows as given, on one rank
    needs: tuple[bool, bool] | None = None  # whose gradients a backward will ask for; None: nobody's, or not known


class DualUpstream(NamedTuple):
    """What a backward of ``dual_softmax`` starts from; numbers and weights of all ranks' rows, its own first."""

    numbers: Tensor  # [3, N]
    weight: Tensor | None  # [N]
    grad_contrast: Tensor
    grad_consistency: Tensor
    is_swapped: bool  # the contrast reads q, not p
    factors: tuple[float, float] = (1.0, 1.0)  # what the two sums were multiplied by


class ContrastRows(NamedTuple):
    """The rows of ``contrast``: what the backend's ``rows`` made, or, if ``is_packed``, rows of an exchange."""

    queries: Tensor  # [n, D]
    keys: Tensor | None  # [m, D]; None where queries are contrasted with each other
    scale: Tensor  # 0-dim, in the accumulation dtype
    mask: Mask
    normalized: bool  # the rows have length 1 or 0
    columns: int  # how many keys there are on all ranks
    is_packed: bool
    inverse_norms: tuple[Tensor | None, Tensor | None] = (None, None)  # as in DualRows, of queries and keys
    needs: tuple[bool, bool] | None = None


class ContrastUpstream(NamedTuple):
    """What a backward of ``contrast`` starts from.

    Stats and weights cover the rank's own queries. Other ranks' follow where keys need a gradient.
    """

    stats: Tensor  # [2, n]
    weight: Tensor | None  # [n]
    grad_loss: Tensor
    factor: float = 1.0  # what the sum was multiplied by
