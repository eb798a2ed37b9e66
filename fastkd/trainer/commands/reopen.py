"""Opens a checkpoint again: rebuilds its student and its data from its own config, and runs no unknown code unasked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.datasets import build_datasets, is_known_data, without_download
from fastkd.trainer.imports import current_name
from fastkd.trainer.models import cifar as cifar_nets
from fastkd.trainer.models import small as nets
from fastkd.trainer.models.build import build_model
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.run.checkpoint import Checkpoint, CheckpointError, find_checkpoint, load_into, read_checkpoint


@dataclass
class Reopened:
    """A checkpoint, and what was rebuilt from its config.

    ``model`` is the student on the CPU with the checkpoint's weights, or with their moving average if the run keeps
    one. ``eval_data`` is None if no data were asked for. ``train_data`` is None then, and if ``eval_data`` was given.
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
    """The student of a checkpoint, or of a run folder's newest (or ``best``) checkpoint, and the data of its run.

    The arguments, and the CheckpointError raised, are described in ``evaluate_checkpoint``.
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
        _check_trust(checkpoint.path, config.student.name, is_known_model(config.student.name), trust_code)
        model = build_model(config.student.without_weights())
    elif isinstance(model, FeatureModel):
        model = model.model
    train_data = None
    if eval_data is None and with_data:
        if "data" in given:
            raise CheckpointError(f"{checkpoint.path}: its data was given as objects; pass it as eval_data=...")
        _check_trust(checkpoint.path, config.data.name, is_known_data(config.data.name), trust_code)
        train_data, eval_data = build_datasets(without_download(config.data))
    load_into(model, checkpoint.weights[checkpoint.deployed], checkpoint.path / checkpoint.deployed)
    return Reopened(checkpoint, config, model, train_data, eval_data)


def is_known_model(name: str) -> bool:
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
