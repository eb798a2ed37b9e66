"""Flow of the solution procedure (Yim et al., CVPR 2017)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastkd.losses.base import LossModule
from fastkd.losses.maps.match import match
from fastkd.losses.pairs import check_map_lists, full_precision, in_loss_dtype


class FSPLoss(LossModule):
    r"""FSP: the products of the channels of two neighbouring maps are those of the teacher.

    .. code-block:: text

        G_l = mean over the positions of F_l F_{l+1}^T, [B, C_l, C_{l+1}]
        fsp = sum over the pairs of neighbours of mean (G^s_l - G^t_l)^2          over samples and pairs of channels

    Inside a network, of two maps the higher one is averaged to the size of the other. Both networks have the same
    numbers of channels. The public code trains the student's layers below the classifier with this loss alone, for 30
    epochs at a constant rate, and then the whole student with cross-entropy alone. So it has no weight.

    Every row stands alone, so there is no ``group``: with several ranks the mean is over the rows of this rank.

    Source: Yim et al., "A Gift from Knowledge Distillation", CVPR 2017, as in RepDistiller. The paper pools
    with maxima and weighs the pairs.

    Example:
        >>> import torch
        >>> from fastkd.losses import FSPLoss
        >>> student_maps = [torch.randn(4, 8, 8, 8, requires_grad=True), torch.randn(4, 16, 4, 4)]
        >>> terms = FSPLoss()(student_maps, [torch.randn(4, 8, 8, 8), torch.randn(4, 16, 4, 4)])
        >>> terms["fsp"].backward()
    """

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns ``{"fsp": loss}``, 0-dim. The teacher gets no gradient.

        student_maps, teacher_maps: equally many maps [B, C, H, W], at least two, in float64, float32, bf16 or fp16. The
        student's numbers of channels are the teacher's.
        """
        check_map_lists(student_maps, teacher_maps, channels=True)
        if len(student_maps) < 2:
            raise ValueError(f"student_maps: got {len(student_maps)} map, expected at least 2")
        pairs = [in_loss_dtype(*maps) for maps in zip(student_maps, teacher_maps, strict=True)]
        with full_precision(student_maps[0]):
            student, teacher = (_flows(maps) for maps in zip(*pairs, strict=True))
        return {"fsp": torch.stack([(s - t).square().mean() for s, t in zip(student, teacher, strict=True)]).sum()}


def _flows(maps: Sequence[Tensor]) -> list[Tensor]:
    flows = []
    for pair in pairwise(maps):
        first, second = (x.flatten(2) for x in match(*pair))
        flows.append(first @ second.mT / first.shape[2])
    return flows
