"""The terms of cross-entropy, KD, and the methods whose losses are fused operations: DCD, CKD, PCKD, MSDCRD."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.distributed.agree import agreeing
from fastkd.distributed.group import resolve_group
from fastkd.functional.kd import ce_kd_terms
from fastkd.losses import CKDLoss, DCDLoss, KDLoss, MSDCRDLoss, PCKDLoss
from fastkd.numerics import accumulation_dtype
from fastkd.trainer.models.features import ModelOutput, ModelShapes
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.options.check import loss_options
from fastkd.trainer.objective.terms.base import LossTerm, RelationalTerm, TermBuilder, as_linear, one_dtype
from fastkd.validate import NO_LABEL, check_labels

# Where cross-entropy and KD together are one read of the logits; on a CPU torch's own cross-entropy is as fast.
ONE_READ_DEVICES = {"cuda"}


class CETerm(nn.Module):
    """Cross-entropy of the student's logits with the labels, the mean over the batch.

    With ``unlabelled`` it is the mean over the labelled rows of the global batch, and zero if there are none.
    """

    needs_teacher = False
    needs_features = False
    needs_classes = True
    unlabelled = False

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()
        self.label_smoothing = config.ce.label_smoothing

    @property
    def spans_ranks(self) -> bool:
        """The number of labelled rows is known to no rank alone, so that the mean is taken over the ranks here."""
        return self.unlabelled

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        if labels.ndim == 1:  # not class probabilities
            check_labels(labels, student.logits, unlabelled=self.unlabelled)
        logits = student.logits.to(accumulation_dtype(student.logits.dtype))
        if self.unlabelled:
            options: Any = {"ignore_index": NO_LABEL, "label_smoothing": self.label_smoothing, "reduction": "sum"}
            ranks = agreeing(resolve_group(None), "ce")
            return {"ce": ranks.mean_over(F.cross_entropy(logits, labels, **options), (labels != NO_LABEL).sum())}
        return {"ce": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}


class KDTerm(LossTerm):
    """``KDLoss`` on the logits. With cross-entropy beside it, both are computed in one read of the logits on a GPU."""

    needs_features = False
    fuses_with = CETerm

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> KDLoss:
        return KDLoss(config.kd.temperature)

    def fused(
        self, ce: CETerm, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """The values of this term and the values of ``ce``, from one read of the logits.

        None where the two must be computed one after the other, or where one read is no faster.
        """
        if student.logits.device.type not in ONE_READ_DEVICES or labels.ndim != 1 or ce.unlabelled:
            return None  # class probabilities have ndim 2
        assert teacher is not None
        logits = one_dtype(student.logits, teacher.logits)
        ce_value, kd_value = ce_kd_terms(*logits, labels, self.loss.temperature, label_smoothing=ce.label_smoothing)
        return {"kd": kd_value}, {"ce": ce_value}


class CKDTerm(RelationalTerm):
    """``CKDLoss`` on the logits."""

    needs_features = False

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> CKDLoss:
        return CKDLoss(**loss_options(config.ckd, CKDLoss))

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks: both models' logits."""
        return 2 * classes


class DCDTerm(RelationalTerm):
    """``DCDLoss`` on the penultimate features; owns both projection heads and tau."""

    needs_classes = False

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> DCDLoss:
        return DCDLoss(student.features, teacher.features, **loss_options(config.dcd, DCDLoss))

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        return self.for_layers(student.features, teacher.features)

    def scalars(self) -> dict[str, Tensor]:
        """What is logged beside the loss: tau and the logit scale."""
        return {"tau": self.loss.bounded_tau().detach(), "scale": self.loss.logit_scale().detach()}

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks: two embeddings."""
        return 2 * self.loss.student_head.out_features


class PCKDTerm(RelationalTerm):
    """``PCKDLoss`` on features, logits and both classifier layers; owns its heads. Its preview follows the epoch."""

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> PCKDLoss:
        return PCKDLoss(student.features, teacher.features, **loss_options(config.pckd, PCKDLoss))

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        return (
            *self.for_layers(student.features, teacher.features),
            *one_dtype(student.logits, teacher.logits),
            labels,
            as_linear(student.classifier),
            as_linear(teacher.classifier),
            self.epoch,
        )

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks: two relations."""
        return 2 * classes


class MSDCRDTerm(RelationalTerm):
    """``MSDCRDLoss`` on the last feature maps; owns the convolution from the student's channels to the teacher's.

    Raises ValueError for a teacher that does not classify single positions of its map.
    """

    needs_maps = True

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> MSDCRDLoss:
        own, other = student.feature_map, teacher.feature_map
        assert own is not None
        assert other is not None
        if other.tail is None:
            raise ValueError(
                f"msdcrd: the teacher's layers after {other.layer!r} do not classify single positions of its map, "
                "expected a map that is averaged and then classified; for another one, ModelConfig(feature_map='...')"
            )
        prefixes: dict[str, Any] = {
            "student_prefix_tokens": own.prefix_tokens,
            "teacher_prefix_tokens": other.prefix_tokens,
        }
        return MSDCRDLoss(own.channels, other.channels, **prefixes, **loss_options(config.msdcrd, MSDCRDLoss))

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        assert student.feature_map is not None
        assert teacher.feature_map is not None
        return (*self.for_layers(student.feature_map, teacher.feature_map), teacher.map_classifier, labels)


TERMS: dict[str, TermBuilder] = {
    "ce": CETerm,
    "kd": KDTerm,
    "dcd": DCDTerm,
    "ckd": CKDTerm,
    "pckd": PCKDTerm,
    "msdcrd": MSDCRDTerm,
}
