"""Contrastive knowledge-distillation losses as fused, memory-linear kernels, and a thin trainer.

The losses need PyTorch alone. Importing this package compiles nothing and never initialises CUDA. The trainer is in
``fastkd.trainer`` and needs the packages of the extra ``train`` (in a checkout, ``pip install '.[train]'``).
docs/architecture.md shows how all of it is built. Names are imported on first use, so that ``fastkd --help`` need not
wait for PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.functional.contrast import ckd_loss, info_nce_loss, masked_contrast_loss, sup_con_loss
    from fastkd.functional.dcd import dcd_loss
    from fastkd.functional.kd import kd_loss, soft_target_rows
    from fastkd.functional.pool import multiscale_pool
    from fastkd.functional.preview import preview_weight
    from fastkd.losses import (
        CKDLoss,
        DCDLoss,
        InfoNCELoss,
        KDLoss,
        MSDCRDLoss,
        PCKDLoss,
        SupConLoss,
        total_loss,
    )

__version__ = "0.1.0"  # pyproject.toml reads this line
__all__ = [
    "CKDLoss",
    "DCDLoss",
    "InfoNCELoss",
    "KDLoss",
    "MSDCRDLoss",
    "PCKDLoss",
    "SupConLoss",
    "ckd_loss",
    "dcd_loss",
    "info_nce_loss",
    "kd_loss",
    "masked_contrast_loss",
    "multiscale_pool",
    "preview_weight",
    "soft_target_rows",
    "sup_con_loss",
    "total_loss",
]

_FUNCTIONS = {
    "dcd_loss": "functional.dcd",
    "kd_loss": "functional.kd",
    "multiscale_pool": "functional.pool",
    "preview_weight": "functional.preview",
    "soft_target_rows": "functional.kd",
    "total_loss": "losses",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "losses" if name.endswith("Loss") else _FUNCTIONS.get(name, "functional.contrast")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
