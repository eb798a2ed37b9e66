"""The thin trainer: ``train(config)`` distils a student; see ``fastkd.trainer.loop``.

Names are imported on first use, so that ``fastkd.trainer`` itself needs nothing beyond torch.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.trainer.checkpoint import CheckpointError, find_checkpoint, load_weights
    from fastkd.trainer.config import TrainConfig
    from fastkd.trainer.data import DataConfig, TensorImages, labelled_subset, load_digits
    from fastkd.trainer.distiller import Distiller, weights_hash
    from fastkd.trainer.evaluation import EvalResult, evaluate, evaluate_checkpoint
    from fastkd.trainer.log import NonFiniteLossError
    from fastkd.trainer.loop import train
    from fastkd.trainer.models import FeatureModel, ModelConfig, ModelOutput, ModelShapes, build_model, find_classifier
    from fastkd.trainer.objective import Objective, ObjectiveConfig
    from fastkd.trainer.optim import OptimConfig
    from fastkd.trainer.recipes import RECIPES
    from fastkd.trainer.state import TrainResult
    from fastkd.trainer.terms import TERMS, CEConfig, CKDConfig, DCDConfig, KDConfig, MSDCRDConfig, PCKDConfig

_HOME = {
    "checkpoint": ("CheckpointError", "find_checkpoint", "load_weights"),
    "config": ("TrainConfig",),
    "data": ("DataConfig", "TensorImages", "labelled_subset", "load_digits"),
    "distiller": ("Distiller", "weights_hash"),
    "evaluation": ("EvalResult", "evaluate", "evaluate_checkpoint"),
    "log": ("NonFiniteLossError",),
    "loop": ("train",),
    "models": ("FeatureModel", "ModelConfig", "ModelOutput", "ModelShapes", "build_model", "find_classifier"),
    "objective": ("Objective", "ObjectiveConfig"),
    "optim": ("OptimConfig",),
    "recipes": ("RECIPES",),
    "state": ("TrainResult",),
    "terms": ("TERMS", "CEConfig", "CKDConfig", "DCDConfig", "KDConfig", "MSDCRDConfig", "PCKDConfig"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "RECIPES",
    "TERMS",
    "CEConfig",
    "CKDConfig",
    "CheckpointError",
    "DCDConfig",
    "DataConfig",
    "Distiller",
    "EvalResult",
    "FeatureModel",
    "KDConfig",
    "MSDCRDConfig",
    "ModelConfig",
    "ModelOutput",
    "ModelShapes",
    "NonFiniteLossError",
    "Objective",
    "ObjectiveConfig",
    "OptimConfig",
    "PCKDConfig",
    "TensorImages",
    "TrainConfig",
    "TrainResult",
    "build_model",
    "evaluate",
    "evaluate_checkpoint",
    "find_checkpoint",
    "find_classifier",
    "labelled_subset",
    "load_digits",
    "load_weights",
    "train",
    "weights_hash",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_extras()
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def require_extras() -> None:
    """Raise ImportError that says what to install when a package of the ``train`` extra is missing."""
    needed = (
        *("timm", "torchvision", "torchdata", "safetensors", "rich", "tensorboard", "tyro", "sklearn"),
        *("matplotlib", "jinja2", "threadpoolctl", "numpy", "scipy", "PIL", "huggingface_hub"),
    )
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"fastkd.trainer: missing {', '.join(missing)}; run: pip install 'fastkd[train]'")
