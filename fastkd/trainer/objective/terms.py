"""The terms of the objective: their options, and the losses as modules that read what student and teacher give.

A term is called as ``term(student: ModelOutput, teacher: ModelOutput | None, labels)`` and returns named scalars before
weights. These attributes, of its class or of a user's module or function, say more about it; all may be left out:

    needs_teacher, needs_features   whether it reads them; True by default
    needs_maps                      whether it reads the last feature maps; False by default
    spans_ranks                     whether it returns this rank's part of a loss over the global batch, which contains
                                    the weight W n / N; by default False, and the objective multiplies by it

and these methods: ``set_epoch(epoch)`` is called before every epoch; ``scalars()`` gives further values to log;
``columns_sent(classes)`` says how many numbers per row go to the other ranks, for the memory estimate; ``fuses_with``
and ``fused`` make a pair of terms one computation, see ``KDTerm``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.functional.kd import ce_kd_terms
from fastkd.losses import CKDLoss, DCDLoss, KDLoss, MSDCRDLoss, PCKDLoss
from fastkd.numerics import accumulation_dtype
from fastkd.trainer.models.features import ModelOutput, ModelShapes
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.validate import check_labels

# Where cross-entropy and KD together are one read of the logits; on a CPU torch's own cross-entropy is as fast.
ONE_READ_DEVICES = {"cuda"}

TermFunction = Callable[[ModelOutput, ModelOutput | None, Tensor], Mapping[str, Tensor]]


class CETerm(nn.Module):
    """Cross-entropy of the student's logits with the labels, the mean over the batch."""

    needs_teacher = False
    needs_features = False

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()
        self.label_smoothing = config.ce.label_smoothing

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        if labels.ndim == 1:  # not class probabilities
            check_labels(labels, student.logits)
        logits = student.logits.to(accumulation_dtype(student.logits.dtype))
        return {"ce": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}


class KDTerm(nn.Module):
    """``KDLoss`` on the logits. With cross-entropy beside it, both are computed in one read of the logits on a GPU."""

    needs_features = False
    fuses_with = CETerm

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()
        self.loss = KDLoss(config.kd.temperature)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        assert teacher is not None
        return self.loss(*one_dtype(student.logits, teacher.logits))

    def fused(
        self, ce: CETerm, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """This term's values and those of ``ce``; None where they must be computed one by one, or that is as fast."""
        if student.logits.device.type not in ONE_READ_DEVICES or labels.ndim != 1:  # class probabilities
            return None
        assert teacher is not None
        logits = one_dtype(student.logits, teacher.logits)
        ce_value, kd_value = ce_kd_terms(*logits, labels, self.loss.temperature, label_smoothing=ce.label_smoothing)
        return {"kd": kd_value}, {"ce": ce_value}


class DCDTerm(nn.Module):
    """``DCDLoss`` on the penultimate features; owns both projection heads and tau."""

    spans_ranks = True

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()
        self.loss = DCDLoss(student.features, teacher.features, **asdict(config.dcd))

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        assert teacher is not None
        dtype = self.loss.student_head.weight.dtype
        return self.loss(_for_linear(student.features, dtype), _for_linear(teacher.features, dtype))

    def scalars(self) -> dict[str, Tensor]:
        """What is logged beside the loss: tau and the logit scale."""
        return {"tau": self.loss.tau.detach(), "scale": torch.as_tensor(self.loss.logit_scale()).detach()}

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks: two embeddings."""
        return 2 * self.loss.student_head.out_features


class CKDTerm(nn.Module):
    """``CKDLoss`` on the logits."""

    needs_features = False
    spans_ranks = True

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()
        self.loss = CKDLoss(config.ckd.temperature)

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks: both models' logits."""
        return 2 * classes

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        assert teacher is not None
        return self.loss(*one_dtype(student.logits, teacher.logits))


class PCKDTerm(nn.Module):
    """``PCKDLoss`` on features, logits and both classifier layers; owns its heads. Its preview follows the epoch."""

    spans_ranks = True

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()
        self.loss = PCKDLoss(student.features, teacher.features, **asdict(config.pckd))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the loop before every epoch, counted from 0."""
        self.epoch = epoch

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks: two relations."""
        return 2 * classes

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        assert teacher is not None
        dtype = next((parameter.dtype for parameter in self.parameters()), student.features.dtype)
        return self.loss(
            _for_linear(student.features, dtype),
            _for_linear(teacher.features, dtype),
            *one_dtype(student.logits, teacher.logits),
            labels,
            _as_linear(student.classifier),
            _as_linear(teacher.classifier),
            self.epoch,
        )


class MSDCRDTerm(nn.Module):
    """``MSDCRDLoss`` on the last feature maps; owns the convolution from the student's channels to the teacher's.

    Raises ValueError for a teacher that does not classify single positions of its map.
    """

    needs_maps = True
    spans_ranks = True

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()
        own, other = student.feature_map, teacher.feature_map
        assert own is not None
        assert other is not None
        if other.tail is None:
            raise ValueError(
                f"msdcrd: the teacher's layers after {other.layer!r} do not classify single positions of its map, "
                "expected a map that is averaged and then classified; for another one, ModelConfig(feature_map='...')"
            )
        self.loss = MSDCRDLoss(
            own.channels,
            other.channels,
            student_prefix_tokens=own.prefix_tokens,
            teacher_prefix_tokens=other.prefix_tokens,
            **asdict(config.msdcrd),
        )

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        assert teacher is not None
        assert student.feature_map is not None
        assert teacher.feature_map is not None
        dtype = next((parameter.dtype for parameter in self.parameters()), student.feature_map.dtype)
        return self.loss(
            _for_linear(student.feature_map, dtype), _for_linear(teacher.feature_map, dtype), teacher.map_classifier
        )


class CallableTerm(nn.Module):
    """A user's plain function as a term."""

    def __init__(self, function: TermFunction) -> None:
        super().__init__()
        self.function = function
        self.needs_teacher = getattr(function, "needs_teacher", True)
        self.spans_ranks = getattr(function, "spans_ranks", False)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> Mapping[str, Tensor]:
        return self.function(student, teacher, labels)


TermBuilder = Callable[["ObjectiveConfig", ModelShapes, ModelShapes], nn.Module]

# name -> (config, shapes of the student, of the teacher) -> term; without a teacher both are the student's.
TERMS: dict[str, TermBuilder] = {
    "ce": CETerm,
    "kd": KDTerm,
    "dcd": DCDTerm,
    "ckd": CKDTerm,
    "pckd": PCKDTerm,
    "msdcrd": MSDCRDTerm,
}


def one_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are when their dtypes agree, else both in float32."""
    return (student, teacher) if student.dtype == teacher.dtype else (student.float(), teacher.float())


def _for_linear(features: Tensor, dtype: torch.dtype) -> Tensor:
    """``features`` for a linear layer of ``dtype``; autocast converts by itself, all but float64."""
    if torch.is_autocast_enabled(features.device.type) and features.dtype != torch.float64:
        return features
    return features.to(dtype)


def _as_linear(classifier: nn.Module | None) -> Any:
    """A classifier that is a 1x1 convolution as the pair (weight, bias); others as they are."""
    if isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1) and classifier.groups == 1:
        return classifier.weight.flatten(1), classifier.bias
    return classifier
