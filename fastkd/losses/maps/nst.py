"""Neuron selectivity transfer (arXiv 1707.01219)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.losses.base import LossModule
from fastkd.losses.maps.match import match
from fastkd.losses.pairs import check_map_lists, full_precision, in_loss_dtype, unit


class NSTLoss(LossModule):
    r"""NST: the channels of the student's maps are distributed as the teacher's.

    .. code-block:: text

        S, T = the channels of a sample's maps as rows of norm 1, [C_s, H * W] and [C_t, H * W]     k(a, b) = (a . b)^2
        nst  = sum over the maps of mean k(T, T) + mean k(S, S) - 2 mean k(S, T)        over samples, pairs of channels
             = sum over the maps of mean_i |S_i^T S_i / C_s - T_i^T T_i / C_t|_F^2

    Of two maps the higher one is averaged to the size of the other. The two lines are the same number. The one with the
    smaller matrices is computed, channels by channels or positions by positions; the public code holds B * C_s * C_t *
    H * W numbers instead. RepDistiller's weight is 50, of all maps. The authors have the last map alone, and leave out
    the teacher's term, which has no gradient.

    Every row stands alone, so there is no ``group``: with several ranks the mean is over the rows of this rank.

    Source: arXiv 1707.01219 with the polynomial kernel of degree 2 and offset 0.

    Example:
        >>> import torch
        >>> from fastkd.losses import NSTLoss
        >>> terms = NSTLoss()([torch.randn(4, 8, 8, 8, requires_grad=True)], [torch.randn(4, 16, 8, 8)])
        >>> (50 * terms["nst"]).backward()
    """

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns ``{"nst": loss}``, 0-dim. The teacher gets no gradient.

        student_maps, teacher_maps: equally many maps [B, C, H, W], in float64, float32, bf16 or fp16.
        """
        check_map_lists(student_maps, teacher_maps)
        losses = []
        with full_precision(student_maps[0]):
            for maps in zip(student_maps, teacher_maps, strict=True):
                S, T = (unit(x.flatten(2)) for x in match(*in_loss_dtype(*maps)))
                losses.append(_discrepancy(S, T))
        return {"nst": torch.stack(losses).sum()}


def _discrepancy(S: Tensor, T: Tensor) -> Tensor:
    C_s, C_t, positions = S.shape[1], T.shape[1], S.shape[2]
    if positions * (C_s + C_t) <= C_s**2 + C_t**2 + C_s * C_t:
        difference = S.mT @ S / C_s - T.mT @ T / C_t  # [B, H * W, H * W]
        return difference.square().sum(dim=(1, 2)).mean()
    kernels = ((a @ b.mT).square().mean() for a, b in ((T, T), (S, S), (S, T)))
    teachers, students, both = kernels
    return teachers + students - 2 * both
