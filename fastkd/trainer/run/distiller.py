"""Student, frozen teacher and objective in one module, and the part of it that is trained."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.imports import import_object
from fastkd.trainer.models.build import ModelConfig, Normalization, build_model, is_detector
from fastkd.trainer.models.extended import ExtendedModel, extended_like
from fastkd.trainer.models.features import FeatureModel, ModelOutput, ModelShapes, are_bytes
from fastkd.trainer.models.fold import folded
from fastkd.trainer.objective.objective import Objective, extended_student, needs
from fastkd.trainer.objective.terms.base import TermFunction
from fastkd.trainer.objective.terms.maps import FTTerm
from fastkd.trainer.run.accumulate import in_chunks, recomputed
from fastkd.trainer.run.saved.checkpoint import LOSS, find_checkpoint, find_weights
from fastkd.trainer.tasks.base import Task, find_task
from fastkd.trainer.tasks.classification import rows_of_images


class FrozenModel(nn.Module):
    """A model that stays in eval mode and without gradient, whatever is called on it or on a module that holds it.

    It may have been trained with another normalisation than the student: see ``FeatureModel.take_images``.
    """

    def __init__(self, model: FeatureModel) -> None:
        super().__init__()
        self.model = model
        # What ``forward`` calls: the model itself, or its folded copy. The tuple hides the copy from state dicts.
        self._runs = (model,)
        # Listed once: the walk through a model's modules costs more than a look at each.
        self._every = tuple(model.modules())
        self.train(False)
        self.requires_grad_(False)

    def fold(self, images: Tensor) -> str:
        """From now on compute with a copy whose batch norms are folded, if there can be one; returns a line about it.

        The model and its weights stay as they are. ``images``: see ``folded``.
        """
        try:
            copy, count = folded(self.model, images)
        except ValueError as error:
            return f"teacher: its batch norms are not folded: {error}"
        self._runs = (copy,)
        return f"teacher: {count} batch norms are folded into convolutions"

    @property
    def computing(self) -> FeatureModel:
        """The module that computes: ``model``, or its folded copy."""
        return self._runs[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to`` calls: a folded copy goes where the model goes."""
        if self.computing is not self.model:
            self.computing._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Stays without gradient."""
        return super().requires_grad_(False)

    # no_grad, not inference_mode: the outputs are saved for the backward of the losses.
    @torch.no_grad()
    def forward(self, images: Any) -> ModelOutput:
        """The model's output, without a graph."""
        self._stay_frozen()
        return self.computing(images)

    @torch.no_grad()
    def finish(self, features: Tensor) -> ModelOutput:
        """The output that belongs to the features [B, D], of which only the classifier is run."""
        self._stay_frozen()
        return self.computing.finish(features)

    def _stay_frozen(self) -> None:
        # Someone may have called train() on the wrapped model itself, or on one of its batch norms.
        if any(module.training for module in self._every):
            self.model.eval()


