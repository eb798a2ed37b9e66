"""``triplet_angles`` through the Triton kernels."""

from torch import Tensor

from fastkd.kernels import triplet_angles as kernels


def triplet_angles(
    gram_s: Tensor, inverse_s: Tensor, gram_t: Tensor, inverse_t: Tensor, first: int, last: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`fastkd.backends.blocked.triplet_angles.triplet_angles`."""
    return kernels.triplet_angles(*(x.contiguous() for x in (gram_s, inverse_s, gram_t, inverse_t)), first, last)
