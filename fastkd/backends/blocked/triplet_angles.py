"""``triplet_angles`` of the blocked backend: blocks of anchors, or the extension's loops on a CPU.

The gradients come with the losses, because the angles are the work and are at hand. Let ``c`` be the difference of two
angles, clamped to [-1, 1], and ``u`` the inverse distances. The derivative of a triplet's loss is then ``c u_ij u_ik``
in the product of its two sides, and ``c`` times its angle over ``u_ij`` in ``u_ij``.
"""

import torch
from torch import Tensor

from fastkd.native import extension

BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}  # so many angles are held at once: 1 MiB in float32 stays in the cache


def triplet_angles(
    gram_s: Tensor, inverse_s: Tensor, gram_t: Tensor, inverse_t: Tensor, first: int, last: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over the anchors in [first, last) of the losses of all pairs of ends, 0-dim, and its derivatives.

    These are ``ends`` [N, N], summed over the anchors, and per anchor the sums over one end of ``c u_ij u_ik`` and of
    ``c`` times the angle, each [last - first, N].
    """
    given = [x.contiguous() for x in (gram_s, inverse_s, gram_t, inverse_t)]
    native = extension() if gram_s.device.type == "cpu" else None
    if native is not None:
        return native.triplet_angles(*given, first, last, torch.get_num_threads())
    count = len(gram_s)
    ends, total = torch.zeros_like(given[0]), gram_s.new_zeros(())
    of_gram, of_inverse = gram_s.new_zeros(2, last - first, count)
    step = max(1, BLOCK.get(gram_s.device.type, BLOCK["cuda"]) // count**2)
    for start in range(first, last, step):
        anchors, rows = slice(start, min(start + step, last)), slice(start - first, min(start + step, last) - first)
        scale, angle = _angles(given[0], given[1], anchors)
        difference = angle - _angles(given[2], given[3], anchors)[1]
        slope = difference.clamp(-1, 1)
        total += slope.flatten().dot(difference.sub_(slope, alpha=0.5).flatten())
        ends += scale.mul_(slope).sum(dim=0)
        torch.sum(scale, 2, out=of_gram[rows])
        torch.sum(angle.mul_(slope), 2, out=of_inverse[rows])
    return total, ends, of_gram, of_inverse


def _angles(gram: Tensor, inverse: Tensor, anchors: slice) -> tuple[Tensor, Tensor]:
    """``u_ij u_ik`` and the angles, both [anchors, N, N]."""
    own, u = gram[anchors], inverse[anchors]
    scale = u[:, :, None] * u[:, None, :]
    sides = (own - gram.diagonal()[anchors, None])[:, :, None]
    return scale, (gram - sides).sub_(own[:, None, :]).mul_(scale)