class Trained(nn.Module):
    """The part of a distiller that is trained: student and objective. DistributedDataParallel wraps this module.

    The teacher is called here, since it may look at what the student found, but it is no part of the module: its
    parameters and buffers are the same on every rank and never change.
    """

    def __init__(self, distiller: Distiller, task: Task, chunks: int = 1) -> None:
        """``chunks``: how many parts of the images go through a model one at a time, see ``accumulate``."""
        super().__init__()
        self.student, self.objective = distiller.student, distiller.objective
        self.task, self.chunks = task, chunks
        self._teachers = (distiller.teacher,)  # in a tuple, which no state dict looks into

    def forward(self, batch: Any, rank_weight: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss of a batch of the task, and its named terms. ``rank_weight``: see ``Objective.forward``."""
        teach = partial(self._teach, features=_of_a_cache(batch))
        rows = self.task.forward(self._learn, teach, batch, self.objective.additions)
        weight = rank_weight if rows.weight is None else rows.weight
        given = (rows.student, rows.teacher, rows.labels, weight, rows.additions)
        return self.objective(*given, image_weight=rank_weight, missing=rows.missing)

    def _learn(self, images: Any) -> ModelOutput:
        if self.chunks == 1:
            return self.student(images)
        return in_chunks(lambda part: recomputed(self.student, part), images, self.chunks)

    def _teach(self, images: Any, features: Tensor | None = None) -> ModelOutput | None:
        (teacher,) = self._teachers
        if teacher is None or features is None:
            return None if teacher is None else in_chunks(teacher, images, self.chunks)
        return in_chunks(teacher.finish, features, self.chunks)


def _of_a_cache(batch: Any) -> Tensor | None:
    """The teacher's features in a batch (images, labels, additions), where they come from a cache."""
    additions = batch[2] if isinstance(batch, tuple | list) and len(batch) == 3 else None
    return additions.get("teacher_features") if isinstance(additions, dict) else None


class Distiller(nn.Module):
    """``distiller(images, labels)`` -> (total loss, named terms before weights, detached).

    A loop of your own needs no more than this module and an optimiser over the parameters that require a gradient::

        objective = Objective(ObjectiveConfig(terms="kd"), shapes, shapes)  # ModelShapes(features=64, classes=10)
        distiller = Distiller(FeatureModel(student), FeatureModel(teacher), objective)
        loss, terms = distiller(images, labels)
    """

    def __init__(
        self, student: FeatureModel, teacher: FeatureModel | None, objective: Objective, classes: int = 0
    ) -> None:
        """``classes``: the width of the student's logits where it is known; the trainer counts per class then."""
        super().__init__()
        self.classes = classes
        self.student = student
        self.teacher = None if teacher is None else FrozenModel(teacher)
        self.objective = objective

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Sets it for the student and the objective; the teacher stays without gradient."""
        super().requires_grad_(requires_grad)
        if self.teacher is not None:
            self.teacher.requires_grad_(False)
        return self

    def teach(self, images: Tensor) -> ModelOutput | None:
        """The teacher's output, without a graph; None without a teacher."""
        return None if self.teacher is None else self.teacher(images)

    def begin_epoch(self, epoch: int) -> None:
        """Switch to training mode and tell the objective's terms the epoch, counted from 0."""
        self.train()
        self.objective.set_epoch(epoch)

    def scalars(self) -> dict[str, float]:
        """The objective's further values (tau and scale) on the host."""
        return {name: value.item() for name, value in self.objective.scalars().items()}

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        rank_weight: float = 1.0,
        additions: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss and its named terms.

        ``rank_weight``: see ``Objective.forward``. ``additions``: what ``fastkd.trainer.data.additions`` makes.
        """
        rows = rows_of_images(self.student, self.teach, (images, labels, additions or {}), self.objective.additions)
        return self.objective(rows.student, rows.teacher, rows.labels, rank_weight, rows.additions)


def load_paraphraser(distiller: Distiller, path: str | None) -> list[str]:
    """Give the term ``ft`` the paraphraser that another run, or a file, has; returns a line for the user.

    Raises:
        ValueError: ``path`` is None.
        CheckpointError: there is no paraphraser, or one for other maps.
    """
    term = dict(distiller.objective.terms.items()).get("ft")
    if not isinstance(term, FTTerm):
        return []
    if path is None:
        raise ValueError(
            "ft.paraphraser: got None, expected the run that trained it, with the terms '0*ce + paraphraser' "
            "(--objective.ft.paraphraser RUN)"
        )
    file = find_checkpoint(path) / LOSS if Path(path).is_dir() else Path(path)
    term.load_paraphraser(file)
    return [f"paraphraser: {file}"]


def weights_hash(model: nn.Module) -> str:
    """The sha256 of a model's weights: of name, dtype, shape and bytes of every tensor, in the order of the names.

    Example:
        >>> weights_hash(torch.nn.Linear(2, 2)) == weights_hash(torch.nn.Linear(2, 2))  # two random initialisations
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # Through bytes, for dtypes that numpy lacks (bf16).
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build_distiller(
    config: TrainConfig,
    images: Any,
    normalization: Normalization | None = None,
    *,
    task: Task | None = None,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    terms: Mapping[str, nn.Module | TermFunction] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Distiller:
    """The distiller of ``config``; given modules replace what the config would build.

    ``tell`` gets a line for each model whose weights were read.

    ``images`` is the ``task``'s sample: [B, C, H, W], a small batch, for classification, which is the default. Where it
    is of bytes, both models normalise such images from now on, as the ``normalization`` of the data says. One forward
    pass of each model tells its feature dimension and its classes. A second one finds its last map if a term needs it.

    Raises:
        ValueError: no student; a term needs a teacher and there is none, or the reverse; a teacher without weights;
            student and teacher with different numbers of classes, or with a parameter in common.
        CheckpointError: weights that are missing, damaged or do not fit.
    """
    reads = {
        "feature_map": needs("maps", config.objective, terms),
        "taps": needs("taps", config.objective, terms),
        "preactivations": needs("preactivations", config.objective, terms),
    }
    optional = not (any(reads.values()) or needs("features", config.objective, terms))
    task = task or find_task(config)
    student_model = _feature_model("student", config.student, student, task, optional, tell)
    if student_model is None:
        raise ValueError("student: got None, expected config.student or a module")
    shapes = _measured("student", student_model, images, normalization, reads)
    wanted = needs("teacher", config.objective, terms)
    if wanted != (config.teacher is not None or teacher is not None):
        has = "needs a teacher but there is none; give --teacher.name and --teacher.weights, or --no-teacher"
        if not wanted:
            has = "has no term that uses the teacher that is given; leave it out with --no-teacher"
        raise ValueError(f"teacher: objective.terms={config.objective.terms!r} {has}")
    if not wanted:
        alone = Objective(config.objective, shapes, shapes, terms, unlabelled=config.data.unlabelled)
        return Distiller(student_model, None, alone, shapes.classes)
    if teacher is None and config.teacher is not None and not (config.teacher.weights or config.teacher.pretrained):
        raise ValueError("teacher.weights: got None, expected trained weights (or pretrained=True, or a module)")
    teacher_model = _feature_model("teacher", config.teacher, teacher, task, optional, tell)
    assert teacher_model is not None
    _check_nothing_shared(student_model, teacher_model)
    teacher_shapes = _measured("teacher", teacher_model, images, normalization, reads)
    if shapes.classes != teacher_shapes.classes:
        raise ValueError(f"teacher: has {teacher_shapes.classes} classes, expected the student's {shapes.classes}")
    extended = extended_student(config.objective, student_model, teacher_model, shapes, teacher_shapes)
    if extended is not None:
        student_model = FeatureModel(
            extended, feature_map="layers", taps=[f"model.{name}" for name in student_model.tap_names]
        )
        shapes = _measured("student", student_model, images, normalization, reads)
    objective = Objective(config.objective, shapes, teacher_shapes, terms, unlabelled=config.data.unlabelled)
    return Distiller(student_model, teacher_model, objective, shapes.classes)


def _check_nothing_shared(student: FeatureModel, teacher: FeatureModel) -> None:
    """Freezing the teacher would freeze what the student shares with it."""
    frozen = {id(parameter) for parameter in teacher.model.parameters()}
    shared = [name for name, parameter in student.model.named_parameters() if id(parameter) in frozen]
    if shared:
        more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
        raise ValueError(f"teacher: shares parameters with the student, expected its own: {shared[:5]}{more}")


def takes_classes(config: ModelConfig) -> bool:
    """Whether the builder of this model has an argument ``num_classes``. Those that are found by a name have it."""
    source = config.name.rpartition(":")[0]
    if is_detector(config.name) or source in ("timm", "torchvision", "cifar", ""):
        return True
    try:
        return "num_classes" in inspect.signature(import_object(config.name, "model.name")).parameters
    except TypeError:
        return False  # no callable
    except ValueError as error:
        if str(error).startswith("no signature"):  # a function that is not written in Python
            return False
        raise


def _built(role: str, config: ModelConfig) -> nn.Module:
    """The model. What is wrong with its settings is told by the names of ``role``'s flags."""
    try:
        return build_model(config, role)
    except (ValueError, TypeError) as error:
        if not isinstance(error, TypeError) or "argument" not in str(error):
            raise
        raise ValueError(
            f"{role}.options: {config.name!r} with {config.options}: {error}; set all of them with "
            f"--{role}.options '{{...}}'"
        ) from error


def _measured(
    role: str, model: FeatureModel, images: Any, normalization: Normalization | None, reads: dict[str, bool]
) -> ModelShapes:
    """The model's shapes. ValueError for images that it cannot take. It normalises bytes from now on."""
    model.take_images("bytes" if are_bytes(images) else None, normalization)
    try:
        return model.measure(images, **reads)
    except RuntimeError as error:
        if not isinstance(images, Tensor) or images.ndim < 2:
            raise
        shape = " x ".join(map(str, images.shape[1:]))
        hint = f"other channels: --{role}.options '{{\"in_chans\": {images.shape[1]}}}' with a timm model"
        if are_bytes(images) and normalization is None:
            hint = "bytes need an attribute 'normalization' of the data set, (means, standard deviations)"
        raise ValueError(
            f"{role}: {type(model.model).__name__} cannot take the data's images of {shape} "
            f"({' '.join(str(error).split())}); {hint}"
        ) from error


def _feature_model(
    role: str,
    config: ModelConfig | None,
    module: nn.Module | None,
    task: Task,
    optional: bool,
    tell: Callable[[str], None],
) -> FeatureModel | None:
    """The given module, or the configured one with its weights; None when there is neither."""
    names: dict[str, Any] = {}
    if config is not None:
        names = {name: getattr(config, name) for name in ("classifier", "feature_map", "taps")}
    if module is not None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{role}: got {type(module).__name__}, expected an nn.Module")
        return module if isinstance(module, FeatureModel) else task.wrap(module, names, optional)
    if config is None:
        return None
    model = _built(role, config)
    if config.weights is not None:
        found = find_weights(config.weights)
        model = extended_like(model, found.state, found.path)
        tell(found.load_into(model, role))
    if isinstance(model, ExtendedModel):  # the names are those of the model in it; it knows its classifier
        names = {"taps": config.taps and tuple(f"model.{name}" for name in config.taps)}
    return task.wrap(model, names, optional)
