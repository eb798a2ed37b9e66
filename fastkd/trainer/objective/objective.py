"""The objective: a weighted sum of named terms, ``total = CE + lambda KD + beta DCD``.

A term is a module (or any callable): see ``fastkd.trainer.objective.terms``. There ``TERMS`` maps the name of a term to
what builds it. A new method adds one entry there.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fastkd.functional.kd import ce_kd_terms
from fastkd.trainer.models.features import ModelOutput, ModelShapes
from fastkd.trainer.objective.config import (
    ObjectiveConfig,
    parse_terms,
)
from fastkd.trainer.objective.terms import TERMS, CallableTerm, CETerm, KDTerm, TermFunction, one_dtype

# Names of other values in the same record.
_RESERVED = {"kind", "step", "epoch", "lr", "loss", "accuracy", "eval_loss", "grad_norm"}

# Where cross-entropy and KD together are one read of the logits; on a CPU torch's own cross-entropy is as fast.
_ONE_READ_DEVICES = {"cuda"}


def _ce_and_kd(
    terms: Mapping[str, nn.Module], student: ModelOutput, teacher: ModelOutput | None, labels: Tensor
) -> dict[str, dict[str, Tensor]]:
    """The values of the terms ``ce`` and ``kd`` computed together, where both are ours and that is faster."""
    ce, kd = terms.get("ce"), terms.get("kd")
    if not (isinstance(ce, CETerm) and isinstance(kd, KDTerm) and student.logits.device.type in _ONE_READ_DEVICES):
        return {}
    if labels.ndim != 1:  # class probabilities, which only torch's cross-entropy takes
        return {}
    assert teacher is not None
    ce_value, kd_value = ce_kd_terms(
        *one_dtype(student.logits, teacher.logits), labels, kd.loss.temperature, label_smoothing=ce.label_smoothing
    )
    return {"ce": {"ce": ce_value}, "kd": {"kd": kd_value}}


def needs(what: str, config: ObjectiveConfig, terms: Mapping[str, nn.Module | TermFunction] | None = None) -> bool:
    """Whether any term needs the ``"teacher"``, the ``"features"`` or the ``"maps"``: see ``objective.terms``."""
    known = {**TERMS, **(terms or {})}
    default = what != "maps"
    return any(getattr(known.get(name), f"needs_{what}", default) for name in parse_terms(config.terms))


class Objective(nn.Module):
    """``sum_k weight_k * sum(term_k.values())``.

    Args:
        config: which terms, their weights and options.
        student, teacher: what ``probe`` found of the models; without a teacher, the student's for both.
        terms: the user's own terms by name: modules (their parameters are trained) or plain functions. They may be
            named, with a weight, in ``config.terms``; one that is not named there is an error.

    Raises ValueError for a name that neither ``TERMS`` nor ``terms`` has, or that means something else in a record or
    in ``nn.ModuleDict``.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        student: ModelShapes,
        teacher: ModelShapes,
        terms: Mapping[str, nn.Module | TermFunction] | None = None,
    ) -> None:
        super().__init__()
        self.weights = parse_terms(config.terms)
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

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, rank_weight: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every named term before weights, detached (``ce``, ``kd``, ``dcd/contrast``, ...).

        ``rank_weight``, with several ranks: W n / N, by which means over this rank's n of N rows are multiplied, so that the
        average over the W ranks is the mean over the global batch. Terms whose attribute ``spans_ranks`` is true
        contain that already.
        """
        total: Tensor | None = None
        named = {}
        together = _ce_and_kd(dict(self.terms.items()), student, teacher, labels)
        for name, term in self.terms.items():
            values = together[name] if name in together else term(student, teacher, labels)
            if not isinstance(values, Mapping) or not values:
                raise TypeError(
                    f"terms: {name!r} returned {'an empty dict' if values == {} else type(values).__name__}, expected "
                    "a dict of named 0-dim tensors"
                )
            for part, value in values.items():
                if not isinstance(value, Tensor) or value.ndim != 0:
                    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                    raise TypeError(f"terms: {name!r} returned {got} for {part!r}, expected a 0-dim tensor")
                if rank_weight != 1.0 and not getattr(term, "spans_ranks", False):
                    value = rank_weight * value
                named[name if part == name else f"{name}/{part}"] = value.detach()
                weighted = self.weights[name] * value
                total = weighted if total is None else total + weighted
        assert total is not None
        return total, named

    def set_epoch(self, epoch: int) -> None:
        """Tells the terms that have a method ``set_epoch``; the loop calls this before every epoch, counted from 0."""
        for term in self.terms.values():
            if hasattr(term, "set_epoch"):
                term.set_epoch(epoch)  # type: ignore[operator]

    def scalars(self) -> dict[str, Tensor]:
        """Further values to log (``dcd/tau``, ``dcd/scale``), of the terms that have a method ``scalars``."""
        return {
            f"{name}/{key}": value
            for name, term in self.terms.items()
            if hasattr(term, "scalars")
            for key, value in term.scalars().items()  # type: ignore[operator]
        }
