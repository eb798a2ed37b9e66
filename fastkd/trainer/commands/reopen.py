"""A checkpoint opened again: its student rebuilt from its own config, with its data; nothing is run unasked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.datasets import DATASETS, build_datasets
from fastkd.trainer.imports import current_name
from fastkd.trainer.models import cifar as cifar_nets
from fastkd.trainer.models import small as nets
from fastkd.trainer.models.build import build_model
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_into,
    read_checkpoint,
)


@dataclass
class Reopened:
    """``model``: the student with the checkpoint's weights (their moving average if the run keeps one), on the CPU.

    ``train_data`` and ``eval_data`` are None where no data were asked for, the first also where the second was given.
    """

    checkpoint: Checkpoint
    config: TrainConfig
    model: nn.Module
    train_data: Any
    eval_data: Any


def reopen(
    path: str | Path,
    *,
    best: bool = False,
    model: nn.Module | None = None,
    eval_data: Any = None,
    with_data: bool = True,
    trust_code: bool = False,
) -> Reopened:
    """The student of a checkpoint (or of the newest, or ``best``, one of a run folder), and the data of its run.

    Model and data are rebuilt from the config in the checkpoint unless given. A config may name any
    ``package.module:callable``, which would be imported and called: from a checkpoint that needs ``trust_code=True``,
    except for timm, torchvision and fastkd's own.

    Raises CheckpointError: missing, damaged, needs ``trust_code``, or its student or data were given to ``train`` as
    objects, which no config names, and are not given here.
    """
    checkpoint = read_checkpoint(find_checkpoint(path, best=best))
    try:
        config = TrainConfig.from_dict(checkpoint.manifest["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path / 'manifest.json'}: its config is not valid ({error})") from error
    given = checkpoint.manifest.get("given_as_objects", [])
    if model is None:
        if config.student is None or "student" in given:
            raise CheckpointError(f"{checkpoint.path}: its student was given as a module; pass it as model=...")
        _check_trust(checkpoint.path, config.student.name, _is_known_model(config.student.name), trust_code)
        model = build_model(replace(config.student, pretrained=False, weights=None))
    elif isinstance(model, FeatureModel):
        model = model.model
    train_data = None
    if eval_data is None and with_data:
        if "data" in given:
            raise CheckpointError(f"{checkpoint.path}: its data was given as objects; pass it as eval_data=...")
        _check_trust(checkpoint.path, config.data.name, config.data.name in DATASETS, trust_code)
        train_data, eval_data = build_datasets(config.data)
    load_into(model, checkpoint.weights[checkpoint.deployed], checkpoint.path / checkpoint.deployed)
    return Reopened(checkpoint, config, model, train_data, eval_data)


def _is_known_model(name: str) -> bool:
    """Whether ``name`` can build nothing but a model of timm or torchvision, or a class of our own networks."""
    source, _, attribute = current_name(name).rpartition(":")
    # Looked up without following dots, and not what the module merely imports: nets:nn.functional... reaches anything.
    ours = {module.__name__: module for module in (nets, cifar_nets)}
    found = vars(ours[source]).get(attribute) if source in ours else None
    own = isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == source
    return own or source in ("timm", "torchvision", "")


def _check_trust(path: Path, name: str, known: bool, trust_code: bool) -> None:
    if not known and not trust_code:
        raise CheckpointError(f"{path}: its config would import and call {name!r}; allow it with trust_code=True")
