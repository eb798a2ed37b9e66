"""N-to-one representation matching (NORM, ICLR 2023)."""

import torch.nn.functional as F
from torch import Tensor

from fastkd.losses.base import LossModule
from fastkd.losses.pairs import check_maps, in_loss_dtype
from fastkd.validate import check_int


class NORMLoss(LossModule):
    r"""NORM: each of N parts of the student's widened last map is the teacher's.

    .. code-block:: text

        norm = N * mean (F^s - [F^t, ..., F^t])^2                                   over all entries of F^s, N copies

    The student's last map is widened to N C_t channels by a 1x1 convolution with batch norm, and projected back with a
    residual. These layers belong to the student, and are not here. The teacher's map is max-pooled to the student's
    size. Every row stands alone: with several ranks the mean is over the rows of this rank.

    Source: "NORM: Knowledge Distillation via N-to-One Representation Matching", ICLR 2023, as in the authors' code.

    Args:
        repeats: N; >= 1.

    Raises:
        TypeError, ValueError: ``repeats`` is not an int >= 1.

    Example:
        >>> import torch
        >>> from fastkd.losses import NORMLoss
        >>> terms = NORMLoss(repeats=3)(torch.randn(4, 48, 4, 4, requires_grad=True), torch.randn(4, 16, 8, 8))
        >>> terms["norm"].backward()
    """

    def __init__(self, repeats: int = 8) -> None:
        super().__init__()
        check_int("repeats", repeats, minimum=1)
        self.repeats = repeats

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> dict[str, Tensor]:
        """Returns ``{"norm": loss}``, 0-dim. The teacher gets no gradient.

        student_map: [B, N * C_t, H, W], widened. teacher_map: [B, C_t, H', W']. Both in any float dtype.
        """
        check_maps(student_map, teacher_map)
        if student_map.shape[1] != self.repeats * teacher_map.shape[1]:
            raise ValueError(f"student_map: got {student_map.shape[1]} channels, expected {self.repeats} times the "
                             f"teacher's {teacher_map.shape[1]}")  # fmt: skip
        student, teacher = in_loss_dtype(student_map, teacher_map)
        if teacher.shape[2:] != student.shape[2:]:
            teacher = F.adaptive_max_pool2d(teacher, student.shape[2:])
        return {"norm": self.repeats * F.mse_loss(student, teacher.repeat(1, self.repeats, 1, 1))}

    def extra_repr(self) -> str:
        return f"repeats={self.repeats}"
