"""The options of cross-entropy, KD, DCD, CKD, PCKD and MSDCRD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastkd.losses import CKDLoss, DCDLoss, KDLoss, MSDCRDLoss, PCKDLoss
from fastkd.trainer.objective.options.check import GroupName, check_options
from fastkd.validate import check_number


@dataclass(kw_only=True, frozen=True)
class CEConfig:
    """Cross-entropy with the labels.

    Attributes:
        label_smoothing: this share of a label is spread over all classes.

    Example:
        >>> config = ObjectiveConfig(terms="ce", ce=CEConfig(label_smoothing=0.1))
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_number("ce.label_smoothing", self.label_smoothing, 0.0, 1.0)


@dataclass(kw_only=True, frozen=True)
class KDConfig:
    """The options of ``fastkd.losses.KDLoss``: Hinton's loss at this temperature.

    Attributes:
        temperature: divides the logits.

    Example:
        >>> config = ObjectiveConfig(terms="0.5*kd", kd=KDConfig(temperature=2.0))
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        check_options("kd", self, KDLoss)


@dataclass(kw_only=True, frozen=True)
class DCDConfig:
    """The options of ``fastkd.losses.DCDLoss``: see there.

    Attributes:
        embed_dim: width of the shared space of student and teacher.
        alpha: weight of the consistency term.
        consistency: the direction of its KL divergence. The first is the paper's, the other the authors' code's.
        max_scale: upper bound of the logit scale. None sets no bound.
        min_scale: lower bound of the logit scale.
        learnable: train the logit scale. If not, it stays at ``1 / temperature``.
        temperature: fixes the scale where it is not learnt, and is unused otherwise.
        group: contrast the samples of all ranks, or those of each rank alone.

    Example:
        >>> config = ObjectiveConfig(terms="dcd", dcd=DCDConfig(embed_dim=64, max_scale=20.0))
    """

    embed_dim: int = 128
    alpha: float = 0.5
    consistency: Literal["student||teacher", "teacher||student"] = "student||teacher"
    max_scale: float | None = 10.0
    min_scale: float | None = None
    learnable: bool = True
    temperature: float = 0.07
    group: GroupName = "global"

    def __post_init__(self) -> None:
        check_options("dcd", self, DCDLoss, 1, 1)


@dataclass(kw_only=True, frozen=True)
class CKDConfig:
    """The options of ``fastkd.losses.CKDLoss``: see there.

    Attributes:
        temperature: divides the logits.
        group: contrast the samples of all ranks, or those of each rank alone.

    Example:
        >>> config = ObjectiveConfig(terms="ckd", ckd=CKDConfig(temperature=0.5))
    """

    temperature: float = 1.0
    group: GroupName = "global"

    def __post_init__(self) -> None:
        check_options("ckd", self, CKDLoss)


@dataclass(kw_only=True, frozen=True)
class PCKDConfig:
    """The options of ``fastkd.losses.PCKDLoss``: see there. It contains KD; ``kd_weight=0`` leaves KD out.

    Attributes:
        temperature: divides the logits of its KD.
        relation_scale: multiplies the products of relations.
        category_weight: weight of the contrast of relations.
        center_weight: weight of the alignment of class centres.
        feature_weight: weight of the alignment of features.
        kd_weight: weight of its KD.
        preview_base: the preview's threshold is this number to the power of the epoch.
        first_epoch: the number of the first epoch. The authors' code counts from 1.
        preview_gradient: let a gradient pass through the weights of its KD, as in the authors' code.
        category_eps: is added inside the logarithm of the contrast of relations. The authors' code has 1e-7.
        hidden_dim: width of the hidden layer of its heads. None chooses it.
        group: contrast the samples of all ranks, or those of each rank alone.

    Example:
        >>> config = ObjectiveConfig(terms="pckd", pckd=PCKDConfig(kd_weight=0.0))
    """

    temperature: float = 4.0
    relation_scale: float = 0.25
    category_weight: float = 1.0
    center_weight: float = 1.0
    feature_weight: float = 1.0
    kd_weight: float = 1.0
    preview_base: float = 1.005
    first_epoch: int = 0
    preview_gradient: bool = False
    category_eps: float = 0.0
    hidden_dim: int | None = None
    group: GroupName = "global"

    def __post_init__(self) -> None:
        check_options("pckd", self, PCKDLoss, 1, 1)


@dataclass(kw_only=True, frozen=True)
class MSDCRDConfig:
    """The options of ``fastkd.losses.MSDCRDLoss``: see there.

    Attributes:
        windows: the scales, each the side of a square window, or None for the whole map. None means three scales of
            the teacher's map.
        strides: the distance of the windows, per scale. None means half of the window.
        temperature: divides the cosines.
        positives: the teacher's features of the same sample, or of all samples of its label.
        selection: which local samples take part: all, those of a probability of ``confidence`` or more, those of the
            class that the teacher gives the image, those of the image's label, or one per class and image.
        confidence: the least probability of the teacher, with ``selection`` confident.
        sample_term_weight: weight of the contrast of samples.
        feature_weight: weight of the contrast of channels.
        group: contrast the samples of all ranks, or those of each rank alone.

    Example:
        >>> config = ObjectiveConfig(terms="msdcrd", msdcrd=MSDCRDConfig(windows=(1, 2), positives="label"))
    """

    windows: tuple[int | None, ...] | None = None
    strides: tuple[int, ...] | None = None
    temperature: float = 0.1
    positives: Literal["index", "label"] = "index"
    selection: Literal["all", "confident", "teacher_class", "image_class", "one_per_class"] = "all"
    confidence: float = 0.5
    sample_term_weight: float = 1.0
    feature_weight: float = 1.0
    group: GroupName = "global"

    def __post_init__(self) -> None:
        check_options("msdcrd", self, MSDCRDLoss, 1, 1)
