"""The studies by the name that ``fastkd study`` takes. Each is a function of its options: see ``fastkd.study.grid``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastkd.study.grid import Study
from fastkd.study.studies import dcd, digits, imagenet, others, shapes, sweeps

STUDIES: dict[str, Callable[[Any], Study]] = {
    "digits": digits.digits,
    "shapes": shapes.shapes,
    "dcd-table1": dcd.table1,
    "dcd-table2": dcd.table2,
    "dcd-table3": imagenet.table3,
    "dcd-figure2": dcd.figure2,
    "dcd-figure3": dcd.figure3,
    "dcd-figure4": sweeps.figure4,
    "dcd-figure5": sweeps.figure5,
    "dcd-cost": sweeps.cost,
    "ckd-pairs": others.ckd_pairs,
    "pckd": others.pckd,
    "msdcrd": others.msdcrd,
}
