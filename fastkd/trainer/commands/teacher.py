"""Which model the weights are of that ``--teacher.weights`` names."""

from __future__ import annotations

from pathlib import Path

from fastkd.trainer.commands.reopen import is_known_model
from fastkd.trainer.config import TrainConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.models.cifar.teachers import published_teacher_in
from fastkd.trainer.run.saved.checkpoint import CheckpointError, find_checkpoint, read_manifest


def teacher_of_weights(path: str, name: str | None, current: ModelConfig | None) -> ModelConfig | None:
    """The model that a published file or a run says it is of, if it has this ``name``, or no name was given.

    Else it is the ``current`` one of the config, before which only a published file goes. None leaves it to the name.
    """
    published = published_teacher_in(path)
    if published is not None and name in (None, published.name):
        return published
    if current is not None:
        return current
    if not Path(path).is_dir():
        if name is None:
            what = "is not a run folder" if Path(path).exists() else "is not there"
            raise ValueError(f"--teacher.weights: got {path!r}, which {what}, expected a run, or --teacher.name too")
        return None
    try:
        saved = TrainConfig.from_dict(read_manifest(find_checkpoint(path))["config"]).student
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its config is not valid ({error})") from None
    if saved is None or (name is None and not is_known_model(saved.name)):
        raise ValueError(f"--teacher.weights: {path!r} does not say which model it is of, expected --teacher.name too")
    return saved.without_weights() if name in (None, saved.name) else None
