"""The objective: a weighted sum of named terms, such as ``CE + lambda KD + beta DCD``.

A term is a module or a function: see ``fastkd.trainer.objective.terms.base``. A new method adds a dataclass to
``objective/options/``, a term to ``objective/terms/``, and a field to ``ObjectiveConfig``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.trainer.models.extended import ExtendedModel
from fastkd.trainer.models.features import FeatureModel, ModelOutput, ModelShapes
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.terms.base import CallableTerm, TermFunction
from fastkd.trainer.objective.terms.registry import TERMS
from fastkd.validate import NO_LABEL

# Names of other values in the same record.
_RESERVED = {
    "kind",
    "step",
    "epoch",
    "lr",
    "loss",
    "accuracy",
    "eval_loss",
    "grad_norm",
    "recall_1",
    "recall_5",
    "left_out",
}


def needs(what: str, config: ObjectiveConfig, terms: Mapping[str, nn.Module | TermFunction] | None = None) -> bool:
    """Whether any term has ``needs_WHAT``, such as ``"teacher"`` or ``"taps"``: see ``objective.terms.base``."""
    return bool(needing(what, config, terms))


def needing(
    what: str, config: ObjectiveConfig, terms: Mapping[str, nn.Module | TermFunction] | None = None
) -> list[str]:
    """The names of the terms that have ``needs_WHAT``, in their order."""
    known = {**TERMS, **(terms or {})}
    default = what in ("teacher", "features")
    found = {name: getattr(known.get(name), f"needs_{what}", default) for name in config.weights}
    return [name for name, value in found.items() if (value(config) if callable(value) else value)]


def extended_student(
    config: ObjectiveConfig, student: FeatureModel, teacher: FeatureModel, own: ModelShapes, other: ModelShapes
) -> nn.Module | None:
    """The student with the layers that a method gives it for good; None if no method does.

    ``own`` and ``other`` are the shapes of the student and of the teacher.

    Raises ValueError: two methods would, or one has already.
    """
    found = [name for name in config.weights if hasattr(TERMS.get(name), "extend_student")]
    if not found:
        return None
    if len(found) > 1 or isinstance(student.model, ExtendedModel):
        raise ValueError(
            f"objective.terms: got {config.terms!r}, expected a student that is extended once, by {found[0]} alone"
        )
    extend: Callable[..., nn.Module] = getattr(TERMS[found[0]], "extend_student")  # noqa: B009 (not of every builder)
    return extend(config, student, teacher, own, other)


def additions_of(config: ObjectiveConfig, terms: Mapping[str, nn.Module | TermFunction] | None = None) -> list[str]:
    """The names of what the terms read of a batch beside images and labels, sorted: see ``objective.terms.base``."""
    known = {**TERMS, **(terms or {})}
    return sorted({wanted for name in config.weights for wanted in getattr(known.get(name), "additions", ())})


class Objective(nn.Module):
    """``sum_k weight_k * sum(term_k.values())``.

    Args:
        config: which terms, their weights and options.
        student, teacher: the models' shapes, from ``measure_shapes``; without a teacher, the student's for both.
        terms: the user's own terms by name: modules (their parameters are trained) or plain functions. They may be
            named, with a weight, in ``config.terms``; one that is not named there is an error.
        unlabelled: labels may be -1, which means none. Terms with an attribute ``unlabelled`` are told, and get the
            labels as they are. For all others the teacher's most probable class takes the place of -1.

    Raises ValueError for a name that neither ``TERMS`` nor ``terms`` has, or that means something else in a record or
    in ``nn.ModuleDict``.

    Example:
        >>> shapes = ModelShapes(features=64, classes=10)
        >>> objective = Objective(ObjectiveConfig(terms="ce"), shapes, shapes)
        >>> output = ModelOutput(logits=torch.randn(8, 10), features=torch.randn(8, 64))
        >>> loss, terms = objective(output, None, torch.randint(10, (8,)))
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        student: ModelShapes,
        teacher: ModelShapes,
        terms: Mapping[str, nn.Module | TermFunction] | None = None,
        *,
        unlabelled: bool = False,
    ) -> None:
        super().__init__()
        self.unlabelled = unlabelled
        self.weights = dict(config.weights)
        given = dict(terms or {})
        unused = sorted(set(given) - set(self.weights))
        if unused:
            raise ValueError(f"terms: got {unused}, which objective.terms={config.terms!r} does not name")
        built: dict[str, nn.Module] = {}
        for name in self.weights:
            if name in _RESERVED or hasattr(nn.ModuleDict(), name):
                raise ValueError(f"objective.terms: got the name {name!r}, which is reserved; choose another one")
            if name in given:
                term = given[name]
                built[name] = term if isinstance(term, nn.Module) else CallableTerm(term)
            elif name in TERMS:
                built[name] = TERMS[name](config, student, teacher)
            else:
                known = sorted({*TERMS, *given})
                raise ValueError(f"objective.terms: got {name!r} in {config.terms!r}, expected terms among {known}")
        self.terms = nn.ModuleDict(built)
        self.additions = additions_of(config, terms)
        for term in built.values():
            if hasattr(term, "unlabelled"):
                setattr(term, "unlabelled", unlabelled)  # noqa: B010 (its type is the term's own)
        self._pairs = [
            (name, other)
            for name, term in built.items()
            for other in built
            if isinstance(built[other], getattr(term, "fuses_with", ()))
        ]

    def forward(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        labels: Tensor,
        rank_weight: float = 1.0,
        additions: Mapping[str, Any] | None = None,
        image_weight: float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every named term before weights, detached (``ce``, ``kd``, ``dcd/contrast``, ...).

        ``rank_weight``: with several ranks W n / N, by which means over this rank's n of N rows are multiplied, so that
        the average over the W ranks is the mean over the global batch. The values of a term whose attribute
        ``spans_ranks`` is true contain it already. ``image_weight`` takes its place for terms that read intermediate
        maps, of which there is one per image, where rows are no images. ``additions``: what the terms' attributes of
        this name ask for.
        """
        total: Tensor | None = None
        named = {}
        classes = labels  # with the teacher's where there is none
        if self.unlabelled and labels.ndim != 1:
            raise ValueError("data.unlabelled: got class probabilities as labels (mixup), expected classes")
        if self.unlabelled and teacher is not None:
            classes = torch.where(labels == NO_LABEL, teacher.logits.argmax(dim=1), labels)
        together: dict[str, Mapping[str, Tensor]] = {}
        for pair in self._pairs:
            values = self.terms[pair[0]].fused(self.terms[pair[1]], student, teacher, labels)  # type: ignore[operator]
            together.update(zip(pair, values or (), strict=False))
        for name, term in self.terms.items():
            given = labels if hasattr(term, "unlabelled") else classes
            reads_maps = getattr(term, "needs_taps", False)
            weight = rank_weight if image_weight is None or not reads_maps else image_weight
            values = together.get(name)
            if values is None:
                values = term(student, teacher, given, **self._additions(name, additions or {}))
            if not isinstance(values, Mapping) or not values:
                raise TypeError(
                    f"terms: {name!r} returned {'an empty dict' if values == {} else type(values).__name__}, expected "
                    "a dict of named 0-dim tensors"
                )
            for part, value in values.items():
                if not isinstance(value, Tensor) or value.ndim != 0:
                    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                    raise TypeError(f"terms: {name!r} returned {got} for {part!r}, expected a 0-dim tensor")
                if weight != 1.0 and not getattr(term, "spans_ranks", False):
                    value = weight * value
                named[name if part == name else f"{name}/{part}"] = value.detach()
                weighted = self.weights[name] * getattr(term, "warmth", 1.0) * value
                total = weighted if total is None else total + weighted
        assert total is not None
        return total, named

    def _additions(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those that the term reads."""
        wanted = getattr(self.terms[name], "additions", ())
        if missing := [addition for addition in wanted if addition not in given]:
            raise ValueError(f"additions: got {sorted(given)}, expected {missing} too, which the term {name!r} reads")
        return {addition: given[addition] for addition in wanted}

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, counted from 0, to the terms that have a method ``set_epoch``."""
        for _, set_epoch in self._methods("set_epoch"):
            set_epoch(epoch)

    def scalars(self) -> dict[str, Tensor]:
        """Further values to log (``dcd/tau``, ``dcd/scale``), of the terms that have a method ``scalars``."""
        found = self._methods("scalars")
        return {f"{name}/{key}": value for name, scalars in found for key, value in scalars().items()}

    def columns_sent(self, classes: int) -> int:
        """How many numbers per row go to the other ranks, as the terms with a method ``columns_sent`` say."""
        found = self._methods("columns_sent")
        return sum(columns(classes) for name, columns in found if getattr(self.terms[name], "spans_ranks", False))

    def _methods(self, method: str) -> list[tuple[str, Callable[..., Any]]]:
        """The terms' names and methods of this name, of the terms that have it."""
        return [(name, getattr(term, method)) for name, term in self.terms.items() if hasattr(term, method)]
