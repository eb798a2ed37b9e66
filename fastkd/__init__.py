"""Contrastive knowledge-distillation losses as fused, memory-linear kernels, and a thin trainer.

The losses need PyTorch alone. Importing this package compiles nothing and never initialises CUDA. The trainer is in
``fastkd.trainer`` and needs the packages of the extra ``train`` (in a checkout, ``pip install '.[train]'``).
docs/architecture.md shows how all of it is built.
"""

from fastkd.functional.contrast import ckd_loss, info_nce_loss, masked_contrast_loss, sup_con_loss
from fastkd.functional.dcd import dcd_loss
from fastkd.functional.kd import kd_loss
from fastkd.functional.pool import multiscale_pool
from fastkd.functional.preview import preview_weight
from fastkd.losses import CKDLoss, DCDLoss, KDLoss, MSDCRDLoss, PCKDLoss

__version__ = "0.1.0"  # pyproject.toml reads this line
__all__ = [
    "CKDLoss",
    "DCDLoss",
    "KDLoss",
    "MSDCRDLoss",
    "PCKDLoss",
    "ckd_loss",
    "dcd_loss",
    "info_nce_loss",
    "kd_loss",
    "masked_contrast_loss",
    "multiscale_pool",
    "preview_weight",
    "sup_con_loss",
]
