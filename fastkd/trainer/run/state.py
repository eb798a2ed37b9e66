"""What a checkpoint holds, and how a run is put back from it. No other module says it.

A checkpoint is a folder ``step-00000123`` with
    student.safetensors   the student's state dict
    loss.safetensors      the objective's state dict: projection heads and tau
    ema.safetensors       the moving average of the student, if the run keeps one
    state.pt              the fields of ``SavedState``
    manifest.json         the fields of ``Identity``; step, epoch, accuracy, versions; format, files, sha256
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from fastkd.trainer.config import TrainConfig, differences
from fastkd.trainer.models.weights import load_into
from fastkd.trainer.rng import mix_seed, restore_rng, rng_state, seed_everything
from fastkd.trainer.run.distiller import Distiller
from fastkd.trainer.run.meter import Meter
from fastkd.trainer.run.saved.checkpoint import EMA, LOSS, MANIFEST, STATE, STUDENT, Checkpoint, CheckpointError
from fastkd.trainer.run.step import TrainStep
from fastkd.trainer.strict_json import check_fields
from fastkd.validate import check_number, check_type


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run must have in common with the checkpoint that it resumes from.

    ``given_as_objects`` names the arguments of ``train`` that replaced what the config would build; the config does not
    describe those. ``classes`` are the names of the classes, ``normalization`` the means and the deviations of
    the images' channels; each is None if the data do not say. ``augmentation`` is the version of how images are read
    and augmented, None where that draws nothing. ``teacher_cache`` is the dtype of a cache of the teacher. It is None
    without a cache, and for float32, which gives the same run.
    """

    config: dict[str, Any]
    given_as_objects: list[str]
    train_samples: int
    labels_sha256: str | None
    teacher_sha256: str | None
    classes: list[str] | None = None
    normalization: list[list[float]] | None = None
    augmentation: int | None = None
    teacher_cache: str | None = None

    def check(self, checkpoint: Checkpoint) -> None:
        """CheckpointError when the data or the teacher are not those that the checkpoint was written with."""
        saved = checkpoint.manifest
        for key in ("train_samples", "labels_sha256", "teacher_sha256"):
            if saved[key] != getattr(self, key):
                raise CheckpointError(
                    f"{checkpoint.path}: was written with {key}={saved[key]}, this run has {getattr(self, key)}"
                )
        if saved.get("augmentation") != self.augmentation:
            raise CheckpointError(
                f"{checkpoint.path}: was written with augmentation={saved.get('augmentation')}, this run has "
                f"{self.augmentation}: this version of fastkd gives the samples other random numbers; finish the run "
                "with the version that began it (see run.json), or begin it anew"
            )
        if saved.get("teacher_cache") != self.teacher_cache:
            was, own = (kind or "float32 or none" for kind in (saved.get("teacher_cache"), self.teacher_cache))
            raise CheckpointError(f"{checkpoint.path}: was written with a teacher.cache of {was}, this run has {own}")
        before, now = ("data" in given for given in (saved["given_as_objects"], self.given_as_objects))
        if before != now:
            raise CheckpointError(
                f"{checkpoint.path}: its data {'was' if before else 'was not'} given as objects (train_data, "
                f"eval_data), that of this run {'is' if now else 'is not'}"
            )


@dataclass
class Progress:
    """Where a run is: ``step`` optimiser steps are done, and training goes on with ``epoch``, counted from 0.

    ``history`` has one record per finished epoch. ``metrics_bytes`` is the size of ``metrics.jsonl`` when the
    checkpoint was written.
    """

    step: int = 0
    epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    metrics_bytes: int = 0


@dataclass(kw_only=True)
class SavedState(Progress):
    """``state.pt``: plain types and tensors, which ``torch.load(weights_only=True)`` accepts.

    ``rng`` is rank 0's ``rng_state``. The loader has no state: its position is the step.
    """

    meter: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    rng: dict[str, Any]
    rng_of_other_ranks: list[dict[str, Any]]


_STATE_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("step", "epoch", "metrics_bytes"), int),
    **dict.fromkeys(("meter", "optimizer", "scaler", "rng"), dict),
    **dict.fromkeys(("history", "rng_of_other_ranks"), list),
    "seconds": (float, int),
}


