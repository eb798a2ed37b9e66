"""Knowledge review (arXiv 2104.09044)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses.base import LossModule
from fastkd.losses.maps.match import channel_lists, check_channels, check_connected, check_same_grid
from fastkd.losses.pairs import check_map_lists, in_loss_dtype
from fastkd.validate import check_int

MAX_WIDTH = 512
POOLED_SIDES = (4, 2, 1)


class ReviewKDLoss(LossModule):
    r"""ReviewKD: the student's maps, each joined with the deeper ones, are the teacher's at several scales.

    .. code-block:: text

        from the deepest map on:
            x = batch_norm(conv1x1(F^s))                                                 no bias, -> width
            y = the joined map of the deeper level, resized to the size of x             not for the deepest
            g = sigmoid(conv1x1([x, y]))                                                 2 channels, with bias
            x = g_0 x + g_1 y
            x = x resized to the size of F^t                                             this is the joined map
            o = batch_norm(conv3x3(x))                                                   no bias, -> C_t

        hcl(o, F^t) = sum_{l in {h, 4, 2, 1}, l <= h} w_l mean (o averaged to l x l - F^t averaged to l x l)^2 / sum w_l
        review      = sum over the maps of hcl                      h: height of F^t; w: 1, 1/2, 1/4, 1/8 in turn

    Resizing takes the nearest neighbour. The student's maps are those after the activation, the teacher's those before
    it, and the last of both are the pooled features as maps of 1x1. The weight is 5 on CIFAR-100 (0.6, 1 and 8 for some
    pairs), times ``min(epoch / 20, 1)``, beside cross-entropy of weight 1.

    All parameters of this module belong in the optimiser. With several ranks the mean is over the rows of this rank.

    Source: arXiv 2104.09044, as in the authors' code.

    Args:
        student_channels, teacher_channels: numbers of channels of the maps, one per map, from the input on.
        width: of the joined maps; None for the width of the student's deepest map, and at most 512.

    Raises:
        TypeError, ValueError: a number is out of range, or the two lists differ in length.

    Example:
        >>> import torch
        >>> from fastkd.losses import ReviewKDLoss
        >>> review = ReviewKDLoss(student_channels=[8, 16, 16], teacher_channels=[16, 32, 32])
        >>> student_maps = [torch.randn(4, C, side, side, requires_grad=True) for C, side in ((8, 8), (16, 4), (16, 1))]
        >>> terms = review(student_maps, [torch.randn(4, C, side, side) for C, side in ((16, 8), (32, 4), (32, 1))])
        >>> (5 * terms["review"]).backward()
    """

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], width: int | None = None
    ) -> None:
        super().__init__()
        self.channels = channel_lists(student_channels, teacher_channels)
        if width is None:
            width = min(MAX_WIDTH, student_channels[-1])
        check_int("width", width, minimum=1)
        deepest = len(self.channels) - 1
        self.fusions = nn.ModuleList(
            _Fusion(C_s, C_t, width, joins=level < deepest) for level, (C_s, C_t) in enumerate(self.channels)
        )

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns ``{"review": loss}``, 0-dim. The teacher gets no gradient.

        student_maps, teacher_maps: as many maps [B, C, H, W] as the module was made for; the student's in the dtype of
        the parameters unless autocast is on.
        """
        check_map_lists(student_maps, teacher_maps, len(self.channels))
        losses = []
        joined: Tensor | None = None
        for level in reversed(range(len(self.channels))):
            student, teacher = student_maps[level], teacher_maps[level]
            fusion, (C_s, C_t) = self.fusions[level], self.channels[level]
            assert isinstance(fusion, _Fusion)
            check_connected(f"student_maps[{level}]", student, C_s, fusion.conv1[0], norms=self.training)
            check_channels(f"teacher_maps[{level}]", teacher, C_t)
            output, joined = fusion(student, joined, teacher.shape[2:])
            check_same_grid(output, teacher, f"s[{level}]")
            losses.append(_hierarchical(*in_loss_dtype(output, teacher)))
        return {"review": torch.stack(losses).sum()}


class _Fusion(nn.Module):
    """One level: joins a map with the deeper levels', and brings it to the teacher's shape."""

    def __init__(self, C_s: int, C_t: int, width: int, *, joins: bool) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(C_s, width, kernel_size=1, bias=False), nn.BatchNorm2d(width))
        self.conv2 = nn.Sequential(nn.Conv2d(width, C_t, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(C_t))
        self.gates = nn.Conv2d(2 * width, 2, kernel_size=1) if joins else None
        for layer in (self.conv1[0], self.conv2[0]):
            assert isinstance(layer, nn.Conv2d)
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, x: Tensor, joined: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        x = self.conv1(x)
        if self.gates is not None:
            assert joined is not None
            y = F.interpolate(joined, x.shape[2:], mode="nearest")
            gates = torch.sigmoid(self.gates(torch.cat([x, y], dim=1)))
            x = gates[:, :1] * x + gates[:, 1:] * y
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return self.conv2(x), x


def _hierarchical(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared difference at the map's own size and averaged to 4x4, 2x2 and 1x1, as far as these are smaller."""
    difference = student - teacher  # averaging is linear
    total, weight, weights = difference.square().mean(), 1.0, 1.0
    for side in POOLED_SIDES:
        if side < difference.shape[2]:
            weight /= 2
            weights += weight
            total = total + weight * F.adaptive_avg_pool2d(difference, side).square().mean()
    return total / weights
