"""The methods of the studies: their objectives, and how they are written."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.recipes import RECIPES
from fastkd.trainer.recipes.methods import SUMS, objective_of

NAMES = {
    "teacher": "Teacher",
    "ce": "From scratch",
    "fitnet": "FitNet",
    "reviewkd": "ReviewKD",
    "simkd": "SimKD",
    "crd+kd": "CRD + KD",
    "dcd-e": "DCD, scale e",
    "dcd-as-run": "DCD, as its authors run it",
    "dcd+kd": "DCD + KD",
    "lskd-dkd": "LSKD on DKD",
    "mlkd-paper": "MLKD, the paper's reading",
    "cc-kernel": "CC, Gaussian kernel",
    "100*ckd": "CKD",
    "msdcrd+kd": "MSDCRD + KD",
}


def display(method: str) -> str:
    """The method as it is written."""
    return NAMES.get(method) or (method.upper() if method in SUMS else method)


@cache  # an objective takes a while to be checked
def objective(method: str) -> ObjectiveConfig:
    """The objective of a method with its paper's weights; DCD as its authors' code for CIFAR-100 runs it.

    ValueError for a method that the trainer does not have.
    """
    if method in ("dcd", "dcd+kd"):
        return replace(RECIPES["cifar100-dcd-kd"]().objective, terms="dcd + kd" if "kd" in method else "dcd")
    return objective_of(method)


def dcd(**options: object) -> ObjectiveConfig:
    """DCD as its authors' code runs it, with other options of the loss."""
    config = objective("dcd")
    return replace(config, dcd=replace(config.dcd, **options))  # type: ignore[arg-type]
