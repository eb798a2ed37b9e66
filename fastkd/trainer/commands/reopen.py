"""Opens a checkpoint again: rebuilds its student and its data from its own config, and runs no unknown code unasked."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.data.datasets import build_datasets, is_known_data, names_of_classes, without_download
from fastkd.trainer.imports import current_name
from fastkd.trainer.models import cifar as cifar_nets
from fastkd.trainer.models import small as nets
from fastkd.trainer.models.build import (
    ModelConfig,
    Normalization,
    build_model,
    is_detector,
    trained_normalization,
)
from fastkd.trainer.models.extended import extended_like
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.models.weights import Origin, load_into
from fastkd.trainer.precision import DTYPES
from fastkd.trainer.run.check import origin_of
from fastkd.trainer.run.distiller import weights_hash
from fastkd.trainer.run.saved.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    find_weights,
    read_checkpoint,
)

# An option of a timm or torchvision builder of this name may name a file or an address to load from.
_LOADS = re.compile("weights|pretrained|checkpoint|path|file|url")


@dataclass
class Reopened:
    """A checkpoint, and what was rebuilt from its config.

    ``model`` is the student on the CPU with the checkpoint's weights, or with their moving average if the run keeps
    one. ``eval_data`` is None if no data were asked for. ``train_data`` is None then, and if ``eval_data`` was given.
    ``data`` says how the data are read.
    """

    checkpoint: Checkpoint
    config: TrainConfig
    model: nn.Module
    train_data: Any
    eval_data: Any
    data: DataConfig

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes that the student was trained on. None if its data had none."""
        return self.checkpoint.manifest.get("classes") or (
            None if self.eval_data is None else names_of_classes(self.eval_data)
        )


def reopen(
    path: str | Path,
    *,
    best: bool = False,
    model: nn.Module | None = None,
    data: DataConfig | None = None,
    eval_data: Any = None,
    with_data: bool = True,
    trust_code: bool = False,
) -> Reopened:
    """The student of a checkpoint, or of a run folder's newest (or ``best``) checkpoint, and data.

    The data are those of its run, unless ``data`` or ``eval_data`` are given. The arguments, and the CheckpointError
    raised, are described in ``evaluate_checkpoint``.
    """
    checkpoint = read_checkpoint(find_checkpoint(path, best=best))
    try:
        config = TrainConfig.from_dict(checkpoint.manifest["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path / MANIFEST}: its config is not valid ({error})") from error
    given = checkpoint.manifest.get("given_as_objects", [])
    weights = checkpoint.path / checkpoint.deployed
    if model is None:
        if config.student is None or "student" in given:
            raise CheckpointError(f"{checkpoint.path}: its student was given as a module; pass it as model=...")
        model = _build(config.student, "student", checkpoint.path / MANIFEST, trust_code)
    elif isinstance(model, FeatureModel):
        model = model.model
    train_data = None
    if eval_data is None and data is not None:
        train_data, eval_data = build_datasets(data)
    elif eval_data is None and with_data:
        if "data" in given:
            raise CheckpointError(f"{checkpoint.path}: its data was given as objects; pass it as eval_data=...")
        _check_trust(checkpoint.path, config.data.name, is_known_data(config.data.name), trust_code)
        train_data, eval_data = build_datasets(without_download(config.data))
    model = extended_like(model, checkpoint.weights[checkpoint.deployed], weights)
    load_into(model, checkpoint.weights[checkpoint.deployed], weights, "student")
    return Reopened(checkpoint, config, model, train_data, eval_data, data or config.data)


def reopen_teacher(reopened: Reopened, trust_code: bool = False) -> tuple[nn.Module, Normalization | None] | None:
    """The teacher of the run on the CPU, and how images are normalised for it. None for a run without a teacher.

    A teacher with published weights is read from the library's cache, or downloaded.

    Raises:
        CheckpointError: the teacher was given as a module, it needs ``trust_code``, or its weights are not there or are
            no longer those that the run was trained with.
    """
    manifest, config, path = reopened.checkpoint.manifest, reopened.config.teacher, reopened.checkpoint.path
    if manifest.get("teacher_sha256") is None:
        return None
    if config is None or "teacher" in manifest.get("given_as_objects", []):
        raise CheckpointError(f"{path}: its teacher was given as a module")
    origin = Origin()
    if config.weights is None:
        _check_trust(path, config.name, is_known_model(config.name), trust_code)
        model = build_model(config, "teacher")
    else:
        model = _build(config, "teacher", path / MANIFEST, trust_code)
        origin = origin_of(config.weights)
        find_weights(config.weights).load_into(model, "teacher")
    if config.dtype is not None:  # the hash is that of the weights as they were used
        model.to(DTYPES[config.dtype])
    if weights_hash(model) != manifest["teacher_sha256"]:
        raise CheckpointError(f"{config.weights or config.name}: is no longer the teacher that {path} was trained with")
    own = trained_normalization(config, model)
    if own is None and origin.input.get("mean") and origin.input.get("std"):
        own = (origin.input["mean"], origin.input["std"])
    return model, own


def other_data(config: DataConfig, root: str) -> DataConfig:
    """The images in ``root``, read as ``config`` reads its own: those in ``root/val`` if there is such a folder."""
    if config.name == "coco":
        return replace(config, options={**config.options, "root": root})
    options = config.options if config.name == "images" else {}
    part = options.get("val", "val")
    part = part if (Path(root) / part).is_dir() else "."
    return replace(config, name="images", options={**options, "root": root, "train": part, "val": part})


def _build(config: ModelConfig, role: str, manifest: Path, trust_code: bool) -> nn.Module:
    """The model that a checkpoint's config names. CheckpointError if it cannot be built, or would load something."""
    _check_trust(manifest.parent, config.name, is_known_model(config.name), trust_code)
    loading = sorted(name for name, value in config.options.items() if _LOADS.search(name) and value)
    if loading and not trust_code:
        raise CheckpointError(
            f"{manifest}: its config would load something by the option {loading[0]!r}; allow it with trust_code=True "
            "(--trust-code)"
        )
    try:
        return build_model(config.without_weights(), role)
    except Exception as error:  # the options come from a file, and builders raise anything on bad ones
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{manifest}: its {role} {config.name!r} cannot be built ({reason})") from error


def is_known_model(name: str) -> bool:
    """Whether ``name`` builds nothing but a model of timm or torchvision, a detector, or one of our own networks."""
    source, _, attribute = current_name(name).rpartition(":")
    # Looked up without following dots, and not what the module merely imports: nets:nn.functional... reaches anything.
    ours = {module.__name__: module for module in (nets, cifar_nets)}
    found = vars(ours[source]).get(attribute) if source in ours else None
    own = isinstance(found, type) and issubclass(found, nn.Module) and f"{found.__module__}.".startswith(f"{source}.")
    return own or is_detector(name) or source in ("timm", "torchvision", "cifar", "")


def _check_trust(path: Path, name: str, known: bool, trust_code: bool) -> None:
    if not known and not trust_code:
        raise CheckpointError(
            f"{path}: its config would import and call {name!r}; allow it with trust_code=True (--trust-code)"
        )
