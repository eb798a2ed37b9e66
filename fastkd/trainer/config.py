"""The configuration of a run: a dataclass of dataclasses, and its JSON form."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from fastkd.trainer.data.config import DataConfig, check_seed
from fastkd.trainer.imports import current_name
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.optim import OptimConfig
from fastkd.validate import check_choice, check_int, check_number, check_type

# What may differ between a run and its resumption: nothing that changes what it computes. The teacher's file and the
# data may have moved, because hashes of the weights and of the labels are compared. ``chunks`` only changes the order
# of sums; it may differ so that fewer GPUs can take over. With more epochs the schedule follows the new total.
FREE_TO_CHANGE = (
    *("run_dir", "resume", "resume_or_start", "keep", "max_skipped", "tensorboard", "progress", "quiet", "device"),
    *("log_every", "save_every_steps", "save_every_epochs", "chunks", "teacher.weights", "teacher.min_accuracy"),
    *("data.options.root", "data.options.max_broken", "data.eval_batch_size", "data.num_workers", "epochs", "track"),
)

# Settings that earlier versions saved under another name: the old path, and the name of the field now.
RENAMED = {"objective.msdcrd.sample_weight": "sample_term_weight"}


@dataclass(kw_only=True, frozen=True)
class TrainConfig:
    """All settings of one training run::

        TrainConfig(
            student=ModelConfig(name="timm:resnet18", num_classes=100),
            teacher=ModelConfig(name="timm:resnet50", num_classes=100, weights="runs/teacher"),
            data=DataConfig(name="cifar", options={"root": "data"}),
            objective=ObjectiveConfig(terms="dcd+kd"),
            run_dir="runs/student",
        )

    ``student`` / ``teacher`` may be None when modules are given to ``train`` instead. ``run_dir`` is the run folder;
    None writes nothing. ``resume`` goes on with the run in it. So does ``resume_or_start`` if there is a run, and so
    does a restart by torchrun. A checkpoint is written at the start, at the end, on SIGTERM, every ``save_every_steps``
    steps and every ``save_every_epochs`` epochs (0: not); the last ``keep`` and the best stay. ``log_every`` is in
    steps, ``eval_every`` in epochs (the last epoch is always evaluated). ``device`` is ``auto`` (CUDA when present) or
    a torch device. ``progress`` shows a bar on terminals; ``quiet`` prints nothing. ``track`` sends the records to
    Weights & Biases or MLflow (``fastkd.trainer.callbacks``); ``tensorboard`` writes them for TensorBoard.

    ``chunks`` splits each rank's batch into this many pieces to save activation memory; the gradient stays exact.
    ``ema`` is the decay of a moving average of the student, which is then evaluated in its place. ``max_skipped`` is
    how many steps whose loss or gradient is not finite are left out before the run ends with an error.

    ``channels_last`` is the memory layout of both models and their input. ``compile`` runs both models through
    ``torch.compile``. ``sync_batchnorm`` normalises with the rows of all ranks; it needs several ranks on CUDA.
    """

    student: ModelConfig | None = None
    teacher: ModelConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    epochs: int = 30
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    sync_batchnorm: bool = False
    device: str = "auto"
    run_dir: str | None = None
    resume: bool = False
    resume_or_start: bool = False
    chunks: int = 1
    ema: float | None = None
    max_skipped: int = 10
    save_every_steps: int = 0
    save_every_epochs: int = 1
    keep: int = 2
    log_every: int = 10
    eval_every: int = 1
    tensorboard: bool = True
    track: Literal["wandb", "mlflow"] | None = None
    progress: bool = True
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "chunks", "keep", "log_every", "eval_every"):
            check_int(name, getattr(self, name), 1)
        for name in ("max_skipped", "save_every_steps", "save_every_epochs"):
            check_int(name, getattr(self, name), 0)
        for name, part, kind in (
            ("data", self.data, DataConfig),
            ("objective", self.objective, ObjectiveConfig),
            ("optim", self.optim, OptimConfig),
        ):
            check_type(name, part, kind)
        for name, model in (("student", self.student), ("teacher", self.teacher)):
            check_type(name, model, (ModelConfig, type(None)))
        if self.student is not None:
            check_choice("student.dtype", self.student.dtype, ("fp32",))
            if self.student.min_accuracy is not None:
                raise ValueError(f"student.min_accuracy: got {self.student.min_accuracy}, expected None")
        check_seed("seed", self.seed)
        check_choice("precision", self.precision, ("fp32", "bf16", "fp16"))
        check_type("device", self.device, str)
        if self.track is not None:
            check_choice("track", self.track, ("wandb", "mlflow"))
        if self.ema is not None:
            check_number("ema", self.ema, 0.0, 1.0, exclusive=True)
        for name in (
            *("resume", "resume_or_start", "channels_last", "compile", "sync_batchnorm"),
            *("tensorboard", "progress", "quiet"),
        ):
            check_type(name, getattr(self, name), bool)
        for name in ("resume", "resume_or_start"):
            if getattr(self, name) and self.run_dir is None:
                raise ValueError(f"run_dir: got None with {name}=True, expected the folder of the run to resume")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, lists and scalars."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of ``to_dict``; ValueError for unknown keys."""
        return _build(cls, values, "config")


def differences(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """``name: saved -> current`` of every setting that differs and is not in ``FREE_TO_CHANGE``."""
    found = []
    saved = {RENAMED.get(prefix + key, key): value for key, value in saved.items()}
    for key in sorted({*saved, *current}):
        if prefix + key in FREE_TO_CHANGE:
            continue
        old, new = (_renamed(source.get(key)) for source in (saved, current))
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return found


def _renamed(value: Any) -> Any:
    """The present name of an object whose module has moved since the run began; other values as they are."""
    return current_name(value) if isinstance(value, str) else value


def without_initial_weights(config: TrainConfig) -> TrainConfig:
    """For a resumed run: the student's weights come from the checkpoint, its first ones may be gone by now."""
    if config.student is None:
        return config
    return dataclasses.replace(config, student=dataclasses.replace(config.student, weights=None, pretrained=False))


def _plain(value: Any) -> Any:
    """Tuples to lists, as JSON has it; TypeError for what JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"config: got {value!r} of type {type(value).__name__}, expected numbers, strings, lists and dicts")


def _build(kind: Any, values: Any, name: str) -> Any:
    """The dataclass ``kind`` out of ``values``, its dataclass fields built in turn."""
    if not isinstance(values, dict):
        raise ValueError(f"{name}: got {values!r}, expected the fields of {kind.__name__}")
    values = {RENAMED.get(f"{name}.{key}".removeprefix("config."), key): value for key, value in values.items()}
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{name}: got unknown fields {unknown}, expected some of {sorted(hints)}")
    arguments = {}
    for key, value in values.items():
        hint = hints[key]
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        nested = next((member for member in members if dataclasses.is_dataclass(member)), None)
        if nested is not None and value is not None:
            value = _build(nested, value, f"{name}.{key}")
        elif isinstance(value, list):
            value = tuple(value)
        arguments[key] = value
    return kind(**arguments)
