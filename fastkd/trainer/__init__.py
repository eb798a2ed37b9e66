"""The thin trainer: ``train(config)`` distils a student; see ``fastkd.trainer.run.loop``.

Names are imported on first use, so that ``fastkd.trainer`` itself needs nothing beyond torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastkd.trainer.extras import require_extras

if TYPE_CHECKING:
    from fastkd.trainer.callbacks import Callback
    from fastkd.trainer.commands.evaluate_checkpoint import EvalResult, evaluate_checkpoint, evaluate_model
    from fastkd.trainer.commands.evaluate_task import TaskResult, evaluate_task
    from fastkd.trainer.config import DetectionConfig, TrainConfig
    from fastkd.trainer.data.config import DataConfig
    from fastkd.trainer.data.labels import labelled_subset
    from fastkd.trainer.data.readers.encoded import BrokenImagesError
    from fastkd.trainer.data.readers.memory import TensorImages, load_digits
    from fastkd.trainer.models.build import ModelConfig, build_model
    from fastkd.trainer.models.cifar.teachers import published_teacher
    from fastkd.trainer.models.features import FeatureModel, ModelOutput, ModelShapes, find_classifier
    from fastkd.trainer.objective.config import ObjectiveConfig
    from fastkd.trainer.objective.objective import Objective
    from fastkd.trainer.objective.options.fused import (
        CEConfig,
        CKDConfig,
        DCDConfig,
        KDConfig,
        MSDCRDConfig,
        PCKDConfig,
    )
    from fastkd.trainer.objective.options.logits import (
        CTKDConfig,
        DISTConfig,
        DKDConfig,
        IPWDConfig,
        LSKDConfig,
        MLKDConfig,
        WSLDConfig,
    )
    from fastkd.trainer.objective.options.maps import (
        ABConfig,
        ATConfig,
        FitNetConfig,
        FTConfig,
        NORMConfig,
        NSTConfig,
        OFDConfig,
        ParaphraserConfig,
        ReviewKDConfig,
        SimKDConfig,
        SRRLConfig,
        VIDConfig,
    )
    from fastkd.trainer.objective.options.relations import (
        CCConfig,
        CRDConfig,
        InfoNCEConfig,
        PKTConfig,
        RKDConfig,
        SPConfig,
    )
    from fastkd.trainer.objective.terms.registry import TERMS
    from fastkd.trainer.optim import OptimConfig
    from fastkd.trainer.pulse import RankLostError
    from fastkd.trainer.recipes import RECIPES
    from fastkd.trainer.run.distiller import Distiller, weights_hash
    from fastkd.trainer.run.loop import TrainResult, train
    from fastkd.trainer.run.meter import NonFiniteLossError
    from fastkd.trainer.run.saved.checkpoint import CheckpointError, find_checkpoint, load_weights
    from fastkd.trainer.run.stages import train_stages
    from fastkd.trainer.tasks.evaluate import evaluate

_HOME = {
    "callbacks": ("Callback",),
    "commands.evaluate_checkpoint": ("EvalResult", "evaluate_checkpoint", "evaluate_model"),
    "commands.evaluate_task": ("TaskResult", "evaluate_task"),
    "config": ("DetectionConfig", "TrainConfig"),
    "data.config": ("DataConfig",),
    "data.readers.encoded": ("BrokenImagesError",),
    "data.labels": ("labelled_subset",),
    "data.readers.memory": ("TensorImages", "load_digits"),
    "models.build": ("ModelConfig", "build_model"),
    "models.cifar.teachers": ("published_teacher",),
    "models.features": ("FeatureModel", "ModelOutput", "ModelShapes", "find_classifier"),
    "objective.config": ("ObjectiveConfig",),
    "objective.options.fused": (*("CEConfig", "CKDConfig", "DCDConfig", "KDConfig", "MSDCRDConfig", "PCKDConfig"),),
    "objective.options.logits": (
        *("CTKDConfig", "DISTConfig", "DKDConfig", "IPWDConfig", "LSKDConfig", "MLKDConfig", "WSLDConfig"),
    ),
    "objective.options.relations": (*("CCConfig", "CRDConfig", "InfoNCEConfig", "PKTConfig", "RKDConfig", "SPConfig"),),
    "objective.options.maps": (
        *("ABConfig", "ATConfig", "FitNetConfig", "FTConfig", "NORMConfig", "NSTConfig", "OFDConfig"),
        *("ParaphraserConfig", "ReviewKDConfig", "SimKDConfig", "SRRLConfig", "VIDConfig"),
    ),
    "objective.objective": ("Objective",),
    "objective.terms.registry": ("TERMS",),
    "optim": ("OptimConfig",),
    "pulse": ("RankLostError",),
    "recipes": ("RECIPES",),
    "run.saved.checkpoint": ("CheckpointError", "find_checkpoint", "load_weights"),
    "run.distiller": ("Distiller", "weights_hash"),
    "tasks.evaluate": ("evaluate",),
    "run.loop": ("TrainResult", "train"),
    "run.meter": ("NonFiniteLossError",),
    "run.stages": ("train_stages",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "RECIPES",
    "TERMS",
    "ABConfig",
    "ATConfig",
    "BrokenImagesError",
    "CCConfig",
    "CEConfig",
    "CKDConfig",
    "CRDConfig",
    "CTKDConfig",
    "Callback",
    "CheckpointError",
    "DCDConfig",
    "DISTConfig",
    "DKDConfig",
    "DataConfig",
    "DetectionConfig",
    "Distiller",
    "EvalResult",
    "FTConfig",
    "FeatureModel",
    "FitNetConfig",
    "IPWDConfig",
    "InfoNCEConfig",
    "KDConfig",
    "LSKDConfig",
    "MLKDConfig",
    "MSDCRDConfig",
    "ModelConfig",
    "ModelOutput",
    "ModelShapes",
    "NORMConfig",
    "NSTConfig",
    "NonFiniteLossError",
    "OFDConfig",
    "Objective",
    "ObjectiveConfig",
    "OptimConfig",
    "PCKDConfig",
    "PKTConfig",
    "ParaphraserConfig",
    "RKDConfig",
    "RankLostError",
    "ReviewKDConfig",
    "SPConfig",
    "SRRLConfig",
    "SimKDConfig",
    "TaskResult",
    "TensorImages",
    "TrainConfig",
    "TrainResult",
    "VIDConfig",
    "WSLDConfig",
    "build_model",
    "evaluate",
    "evaluate_checkpoint",
    "evaluate_model",
    "evaluate_task",
    "find_checkpoint",
    "find_classifier",
    "labelled_subset",
    "load_digits",
    "load_weights",
    "published_teacher",
    "train",
    "train_stages",
    "weights_hash",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_extras("train", by=__name__)
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
