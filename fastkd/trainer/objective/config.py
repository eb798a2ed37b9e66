"""The settings of the objective: which terms, with which weights and options."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property

from fastkd.trainer.objective.options.fused import CEConfig, CKDConfig, DCDConfig, KDConfig, MSDCRDConfig, PCKDConfig
from fastkd.trainer.objective.options.logits import (
    CTKDConfig,
    DISTConfig,
    DKDConfig,
    IPWDConfig,
    LSKDConfig,
    MLKDConfig,
    WSLDConfig,
)
from fastkd.trainer.objective.options.maps import (
    ABConfig,
    ATConfig,
    FitNetConfig,
    FTConfig,
    NORMConfig,
    NSTConfig,
    OFDConfig,
    ParaphraserConfig,
    ReviewKDConfig,
    SimKDConfig,
    SRRLConfig,
    VIDConfig,
)
from fastkd.trainer.objective.options.relations import (
    CCConfig,
    CRDConfig,
    InfoNCEConfig,
    PKTConfig,
    RKDConfig,
    SPConfig,
)
from fastkd.validate import check_type


@dataclass(kw_only=True, frozen=True)
class ObjectiveConfig:
    """Which terms the loss is made of, with their weights and options.

    ``terms`` is a sum of names, each with a weight or without (1). Cross-entropy belongs to every objective: it is
    added with weight 1 unless written, and ``"0*ce + kd"`` leaves it out. ``"ce"`` alone trains from scratch::

        ObjectiveConfig(terms="dcd+kd")
        ObjectiveConfig(terms="0.5*kd + 2*dcd", kd=KDConfig(temperature=2.0))

    Attributes:
        terms: the sum, such as ``"0.5*kd + dcd"``, of the names below, ``ce_strong`` and terms of your own.
        ce: options of cross-entropy.
        kd: options of KD.
        dcd: options of DCD.
        ckd: options of CKD.
        pckd: options of PCKD.
        msdcrd: options of MSDCRD.
        dkd: options of DKD.
        dist: options of DIST.
        lskd: options of LSKD.
        wsld: options of WSLD.
        ctkd: options of CTKD.
        mlkd: options of MLKD.
        ipwd: options of IPWD.
        cc: options of CC.
        rkd: options of RKD.
        pkt: options of PKT.
        sp: options of SP.
        crd: options of CRD.
        info_nce: options of InfoNCE between the features of both.
        fitnet: options of FitNet.
        at: options of AT.
        nst: options of NST.
        vid: options of VID.
        ab: options of AB.
        paraphraser: options of the first stage of FT.
        ft: options of FT.
        ofd: options of OFD.
        reviewkd: options of ReviewKD.
        simkd: options of SimKD.
        srrl: options of SRRL.
        norm: options of NORM.
    """

    terms: str = "ce+kd+dcd"
    ce: CEConfig = field(default_factory=CEConfig)
    kd: KDConfig = field(default_factory=KDConfig)
    dcd: DCDConfig = field(default_factory=DCDConfig)
    ckd: CKDConfig = field(default_factory=CKDConfig)
    pckd: PCKDConfig = field(default_factory=PCKDConfig)
    msdcrd: MSDCRDConfig = field(default_factory=MSDCRDConfig)
    dkd: DKDConfig = field(default_factory=DKDConfig)
    dist: DISTConfig = field(default_factory=DISTConfig)
    lskd: LSKDConfig = field(default_factory=LSKDConfig)
    wsld: WSLDConfig = field(default_factory=WSLDConfig)
    ctkd: CTKDConfig = field(default_factory=CTKDConfig)
    mlkd: MLKDConfig = field(default_factory=MLKDConfig)
    ipwd: IPWDConfig = field(default_factory=IPWDConfig)
    cc: CCConfig = field(default_factory=CCConfig)
    rkd: RKDConfig = field(default_factory=RKDConfig)
    pkt: PKTConfig = field(default_factory=PKTConfig)
    sp: SPConfig = field(default_factory=SPConfig)
    crd: CRDConfig = field(default_factory=CRDConfig)
    info_nce: InfoNCEConfig = field(default_factory=InfoNCEConfig)
    fitnet: FitNetConfig = field(default_factory=FitNetConfig)
    at: ATConfig = field(default_factory=ATConfig)
    nst: NSTConfig = field(default_factory=NSTConfig)
    vid: VIDConfig = field(default_factory=VIDConfig)
    ab: ABConfig = field(default_factory=ABConfig)
    paraphraser: ParaphraserConfig = field(default_factory=ParaphraserConfig)
    ft: FTConfig = field(default_factory=FTConfig)
    ofd: OFDConfig = field(default_factory=OFDConfig)
    reviewkd: ReviewKDConfig = field(default_factory=ReviewKDConfig)
    simkd: SimKDConfig = field(default_factory=SimKDConfig)
    srrl: SRRLConfig = field(default_factory=SRRLConfig)
    norm: NORMConfig = field(default_factory=NORMConfig)

    def __post_init__(self) -> None:
        _ = self.weights
        for part in fields(self):
            if isinstance(part.default_factory, type):
                check_type(f"objective.{part.name}", getattr(self, part.name), part.default_factory)

    @cached_property
    def weights(self) -> dict[str, float]:
        """The weight of each term that ``terms`` names, in its order; terms of weight zero are left out."""
        return parse_terms(self.terms)


def describe_terms(weights: Mapping[str, float]) -> str:
    """The sum in words for the user: ``1 x ce + 0.5 x kd``."""
    return " + ".join(f"{weight:g} x {name}" for name, weight in weights.items())


def parse_terms(text: str) -> dict[str, float]:
    """``{name: weight}`` of ``"dcd + 0.5*kd"``, cross-entropy added; terms of weight zero are left out.

    Raises ValueError for anything else, repeated names and negative weights; TypeError for a non-string.
    """
    check_type("objective.terms", text, str)
    weights = {}
    # A '+' after an 'e' and before a digit belongs to a number such as 1e+2.
    for part in re.split(r"(?<![0-9]e)\+", text):
        match = re.fullmatch(r"\s*(?:([0-9.]+(?:e[+-]?[0-9]+)?)\s*\*\s*)?([A-Za-z_]\w*)\s*", part)
        if match is None:
            raise ValueError(f"objective.terms: got {part!r} in {text!r}, expected a sum such as 'ce + 0.5*kd + dcd'")
        weight, name = match.groups()
        if name in weights:
            raise ValueError(f"objective.terms: {name!r} appears twice in {text!r}, expected each term once")
        try:
            weights[name] = 1.0 if weight is None else float(weight)
        except ValueError:
            raise ValueError(f"objective.terms: got the weight {weight!r} in {text!r}, expected a number") from None
        if not math.isfinite(weights[name]):
            raise ValueError(f"objective.terms: got the weight {weight!r} in {text!r}, expected a finite number")
    if "ce" not in weights:
        weights = {"ce": 1.0, **weights}
    weights = {name: weight for name, weight in weights.items() if weight != 0.0}
    if not weights:
        raise ValueError(f"objective.terms: got {text!r}, expected at least one term with a positive weight")
    return weights
