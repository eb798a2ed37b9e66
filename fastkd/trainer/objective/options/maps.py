"""The options of the classical methods that read feature maps. FSP has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fastkd.losses import (
    ABLoss,
    ATLoss,
    FTLoss,
    NORMLoss,
    OFDLoss,
    Paraphraser,
    ReviewKDLoss,
    SimKDLoss,
    SRRLLoss,
    VIDLoss,
)
from fastkd.trainer.objective.options.check import check_options
from fastkd.validate import check_choice, check_int, check_type


@dataclass(kw_only=True, frozen=True)
class FitNetConfig:
    """Which map ``fastkd.losses.FitNetLoss`` reads.

    Attributes:
        hint: the number of the map of both models. 0 is the stem, 1 the first stage, 2 the second, as in RepDistiller.

    Example:
        >>> config = ObjectiveConfig(terms="100*fitnet", fitnet=FitNetConfig(hint=3))
    """

    hint: int = 2

    def __post_init__(self) -> None:
        check_int("fitnet.hint", self.hint, 0)


@dataclass(kw_only=True, frozen=True)
class ATConfig:
    """The options of ``fastkd.losses.ATLoss``: see there.

    Attributes:
        power: of the entries of the maps.
        reading: the authors' code, or eq. 2 of the paper.

    Example:
        >>> config = ObjectiveConfig(terms="1000*at", at=ATConfig(power=2))
    """

    power: int = 2
    reading: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        check_options("at", self, ATLoss)


@dataclass(kw_only=True, frozen=True)
class NSTConfig:
    """Which maps ``fastkd.losses.NSTLoss`` reads.

    Attributes:
        maps: all of them, as in RepDistiller, or the last one alone, as in the authors' code.

    Example:
        >>> config = ObjectiveConfig(terms="50*nst", nst=NSTConfig(maps="last"))
    """

    maps: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        check_choice("nst.maps", self.maps, ("all", "last"))


@dataclass(kw_only=True, frozen=True)
class VIDConfig:
    """The options of ``fastkd.losses.VIDLoss``: see there.

    Attributes:
        initial_variance: the variance of every channel at first.
        eps: the smallest variance.

    Example:
        >>> config = ObjectiveConfig(terms="vid", vid=VIDConfig(initial_variance=1.0))
    """

    initial_variance: float = 5.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_options("vid", self, VIDLoss, [1], [1])


@dataclass(kw_only=True, frozen=True)
class ABConfig:
    """The options of ``fastkd.losses.ABLoss``: see there. It is a stage of its own: ``terms="0*ce + ab"``.

    Attributes:
        margin: of the hinge.

    Example:
        >>> config = ObjectiveConfig(terms="0*ce + ab", ab=ABConfig(margin=2.0))
    """

    margin: float = 1.0

    def __post_init__(self) -> None:
        check_options("ab", self, ABLoss, [(1, 1, 1)], [(1, 1, 1)])


@dataclass(kw_only=True, frozen=True)
class ParaphraserConfig:
    """The options of ``fastkd.losses.Paraphraser``, the first stage of FT: ``terms="0*ce + paraphraser"``.

    Attributes:
        rate: channels of the factor, as a part of the teacher's.
        distance: the reconstruction's: RepDistiller's and the paper's, or the authors' code's.

    Example:
        >>> config = ObjectiveConfig(terms="0*ce + paraphraser", paraphraser=ParaphraserConfig(distance="l1"))
    """

    rate: float = 0.5
    distance: Literal["mse", "l1"] = "mse"

    def __post_init__(self) -> None:
        check_options("paraphraser", self, Paraphraser, 1)


@dataclass(kw_only=True, frozen=True)
class FTConfig:
    """The options of ``fastkd.losses.FTLoss``: see there.

    Attributes:
        reading: attention of factors (RepDistiller's, weight 200), or factors (the paper's, weight 500).
        rate: of the paraphraser.
        paraphraser: the run that trained it (``terms="0*ce + paraphraser"``), its checkpoint, or a file with the
            weights of a ``fastkd.losses.Paraphraser``. A new run needs it.

    Example:
        >>> config = ObjectiveConfig(terms="200*ft", ft=FTConfig(paraphraser="runs/paraphraser"))
    """

    reading: Literal["attention", "factors"] = "attention"
    rate: float = 0.5
    paraphraser: str | None = None

    def __post_init__(self) -> None:
        if self.paraphraser is not None:
            check_type("ft.paraphraser", self.paraphraser, str)
        check_options("ft", self, _ft)


def _ft(reading: Literal["attention", "factors"], rate: float, paraphraser: str | None) -> FTLoss:
    return FTLoss(1, Paraphraser(1, rate), reading)


@dataclass(kw_only=True, frozen=True)
class OFDConfig:
    """The options of ``fastkd.losses.OFDLoss``: see there.

    Attributes:
        scale: 1e-3 for small images, 1e-4 on ImageNet.

    Example:
        >>> config = ObjectiveConfig(terms="ofd", ofd=OFDConfig(scale=1e-4))
    """

    scale: float = 1e-3

    def __post_init__(self) -> None:
        check_options("ofd", self, OFDLoss, [1], [torch.zeros(1)])


@dataclass(kw_only=True, frozen=True)
class ReviewKDConfig:
    """The options of ``fastkd.losses.ReviewKDLoss``, and its warm-up.

    Attributes:
        width: of the joined maps. None for the width of the student's features, at most 512.
        warmup_epochs: the weight is multiplied by ``min(epoch / warmup_epochs, 1)``. 0 leaves the warm-up out.
        first_epoch: from which number epochs are counted there: 0 in the authors' code, 1 in mdistiller.

    Example:
        >>> config = ObjectiveConfig(terms="5*reviewkd", reviewkd=ReviewKDConfig(first_epoch=1))
    """

    width: int | None = None
    warmup_epochs: int = 20
    first_epoch: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        check_int("reviewkd.warmup_epochs", self.warmup_epochs, 0)
        check_int("reviewkd.first_epoch", self.first_epoch, 0)
        if self.first_epoch not in (0, 1):
            raise ValueError(f"reviewkd.first_epoch: got {self.first_epoch}, expected 0 or 1")
        if self.width is not None:
            check_options("reviewkd", self, _review)


def _review(width: int, **_: int) -> ReviewKDLoss:
    return ReviewKDLoss([1], [1], width)


@dataclass(kw_only=True, frozen=True)
class SimKDConfig:
    """The options of ``fastkd.losses.SimKDLoss``: see there. It is trained alone: ``terms="0*ce + simkd"``.

    Attributes:
        factor: the projector's inner width is the teacher's divided by it.

    Example:
        >>> config = ObjectiveConfig(terms="0*ce + simkd", simkd=SimKDConfig(factor=4))
    """

    factor: int = 2

    def __post_init__(self) -> None:
        check_options("simkd", self, SimKDLoss, 1, 10**6)


@dataclass(kw_only=True, frozen=True)
class SRRLConfig:
    """The options of ``fastkd.losses.SRRLLoss``: see there.

    Attributes:
        reading: pooled features, as in the code behind the CIFAR-100 tables, or the last maps, as the authors'.

    Example:
        >>> config = ObjectiveConfig(terms="kd + srrl", srrl=SRRLConfig(reading="maps"))
    """

    reading: Literal["pooled", "maps"] = "pooled"

    def __post_init__(self) -> None:
        check_options("srrl", self, SRRLLoss, 1, 1)


@dataclass(kw_only=True, frozen=True)
class NORMConfig:
    """The options of ``fastkd.losses.NORMLoss``: see there.

    Attributes:
        repeats: how many copies of the teacher's map the student's widened map is compared with.

    Example:
        >>> config = ObjectiveConfig(terms="kd + norm", norm=NORMConfig(repeats=4))
    """

    repeats: int = 8

    def __post_init__(self) -> None:
        check_options("norm", self, NORMLoss)
