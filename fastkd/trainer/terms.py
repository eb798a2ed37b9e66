"""The terms of the objective: their options, and the losses as modules that read what student and teacher give.

A term is called as ``term(student: ModelOutput, teacher: ModelOutput | None, labels)`` and returns named scalars before
weights. What it needs is said by attributes, of its class or of a user's module or function: ``needs_teacher`` and
``needs_features`` (True unless given), ``needs_maps`` (False unless given), and ``spans_ranks`` (False unless given):
its values contain the scaling by W n / N of a loss over the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.backends.reference import accumulation_dtype
from fastkd.losses import CKDLoss, DCDLoss, KDLoss, MSDCRDLoss, PCKDLoss
from fastkd.trainer.models import ModelOutput, ModelShapes
from fastkd.validate import check_choice, check_int, check_labels, check_number, check_type

if TYPE_CHECKING:
    from fastkd.trainer.objective import ObjectiveConfig

TermFunction = Callable[[ModelOutput, ModelOutput | None, Tensor], Mapping[str, Tensor]]


@dataclass(kw_only=True, frozen=True)
class CEConfig:
    """Cross-entropy with the labels."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_number("ce.label_smoothing", self.label_smoothing, 0.0, 1.0)


@dataclass(kw_only=True, frozen=True)
class KDConfig:
    """``fastkd.losses.KDLoss``: Hinton's loss at this temperature."""

    temperature: float = 4.0

    def __post_init__(self) -> None:
        check_number("kd.temperature", self.temperature, 0.0, exclusive=True)


@dataclass(kw_only=True, frozen=True)
class DCDConfig:
    """``fastkd.losses.DCDLoss``: see there."""

    embed_dim: int = 128
    alpha: float = 0.5
    consistency: Literal["student||teacher", "teacher||student"] = "student||teacher"
    max_scale: float | None = 10.0
    min_scale: float | None = None
    learnable: bool = True
    temperature: float = 0.07

    def __post_init__(self) -> None:
        check_int("dcd.embed_dim", self.embed_dim, 1)
        check_number("dcd.alpha", self.alpha, 0.0)
        check_choice("dcd.consistency", self.consistency, ("student||teacher", "teacher||student"))
        for name, bound in (("dcd.max_scale", self.max_scale), ("dcd.min_scale", self.min_scale)):
            if bound is not None:
                check_number(name, bound, 0.0, exclusive=True)
        check_type("dcd.learnable", self.learnable, bool)
        check_number("dcd.temperature", self.temperature, 0.0, exclusive=True)


@dataclass(kw_only=True, frozen=True)
class CKDConfig:
    """``fastkd.losses.CKDLoss``: see there."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("ckd.temperature", self.temperature, 0.0, exclusive=True)


@dataclass(kw_only=True, frozen=True)
class PCKDConfig:
    """``fastkd.losses.PCKDLoss``: see there. It contains KD; ``kd_weight=0`` leaves that out."""

    temperature: float = 4.0
    relation_scale: float = 0.25
    category_weight: float = 1.0
    center_weight: float = 1.0
    feature_weight: float = 1.0
    kd_weight: float = 1.0
    preview_base: float = 1.005
    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "relation_scale", "preview_base"):
            check_number(f"pckd.{name}", getattr(self, name), 0.0, exclusive=True)
        for name in ("category_weight", "center_weight", "feature_weight", "kd_weight"):
            check_number(f"pckd.{name}", getattr(self, name), 0.0)
        if self.hidden_dim is not None:
            check_int("pckd.hidden_dim", self.hidden_dim, 1)


@dataclass(kw_only=True, frozen=True)
class MSDCRDConfig:
    """``fastkd.losses.MSDCRDLoss``: see there. ``windows=None`` are three scales of the teacher's map."""

    windows: tuple[int | None, ...] | None = None
    strides: tuple[int, ...] | None = None
    temperature: float = 0.1
    positives: Literal["index", "label"] = "index"
    sample_weight: float = 1.0
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("msdcrd.temperature", self.temperature, 0.0, exclusive=True)
        check_choice("msdcrd.positives", self.positives, ("index", "label"))
        for name in ("sample_weight", "feature_weight"):
            check_number(f"msdcrd.{name}", getattr(self, name), 0.0)
        for name in ("windows", "strides"):
            check_type(f"msdcrd.{name}", getattr(self, name), (tuple, list, type(None)))
            for side in getattr(self, name) or ():
                if side is not None:
                    check_int(f"msdcrd.{name}", side, 1)


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
    """``KDLoss`` on the logits."""

    needs_features = False

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()
        self.loss = KDLoss(config.kd.temperature)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        assert teacher is not None
        return self.loss(*one_dtype(student.logits, teacher.logits))


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


class CKDTerm(nn.Module):
    """``CKDLoss`` on the logits."""

    needs_features = False
    spans_ranks = True

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()
        self.loss = CKDLoss(config.ckd.temperature)

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
