"""What a term of the objective is, and the losses as terms: modules that read what student and teacher give.

A term is called as ``term(student: ModelOutput, teacher: ModelOutput | None, labels)`` and returns named scalars before
weights. These attributes, of its class or of a user's module or function, say more about it; all may be left out:

    needs_teacher, needs_features   whether it reads them; True by default
    needs_maps                      whether it reads the last feature maps; False by default
    needs_classes                   whether it reads logits, classifiers or labels, which embeddings do not have; False
                                    by default, but True for a ``LossTerm``
    additions                       names of what else it reads of a batch, as keyword arguments: those of
                                    ``fastkd.trainer.data.additions``; ``strong`` is then the student's output for the
                                    strong view, and ``strong_teacher`` the teacher's
    same_on_ranks                   names of buffers that all ranks change alike, so that they are not sent
    warmth                          a factor of its weight, which may change from epoch to epoch; 1 by default
    needs_taps                      whether it reads the intermediate maps, ``ModelOutput.taps``; False by default
    needs_preactivations            whether it reads these before their activations, too; False by default
    needs_two_rows                  whether a batch of one row is an error; False by default
    unlabelled                      a term that has it is told whether labels may be -1; it then gets them as they are,
                                    and not with the teacher's classes in their place
    spans_ranks                     whether it returns this rank's part of a loss over the global batch, which contains
                                    the weight W n / N; by default False, and the objective multiplies by it

and these methods: ``set_epoch(epoch)`` is called before every epoch; ``scalars()`` gives further values to log;
``columns_sent(classes)`` says how many numbers per row go to the other ranks, for the memory estimate; ``fuses_with``
and ``fused`` make a pair of terms one computation, see ``KDTerm``; ``extend_student`` of a class gives the student
layers of the method, see ``SimKDTerm``. Each ``needs_...`` may be a function of the ObjectiveConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.trainer.models.features import ModelOutput, ModelShapes
from fastkd.trainer.objective.config import ObjectiveConfig

TermFunction = Callable[..., Mapping[str, Tensor]]  # (student, teacher, labels), and its additions as keywords
# (config, shapes of the student, of the teacher) -> term; without a teacher both shapes are the student's.
TermBuilder = Callable[[ObjectiveConfig, ModelShapes, ModelShapes], nn.Module]


class LossTerm(nn.Module):
    """A module of ``fastkd.losses`` as a term: ``build`` makes it, ``inputs`` are its arguments.

    With ``warmup_epochs`` the weight of the term rises until the epoch of this number. ``first_epoch`` is the number of
    the first epoch there.
    """

    needs_classes = True
    epoch = 0
    warmup_epochs = 0
    first_epoch = 1

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()
        self.loss = self.build(config, student, teacher)

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> Any:
        raise NotImplementedError

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        return one_dtype(student.logits, teacher.logits)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        assert teacher is not None
        return self.loss(*self.inputs(student, teacher, labels))

    def set_epoch(self, epoch: int) -> None:
        """Called by the loop before every epoch, counted from 0."""
        self.epoch = epoch

    @property
    def warmth(self) -> float:
        """The factor of the weight in this epoch."""
        return min((self.epoch + self.first_epoch) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0

    def for_layers(self, *features: Tensor) -> tuple[Tensor, ...]:
        """The features in the dtype of the loss's layers; autocast converts by itself, all but float64."""
        dtype = next((parameter.dtype for parameter in self.parameters()), features[0].dtype)
        is_cast = [torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64 for x in features]
        return tuple(x if cast else x.to(dtype) for x, cast in zip(features, is_cast, strict=True))


class RelationalTerm(LossTerm):
    """A loss over the rows of all ranks, or, with ``group="local"``, over those of each rank alone."""

    @property
    def spans_ranks(self) -> bool:
        """The loss of all ranks' rows is the same on every rank. That of a rank's own rows counts as a mean."""
        return self.loss.group != "local"


class CallableTerm(nn.Module):
    """A user's plain function as a term."""

    def __init__(self, function: TermFunction) -> None:
        super().__init__()
        self.function = function
        self.needs_teacher = getattr(function, "needs_teacher", True)
        self.spans_ranks = getattr(function, "spans_ranks", False)
        self.additions = getattr(function, "additions", ())

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, **additions: Any
    ) -> Mapping[str, Tensor]:
        return self.function(student, teacher, labels, **additions)


def one_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are when their dtypes agree, else both in float32."""
    return (student, teacher) if student.dtype == teacher.dtype else (student.float(), teacher.float())


def as_linear(classifier: nn.Module | None) -> Any:
    """A classifier that is a 1x1 convolution as the pair (weight, bias); others as they are."""
    if isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1) and classifier.groups == 1:
        return classifier.weight.flatten(1), classifier.bias
    return classifier
