"""Attention transfer (arXiv 1612.03928)."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastkd.losses.base import LossModule
from fastkd.losses.maps.match import match
from fastkd.losses.pairs import check_map_lists, in_loss_dtype, unit
from fastkd.validate import check_choice, check_int

Reading = Literal["code", "paper"]


class ATLoss(LossModule):
    r"""AT: student and teacher look at the same positions of their maps.

    .. code-block:: text

        Q = flatten(mean over the channels of F^power), divided by its norm                           [B, H * W]

        reading="code":   at = sum over the maps of mean_{i, position} (Q^s - Q^t)^2
        reading="paper":  at = sum over the maps of mean_i |Q^s_i - Q^t_i|

    Of two maps the higher one is averaged to the size of the other. ``"code"`` is the authors' code and RepDistiller's
    (weight 1000), and the default. Its mean over the positions weakens large maps. ``"paper"`` is eq. 2 of the paper.

    Every row stands alone, so there is no ``group``: with several ranks the mean is over the rows of this rank.

    Source: arXiv 1612.03928, eq. 2.

    Args:
        power: of the entries of the maps; >= 1.
        reading: see above.

    Raises:
        TypeError, ValueError: ``power`` is not an int >= 1, or ``reading`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import ATLoss
        >>> student_maps = [torch.randn(4, 8, 16, 16, requires_grad=True), torch.randn(4, 16, 8, 8)]
        >>> terms = ATLoss()(student_maps, [torch.randn(4, 32, 16, 16), torch.randn(4, 64, 8, 8)])
        >>> (1000 * terms["at"]).backward()
    """

    def __init__(self, power: int = 2, reading: Reading = "code") -> None:
        super().__init__()
        check_int("power", power, minimum=1)
        check_choice("reading", reading, get_args(Reading))
        self.power, self.reading = power, reading

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns ``{"at": loss}``, 0-dim. The teacher gets no gradient.

        student_maps, teacher_maps: equally many maps [B, C, H, W], in float64, float32, bf16 or fp16.
        """
        check_map_lists(student_maps, teacher_maps)
        losses = []
        for maps in zip(student_maps, teacher_maps, strict=True):
            student, teacher = (attention(x, self.power) for x in match(*in_loss_dtype(*maps)))
            if self.reading == "code":
                losses.append((student - teacher).square().mean())
            else:
                losses.append(torch.linalg.vector_norm(student - teacher, dim=1).mean())
        return {"at": torch.stack(losses).sum()}

    def extra_repr(self) -> str:
        return f"power={self.power}, reading={self.reading!r}"


def attention(features: Tensor, power: int = 2) -> Tensor:
    """The attention [B, H * W] of maps [B, C, H, W], each of norm 1."""
    if power == 2:  # one read, where squares would be written and read again
        means = torch.linalg.vector_norm(features, dim=1).square() / features.shape[1]
    else:
        means = features.pow(power).mean(dim=1)
    return unit(means.flatten(1))
