"""Softmax regression representation learning (Yang et al., ICLR 2021)."""

import math
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses.base import LossModule
from fastkd.losses.inputs import Classifier, weight_and_bias
from fastkd.losses.maps.match import check_channels, check_connected
from fastkd.losses.pairs import check_maps, feature_pair, in_loss_dtype
from fastkd.validate import check_choice, check_floating, check_int, check_pair

Reading = Literal["pooled", "maps"]


class SRRLLoss(LossModule):
    r"""SRRL: the student's features, behind a connector, are the teacher's, and the teacher's classifier agrees.

    .. code-block:: text

        r(F)       = ReLU(batch_norm(conv1x1(F))), no bias                                      C_s -> C_t
        feature    = mean (g^s - g^t)^2                                                         over all entries
        regression = mean (W_t g^s + b_t - teacher_logits)^2                                    over all entries

        reading="pooled":  g^s = r(f^s), g^t = f^t                      of pooled features
        reading="maps":    g^s = average(r(F^s)), g^t = average(F^t)    of the last maps

    ``"pooled"`` is the code behind the CIFAR-100 tables, with this loss, cross-entropy and KD at temperature 4 each of
    weight 1, and the default. ``"maps"`` is the authors' ImageNet code, without KD, and with an initialisation of its
    own. The gradient passes the teacher's classifier, which gets none itself.

    All parameters of this module belong in the optimiser. With several ranks the mean is over the rows of this rank.

    Source: Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning", ICLR 2021.

    Args:
        student_dim, teacher_dim: widths of the features, or numbers of channels of the maps.
        reading: see above.

    Raises:
        TypeError, ValueError: a width is not an int >= 1, or ``reading`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd.losses import SRRLLoss, total_loss
        >>> teacher_fc, teacher_features = torch.nn.Linear(16, 10), torch.randn(6, 16)
        >>> srrl = SRRLLoss(student_dim=8, teacher_dim=16)
        >>> student_features = torch.randn(6, 8, requires_grad=True)
        >>> terms = srrl(student_features, teacher_features, teacher_fc(teacher_features), teacher_fc)
        >>> list(terms)
        ['feature', 'regression']
        >>> total_loss(terms).backward()
    """

    def __init__(self, student_dim: int, teacher_dim: int, reading: Reading = "pooled") -> None:
        super().__init__()
        check_int("student_dim", student_dim, minimum=1)
        check_int("teacher_dim", teacher_dim, minimum=1)
        check_choice("reading", reading, get_args(Reading))
        self.widths, self.reading = (student_dim, teacher_dim), reading
        conv = nn.Conv2d(student_dim, teacher_dim, kernel_size=1, bias=False)
        if reading == "maps":
            nn.init.normal_(conv.weight, std=math.sqrt(2 / teacher_dim))
        self.connector = nn.Sequential(conv, nn.BatchNorm2d(teacher_dim), nn.ReLU())

    def forward(
        self, student_features: Tensor, teacher_features: Tensor, teacher_logits: Tensor, teacher_classifier: Classifier
    ) -> dict[str, Tensor]:
        """Returns ``feature`` and ``regression``, 0-dim. The teacher gets no gradient.

        student_features: [B, student_dim], or maps [B, student_dim, H, W] with ``reading="maps"``, in the dtype of the
        parameters unless autocast is on. teacher_features: [B, teacher_dim], or maps of any size. teacher_logits:
        [B, classes]. teacher_classifier: an nn.Linear, or a pair (weight [classes, teacher_dim], bias or None). A batch
        norm in training mode needs more than one value per channel, so ``"pooled"`` needs two rows.
        """
        if self.reading == "maps":
            check_maps(student_features, teacher_features)
        else:
            feature_pair(student_features, teacher_features)
        check_connected("student_features", student_features, self.widths[0], self.connector[0], norms=self.training)
        check_channels("teacher_features", teacher_features, self.widths[1])
        check_floating("teacher_logits", teacher_logits)
        is_map = self.reading == "maps"
        connected = self.connector(student_features if is_map else student_features[:, :, None, None])
        student, teacher = in_loss_dtype(connected, teacher_features)
        student = student.mean(dim=(2, 3))
        if is_map:
            teacher = teacher.mean(dim=(2, 3))
        weight, bias = weight_and_bias("teacher_classifier", teacher_classifier, teacher)
        logits = F.linear(student, weight.detach().to(student), None if bias is None else bias.detach().to(student))
        check_pair("teacher_logits", teacher_logits, "teacher_classifier", logits, "[B, C]", may_differ_in_dtype=True)
        regression = F.mse_loss(logits, teacher_logits.detach().to(logits))
        return {"feature": F.mse_loss(student, teacher), "regression": regression}

    def extra_repr(self) -> str:
        return f"{self.widths[0]}, {self.widths[1]}, reading={self.reading!r}"
