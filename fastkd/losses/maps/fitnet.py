"""Hints (arXiv 1412.6550)."""

import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.base import LossModule
from fastkd.losses.maps.connectors import Regressor, Shape, check_shape
from fastkd.losses.maps.match import check_channels, check_connected, check_same_grid
from fastkd.losses.pairs import check_maps, in_loss_dtype


class FitNetLoss(LossModule):
    r"""FitNet: a map of the student, behind a regressor, is the teacher's.

    .. code-block:: text

        r(F)   = ReLU(batch_norm(conv(F)))
        fitnet = mean (r(F^s) - F^t)^2                                                 over all entries

    The convolution has a bias. Its kernel follows from the two heights: 1x1 where they are equal, 3x3 of stride 2 or
    transposed 4x4 of stride 2 where they differ by a factor of 2, else a valid kernel from the larger to the smaller.
    RepDistiller trains with this term (weight 100) and cross-entropy in one stage. The paper has two: the hint first,
    then KD. The ReLU cannot reach negative values, which the maps of some teachers have.

    All parameters of this module belong in the optimiser. With several ranks the mean is over the rows of this rank.

    Source: arXiv 1412.6550. The ReLU and the batch norm are RepDistiller's, whose numbers are in most tables.

    Args:
        student_shape, teacher_shape: (C, H, W) of the maps.

    Raises:
        TypeError, ValueError: a shape is not three ints >= 1, or no kernel takes the student's height to the teacher's.

    Example:
        >>> import torch
        >>> from fastkd.losses import FitNetLoss
        >>> fitnet = FitNetLoss(student_shape=(8, 14, 14), teacher_shape=(16, 7, 7))
        >>> terms = fitnet(torch.randn(4, 8, 14, 14, requires_grad=True), torch.randn(4, 16, 7, 7))
        >>> (100 * terms["fitnet"]).backward()
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape) -> None:
        super().__init__()
        check_shape("student_shape", student_shape)
        check_shape("teacher_shape", teacher_shape)
        self.channels = student_shape[0], teacher_shape[0]
        self.regressor = Regressor(student_shape, teacher_shape, relu=True)

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> dict[str, Tensor]:
        """Returns ``{"fitnet": loss}``, 0-dim. The teacher gets no gradient.

        student_map, teacher_map: [B, C, H, W] of the module's shapes; the student's in the dtype of the parameters
        unless autocast is on.
        """
        check_maps(student_map, teacher_map)
        check_connected("student_map", student_map, self.channels[0], self.regressor.conv, norms=self.training)
        check_channels("teacher_map", teacher_map, self.channels[1])
        hint = self.regressor(student_map)
        check_same_grid(hint, teacher_map)
        return {"fitnet": F.mse_loss(*in_loss_dtype(hint, teacher_map))}
