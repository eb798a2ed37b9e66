"""The methods of the studies: their objectives, and how they are written."""

from __future__ import annotations

from dataclasses import replace

from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.terms.registry import TERMS
from fastkd.trainer.recipes import RECIPES

NAMES = {
    "teacher": "Teacher",
    "ce": "From scratch",
    "fitnet": "FitNet",
    "reviewkd": "ReviewKD",
    "simkd": "SimKD",
    "crd+kd": "CRD + KD",
    "dcd-e": "DCD, scale e",
    "dcd+kd": "DCD + KD",
    "100*ckd": "CKD",
    "msdcrd+kd": "MSDCRD + KD",
}


def display(method: str) -> str:
    """The method as it is written."""
    return NAMES.get(method, method.upper())


def all_methods() -> tuple[str, ...]:
    """The methods that the trainer has, by the names of ``fastkd.trainer.recipes.methods``."""
    try:
        from fastkd.trainer.recipes.methods import METHODS
    except ImportError:  # FALLBACK until it is merged
        return tuple(TERMS)

    return tuple(METHODS)


def objective(method: str) -> ObjectiveConfig:
    """The objective of a method with its paper's weights; DCD as its authors' code for CIFAR-100 runs it.

    ValueError for a method that the trainer does not have.
    """
    if method in ("dcd", "dcd+kd"):
        return replace(RECIPES["cifar100-dcd-kd"]().objective, terms="dcd + kd" if "kd" in method else "dcd")
    try:
        from fastkd.trainer.recipes.methods import objective_of
    except ImportError:  # FALLBACK until it is merged
        if method not in ("ce", "pckd", "msdcrd", "msdcrd+kd", "kd", "ckd"):
            raise ValueError(f"the trainer has no method {method!r}") from None
        return ObjectiveConfig(terms="0.1*ce + 0.9*kd" if method == "kd" else method)

    return objective_of(method)


def dcd(**options: object) -> ObjectiveConfig:
    """DCD as its authors' code runs it, with other options of the loss."""
    config = objective("dcd")
    return replace(config, dcd=replace(config.dcd, **options))  # type: ignore[arg-type]