def check_resumable(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """CheckpointError when the checkpoint lacks what resuming reads, or belongs to another config."""
    state, manifest, file = checkpoint.state, checkpoint.manifest, checkpoint.path / STATE
    needed = {part.name for part in fields(Identity)} - {
        "classes",
        "normalization",
        "augmentation",
        "teacher_cache",
    }  # of later versions
    if missing := sorted(needed - manifest.keys()):
        raise CheckpointError(f"{checkpoint.path / MANIFEST}: lacks {', '.join(missing)}")
    try:
        check_fields(state, _STATE_TYPES, str(file))
        for rng in (state["rng"], *state["rng_of_other_ranks"]):
            check_type(f"{file}: rng", rng, dict)
            check_fields(rng, dict.fromkeys(rng_state(torch.device("cpu")), object), str(file))
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if changed := differences(manifest["config"], config):
        raise CheckpointError(f"{checkpoint.path}: belongs to another config ({'; '.join(changed)})")
    try:
        _check_progress(checkpoint)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from error


def _check_progress(checkpoint: Checkpoint) -> None:
    """TypeError or ValueError unless the saved progress agrees with itself and with the manifest."""
    state, file = checkpoint.state, checkpoint.path / STATE
    for name in ("step", "epoch", "metrics_bytes", "seconds"):
        check_number(f"{file}: {name}", state[name], 0, 2**62)
    for name in ("step", "epoch"):
        if state[name] != checkpoint.manifest.get(name, state[name]):
            raise ValueError(f"{file}: {name} is {state[name]}, {checkpoint.manifest[name]} in {MANIFEST}")
    samples = checkpoint.manifest["train_samples"]
    try:
        config = TrainConfig.from_dict(checkpoint.manifest["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint.path / MANIFEST}: its config is not valid ({error})") from error
    full, rest = divmod(samples, config.data.batch_size)
    per_epoch, epochs = full + (rest > 0 and not config.data.drop_last), config.epochs
    if not state["epoch"] * per_epoch <= state["step"] <= min(state["epoch"] + 1, epochs) * per_epoch:
        raise ValueError(
            f"{file}: step {state['step']} is not in epoch {state['epoch']} of {epochs}, each of {per_epoch} steps"
        )
    if len(state["history"]) != state["epoch"]:
        raise ValueError(f"{file}: history has {len(state['history'])} records, expected one for each epoch")
    for record in state["history"]:
        check_type(f"{file}: history", record, dict)
        for name, value in record.items():
            check_type(f"{file}: history", name, str)
            if not (isinstance(value, float) and not math.isfinite(value)):  # a loss that is not finite is recorded
                check_number(f"{file}: history.{name}", value)


@dataclass
class RunState:
    """All of a run that changes while it trains."""

    distiller: Distiller
    step: TrainStep
    meter: Meter
    progress: Progress

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules whose state dicts are files of a checkpoint, by the file's name."""
        found = {STUDENT: self.distiller.student.model, LOSS: self.distiller.objective}
        return found if self.step.ema is None else {**found, EMA: self.step.ema.module}

    def saved_state(self, generators: list[dict[str, Any]]) -> SavedState:
        """The content of ``state.pt``; ``generators``: the ``rng_state`` of every rank."""
        return SavedState(
            **vars(self.progress),
            meter=self.meter.state_dict(),
            **self.step.state_dict(),
            rng=generators[0],
            rng_of_other_ranks=generators[1:],
        )

    def restore(self, checkpoint: Checkpoint, seed: int, rank: int) -> None:
        """Put everything back as it was in the checkpoint. CheckpointError when it does not fit.

        A rank that the saved run did not have seeds its generators anew.
        """
        for name, module in self.modules.items():
            if name not in checkpoint.weights:
                raise CheckpointError(f"{checkpoint.path}: has no {name}, expected the moving average of the student")
            load_into(module, checkpoint.weights[name], checkpoint.path / name, cast=False)
        try:
            saved = SavedState(**{part.name: checkpoint.state[part.name] for part in fields(SavedState)})
            self.step.load_state_dict(checkpoint.state, saved.step)
            self.meter.load_state_dict(saved.meter)
            self.progress = Progress(**{part.name: getattr(saved, part.name) for part in fields(Progress)})
            generators = [saved.rng, *saved.rng_of_other_ranks]
            if rank < len(generators):
                restore_rng(generators[rank], self.step.device)
            else:
                seed_everything(mix_seed(seed, rank, saved.step))
        # Libraries raise all kinds of exceptions on a state that is not theirs.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            kind = "" if type(error) in (ValueError, TypeError) else f"{type(error).__name__}: "
            raise CheckpointError(f"{checkpoint.path / STATE}: is not a training state ({kind}{reason})") from error
