"""Activation boundaries (arXiv 1811.03233)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd.losses.base import LossModule
from fastkd.losses.maps.connectors import Regressor, Shape, check_shape
from fastkd.losses.maps.match import check_channels, check_connected, check_same_grid, level_weights
from fastkd.losses.pairs import check_map_lists, in_loss_dtype
from fastkd.validate import check_number, check_type


class ABLoss(LossModule):
    r"""AB: a neuron of the student is active where the teacher's is.

    .. code-block:: text

        a, t  = the student's map behind its connector, the teacher's map, both before the activation
        hinge = max(margin - a, 0) where t > 0, and max(margin + a, 0) elsewhere
        ab    = 0.003 / B * sum_l 2^(l - L) sum over the entries of hinge_l^2          l: 1..L, from the input on

    A connector is the identity where both shapes agree. Else it is FitNet's regressor without ReLU. The public code
    trains connectors and the student's layers below the classifier with this loss alone, for 30 epochs, and then the
    student with cross-entropy alone. So it has no weight.

    All parameters of this module belong in the optimiser. With several ranks the sum is over the rows of this rank.

    Source: arXiv 1811.03233, as in RepDistiller. The authors' connectors are 1x1 convolutions without bias
    and batch norm, and their second stage is KD.

    Args:
        student_shapes, teacher_shapes: (C, H, W) of the maps, one shape per map.
        margin: of the hinge; > 0.

    Raises:
        TypeError, ValueError: a shape is not three ints >= 1, no kernel takes a student's height to the teacher's, the
            two lists differ in length, or ``margin`` is out of range.

    Example:
        >>> import torch
        >>> from fastkd.losses import ABLoss
        >>> ab = ABLoss(student_shapes=[(8, 8, 8)], teacher_shapes=[(16, 8, 8)])
        >>> terms = ab([torch.randn(4, 8, 8, 8, requires_grad=True)], [torch.randn(4, 16, 8, 8)])
        >>> terms["ab"].backward()
    """

    def __init__(self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], margin: float = 1.0) -> None:
        super().__init__()
        for name, shapes in (("student_shapes", student_shapes), ("teacher_shapes", teacher_shapes)):
            check_type(name, shapes, (list, tuple))
            if len(shapes) == 0 or len(shapes) != len(student_shapes):
                expected = "as many as of the student's" if len(shapes) else "the shape of every map"
                raise ValueError(f"{name}: got {len(shapes)} shapes, expected {expected}")
            for shape in shapes:
                check_shape(name, shape)
        check_number("margin", margin, minimum=0, exclusive=True)
        self.margin = margin
        self.channels = [(s[0], t[0]) for s, t in zip(student_shapes, teacher_shapes, strict=True)]
        self.connectors = nn.ModuleList(
            nn.Identity() if tuple(s) == tuple(t) else Regressor(s, t, relu=False)
            for s, t in zip(student_shapes, teacher_shapes, strict=True)
        )

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns ``{"ab": loss}``, 0-dim. The teacher gets no gradient.

        student_maps, teacher_maps: as many maps [B, C, H, W], before their activations, as the module was made for;
        the student's in the dtype of the parameters unless autocast is on.
        """
        check_map_lists(student_maps, teacher_maps, len(self.channels))
        losses = []
        weights = level_weights(len(self.channels))
        for level, (weight, connector) in enumerate(zip(weights, self.connectors, strict=True)):
            student, teacher = student_maps[level], teacher_maps[level]
            name, (C_s, C_t) = f"student_maps[{level}]", self.channels[level]
            check_channels(name, student, C_s)
            check_channels(f"teacher_maps[{level}]", teacher, C_t)
            if isinstance(connector, Regressor):
                check_connected(name, student, C_s, connector.conv, norms=self.training)
            student = connector(student)
            check_same_grid(student, teacher, f"s[{level}]")
            student, teacher = in_loss_dtype(student, teacher)
            signed = torch.where(teacher > 0, student, -student)
            losses.append(weight * (self.margin - signed).clamp_min(0).square().sum())
        return {"ab": 0.003 / len(student_maps[0]) * torch.stack(losses).sum()}

    def extra_repr(self) -> str:
        return f"margin={self.margin}"
