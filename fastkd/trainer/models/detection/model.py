"""A Faster R-CNN of torchvision as the run takes it: it gives rows, own losses and maps, and looks at given regions.

The steps are those of torchvision's ``GeneralizedRCNN``, ``RegionProposalNetwork`` and ``RoIHeads``, whose forward
passes hide the regions, their labels and the counts of the losses. Two things are done differently. Images have their
size already, and are only normalised. What boxes and losses are computed from is float32, also under autocast: in
bfloat16 a box of 800 pixels would be off by two.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from fastkd.numerics import accumulation_dtype
from fastkd.trainer.batches import DetectionBatch
from fastkd.trainer.models.detection.output import DetectorOutput, Regions
from fastkd.trainer.models.detection.sampler import SeededSampler
from fastkd.trainer.models.features import FeatureModel, ModelShapes, evaluating
from fastkd.trainer.models.taps import Taps, TapShapes

CLASSIFIER = "roi_heads.box_predictor.cls_score"
POOL = "pool"  # torchvision's name of the coarsest level, which is made by pooling and not by the pyramid
_BETA = 1 / 9  # of the smooth L1 losses, as in torchvision


class DetectorModel(FeatureModel):
    """A ``torchvision.models.detection.FasterRCNN`` whose regions are the rows of the losses.

    In training, ``forward(DetectionBatch)`` gives a ``DetectorOutput``. In eval mode it gives what was found in each
    image: a dict of boxes [n, 4] in pixels of the batch, scores [n] and labels [n]. ``forward(Regions)`` gives the
    output of this model for regions of another one, which is how a teacher looks at what its student has sampled.

    The samplers of the model draw with the seeds of the batch from now on: see ``SeededSampler``.

    Args:
        model: the detector.
        taps: the names of the levels of the feature pyramid that are its intermediate maps, from fine to coarse. None
            takes all but the coarsest, ``pool``. ReviewKD's authors read that one, too.
        classifier, feature_map: must be None. The classifier is that of the box head, and a detector has no last map.
        optional: as in ``FeatureModel``.

    Example:
        >>> from fastkd.trainer.models.detection.build import faster_rcnn
        >>> model = DetectorModel(faster_rcnn("small", num_classes=5))
        >>> found = model.eval()(DetectionBatch(torch.rand(1, 3, 64, 64), [(64, 64)], [], []))
        >>> sorted(found[0])
        ['boxes', 'labels', 'scores']
    """

    def __init__(
        self,
        model: nn.Module,
        classifier: str | None = None,
        *,
        feature_map: str | None = None,
        taps: Any = None,
        optional: bool = False,
    ) -> None:
        for name, given in (("classifier", classifier), ("feature_map", feature_map)):
            if given is not None:
                raise ValueError(f"{name}: got {given!r} for a detector, expected None")
        if not isinstance(model, GeneralizedRCNN) or not hasattr(model.roi_heads.box_predictor, "cls_score"):
            raise ValueError(
                f"model.name: got a model of type {type(model).__name__} for detection, expected a Faster R-CNN of "
                "torchvision, such as 'faster-rcnn:timm:resnet18' or 'torchvision:fasterrcnn_resnet50_fpn'"
            )
        super().__init__(model, CLASSIFIER, taps=taps, optional=optional)
        for salt, part in enumerate((model.rpn, model.roi_heads)):
            sampler = part.fg_bg_sampler
            part.fg_bg_sampler = SeededSampler(sampler.batch_size_per_image, sampler.positive_fraction, salt)
        self.levels_read: tuple[str, ...] = ()  # set by ``measure`` when a term needs maps

    def like(self, module: nn.Module) -> DetectorModel:
        """The same wrapper around another module of this kind, such as a moving average."""
        other = DetectorModel(module, taps=self.tap_names, optional=self.optional)
        other.channels_last = self.channels_last
        if self.conversion is not None:
            other.take_images(*self.conversion)
        return other

    def compile(self, **options: Any) -> None:
        """ValueError: the numbers of boxes change with every batch."""
        raise ValueError(
            "compile: got True for a detector, whose numbers of boxes change with every batch; expected False"
        )

    def measure(self, images: Any, **reads: bool) -> ModelShapes:
        """The widths of features and logits and, with ``taps``, the shapes of the levels for images of this size.

        ``images`` is a ``DetectionBatch``. ``reads`` is what the terms read, as for ``measure_shapes``.

        Raises ValueError: a term reads the last feature map, or there is no level of a name in ``taps``.
        """
        if reads.get("feature_map"):
            raise ValueError("objective.terms: a term reads the last feature map, and a detector has none for its rows")
        layer = self.classifier
        assert isinstance(layer, nn.Linear)
        shapes = ModelShapes(features=layer.in_features, classes=layer.out_features)
        self.levels_read = ()
        if not reads.get("taps"):
            return shapes
        with evaluating(self), self._precision(images):
            levels = self._levels(images.to(layer.weight.device))
        self.levels_read = self.tap_names or tuple(name for name in levels if name != POOL)
        if unknown := [name for name in self.levels_read if name not in levels]:
            raise ValueError(f"taps: got {unknown[0]!r}, expected levels of the feature pyramid: {' '.join(levels)}")
        maps: tuple[Any, ...] = tuple(tuple(levels[name].shape[1:]) for name in self.levels_read)
        layers = tuple(f"level {name}" for name in self.levels_read)
        norms = (None,) * len(maps)
        taps = TapShapes(maps=maps, stem=maps[0], preactivations=maps, layers=layers, norms=norms, pooled=False)
        return replace(shapes, taps=taps)

    def forward(self, given: Any) -> Any:
        """See the class."""
        batch: DetectionBatch = given.batch if isinstance(given, Regions) else given
        with self._precision(batch):
            levels = self._levels(batch)
            if isinstance(given, Regions):
                return self._look(levels, given)[0]
            if self.training:
                return self._learn(levels, batch)
            boxes, _ = self._propose(levels, batch)
            output, deltas = self._look(levels, Regions(batch, boxes))
            found = self._heads.postprocess_detections(_exact(output.logits), _exact(deltas), boxes, batch.sizes)
        return [dict(zip(("boxes", "scores", "labels"), each, strict=True)) for each in zip(*found, strict=True)]

    @property
    def _heads(self) -> Any:
        return self.model.roi_heads

    def _precision(self, batch: DetectionBatch) -> AbstractContextManager[Any]:
        """Autocast is made for float32 models: see ``FeatureModel``."""
        if next(self.model.parameters()).dtype == torch.float32:
            return nullcontext()
        return torch.autocast(batch.images.device.type, enabled=False)

    def _levels(self, batch: DetectionBatch) -> OrderedDict[str, Tensor]:
        """The levels of the pyramid, from fine to coarse. What is beyond an image is zero after it was normalised."""
        images = self.normalized(batch.images)
        if images is not batch.images:
            for image, (height, width) in zip(images, batch.sizes, strict=True):
                if (height, width) != image.shape[1:]:
                    image[:, height:], image[:, :, width:] = 0, 0
        images = images.to(next(self.model.parameters()).dtype)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        levels: Tensor | OrderedDict[str, Tensor] = self.model.backbone(images)  # type: ignore[operator]
        return OrderedDict({"0": levels}) if isinstance(levels, Tensor) else levels

    def _look(self, levels: OrderedDict[str, Tensor], regions: Regions) -> tuple[DetectorOutput, Tensor]:
        """The rows of these regions and their box regression [R, 4 (C + 1)]."""
        padded = tuple(regions.batch.images.shape[2:])  # of which the levels' scales are exact fractions
        pooled = self._heads.box_roi_pool(levels, regions.boxes, [padded] * len(regions.batch))
        features = self._heads.box_head(pooled)
        logits, deltas = self._heads.box_predictor(features)
        taps = None
        if self.levels_read:
            maps = tuple(levels[name] for name in self.levels_read)
            taps = Taps(maps, maps[0], maps)
        return DetectorOutput(logits, features, self.classifier, taps=taps, regions=regions), deltas

    def _learn(self, levels: OrderedDict[str, Tensor], batch: DetectionBatch) -> DetectorOutput:
        """The sampled regions, with their labels and all losses."""
        targets = [_without_crowds(target, accumulation_dtype(levels["0"].dtype)) for target in batch.targets]
        self.model.rpn.fg_bg_sampler.seeds = self._heads.fg_bg_sampler.seeds = batch.seeds  # type: ignore[union-attr]
        boxes, losses = self._propose(levels, batch, targets)
        # An image in which nothing at all is proposed counts as one region, so that no batch is empty.
        whole = [boxes[0].new_tensor([[0, 0, width, height]]) for height, width in batch.sizes]
        boxes = [found if len(found) else image for found, image in zip(boxes, whole, strict=True)]
        boxes, _, labels, wanted = self._heads.select_training_samples(boxes, targets)
        output, deltas = self._look(levels, Regions(batch, boxes))
        output.labels = torch.cat(labels)
        logits, count = _exact(output.logits), len(output.labels)
        objects = torch.where(output.labels > 0)[0]
        found = _exact(deltas).unflatten(1, (-1, 4))[objects, output.labels[objects]]
        box = F.smooth_l1_loss(found, torch.cat(list(wanted))[objects], beta=_BETA, reduction="sum")
        classifier = F.cross_entropy(logits, output.labels, reduction="sum")
        output.losses = {"classifier": (classifier, count), "box": (box, count), **losses}
        return output

    def _propose(
        self, levels: OrderedDict[str, Tensor], batch: DetectionBatch, targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, tuple[Tensor, int]]]:
        """The boxes [n, 4] that the region proposal network finds in each image and, with ``targets``, its losses."""
        rpn: Any = self.model.rpn
        by_level = rpn.head(list(levels.values()))
        per_level = [x[0].numel() for x in by_level[0]]
        objectness, deltas = map(_exact, concat_box_prediction_layers(*by_level))
        # The anchors get the dtype of the maps, of which nothing else but their size is read.
        maps = [objectness.new_empty(()).expand(x.shape) for x in levels.values()]
        anchors = rpn.anchor_generator(ImageList(batch.images, batch.sizes), maps)
        boxes = rpn.box_coder.decode(deltas.detach(), anchors).view(len(batch), -1, 4)
        found, _ = rpn.filter_proposals(boxes, objectness, batch.sizes, per_level)
        if targets is None:
            return found, {}
        labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in rpn.fg_bg_sampler(labels))
        sampled = torch.cat((positive, negative))
        wanted = torch.cat(rpn.box_coder.encode(matched, anchors))
        box = F.smooth_l1_loss(deltas[positive], wanted[positive], beta=_BETA, reduction="sum")
        is_object = torch.cat(labels)[sampled].to(objectness.dtype)
        decided = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], is_object, reduction="sum")
        return found, {"objectness": (decided, len(sampled)), "rpn_box": (box, len(sampled))}


def _exact(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _without_crowds(target: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The boxes of single objects, as torchvision's reference trains on."""
    boxes, labels = target["boxes"].to(dtype), target["labels"]
    if "iscrowd" not in target:
        return {"boxes": boxes, "labels": labels}
    single = target["iscrowd"] == 0
    return {"boxes": boxes[single], "labels": labels[single]}
