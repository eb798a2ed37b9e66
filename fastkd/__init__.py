"""Contrastive knowledge-distillation losses as fused, memory-linear kernels, and a thin trainer.

The losses need PyTorch alone. Importing this package compiles nothing and never initialises CUDA; the trainer is in
``fastkd.trainer`` and brings its own dependencies (``pip install 'fastkd[train]'``).
"""

from fastkd.functional import dcd_loss, info_nce_loss, kd_loss
from fastkd.losses import DCDLoss, KDLoss
from fastkd.pooling import multiscale_pool

__version__ = "0.1.0"
__all__ = ["DCDLoss", "KDLoss", "dcd_loss", "info_nce_loss", "kd_loss", "multiscale_pool"]
