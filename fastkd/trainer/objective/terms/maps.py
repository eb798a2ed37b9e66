"""The terms of the classical methods that read feature maps, each a loss on what both models give."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses import (
    ABLoss,
    ATLoss,
    FitNetLoss,
    FSPLoss,
    FTLoss,
    NORMLoss,
    NSTLoss,
    OFDLoss,
    Paraphraser,
    ReviewKDLoss,
    SRRLLoss,
    VIDLoss,
    activation_margin,
)
from fastkd.losses.maps.match import match
from fastkd.losses.pairs import in_loss_dtype
from fastkd.trainer.models.extended import extend_for_norm, extend_for_simkd
from fastkd.trainer.models.features import FeatureModel, ModelOutput, ModelShapes
from fastkd.trainer.models.maps import MapSource
from fastkd.trainer.models.taps import Taps, TapShapes
from fastkd.trainer.models.weights import load_into, read_weights
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.terms.base import LossTerm, TermBuilder, as_linear


class TapTerm(LossTerm):
    """A loss of the intermediate maps of both models, as many of each.

    ``of_student`` and ``of_teacher`` are the taps that the loss gets, and ``made_of`` builds the loss of their shapes.
    """

    name: str
    needs_features = False
    needs_classes = False
    needs_taps = True
    of_student: Literal["maps", "preactivations"] = "maps"
    of_teacher: Literal["maps", "preactivations"] = "maps"

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> Any:
        own, other = student.taps, teacher.taps
        assert own is not None
        assert other is not None
        if len(own.maps) != len(other.maps):
            raise ValueError(
                f"{self.name}: the student has {len(own.maps)} maps ({_described(own)}), the teacher "
                f"{len(other.maps)} ({_described(other)}), expected as many; name the layers of each with "
                "--student.taps and --teacher.taps"
            )
        try:
            return self.made_of(config, own, other)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{self.name}: {error}; the student's maps: {_described(own)}; the teacher's: {_described(other)}; "
                "for others give --student.taps and --teacher.taps"
            ) from None

    def made_of(self, config: ObjectiveConfig, student: TapShapes, teacher: TapShapes) -> Any:
        raise NotImplementedError

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        assert student.taps is not None
        assert teacher.taps is not None
        own, other = self.chosen(student.taps, self.of_student), self.chosen(teacher.taps, self.of_teacher)
        return list(self.for_layers(*own)), list(self.for_layers(*other))

    def chosen(self, taps: Taps, kind: str) -> tuple[Tensor, ...]:
        """The maps that the loss gets of one model."""
        maps: tuple[Tensor, ...] = getattr(taps, kind)
        return maps


class FitNetTerm(TapTerm):
    """``FitNetLoss`` on the maps of one stage."""

    name = "fitnet"

    def made_of(self, config: ObjectiveConfig, student: TapShapes, teacher: TapShapes) -> FitNetLoss:
        self.hint = config.fitnet.hint
        if self.hint > len(student.maps):
            raise ValueError(f"hint: got {self.hint}, expected at most {len(student.maps)}, the number of maps")
        return FitNetLoss((student.stem, *student.maps)[self.hint], (teacher.stem, *teacher.maps)[self.hint])

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        own, other = super().inputs(student, teacher, labels)
        return own[0], other[0]

    def chosen(self, taps: Taps, kind: str) -> tuple[Tensor, ...]:
        return ((taps.stem, *taps.maps)[self.hint],)


class ATTerm(TapTerm):
    """``ATLoss`` on the maps."""

    name = "at"

    def made_of(self, config: ObjectiveConfig, student: TapShapes, teacher: TapShapes) -> ATLoss:
        return ATLoss(**asdict(config.at))


class NSTTerm(TapTerm):
    """``NSTLoss`` on the maps, or on the last one."""

    name = "nst"

    def made_of(self, config: ObjectiveConfig, student: TapShapes, teacher: TapShapes) -> NSTLoss:
        self.first = 0 if config.nst.maps == "all" else -1
        return NSTLoss()

    def chosen(self, taps: Taps, kind: str) -> tuple[Tensor, ...]:
        return taps.maps[self.first :]


class FSPTerm(TapTerm):
    """``FSPLoss`` on the stem and the maps."""

    name = "fsp"

    def made_of(self, config: ObjectiveConfig, student: TapShapes, teacher: TapShapes) -> FSPLoss:
        widths = [[shape[0] for shape in (taps.stem, *taps.maps)] for taps in (student, teacher)]
        if widths[0] != widths[1]:
            raise ValueError(f"channels: got {widths[0]} of the student's stem and maps, expected the teacher's "
                             f"{widths[1]}")  # fmt: skip
        return FSPLoss()

    def chosen(self, taps: Taps, kind: str) -> tuple[Tensor, ...]:
        return taps.stem, *taps.maps


class VIDTerm(TapTerm):
    """``VIDLoss`` on the maps."""

    name = "vid"

    def made_of(self, config: ObjectiveConfig, student: TapShapes, teacher: TapShapes) -> VIDLoss:
        return VIDLoss(_channels(student.maps), _channels(teacher.maps), **asdict(config.vid))


class ABTerm(TapTerm):
    """``ABLoss`` on the maps before their activations."""

    name = "ab"
    needs_preactivations = True
    of_student = of_teacher = "preactivations"

    def made_of(self, config: ObjectiveConfig, student: TapShapes, teacher: TapShapes) -> ABLoss:
        return ABLoss(student.preactivations, teacher.preactivations, **asdict(config.ab))


class OFDTerm(TapTerm):
    """``OFDLoss`` on the maps before their activations, with the margins of the teacher's batch norms."""

    name = "ofd"
    needs_preactivations = True
    of_student = of_teacher = "preactivations"

    def made_of(self, config: ObjectiveConfig, student: TapShapes, teacher: TapShapes) -> OFDLoss:
        margins = []
        for layer, norm in zip(teacher.layers, teacher.norms, strict=True):
            weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
            if weight is None or bias is None:
                raise ValueError(f"margins: found no batch norm with weights before the teacher's map of {layer!r}")
            margin = activation_margin(weight, bias)
            margins.append(margin if margin.is_meta else margin.cpu())  # of a dry run, or with the loss's parameters
        return OFDLoss(_channels(student.preactivations), margins, **asdict(config.ofd))


