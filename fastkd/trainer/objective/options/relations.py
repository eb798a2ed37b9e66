"""The options of the classical methods that compare relations between samples. Their defaults are the papers'."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fastkd.losses import CCLoss, CRDLoss, InfoNCELoss, PKTLoss, RKDLoss, SPLoss
from fastkd.trainer.objective.options.check import GroupName, check_options
from fastkd.validate import check_choice, check_int


@dataclass(kw_only=True, frozen=True)
class CCConfig:
    """The options of ``fastkd.losses.CCLoss``: see there.

    Attributes:
        embedding_dim: width of the embeddings. None compares the features themselves, of equal widths.
        reading: of the code that published tables come from, of the paper, or of torchdistill.
        gamma: of the kernels.
        order: of the kernels.
        group: compare the samples of all ranks, or those of each rank alone.

    Example:
        >>> config = ObjectiveConfig(terms="ce + 100*cc", cc=CCConfig(reading="kernel"))
    """

    embedding_dim: int | None = 128
    reading: Literal["neighbours", "kernel", "kernel-raw"] = "neighbours"
    gamma: float = 0.4
    order: int = 2
    group: GroupName = "global"

    def __post_init__(self) -> None:
        check_options("cc", self, CCLoss, 1, 1)


@dataclass(kw_only=True, frozen=True)
class RKDConfig:
    """The options of ``fastkd.losses.RKDLoss``: see there.

    Attributes:
        distance_weight: weight of the distances of pairs.
        angle_weight: weight of the angles of triplets.
        group: compare the samples of all ranks, or those of each rank alone.

    Example:
        >>> config = ObjectiveConfig(terms="ce + rkd", rkd=RKDConfig(angle_weight=0.0))
    """

    distance_weight: float = 25.0
    angle_weight: float = 50.0
    group: GroupName = "global"

    def __post_init__(self) -> None:
        check_options("rkd", self, RKDLoss)


@dataclass(kw_only=True, frozen=True)
class PKTConfig:
    """The options of ``fastkd.losses.PKTLoss``: see there.

    Attributes:
        reduction: the mean over all pairs of the public code, or the sum of the paper.
        group: compare the samples of all ranks, or those of each rank alone.

    Example:
        >>> config = ObjectiveConfig(terms="ce + 30000*pkt", pkt=PKTConfig(group="local"))
    """

    reduction: Literal["mean", "sum"] = "mean"
    group: GroupName = "global"

    def __post_init__(self) -> None:
        check_options("pkt", self, PKTLoss)


@dataclass(kw_only=True, frozen=True)
class SPConfig:
    """The options of ``fastkd.losses.SPLoss``: see there.

    Attributes:
        group: compare the samples of all ranks, or those of each rank alone.

    Example:
        >>> config = ObjectiveConfig(terms="ce + 3000*sp", sp=SPConfig(group="local"))
    """

    group: GroupName = "global"

    def __post_init__(self) -> None:
        check_options("sp", self, SPLoss)


@dataclass(kw_only=True, frozen=True)
class InfoNCEConfig:
    """The options of the term ``info_nce``: ``fastkd.losses.InfoNCELoss`` between linear embeddings of both features.

    Attributes:
        embedding_dim: width of the embeddings. None compares the features themselves, of equal widths, so that the
            student learns to give what the teacher gives.
        temperature: divides the cosines.
        group: the negatives are the samples of all ranks, or those of each rank alone.

    Example:
        >>> config = ObjectiveConfig(terms="ce + 0.8*info_nce", info_nce=InfoNCEConfig(temperature=0.1))
    """

    embedding_dim: int | None = 128
    temperature: float = 0.07
    group: GroupName = "global"

    def __post_init__(self) -> None:
        check_options("info_nce", self, InfoNCELoss)
        if self.embedding_dim is not None:
            check_int("info_nce.embedding_dim", self.embedding_dim, 1)


@dataclass(kw_only=True, frozen=True)
class CRDConfig:
    """The options of ``fastkd.losses.CRDLoss`` and of ``fastkd.losses.CRDIndices``: see there.

    Attributes:
        negatives: so many other samples of the data set are contrasted with each sample.
        mode: the positive is the sample itself, or a random sample of its class.
        embedding_dim: width of the embeddings.
        temperature: divides the products.
        momentum: of the memories.
        reading: of the authors' code, or of the paper.
        samples: the size of the training set. The trainer sets it; an own loop has to.

    Example:
        >>> config = ObjectiveConfig(terms="ce + 0.8*crd", crd=CRDConfig(negatives=4096))
    """

    negatives: int = 16384
    mode: Literal["exact", "relax"] = "exact"
    embedding_dim: int = 128
    temperature: float = 0.07
    momentum: float = 0.5
    reading: Literal["code", "paper"] = "code"
    samples: int | None = None

    def __post_init__(self) -> None:
        check_choice("crd.mode", self.mode, ("exact", "relax"))
        if self.samples is None:
            replace(self, samples=2)  # which checks the others
        else:
            check_options("crd", self, CRDLoss, 1, 1)
