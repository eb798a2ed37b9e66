"""Builds detectors: torchvision's Faster R-CNN on any backbone, and those that torchvision publishes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from fastkd.trainer.models.detection.backbones import (
    Body,
    PyramidBackbone,
    freeze,
    small_body,
    timm_body,
    torchvision_body,
)
from fastkd.trainer.models.published import torchvision_weights
from fastkd.validate import check_int, check_type

# What torchvision's FasterRCNN takes as numbers: how many regions are proposed, sampled and kept.
NUMBERS = tuple(
    name
    for name, parameter in inspect.signature(FasterRCNN.__init__).parameters.items()
    if name.startswith(("rpn_", "box_")) and isinstance(parameter.default, int | float)
)
COCO = 81  # outputs for COCO's 80 classes and the background
GAP = "N/A"  # torchvision's name of a number that stands for no category
_BACKBONES = "'timm:NAME', 'torchvision:NAME' or 'small'"


def faster_rcnn(
    backbone: str,
    *,
    num_classes: int = COCO,
    pretrained: bool = False,
    v2: bool = False,
    fpn_channels: int = 256,
    head_width: int = 1024,
    roi_size: int = 7,
    anchor_sizes: Sequence[float] | None = None,
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    frozen_stages: int = 0,
    frozen_norm: bool = False,
    width: int = 16,
    depth: int = 3,
    norm: str = "batch",
    **numbers: float,
) -> FasterRCNN:
    """A Faster R-CNN (arXiv 1506.01497) with a feature pyramid, built of torchvision's parts.

    The defaults are those of torchvision's ``fasterrcnn_resnet50_fpn``, whose weights have the same names. Options of
    ``ModelConfig`` come here for the names ``faster-rcnn:timm:NAME``, ``faster-rcnn:torchvision:NAME`` and
    ``faster-rcnn:small``.

    Args:
        backbone: ``timm:NAME``, ``torchvision:NAME`` or ``small``, a small network for small images.
        num_classes: C + 1, where the first one is the background. In a run it comes from the data.
        pretrained: begin with the published weights of the backbone.
        v2: the heads of ``fasterrcnn_resnet50_fpn_v2``: two convolutions that propose, four convolutions with batch
            norm and a linear layer in the box head, and batch norm in the pyramid.
        fpn_channels: channels of the pyramid's levels.
        head_width: the width D of the box head, whose output are the features that are distilled.
        roi_size: positions of a pooled region along each side.
        anchor_sizes: sides of the anchors in pixels, one per level. None: eight times the level's stride.
        aspect_ratios: heights of the anchors divided by their widths.
        frozen_stages: this many stages of the backbone are not trained, nor what is before them.
            torchvision freezes one where it begins with published weights.
        frozen_norm: the batch norms of the backbone keep their statistics and weights.
        width, depth, norm: of the backbone ``small``: channels of its first map, number of its maps, ``batch`` or
            ``group``.
        numbers: those of torchvision's FasterRCNN whose names begin with ``rpn_`` or ``box_``, such as
            ``box_batch_size_per_image``, the number of regions that are sampled of each image, 512.

    Raises:
        ValueError: there is no such backbone, its maps do not get coarser, or an option does not fit.
        OSError: the published weights cannot be downloaded.

    Example:
        >>> model = faster_rcnn("small", num_classes=5, fpn_channels=32, head_width=64)
        >>> model.roi_heads.box_predictor.cls_score
        Linear(in_features=64, out_features=5, bias=True)
    """
    check_int("num_classes", num_classes, 2)
    for name, number in (("fpn_channels", fpn_channels), ("head_width", head_width), ("roi_size", roi_size)):
        check_int(name, number, 1)
    check_int("frozen_stages", frozen_stages, 0)
    for name, flag in (("v2", v2), ("frozen_norm", frozen_norm)):
        check_type(name, flag, bool)
    own = [name for name in inspect.signature(faster_rcnn).parameters if name not in ("backbone", "numbers")]
    _check_options(numbers, (*own, *NUMBERS))
    if (width, depth, norm) != (16, 3, "batch") and backbone != "small":
        raise ValueError(f"width, depth and norm: got them with the backbone {backbone!r}, expected 'small'")
    body = _body(backbone, pretrained, width, depth, norm)
    levels = len(body.strides) + 1
    sizes = anchor_sizes or [8 * stride for stride in (*body.strides, 2 * body.strides[-1])]
    if len(sizes) != levels:
        raise ValueError(
            f"anchor_sizes: got {list(sizes)}, expected {levels}, one per level of the pyramid of {backbone!r}"
        )
    anchors = AnchorGenerator(tuple((size,) for size in sizes), (tuple(aspect_ratios),) * levels)
    box_head: nn.Module = TwoMLPHead(fpn_channels * roi_size**2, head_width)
    if v2:
        shape = (fpn_channels, roi_size, roi_size)
        box_head = FastRCNNConvFCHead(shape, [fpn_channels] * 4, [head_width], norm_layer=nn.BatchNorm2d)
    pyramid = PyramidBackbone(body, fpn_channels, nn.BatchNorm2d if v2 else None)
    freeze(pyramid, frozen_stages, frozen_norm)
    model = FasterRCNN(
        pyramid,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(fpn_channels, anchors.num_anchors_per_location()[0], conv_depth=2 if v2 else 1),
        box_roi_pool=MultiScaleRoIAlign([str(level) for level in range(levels - 1)], roi_size, sampling_ratio=2),
        box_head=box_head,
        box_predictor=FastRCNNPredictor(head_width, num_classes),
        image_mean=body.mean,
        image_std=body.std,
        **numbers,
    )
    if hasattr(body.network, "pretrained_cfg"):
        model.pretrained_cfg = body.network.pretrained_cfg  # as timm's models have it
    return model


def _body(backbone: str, pretrained: bool, width: int, depth: int, norm: str) -> Body:
    source, _, name = backbone.partition(":")
    if source == "timm" and name:
        return timm_body(name, pretrained)
    if source == "torchvision" and name:
        return torchvision_body(name, pretrained)
    if backbone != "small":
        raise ValueError(f"got the backbone {backbone!r}, expected {_BACKBONES}")
    if pretrained:
        raise ValueError("pretrained: got True with the backbone 'small', which has no published weights")
    return small_body(width, depth, norm)


def published_detector(name: str, *, num_classes: int = COCO, pretrained: bool = False, **options: Any) -> Any:
    """A ``fasterrcnn_...`` of torchvision, with its weights for COCO if ``pretrained``.

    As published, the batch norms of the backbone are frozen, but for those of the version 2. With the published weights
    and 81 outputs, they are those of COCO's 80 classes in the order of their numbers. torchvision's have 91, ten of
    which mean nothing. Another ``num_classes`` gives a new last layer for other classes.

    Args:
        name: ``fasterrcnn_...``, or that with ``.WEIGHTS``.
        num_classes: C + 1, where the first one is the background.
        pretrained: begin with the published weights for COCO.
        options: ``frozen_norm`` and ``frozen_stages`` as for ``faster_rcnn``; others go to torchvision.

    Raises:
        ValueError: there is no such detector or option.
        OSError: the weights cannot be downloaded.
    """
    import torchvision

    known, _, _ = name.partition(".")
    if known not in torchvision.models.list_models(module=torchvision.models.detection, include="fasterrcnn*"):
        raise ValueError(f"got {name!r}, expected a Faster R-CNN of torchvision")
    frozen_norm = options.pop("frozen_norm", not known.endswith("_v2"))
    frozen_stages = options.pop("frozen_stages", 0)
    _check_options(options, NUMBERS)
    weights = torchvision_weights(name) if pretrained else None
    categories = [] if weights is None else weights.meta["categories"]
    check_int("num_classes", num_classes, 2)
    bare: dict[str, Any] = {"weights": None, "weights_backbone": None}
    model = torchvision.models.get_model(known, num_classes=len(categories) or num_classes, **bare, **options)
    if weights is not None:
        # Those of frozen norms have no count of batches.
        found = model.load_state_dict(weights.get_state_dict(check_hash=True), strict=False)
        wrong = [key for key in found.missing_keys if not key.endswith("num_batches_tracked")]
        wrong += found.unexpected_keys
        assert not wrong, wrong
        set_classes(model, num_classes, categories)
    freeze(model.backbone, frozen_stages, frozen_norm)
    if frozen_norm and known == "fasterrcnn_resnet50_fpn":  # whose weights were trained so
        for module in model.modules():
            if type(module).__name__ == "FrozenBatchNorm2d":
                module.eps = 0.0
    return model


def _check_options(options: Collection[str], known: Sequence[str]) -> None:
    for name in sorted(set(options) - set(known)):
        near = difflib.get_close_matches(name, known, 3)
        expected = f"did you mean {' or '.join(near)}?" if near else f"expected some of {', '.join(known)}"
        raise ValueError(f"got the option {name!r}, which this detector does not have, {expected}")


def set_classes(model: FasterRCNN, num_classes: int, categories: Sequence[str]) -> None:
    """Give the detector ``num_classes`` outputs: those of the ``categories`` that are not "N/A", or new ones."""
    old: Any = model.roi_heads.box_predictor
    new = FastRCNNPredictor(old.cls_score.in_features, num_classes)
    kept = torch.tensor([place for place, name in enumerate(categories) if name != GAP])
    if num_classes == len(kept):
        for layer, before, values in ((new.cls_score, old.cls_score, 1), (new.bbox_pred, old.bbox_pred, 4)):
            rows = (kept[:, None] * values + torch.arange(values)).flatten()
            layer.weight.data, layer.bias.data = before.weight.data[rows], before.bias.data[rows]
    model.roi_heads.box_predictor = new
