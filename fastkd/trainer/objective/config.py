"""The settings of the objective: which terms, with which weights and options."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch

from fastkd.losses import CKDLoss, DCDLoss, KDLoss, MSDCRDLoss, PCKDLoss
from fastkd.validate import check_number, check_type


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
        _check_options("kd", self, KDLoss)


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

    def __post_init__(self) -> None:
        _check_options("dcd", self, DCDLoss, 1, 1)


@dataclass(kw_only=True, frozen=True)
class CKDConfig:
    """The options of ``fastkd.losses.CKDLoss``: see there.

    Attributes:
        temperature: divides the logits.

    Example:
        >>> config = ObjectiveConfig(terms="ckd", ckd=CKDConfig(temperature=0.5))
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_options("ckd", self, CKDLoss)


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
        hidden_dim: width of the hidden layer of its heads. None chooses it.

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
    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        _check_options("pckd", self, PCKDLoss, 1, 1)


@dataclass(kw_only=True, frozen=True)
class MSDCRDConfig:
    """The options of ``fastkd.losses.MSDCRDLoss``: see there.

    Attributes:
        windows: the scales, each the side of a square window, or None for the whole map. None means three scales of
            the teacher's map.
        strides: the distance of the windows, per scale. None means half of the window.
        temperature: divides the cosines.
        positives: the teacher's features of the same sample, or of all samples of its label.
        sample_term_weight: weight of the contrast of samples.
        feature_weight: weight of the contrast of channels.

    Example:
        >>> config = ObjectiveConfig(terms="msdcrd", msdcrd=MSDCRDConfig(windows=(1, 2), positives="label"))
    """

    windows: tuple[int | None, ...] | None = None
    strides: tuple[int, ...] | None = None
    temperature: float = 0.1
    positives: Literal["index", "label"] = "index"
    sample_term_weight: float = 1.0
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        _check_options("msdcrd", self, MSDCRDLoss, 1, 1)


def _check_options(term: str, config: Any, loss: Callable[..., Any], *widths: int) -> None:
    """Raise what the loss says of its options, with the term's name before the argument's: ``kd.temperature: ...``."""
    try:
        # On tensors without memory, which draw no random numbers.
        with torch.device("meta"):
            loss(*widths, **asdict(config))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{term}.{error}") from None


@dataclass(kw_only=True, frozen=True)
class ObjectiveConfig:
    """Which terms the loss is made of, with their weights and options.

    ``terms`` is a sum of names, each with a weight or without (1). Cross-entropy belongs to every objective: it is
    added with weight 1 unless written, and ``"0*ce + kd"`` leaves it out. ``"ce"`` alone trains from scratch::

        ObjectiveConfig(terms="dcd+kd")
        ObjectiveConfig(terms="0.5*kd + 2*dcd", kd=KDConfig(temperature=2.0))

    Attributes:
        terms: the sum, such as ``"0.5*kd + dcd"``, of ce, kd, dcd, ckd, pckd, msdcrd and terms of your own.
        ce: options of cross-entropy.
        kd: options of KD.
        dcd: options of DCD.
        ckd: options of CKD.
        pckd: options of PCKD.
        msdcrd: options of MSDCRD.
    """

    terms: str = "ce+kd+dcd"
    ce: CEConfig = field(default_factory=CEConfig)
    kd: KDConfig = field(default_factory=KDConfig)
    dcd: DCDConfig = field(default_factory=DCDConfig)
    ckd: CKDConfig = field(default_factory=CKDConfig)
    pckd: PCKDConfig = field(default_factory=PCKDConfig)
    msdcrd: MSDCRDConfig = field(default_factory=MSDCRDConfig)

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
