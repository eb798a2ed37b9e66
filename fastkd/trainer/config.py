"""The configuration of a run: a dataclass of dataclasses, and its JSON form."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fastkd.trainer.data.config import DataConfig, check_seed
from fastkd.trainer.data.options import with_defaults
from fastkd.trainer.imports import current_name
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.optim import OptimConfig
from fastkd.validate import check_choice, check_int, check_number, check_type

# What may differ between a run and its resumption: nothing that changes what it computes. The teacher's file and the
# data may have moved, because hashes of the weights and of the labels are compared. What the run began with may have
# moved, because it is in the checkpoint. ``chunks`` only changes the order of sums; it may differ so that fewer GPUs
# can take over. With more epochs the schedule follows the new total.
FREE_TO_CHANGE = (
    *("run_dir", "resume", "resume_or_start", "keep", "max_skipped", "tensorboard", "progress", "quiet", "device"),
    *("log_every", "save_every_steps", "save_every_epochs", "chunks", "teacher.weights", "teacher.min_accuracy"),
    *("data.options.root", "data.options.max_broken", "data.options.download", "data.eval_batch_size"),
    *("data.num_workers", "epochs", "track", "rank_timeout", "student.weights", "objective.ft.paraphraser"),
)

# Settings that the data decide where they are None; what they decided is saved.
FROM_THE_DATA = ("student.num_classes", "teacher.num_classes", "objective.crd.samples")

# Settings that earlier versions saved under another name: the old path, and the name of the field now.
RENAMED = {"objective.msdcrd.sample_weight": "sample_term_weight"}


# The student's own loss: the term that is part of every sum which does not name it.
OWN_TERM = {"classification": "ce", "detection": "detector", "embeddings": None}


@dataclass(kw_only=True, frozen=True)
class DetectionConfig:
    """Settings of detection alone.

    Attributes:
        regions: which of the student's sampled regions of interest are distilled: ``all``, those that match an object
            (``foreground``), or those that match none (``background``). The detector's own loss always takes all.

    Example:
        >>> DetectionConfig(regions="foreground")
        DetectionConfig(regions='foreground')
    """

    regions: Literal["all", "foreground", "background"] = "all"

    def __post_init__(self) -> None:
        check_choice("detection.regions", self.regions, ("all", "foreground", "background"))


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

    Attributes:
        task: what a row of the losses is: an image with a class (``classification``), a region of an image
            (``detection``), or any input without a label (``embeddings``).
        detection: settings of that task.
        student: the model that is trained. None if a module is given to ``train`` instead.
        teacher: the trained model that it learns from. None if there is none, or if a module is given to ``train``.
        data: what it is trained on.
        objective: the loss.
        optim: the optimiser and the learning rate.
        epochs: passes over the training set.
        seed: of the weights, the order of the data and the augmentation.
        precision: what the models are computed in. Weights and losses stay in fp32.
        channels_last: the memory layout of both models and their input, which GPUs compute convolutions faster in.
        compile: run both models through ``torch.compile``.
        sync_batchnorm: normalise with the rows of all ranks. Needs several ranks on CUDA.
        device: ``auto`` (CUDA where there is one) or a device of torch, such as ``cpu`` or ``cuda:1``.
        run_dir: the folder that the run is written to. None writes nothing.
        resume: go on with the run in ``run_dir``. A restart by torchrun does so by itself.
        resume_or_start: go on with the run in ``run_dir`` if there is one, else begin it.
        chunks: split each rank's batch into this many pieces, to save activation memory. The gradient stays exact.
        ema: decay of a moving average of the student, which is then evaluated in its place.
        max_skipped: so many steps whose loss or gradient is not finite are left out. One more ends the run.
        save_every_steps: write a checkpoint every so many steps. 0: not. One is written at the start, at the end and
            when a signal stops the run, in any case.
        save_every_epochs: write a checkpoint every so many epochs. 0: not.
        keep: so many of the last checkpoints stay, and the best.
        log_every: write a record every so many steps.
        eval_every: evaluate every so many epochs, and after the last.
        tensorboard: write curves for TensorBoard.
        track: send the records to ``wandb`` (Weights & Biases) or ``mlflow`` too. None sends nothing.
        rank_timeout: how long a rank waits for the others before the run ends, in seconds. It must be longer than what
            one rank does alone: a download, a checkpoint on a slow disk.
        progress: show a bar on terminals.
        quiet: print nothing.
    """

    task: Literal["classification", "detection", "embeddings"] = "classification"
    detection: DetectionConfig = field(default_factory=DetectionConfig)
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
    rank_timeout: float = 600.0
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
            ("detection", self.detection, DetectionConfig),
        ):
            check_type(name, part, kind)
        for name, model in (("student", self.student), ("teacher", self.teacher)):
            if isinstance(model, torch.nn.Module):  # which would fill the screen
                kind = type(model).__name__
                raise TypeError(
                    f"{name}: got a module ({kind}), expected a ModelConfig; or train(config, {name}=module)"
                )
            check_type(name, model, (ModelConfig, type(None)))
            if model is not None and model.num_classes == 0 and self.task != "embeddings":
                raise ValueError(f"{name}.num_classes: got 0 with the task {self.task!r}, expected at least 1")
        if self.student is not None:
            check_choice("student.dtype", self.student.dtype, ("fp32",))
            if self.student.fold:
                raise ValueError("student.fold: got True, expected False: its batch norms are trained")
            if self.student.min_accuracy is not None:
                raise ValueError(f"student.min_accuracy: got {self.student.min_accuracy}, expected None")
        self._own_term()
        self._check_mix()
        check_seed("seed", self.seed)
        check_number("rank_timeout", self.rank_timeout, 1, 604800)  # a week
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

    def _own_term(self) -> None:
        """Let the sum of terms begin with the loss of the task, where that is not cross-entropy."""
        check_choice("task", self.task, tuple(OWN_TERM))
        own, text = OWN_TERM[self.task], self.objective.terms
        if own == "ce":
            return
        if "ce" not in (names := re.findall(r"[A-Za-z_]\w*", text)):
            text = f"0*ce + {text}"
        if own is not None and own not in names:
            text = f"{own} + {text}"
        if text != self.objective.terms:
            object.__setattr__(self, "objective", dataclasses.replace(self.objective, terms=text))
        if "ce" in self.objective.weights:
            has = "has no labels" if own is None else f"has a loss of its own, {own!r}"
            raise ValueError(f"objective.terms: got 'ce' with the task {self.task!r}, which {has}; leave it out")

    def _check_mix(self) -> None:
        """Mixed batches have class probabilities, and no labels of single samples."""
        msdcrd, lskd = self.objective.msdcrd, self.objective.lskd
        readers = dict.fromkeys(("pckd", "dkd", "wsld", "ipwd", "mlkd", "ce_strong", "crd"), True)
        readers |= {
            "msdcrd": msdcrd.positives == "label" or msdcrd.selection == "image_class",
            "lskd": lskd.loss == "dkd",
        }
        for name in ("mixup", "cutmix"):
            term = next((term for term in self.objective.weights if readers.get(term, False)), None)
            if getattr(self.data, name) and term is not None:
                got = getattr(self.data, name)
                raise ValueError(f"data.{name}: got {got} with the term {term!r}, which reads labels; expected 0")
            if getattr(self.data, name) and self.data.unlabelled:
                raise ValueError(f"data.{name}: got {getattr(self.data, name)} with data.unlabelled, expected 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, lists and scalars."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of ``to_dict``; ValueError for unknown keys."""
        return _build(cls, values, "config")


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """``name: saved -> current`` of every setting that differs and is not in ``FREE_TO_CHANGE``.

    A setting that the saved config lacks, because an earlier version wrote it, has its default.
    """
    return _differences(_complete(TrainConfig, saved, ""), _complete(TrainConfig, current, ""), "")


def _differences(saved: dict[str, Any], current: dict[str, Any], prefix: str) -> list[str]:
    found = []
    for key in sorted({*saved, *current}):
        if prefix + key in FREE_TO_CHANGE or (prefix + key in FROM_THE_DATA and current.get(key) is None):
            continue
        old, new = (_renamed(source.get(key)) for source in (saved, current))
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return found


def _complete(kind: Any, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """``values`` for the dataclass ``kind`` with present names, and with the defaults of the settings that it lacks."""
    values = {RENAMED.get(prefix + key, key): value for key, value in values.items()}
    for part in dataclasses.fields(kind):
        if part.default is not dataclasses.MISSING:
            values.setdefault(part.name, _plain(part.default))
        nested = _nested(typing.get_type_hints(kind)[part.name])
        if nested is not None and part.default_factory is nested:  # options of a method that did not exist then
            values.setdefault(part.name, {})
        if nested is not None and isinstance(values.get(part.name), dict):
            values[part.name] = _complete(nested, values[part.name], f"{prefix}{part.name}.")
    if kind is DataConfig:
        values["options"] = with_defaults(values.get("name"), values.get("options"))
    return values


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


def _nested(hint: Any) -> Any:
    """The dataclass that a field of this type holds, None if it holds none."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((member for member in members if dataclasses.is_dataclass(member)), None)


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
        nested = _nested(hints[key])
        if nested is not None and value is not None:
            value = _build(nested, value, f"{name}.{key}")
        elif isinstance(value, list):
            value = tuple(value)
        arguments[key] = value
    return kind(**arguments)
