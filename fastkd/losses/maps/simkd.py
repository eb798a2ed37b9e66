"""Reuse of the teacher's classifier (arXiv 2203.14001)."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses.base import LossModule
from fastkd.losses.inputs import Classifier, weight_and_bias
from fastkd.losses.maps.match import check_channels, check_connected, match
from fastkd.losses.pairs import check_maps, in_loss_dtype
from fastkd.validate import check_feature_map, check_int


class SimKDLoss(LossModule):
    r"""SimKD: the student's last map, behind a projector, is the teacher's, and the teacher's classifier reads it.

    .. code-block:: text

        r(F)   = 1x1, 3x3 and 1x1 convolutions without bias, each with batch norm and ReLU; inner width C_t / factor
        simkd  = mean (r(F^s) - F^t)^2                                      over all entries
        logits = W_t average(r(F^s)) + b_t                                  what the student predicts

    Of two maps the higher one is averaged to the size of the other, before the projector. The loss is trained alone,
    with weight 1: no cross-entropy, no KD. So the student's own classifier learns nothing. The projector and the
    teacher's classifier belong to the model that is used afterwards; :meth:`logits` is its prediction. The projector
    ends in a ReLU, so the teacher's map should be one after a ReLU.

    All parameters of this module belong in the optimiser. With several ranks the mean is over the rows of this rank.

    Source: arXiv 2203.14001, as in the authors' code.

    Args:
        student_channels, teacher_channels: numbers of channels of the last maps.
        factor: the inner width is the teacher's divided by it; >= 1. The paper's tables have 2, and 4 and 8.

    Raises:
        TypeError, ValueError: a number is not an int >= 1, or ``factor`` is larger than ``teacher_channels``.

    Example:
        >>> import torch
        >>> from fastkd.losses import SimKDLoss
        >>> simkd, teacher_fc = SimKDLoss(student_channels=8, teacher_channels=16), torch.nn.Linear(16, 10)
        >>> student_map = torch.randn(4, 8, 8, 8, requires_grad=True)
        >>> simkd(student_map, torch.randn(4, 16, 8, 8))["simkd"].backward()
        >>> simkd.logits(student_map, teacher_fc).shape
        torch.Size([4, 10])
    """

    def __init__(self, student_channels: int, teacher_channels: int, factor: int = 2) -> None:
        super().__init__()
        check_int("student_channels", student_channels, minimum=1)
        check_int("teacher_channels", teacher_channels, minimum=1)
        check_int("factor", factor, minimum=1)
        if factor > teacher_channels:
            raise ValueError(f"factor: got {factor}, expected at most teacher_channels, {teacher_channels}")
        self.channels = student_channels, teacher_channels
        inner = teacher_channels // factor
        self.projector = nn.Sequential(
            *_layer(student_channels, inner, 1), *_layer(inner, inner, 3), *_layer(inner, teacher_channels, 1)
        )

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> dict[str, Tensor]:
        """Returns ``{"simkd": loss}``, 0-dim. The teacher gets no gradient.

        student_map: [B, student_channels, H, W], in the dtype of the parameters unless autocast is on. teacher_map:
        [B, teacher_channels, H', W'].
        """
        check_maps(student_map, teacher_map)
        check_channels("teacher_map", teacher_map, self.channels[1])
        self._check(student_map)
        student, teacher = match(student_map, teacher_map)
        return {"simkd": F.mse_loss(*in_loss_dtype(self.projector(student), teacher))}

    def logits(self, student_map: Tensor, teacher_classifier: Classifier, teacher_height: int | None = None) -> Tensor:
        """What the student predicts, [B, classes], in eval mode as it is used.

        student_map: as for a call. teacher_classifier: an nn.Linear, or a pair (weight [classes, teacher_channels],
        bias or None). teacher_height: the height of the teacher's map, needed where the student's is higher.
        """
        check_feature_map("student_map", student_map)
        self._check(student_map)
        if teacher_height is not None:
            check_int("teacher_height", teacher_height, minimum=1)
            if student_map.shape[2] > teacher_height:
                student_map = F.adaptive_avg_pool2d(student_map, teacher_height)
        pooled = self.projector(student_map).mean(dim=(2, 3))
        return F.linear(pooled, *weight_and_bias("teacher_classifier", teacher_classifier, pooled))

    def _check(self, student_map: Tensor) -> None:
        check_connected("student_map", student_map, self.channels[0], self.projector[0], norms=self.training)


def _layer(C_in: int, C_out: int, kernel: int) -> list[nn.Module]:
    conv = nn.Conv2d(C_in, C_out, kernel_size=kernel, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(C_out), nn.ReLU()]
