"""The terms of the classical methods that compare relations between samples."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from fastkd.losses import CCLoss, CRDLoss, InfoNCELoss, PKTLoss, RKDLoss, SPLoss
from fastkd.trainer.models.features import ModelOutput, ModelShapes
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.options.check import loss_options
from fastkd.trainer.objective.terms.base import LossTerm, RelationalTerm, TermBuilder, one_dtype


class FeatureRelationTerm(RelationalTerm):
    """A loss that relates the pooled features of samples."""

    needs_classes = False

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__(config, student, teacher)
        self._columns = student.features + teacher.features

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        return self.for_layers(student.features, teacher.features)

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks: both models' features."""
        return self._columns


class RKDTerm(FeatureRelationTerm):
    """``RKDLoss``."""

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> RKDLoss:
        return RKDLoss(**loss_options(config.rkd, RKDLoss))


class PKTTerm(FeatureRelationTerm):
    """``PKTLoss``."""

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> PKTLoss:
        return PKTLoss(**loss_options(config.pkt, PKTLoss))


class CCTerm(FeatureRelationTerm):
    """``CCLoss``; owns both embeddings."""

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> CCLoss:
        self.needs_two_rows = config.cc.reading == "neighbours"
        return CCLoss(student.features, teacher.features, **loss_options(config.cc, CCLoss))

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks: two embeddings, or both models' features."""
        return self._columns if self.loss.embed_student is None else 2 * self.loss.embed_student.out_features


class SPTerm(RelationalTerm):
    """``SPLoss`` of the last maps."""

    needs_features = False
    needs_classes = False
    needs_taps = True

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> SPLoss:
        assert student.taps is not None
        assert teacher.taps is not None
        self._columns = math.prod(student.taps.maps[-1]) + math.prod(teacher.taps.maps[-1])
        return SPLoss(**loss_options(config.sp, SPLoss))

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        assert student.taps is not None
        assert teacher.taps is not None
        return student.taps.maps[-1], teacher.taps.maps[-1]

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks: both models' maps."""
        return self._columns


class InfoNCETerm(RelationalTerm):
    """``InfoNCELoss`` with the student's features as queries and the teacher's as keys; owns both embeddings."""

    needs_classes = False

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__(config, student, teacher)
        width = config.info_nce.embedding_dim
        if width is None and student.features != teacher.features:
            raise ValueError(
                f"info_nce.embedding_dim: got None, but the student's features have {student.features} dimensions and "
                f"the teacher's {teacher.features}, expected a width of both embeddings, such as 128"
            )
        self.heads = nn.ModuleList(nn.Linear(shapes.features, width) for shapes in (student, teacher) if width)
        self._columns = width or student.features

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> InfoNCELoss:
        return InfoNCELoss(**loss_options(config.info_nce, InfoNCELoss))

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        pair = self.for_layers(student.features, teacher.features)
        query, key = (head(x) for head, x in zip(self.heads, pair, strict=True)) if self.heads else pair
        return one_dtype(query, key)

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks: the keys."""
        return self._columns


class CRDTerm(LossTerm):
    """``CRDLoss``; owns both embeddings and, for every sample of the training set, a row of two memories."""

    additions = ("index", "contrast_index")
    spans_ranks = True
    same_on_ranks = ("loss.memory_student", "loss.memory_teacher")

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> CRDLoss:
        if config.crd.samples is None:
            raise ValueError("crd.samples: got None, expected the number of training samples")
        return CRDLoss(student.features, teacher.features, **loss_options(config.crd, CRDLoss))

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, **numbers: Tensor
    ) -> dict[str, Tensor]:
        assert teacher is not None
        return self.loss(*self.for_layers(student.features, teacher.features), **numbers)

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks: two embeddings."""
        return 2 * self.loss.embed_student.out_features


TERMS: dict[str, TermBuilder] = {
    "cc": CCTerm,
    "rkd": RKDTerm,
    "pkt": PKTTerm,
    "crd": CRDTerm,
    "sp": SPTerm,
    "info_nce": InfoNCETerm,
}
