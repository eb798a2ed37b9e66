"""The options of the classical methods that read logits. Their defaults are the papers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastkd.losses import CTKDLoss, DISTLoss, DKDLoss, IPWDLoss, KDLoss, MLKDLoss, WSLDLoss
from fastkd.trainer.objective.options.check import GroupName, check_options
from fastkd.validate import check_choice, check_int, check_type


@dataclass(kw_only=True, frozen=True)
class DKDConfig:
    """The options of ``fastkd.losses.DKDLoss``: see there.

    Attributes:
        temperature: divides the logits.
        alpha: weight of the divergence of the label's probability.
        beta: weight of the divergence of the other classes.
        warmup_epochs: the weight is multiplied by ``min(epoch / warmup_epochs, 1)``, epochs counted from 1. 0 leaves
            the warm-up out.

    Example:
        >>> config = ObjectiveConfig(terms="ce + dkd", dkd=DKDConfig(beta=2.0))
    """

    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0
    warmup_epochs: int = 20

    def __post_init__(self) -> None:
        check_int("dkd.warmup_epochs", self.warmup_epochs, 0)
        check_options("dkd", self, DKDLoss)


@dataclass(kw_only=True, frozen=True)
class DISTConfig:
    """The options of ``fastkd.losses.DISTLoss``: see there.

    Attributes:
        temperature: divides the logits. The authors have 4 on CIFAR-100 and 1 on ImageNet.
        beta: weight of the correlations of samples.
        gamma: weight of the correlations of classes.
        group: compare the samples of all ranks, or those of each rank alone.

    Example:
        >>> config = ObjectiveConfig(terms="ce + 2*dist", dist=DISTConfig(temperature=4.0))
    """

    temperature: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    group: GroupName = "global"

    def __post_init__(self) -> None:
        check_options("dist", self, DISTLoss)


@dataclass(kw_only=True, frozen=True)
class LSKDConfig:
    """The options of ``fastkd.losses.LSKDLoss``: KD or DKD of logits that are standardised.

    Attributes:
        loss: what reads the standardised logits.
        temperature: divides them.
        alpha: of DKD.
        beta: of DKD.
        warmup_epochs: of DKD.

    Example:
        >>> config = ObjectiveConfig(terms="ce + 9*lskd", lskd=LSKDConfig(loss="dkd"))
    """

    loss: Literal["kd", "dkd"] = "kd"
    temperature: float = 2.0
    alpha: float = 1.0
    beta: float = 8.0
    warmup_epochs: int = 20

    def __post_init__(self) -> None:
        check_choice("lskd.loss", self.loss, ("kd", "dkd"))
        check_int("lskd.warmup_epochs", self.warmup_epochs, 0)
        check_options("lskd", self, KDLoss if self.loss == "kd" else DKDLoss)


@dataclass(kw_only=True, frozen=True)
class WSLDConfig:
    """The options of ``fastkd.losses.WSLDLoss``: see there.

    Attributes:
        temperature: divides the logits. The authors have 4 on CIFAR-100 and 2 on ImageNet.

    Example:
        >>> config = ObjectiveConfig(terms="ce + 2.5*wsld", wsld=WSLDConfig(temperature=2.0))
    """

    temperature: float = 4.0

    def __post_init__(self) -> None:
        check_options("wsld", self, WSLDLoss)


@dataclass(kw_only=True, frozen=True)
class CTKDConfig:
    """The options of ``fastkd.losses.CTKDLoss``, whose temperature is trained with the student: see there.

    Attributes:
        start: the smallest temperature.
        span: the largest temperature is ``start + span``.
        epochs: after so many epochs the temperature ascends the loss in full. The authors have 10, and 5 on ImageNet.

    Example:
        >>> config = ObjectiveConfig(terms="0.1*ce + 0.9*ctkd", ctkd=CTKDConfig(epochs=5))
    """

    start: float = 1.0
    span: float = 20.0
    epochs: int = 10

    def __post_init__(self) -> None:
        check_options("ctkd", self, CTKDLoss)


@dataclass(kw_only=True, frozen=True)
class MLKDConfig:
    """The options of ``fastkd.losses.MLKDLoss``: see there. It reads a second, strong view of every image.

    The cross-entropy of that view is the term ``ce_strong``.

    Attributes:
        temperatures: divide the logits.
        reading: the sum that the public code computes, or the sum that the paper means.
        group: compare the samples of all ranks, or those of each rank alone.

    Example:
        >>> config = ObjectiveConfig(terms="0.1*ce + 0.1*ce_strong + 0.9*mlkd", mlkd=MLKDConfig(reading="paper"))
    """

    temperatures: tuple[float, ...] = (4.0, 3.0, 5.0, 2.0, 6.0)
    reading: Literal["code", "paper"] = "code"
    group: GroupName = "global"

    def __post_init__(self) -> None:
        check_options("mlkd", self, MLKDLoss)


@dataclass(kw_only=True, frozen=True)
class IPWDConfig:
    """The options of ``fastkd.losses.IPWDLoss``, our reading of the paper: see there.

    The term has a second classifier on the student's features, which cross-entropy alone trains.

    Attributes:
        temperature: divides the logits.
        ratio: which cross-entropy stands above the other in the weight of a sample.
        train_backbone: whether the second classifier's cross-entropy also trains the student below it.

    Example:
        >>> config = ObjectiveConfig(terms="ce + ipwd", ipwd=IPWDConfig(ratio="class/kd"))
    """

    temperature: float = 4.0
    ratio: Literal["kd/class", "class/kd"] = "kd/class"
    train_backbone: bool = True

    def __post_init__(self) -> None:
        check_type("ipwd.train_backbone", self.train_backbone, bool)
        check_options("ipwd", self, IPWDLoss)
