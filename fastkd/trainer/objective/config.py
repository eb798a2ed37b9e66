"""The settings of the objective: which terms, with which weights and options."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal

from fastkd.validate import check_choice, check_int, check_number, check_type


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
    sample_term_weight: float = 1.0
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("msdcrd.temperature", self.temperature, 0.0, exclusive=True)
        check_choice("msdcrd.positives", self.positives, ("index", "label"))
        for name in ("sample_term_weight", "feature_weight"):
            check_number(f"msdcrd.{name}", getattr(self, name), 0.0)
        for name in ("windows", "strides"):
            check_type(f"msdcrd.{name}", getattr(self, name), (tuple, list, type(None)))
            for side in getattr(self, name) or ():
                if side is not None:
                    check_int(f"msdcrd.{name}", side, 1)


@dataclass(kw_only=True, frozen=True)
class ObjectiveConfig:
    """Which terms, and their weights and options.

    ``terms`` is a sum such as ``"dcd+kd"`` or ``"0.5*kd + 2*dcd"``. Cross-entropy belongs to every objective: it is
    added with weight 1 unless written, and ``"0*ce + kd"`` leaves it out. ``"ce"`` alone trains from scratch.
    """

    terms: str = "ce+kd+dcd"
    ce: CEConfig = field(default_factory=CEConfig)
    kd: KDConfig = field(default_factory=KDConfig)
    dcd: DCDConfig = field(default_factory=DCDConfig)
    ckd: CKDConfig = field(default_factory=CKDConfig)
    pckd: PCKDConfig = field(default_factory=PCKDConfig)
    msdcrd: MSDCRDConfig = field(default_factory=MSDCRDConfig)

    def __post_init__(self) -> None:
        parse_terms(self.terms)
        for part in fields(self):
            if callable(part.default_factory):
                check_type(f"objective.{part.name}", getattr(self, part.name), type(part.default_factory()))


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