class ReviewKDTerm(TapTerm):
    """``ReviewKDLoss``: the student's maps, the teacher's before their activations, and the pooled features of both.

    The features of a detector belong to regions, and are left out.
    """

    name = "reviewkd"
    needs_features = True
    needs_preactivations = True
    needs_two_rows = True  # of the batch norms behind the pooled features
    of_teacher = "preactivations"

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> ReviewKDLoss:
        self.options, self.features = config.reviewkd, (student.features, teacher.features)
        self.warmup_epochs, self.first_epoch = self.options.warmup_epochs, self.options.first_epoch
        loss: ReviewKDLoss = super().build(config, student, teacher)
        return loss

    def made_of(self, config: ObjectiveConfig, student: TapShapes, teacher: TapShapes) -> ReviewKDLoss:
        own, other = _channels(student.maps), _channels(teacher.preactivations)
        self.pooled = self.needs_two_rows = student.pooled
        if self.pooled:
            own, other = [*own, self.features[0]], [*other, self.features[1]]
        return ReviewKDLoss(own, other, self.options.width)

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        lists = super().inputs(student, teacher, labels)
        if not self.pooled:
            return lists
        pooled = self.for_layers(student.features, teacher.features)
        return tuple([*maps, x[:, :, None, None]] for maps, x in zip(lists, pooled, strict=True))

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        return {self.name: super().forward(student, teacher, labels)["review"]}


class ParaphraserTerm(TapTerm):
    """``Paraphraser`` on the teacher's last map. The student learns nothing: this is a stage of its own."""

    name = "paraphraser"

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> Paraphraser:
        assert teacher.taps is not None
        return Paraphraser(teacher.taps.maps[-1][0], **asdict(config.paraphraser))

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        assert teacher.taps is not None
        return self.for_layers(teacher.taps.maps[-1])


class FTTerm(TapTerm):
    """``FTLoss`` on the last maps. Before a new run's first step, ``load_paraphraser`` gets an earlier run's."""

    name = "ft"

    def load_paraphraser(self, path: Path) -> None:
        """The weights in the file of a run's terms, or in a file of a ``Paraphraser``. CheckpointError if none fit."""
        prefix = "terms.paraphraser.loss."
        state = read_weights(path).state
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        load_into(self.loss.paraphraser, state, path)

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> FTLoss:
        assert student.taps is not None
        assert teacher.taps is not None
        paraphraser = Paraphraser(teacher.taps.maps[-1][0], config.ft.rate)
        return FTLoss(student.taps.maps[-1][0], paraphraser, config.ft.reading)

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        assert student.taps is not None
        assert teacher.taps is not None
        return self.for_layers(student.taps.maps[-1], teacher.taps.maps[-1])


