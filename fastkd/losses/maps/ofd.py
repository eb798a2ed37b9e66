"""The overhaul of feature distillation (arXiv 1904.01866)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd.losses.base import LossModule
from fastkd.losses.maps.match import averaged, channel_lists, check_channels, check_connected, level_weights
from fastkd.losses.pairs import check_map_lists, in_loss_dtype
from fastkd.validate import check_floating, check_number, check_type

RARE = 0.001  # where fewer values are negative, the margin is -3 standard deviations


def activation_margin(weight: Tensor, bias: Tensor) -> Tensor:
    r"""The margin of every channel of a teacher's map, from the batch norm before its ReLU.

    .. code-block:: text

        E[x | x < 0] of a normal x with mean bias and standard deviation s = |weight|
            = bias - s phi(bias / s) / Phi(-bias / s),  and -3 s where Phi(-bias / s) <= 0.001

    phi is the density and Phi the distribution of the standard normal. A channel of weight 0 is constant: its margin is
    ``min(bias, 0)``.

    Source: arXiv 1904.01866, as in the authors' code, which computes it in float32 alone.

    Args:
        weight, bias: [C], of the batch norm, in a float dtype.

    Returns:
        The margins, [C], float64, <= 0, without gradient.

    Raises:
        TypeError, ValueError: an argument is no float vector, or the two differ in shape.

    Example:
        >>> import torch
        >>> from fastkd.losses import activation_margin
        >>> bn = torch.nn.BatchNorm2d(2)
        >>> activation_margin(bn.weight, bn.bias)
        tensor([-0.7979, -0.7979], dtype=torch.float64)
    """
    for name, x in (("weight", weight), ("bias", bias)):
        check_floating(name, x)
        if x.ndim != 1 or x.shape != weight.shape:
            raise ValueError(f"{name}: got shape {list(x.shape)}, expected [C], the same for weight and bias")
    s, mean = weight.detach().double().abs(), bias.detach().double()
    ratio = mean / s.masked_fill(s == 0, 1)
    below = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    margin = torch.where(below > RARE, mean - s * density / below, -3 * s)
    return torch.where(s == 0, mean.clamp_max(0), margin)


class OFDLoss(LossModule):
    r"""OFD: the student's maps, before the activation, are the teacher's, as far as the ReLU lets through a difference.

    .. code-block:: text

        a   = batch_norm(conv1x1(F^s)), no bias                t = max(F^t, margin)
        ofd = 0.001 / B * sum_l 2^(l - L) sum over the entries with a > t or t > 0 of (a - t)^2

    The teacher's maps are averaged to the student's sizes where they differ. The weight of the first l is the smallest.
    The authors have 1e-3 as here on CIFAR-100, and 1e-4 on ImageNet. They keep the teacher in training mode, Nesterov
    momentum, a rate of 0.1 and batches of 128.

    All parameters of this module belong in the optimiser. With several ranks the sum is over the rows of this rank.

    Source: arXiv 1904.01866, as in the authors' code.

    Args:
        student_channels: numbers of channels of the student's maps, one per map.
        margins: [C] for each of the teacher's maps, <= 0; see :func:`activation_margin`.
        scale: the factor of the formula, 0.001; > 0.

    Raises:
        TypeError, ValueError: a number is out of range, a margin is no float vector, or the two lists differ in length.

    Example:
        >>> import torch
        >>> from fastkd.losses import OFDLoss, activation_margin
        >>> bn = torch.nn.BatchNorm2d(16)                                  # before the ReLU behind the teacher's map
        >>> ofd = OFDLoss(student_channels=[8], margins=[activation_margin(bn.weight, bn.bias)])
        >>> terms = ofd([torch.randn(4, 8, 8, 8, requires_grad=True)], [torch.randn(4, 16, 8, 8)])
        >>> terms["ofd"].backward()
    """

    def __init__(self, student_channels: Sequence[int], margins: Sequence[Tensor], scale: float = 1e-3) -> None:
        super().__init__()
        check_type("margins", margins, (list, tuple))
        for margin in margins:
            check_floating("margins", margin)
            if margin.ndim != 1:
                raise ValueError(f"margins: got shape {list(margin.shape)}, expected [C] for every map")
        check_number("scale", scale, minimum=0, exclusive=True)
        self.channels = channel_lists(student_channels, [len(margin) for margin in margins])
        self.scale = scale
        for level, margin in enumerate(margins):
            self.register_buffer(f"margin_{level}", margin.detach().to(torch.get_default_dtype()))
        self.connectors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(C_s, C_t, kernel_size=1, bias=False), nn.BatchNorm2d(C_t))
            for C_s, C_t in self.channels
        )
        for connector, (_, C_t) in zip(self.connectors, self.channels, strict=True):
            nn.init.normal_(next(connector.parameters()), std=math.sqrt(2 / C_t))

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns ``{"ofd": loss}``, 0-dim. The teacher gets no gradient.

        student_maps, teacher_maps: as many maps [B, C, H, W], before their activations, as the module was made for;
        the student's in the dtype of the parameters unless autocast is on.
        """
        check_map_lists(student_maps, teacher_maps, len(self.channels))
        losses = []
        for level, weight in enumerate(level_weights(len(self.channels))):
            student, teacher = student_maps[level], teacher_maps[level]
            connector, (C_s, C_t) = self.connectors[level], self.channels[level]
            assert isinstance(connector, nn.Sequential)
            check_connected(f"student_maps[{level}]", student, C_s, connector[0], norms=self.training)
            check_channels(f"teacher_maps[{level}]", teacher, C_t)
            student, teacher = in_loss_dtype(connector(student), teacher)
            if student.shape != teacher.shape:
                teacher = averaged(teacher, student)
            margin = self.get_buffer(f"margin_{level}").to(teacher.dtype)
            teacher = torch.maximum(teacher, margin[:, None, None])
            counts = (student > teacher) | (teacher > 0)
            losses.append(weight * (student - teacher).square().masked_fill(~counts, 0).sum())
        return {"ofd": self.scale / len(student_maps[0]) * torch.stack(losses).sum()}

    def extra_repr(self) -> str:
        return f"scale={self.scale}"
