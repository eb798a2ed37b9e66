"""The terms of the classical methods that read logits."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses import (
    CTKDLoss,
    DISTLoss,
    DKDLoss,
    IPWDLoss,
    KDLoss,
    LSKDLoss,
    MLKDLoss,
    WSLDLoss,
)
from fastkd.numerics import accumulation_dtype
from fastkd.trainer.models.features import ModelOutput, ModelShapes
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.options.check import loss_options
from fastkd.trainer.objective.terms.base import LossTerm, RelationalTerm, TermBuilder
from fastkd.trainer.objective.terms.fused import CETerm


class LabelTerm(LossTerm):
    """A loss of the logits of both models and of the labels."""

    needs_features = False

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        return student.logits, teacher.logits, labels


class DKDTerm(LabelTerm):
    """``DKDLoss``, whose weight rises in the first epochs."""

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> DKDLoss:
        self.warmup_epochs = config.dkd.warmup_epochs
        return DKDLoss(**loss_options(config.dkd, DKDLoss))


class LSKDTerm(LabelTerm):
    """``LSKDLoss`` of ``KDLoss``, or of ``DKDLoss``, whose weight then rises in the first epochs."""

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> LSKDLoss:
        if config.lskd.loss == "kd":
            return LSKDLoss(KDLoss(config.lskd.temperature))
        self.warmup_epochs = config.lskd.warmup_epochs
        return LSKDLoss(DKDLoss(**loss_options(config.lskd, DKDLoss)))

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        given = super().inputs(student, teacher, labels)
        return given if isinstance(self.loss.loss, DKDLoss) else given[:2]


class WSLDTerm(LabelTerm):
    """``WSLDLoss``."""

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> WSLDLoss:
        return WSLDLoss(**loss_options(config.wsld, WSLDLoss))


class IPWDTerm(LabelTerm):
    """``IPWDLoss``; owns the class head, and adds its cross-entropy."""

    needs_features = True

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__(config, student, teacher)
        self.train_backbone = config.ipwd.train_backbone
        self.class_head = nn.Linear(student.features, student.classes)

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> IPWDLoss:
        return IPWDLoss(**loss_options(config.ipwd, IPWDLoss))

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        assert teacher is not None
        (features,) = self.for_layers(student.features)
        logits = self.class_head(features if self.train_backbone else features.detach())
        logits = logits.to(accumulation_dtype(logits.dtype))
        terms = self.loss(student.logits, logits, teacher.logits, labels)
        return {**terms, "class_head": F.cross_entropy(logits, labels)}


class CTKDTerm(LossTerm):
    """``CTKDLoss``; owns the temperature, which belongs in the student's optimiser."""

    needs_features = False

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> CTKDLoss:
        return CTKDLoss(**loss_options(config.ctkd, CTKDLoss))

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        return student.logits, teacher.logits, self.epoch + 1

    def scalars(self) -> dict[str, Tensor]:
        """What is logged beside the loss: the temperature."""
        return {"temperature": self.loss.temperature().detach()}


class DISTTerm(RelationalTerm):
    """``DISTLoss``."""

    needs_features = False

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> DISTLoss:
        return DISTLoss(**loss_options(config.dist, DISTLoss))


class MLKDTerm(RelationalTerm):
    """``MLKDLoss`` of the usual and the strong view of every image."""

    needs_features = False
    additions = ("strong", "strong_teacher")

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> MLKDLoss:
        return MLKDLoss(**loss_options(config.mlkd, MLKDLoss))

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, **views: ModelOutput
    ) -> dict[str, Tensor]:
        assert teacher is not None
        return self.loss(student.logits, teacher.logits, *(views[name].logits for name in self.additions))

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks: both models' logits of two views."""
        return 4 * classes


class StrongCETerm(nn.Module):
    """Cross-entropy of the strong view, which MLKD adds to that of the usual view."""

    needs_teacher = False
    needs_features = False
    needs_classes = True
    additions = ("strong",)

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()
        self.ce = CETerm(config, student, teacher)

    @property
    def unlabelled(self) -> bool:
        """Whether labels may be -1."""
        return self.ce.unlabelled

    @unlabelled.setter
    def unlabelled(self, value: bool) -> None:
        self.ce.unlabelled = value

    @property
    def spans_ranks(self) -> bool:
        """As for cross-entropy of the usual view."""
        return self.ce.spans_ranks

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, strong: ModelOutput
    ) -> dict[str, Tensor]:
        return {"ce_strong": self.ce(strong, None, labels)["ce"]}


TERMS: dict[str, TermBuilder] = {
    "dkd": DKDTerm,
    "lskd": LSKDTerm,
    "wsld": WSLDTerm,
    "ipwd": IPWDTerm,
    "ctkd": CTKDTerm,
    "dist": DISTTerm,
    "mlkd": MLKDTerm,
    "ce_strong": StrongCETerm,
}
