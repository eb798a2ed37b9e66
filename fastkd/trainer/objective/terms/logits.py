"""The terms of the classical methods that read logits."""

from __future__ import annotations

from fastkd.trainer.objective.terms.base import TermBuilder

TERMS: dict[str, TermBuilder] = {}