class SRRLTerm(LossTerm):
    """``SRRLLoss`` on pooled features or last maps, with the teacher's classifier."""

    @staticmethod
    def needs_maps(config: ObjectiveConfig) -> bool:
        """Whether the reading is of maps."""
        return config.srrl.reading == "maps"

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> SRRLLoss:
        widths = student.features, teacher.features
        self.of_maps = config.srrl.reading == "maps"
        self.needs_two_rows = not self.of_maps  # of its batch norm
        if self.of_maps:
            assert student.feature_map is not None
            assert teacher.feature_map is not None
            widths = student.feature_map.channels, teacher.feature_map.channels
        return SRRLLoss(*widths, **asdict(config.srrl))

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        pair = student.features, teacher.features
        if self.of_maps:
            assert student.feature_map is not None
            assert teacher.feature_map is not None
            pair = student.feature_map, teacher.feature_map
        return *self.for_layers(*pair), teacher.logits, as_linear(teacher.classifier)


class SimKDTerm(nn.Module):
    """``SimKDLoss`` on the last maps. The projector is the student's: it predicts with the teacher's classifier."""

    needs_maps = True
    needs_classes = True

    def __init__(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> None:
        super().__init__()

    @staticmethod
    def extend_student(
        config: ObjectiveConfig, student: FeatureModel, teacher: FeatureModel, own: ModelShapes, other: ModelShapes
    ) -> nn.Module:
        """The student with projector and classifier. ValueError for a teacher that does more behind its last map."""
        pair = _last_maps("simkd", own, other)
        tail = pair[1].tail or ()
        linear = as_linear(teacher.classifier)
        if isinstance(linear, nn.Linear):
            linear = linear.weight, linear.bias
        between = (teacher.model.get_submodule(name) for name in tail[:-1])
        if not isinstance(linear, tuple) or not tail or any(list(layer.parameters()) for layer in between):
            raise ValueError(
                f"simkd: the teacher does more between its map {pair[1].layer!r} and its logits than to average and to "
                "classify, expected a linear classifier of the averaged map"
            )
        weight, bias = linear
        name = student.classifier_name or ""
        return extend_for_simkd(student.model, name, *pair, weight, bias, factor=config.simkd.factor)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> dict[str, Tensor]:
        assert teacher is not None
        assert student.feature_map is not None
        assert teacher.feature_map is not None
        return {"simkd": F.mse_loss(*match(*in_loss_dtype(student.feature_map, teacher.feature_map)))}


class NORMTerm(LossTerm):
    """``NORMLoss`` on the last maps. The layer that widens the student's map, and the one back, are the student's.

    The authors also normalise the logits, and multiply them by 2.5, before cross-entropy and KD. That is left out.
    """

    needs_maps = True

    @staticmethod
    def extend_student(
        config: ObjectiveConfig, student: FeatureModel, teacher: FeatureModel, own: ModelShapes, other: ModelShapes
    ) -> nn.Module:
        """The student with both layers."""
        pair = _last_maps("norm", own, other)
        return extend_for_norm(student.model, student.classifier_name or "", *pair, config.norm.repeats)

    def build(self, config: ObjectiveConfig, student: ModelShapes, teacher: ModelShapes) -> NORMLoss:
        return NORMLoss(config.norm.repeats)

    def inputs(self, student: ModelOutput, teacher: ModelOutput, labels: Tensor) -> tuple[Any, ...]:
        return student.feature_map, teacher.feature_map


def _last_maps(name: str, student: ModelShapes, teacher: ModelShapes) -> tuple[MapSource, MapSource]:
    """The last maps of both. ValueError for tokens in their place."""
    assert student.feature_map is not None
    assert teacher.feature_map is not None
    for role, source in (("student", student.feature_map), ("teacher", teacher.feature_map)):
        if len(source.shape) != 3:
            raise ValueError(
                f"{name}: the {role}'s last map, of {source.layer!r}, has the shape {source.shape}, expected "
                "(channels, height, width)"
            )
    return student.feature_map, teacher.feature_map


def _channels(shapes: tuple[tuple[int, int, int], ...]) -> list[int]:
    return [shape[0] for shape in shapes]


def _described(taps: TapShapes) -> str:
    """The layers and the shapes of the maps, for a message."""
    shapes = (" x ".join(map(str, shape)) for shape in taps.maps)
    return ", ".join(f"{layer} {shape}" for layer, shape in zip(taps.layers, shapes, strict=True))


TERMS: dict[str, TermBuilder] = {
    "srrl": SRRLTerm,
    "simkd": SimKDTerm,
    "norm": NORMTerm,
    **{
        term.name: term
        for term in (
            *(FitNetTerm, ATTerm, NSTTerm, FSPTerm, VIDTerm, ABTerm, OFDTerm, ReviewKDTerm, ParaphraserTerm, FTTerm),
        )
    },
}
