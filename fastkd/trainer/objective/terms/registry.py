"""The terms by their names."""

from __future__ import annotations

from fastkd.trainer.objective.terms import detection, fused, logits, maps, relations
from fastkd.trainer.objective.terms.base import TermBuilder

TERMS: dict[str, TermBuilder] = {**fused.TERMS, **logits.TERMS, **relations.TERMS, **maps.TERMS, **detection.TERMS}
