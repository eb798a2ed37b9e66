"""The term of a detector's own losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.distributed.agree import agreeing
from fastkd.distributed.group import resolve_group
from fastkd.trainer.models.detection.output import DetectorOutput
from fastkd.trainer.models.features import ModelOutput, ModelShapes
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.terms.base import TermBuilder


class DetectorTerm(nn.Module):
    """The four losses of a Faster R-CNN, whose sum torchvision trains on: of all regions and anchors that were sampled.

    ``classifier`` and ``box`` are the cross-entropy and the smooth L1 loss of the box head, divided by the number of
    regions. ``objectness`` and ``rpn_box`` are those of the region proposal network, divided by the number of anchors.
    The numbers are those of all ranks.
    """

    needs_teacher = False
    needs_features = False
    spans_ranks = True

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        if not isinstance(student, DetectorOutput) or not student.losses:
            raise ValueError("objective.terms: got the term 'detector' with a student that is no detector")
        sums, counts = zip(*student.losses.values(), strict=True)
        total = torch.stack(sums)
        ranks = agreeing(resolve_group(None), "detector")
        return dict(zip(student.losses, ranks.mean_over(total, torch.tensor(counts, device=total.device)), strict=True))


TERMS: dict[str, TermBuilder] = {"detector": DetectorTerm}
