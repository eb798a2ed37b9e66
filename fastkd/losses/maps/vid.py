"""Variational information distillation (arXiv 1904.05835)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses.base import LossModule
from fastkd.losses.maps.match import channel_lists, check_channels, check_connected, match
from fastkd.losses.pairs import check_map_lists, in_loss_dtype
from fastkd.validate import check_number


class VIDLoss(LossModule):
    r"""VID: the student's maps predict the teacher's, each channel with a variance that is learnt.

    .. code-block:: text

        mu      = conv1x1(ReLU(conv1x1(ReLU(conv1x1(F^s)))))                           C_s -> C_t -> C_t -> C_t, no bias
        sigma^2 = softplus(rho) + eps                                                  rho: one per channel of F^t
        vid     = sum over the maps of mean [(mu - F^t)^2 / sigma^2 + ln sigma^2] / 2   over all entries

    Of two maps the higher one is averaged to the size of the other, before the convolutions. The loss may be negative.
    RepDistiller's weight is 1. All parameters of this module belong in the optimiser, the variances too. With several
    ranks the mean is over the rows of this rank.

    Source: arXiv 1904.05835, as in RepDistiller.

    Args:
        student_channels, teacher_channels: numbers of channels of the maps, one per map.
        initial_variance: sigma^2 at first; > eps.
        eps: the smallest variance; > 0.

    Raises:
        TypeError, ValueError: a number is out of range, or the two lists differ in length.

    Example:
        >>> import torch
        >>> from fastkd.losses import VIDLoss
        >>> vid = VIDLoss(student_channels=[8], teacher_channels=[16])
        >>> terms = vid([torch.randn(4, 8, 8, 8, requires_grad=True)], [torch.randn(4, 16, 8, 8)])
        >>> terms["vid"].backward()
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        initial_variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.channels = channel_lists(student_channels, teacher_channels)
        check_number("eps", eps, minimum=0, exclusive=True)
        check_number("initial_variance", initial_variance, minimum=eps, exclusive=True)
        self.eps = eps
        self.regressors = nn.ModuleList(_regressor(C_s, C_t) for C_s, C_t in self.channels)
        initial = math.log(math.expm1(initial_variance - eps))
        self.rho = nn.ParameterList(torch.full((C_t,), initial) for _, C_t in self.channels)

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns ``{"vid": loss}``, 0-dim. The teacher gets no gradient.

        student_maps, teacher_maps: as many maps [B, C, H, W] as the module was made for; the student's in the dtype of
        the parameters unless autocast is on.
        """
        check_map_lists(student_maps, teacher_maps, len(self.channels))
        losses = []
        for level, (C_s, C_t) in enumerate(self.channels):
            regressor = self.regressors[level]
            assert isinstance(regressor, nn.Sequential)
            check_connected(f"student_maps[{level}]", student_maps[level], C_s, regressor[0])
            check_channels(f"teacher_maps[{level}]", teacher_maps[level], C_t)
            student, teacher = match(student_maps[level], teacher_maps[level])
            mu, teacher = in_loss_dtype(regressor(student), teacher)
            variance = (F.softplus(self.rho[level].to(mu.dtype)) + self.eps)[:, None, None]
            losses.append(((mu - teacher).square() / variance + variance.log()).mean() / 2)
        return {"vid": torch.stack(losses).sum()}


def _regressor(C_s: int, C_t: int) -> nn.Sequential:
    convolutions = [nn.Conv2d(width, C_t, kernel_size=1, bias=False) for width in (C_s, C_t, C_t)]
    return nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
