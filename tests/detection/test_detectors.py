"""Detectors give torchvision's losses and detections, on any backbone, and look at the regions of another one."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from fastkd.trainer.batches import DetectionBatch, collate_detection
from fastkd.trainer.models.build import ModelConfig, build_model, trained_normalization
from fastkd.trainer.models.detection import build
from fastkd.trainer.models.detection.build import faster_rcnn, published_detector, set_classes
from fastkd.trainer.models.detection.model import DetectorModel
from fastkd.trainer.models.detection.sampler import SeededSampler

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SMALL: dict[str, Any] = {
    "num_classes": 4,
    "width": 4,
    "depth": 2,
    "fpn_channels": 8,
    "head_width": 16,
    "anchor_sizes": (12, 24, 48),
    "norm": "group",
    "box_batch_size_per_image": 32,
    "rpn_post_nms_top_n_train": 60,
    "rpn_post_nms_top_n_test": 60,
}


def detector(seed: int = 0, **changes: Any) -> DetectorModel:
    torch.manual_seed(seed)
    return DetectorModel(faster_rcnn("small", **{**SMALL, **changes}))


def batch(sizes: tuple[tuple[int, int], ...] = ((64, 64), (50, 40)), seed: int = 0) -> DetectionBatch:
    """Images of these sizes: the first one with three boxes, one of them of a crowd, and the last one with none."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, (height, width) in enumerate(sizes):
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        corner, size = torch.rand(3, 2, generator=generator) * 20, 8 + torch.rand(3, 2, generator=generator) * 12
        target = {"boxes": torch.cat((corner, corner + size), 1), "labels": torch.tensor([1, 2, 3])}
        target["iscrowd"] = torch.tensor([0, 0, 1])
        if number == len(sizes) - 1 and len(sizes) > 1:
            target = {name: value[:0] for name, value in target.items()}
        samples.append((image, target, 100 * seed + number))
    return collate_detection(samples)


def as_torchvision(given: DetectionBatch, model: nn.Module) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """What ``GeneralizedRCNN.forward`` takes, scaled so that its transform leaves the size alone."""
    model.transform.min_size, model.transform.max_size = (min(given.sizes[0]),), 1000  # type: ignore[union-attr]
    model.transform.image_mean, model.transform.image_std = (0.0,) * 3, (1.0,) * 3  # type: ignore[union-attr]
    images = [x[:, :h, :w] for x, (h, w) in zip(given.images, given.sizes, strict=True)]
    targets = [
        {"boxes": target["boxes"][target["iscrowd"] == 0].double(), "labels": target["labels"][target["iscrowd"] == 0]}
        for target in given.targets
    ]
    return images, targets


@pytest.mark.parametrize("v2", [False, True])
def test_losses_and_detections_are_torchvisions(v2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # torchvision's targets of the objectness are float32 in any case, and so is its loss.
    binary = F.binary_cross_entropy_with_logits
    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", lambda x, y, **options: binary(x, y.double(), **options))
    model = detector(v2=v2, box_score_thresh=0.01).double()
    given = batch(((64, 64), (64, 64)))
    given.images = given.images.double() / 255 - 0.5
    reference = copy.deepcopy(model.model)
    images, targets = as_torchvision(given, reference)
    reference.rpn.fg_bg_sampler.seeds = reference.roi_heads.fg_bg_sampler.seeds = given.seeds  # type: ignore[union-attr]
    expected = reference(images, targets)
    output = model(given)
    names = {"classifier": "classifier", "box": "box_reg", "objectness": "objectness", "rpn_box": "rpn_box_reg"}
    for name, theirs in names.items():
        total, count = output.losses[name]
        assert count > 0
        torch.testing.assert_close(total / count, expected[f"loss_{theirs}"], rtol=1e-12, atol=1e-12)
    model.eval()
    found, known = model(given), reference.eval()(images)
    assert sum(len(each["boxes"]) for each in known) > 0
    for ours, theirs in zip(found, known, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-9)


def test_what_is_beyond_an_image_is_zero_after_normalisation() -> None:
    model, seen = detector(), []
    model.take_images("bytes", (MEAN, STD))
    model.model.backbone.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))  # type: ignore[union-attr]
    model(batch())
    assert seen[0].shape == (2, 3, 64, 64)
    assert not seen[0][1, :, 50:].any()
    assert not seen[0][1, :, :, 40:].any()
    assert seen[0][1, :, :50, :40].all()


def test_what_is_sampled_of_an_image_depends_on_its_seed_alone() -> None:
    model = detector()
    given = batch(((64, 64), (64, 64), (64, 64)))
    together = model(given)
    torch.manual_seed(5)
    counts = [len(boxes) for boxes in together.regions.boxes]
    for number in (2, 0):
        alone = DetectionBatch(
            given.images[number : number + 1], given.sizes[:1], [given.targets[number]], [given.seeds[number]]
        )
        output = model(alone)
        assert torch.equal(output.labels, together.labels.split(counts)[number])
        torch.testing.assert_close(output.regions.boxes[0], together.regions.boxes[number])
    other = DetectionBatch(given.images, given.sizes, given.targets, [9, 9, 9])
    assert not torch.equal(model(other).regions.boxes[2], together.regions.boxes[2])


def test_the_sampler_takes_as_many_as_torchvisions() -> None:
    matched = [
        torch.tensor([1] * positive + [0] * negative + [-1] * 3) for positive, negative in ((9, 2), (1, 30), (0, 4))
    ]
    seeded, plain = (SeededSampler(8, 0.5) for _ in range(2))
    seeded.seeds = [1, 2, 3]
    for ours, theirs in zip(seeded(matched), plain(matched), strict=True):
        assert [int(mask.sum()) for mask in ours] == [int(mask.sum()) for mask in theirs]
    for mask, values in zip(seeded(matched)[0], matched, strict=True):
        assert (values[mask.bool()] == 1).all()


def test_a_teacher_of_other_widths_looks_at_the_students_regions() -> None:
    student, teacher = detector(), detector(1, width=8, fpn_channels=12, head_width=24).eval()
    student.take_images("bytes", (MEAN, STD))
    teacher.take_images("bytes", ((0.5,) * 3, (0.5,) * 3))
    output = student(batch())
    seen = teacher(output.regions)
    assert seen.logits.shape == output.logits.shape
    assert seen.features.shape == (len(output.labels), 24)
    # Row by row, the teacher's box head on the same boxes.
    first = output.regions.boxes[0][:1]
    alone = teacher._look(
        teacher._levels(output.regions.batch), type(output.regions)(output.regions.batch, [first, first[:0]])
    )
    torch.testing.assert_close(alone[0].logits, seen.logits[:1])


@pytest.mark.parametrize(("kind", "keeps"), [("foreground", lambda x: x > 0), ("background", lambda x: x == 0)])
def test_regions_of_a_kind(kind: str, keeps: Any) -> None:
    output = detector()(batch())
    chosen, count = output.chosen(kind)
    keep = keeps(output.labels)
    assert 0 < len(chosen.labels) == count < len(output.labels)
    assert torch.equal(chosen.logits, output.logits[keep])
    assert torch.equal(torch.cat(chosen.regions.boxes), torch.cat(output.regions.boxes)[keep])
    assert len(chosen.regions.boxes) == 2
    assert output.chosen("all") == (output, len(output.labels))


def test_a_batch_without_objects_trains() -> None:
    model = detector()
    given = batch()
    empty = DetectionBatch(given.images[1:], given.sizes[1:], given.targets[1:], given.seeds[1:])
    output = model(empty)
    assert output.losses["box"][0] == 0
    chosen, count = output.chosen("foreground")
    assert (len(chosen.labels), count) == (1, 0)
    sum(total for total, _ in output.losses.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_an_image_in_which_nothing_is_proposed_is_one_region(monkeypatch: pytest.MonkeyPatch) -> None:
    model = detector()
    given = batch(((64, 64), (50, 40)))
    nothing = [torch.zeros(0, 4), torch.zeros(0, 4)]
    monkeypatch.setattr(model.model.rpn, "filter_proposals", lambda *_: (nothing, None))
    boxes = model(given).regions.boxes
    assert boxes[1].tolist() == [[0, 0, 40, 50]]


def test_boxes_are_exact_under_autocast() -> None:
    """In bfloat16 they would have 8 bits."""
    model = detector().eval()
    given, anchors = batch(), []
    model.model.rpn.anchor_generator.register_forward_hook(lambda _module, _args, found: anchors.extend(found))  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        levels = model._levels(given)
        boxes, _ = model._propose(levels, given)
        model.train()
        output = model(given)
    assert levels["0"].dtype == torch.bfloat16
    assert boxes[0].dtype == anchors[0].dtype == torch.float32
    assert (boxes[0] != boxes[0].bfloat16()).any(1).float().mean() > 0.8
    assert {total.dtype for total, _ in output.losses.values()} == {torch.float32}


def test_a_copy_with_the_same_input() -> None:
    model = detector()
    model.take_images("bytes", (MEAN, STD))
    model.channels_last = True
    other = model.like(copy.deepcopy(model.model)).eval()
    for ours, theirs in zip(other(batch()), model.eval()(batch()), strict=True):
        assert torch.equal(ours["boxes"], theirs["boxes"])
        assert torch.equal(ours["scores"], theirs["scores"])


def test_levels_of_the_pyramid_are_maps() -> None:
    model = detector()
    shapes = model.measure(batch(), taps=True)
    assert (shapes.features, shapes.classes) == (16, 4)
    assert shapes.taps is not None
    assert shapes.taps.maps == ((8, 16, 16), (8, 8, 8))
    output = model(batch())
    assert [tuple(x.shape) for x in output.taps.maps] == [(2, 8, 16, 16), (2, 8, 8, 8)]
    assert DetectorModel(model.model, taps=("1", "pool")).measure(batch(), taps=True).taps.maps == (
        (8, 8, 8),
        (8, 4, 4),
    )  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="taps: got '7', expected levels of the feature pyramid: 0 1 pool"):
        DetectorModel(model.model, taps=("7",)).measure(batch(), taps=True)
    assert model.measure(batch()).taps is None
    assert model(batch()).taps is None


@pytest.mark.parametrize(
    ("name", "strides"),
    [("timm:resnet10t", 4), ("torchvision:mobilenet_v3_small", 4), ("torchvision:regnet_y_400mf", 4)],
)
def test_any_backbone(name: str, strides: int) -> None:
    config = ModelConfig(
        name=f"faster-rcnn:{name}",
        num_classes=4,
        options={"fpn_channels": 8, "head_width": 8, "frozen_stages": 1, "frozen_norm": True},
    )
    model = build_model(config)
    levels = model.backbone(torch.rand(1, 3, 64, 64))  # type: ignore[operator]
    assert [x.shape[2] for x in levels.values()] == [64 // stride for stride in (4, 8, 16, 32, 64)]
    body = model.backbone.body  # type: ignore[union-attr]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    trained = [parameter.requires_grad for parameter in body.parameters()]
    assert not trained[0]
    assert trained[-1]
    assert trained == sorted(trained)
    assert trained_normalization(config, model) is None


def test_weights_have_torchvisions_names() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
        ours = faster_rcnn("torchvision:resnet50", num_classes=91, v2=True)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }


def test_norms_of_published_detectors_are_frozen_as_published() -> None:
    with torch.device("meta"):
        first, second = (published_detector(f"fasterrcnn_resnet50_fpn{version}") for version in ("", "_v2"))
    frozen = [module for module in first.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(frozen) == 53
    assert {module.eps for module in frozen} == {0.0}
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in second.modules())


def test_images_are_normalised_as_the_backbones_weights_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    body = build.small_body()._replace(mean=MEAN, std=STD)
    monkeypatch.setattr(build, "timm_body", lambda name, pretrained: body)
    config = ModelConfig(name="faster-rcnn:timm:resnet10t", pretrained=True)
    assert trained_normalization(config, build_model(config)) == (MEAN, STD)


def test_published_weights_are_cut_to_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torchvision's 91 outputs those of COCO's classes stay, or new ones take their place."""
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    published = torchvision.models.get_model_weights(name).DEFAULT
    torch.manual_seed(0)
    source = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    state = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    monkeypatch.setattr(type(published), "get_state_dict", lambda *_, **__: state)
    model = published_detector(name, pretrained=True, frozen_stages=1)
    layer = model.roi_heads.box_predictor
    assert layer.cls_score.out_features == 81
    assert torch.equal(layer.cls_score.weight[12], state["roi_heads.box_predictor.cls_score.weight"][13])  # after N/A
    assert torch.equal(layer.bbox_pred.bias[4 * 12 : 4 * 13], state["roi_heads.box_predictor.bbox_pred.bias"][52:56])
    assert torch.equal(model.backbone.body["0"][0].weight, state["backbone.body.0.0.weight"])
    assert not model.backbone.body["0"][0].weight.requires_grad
    config = ModelConfig(name=f"torchvision:{name}", pretrained=True, num_classes=5)
    assert build_model(config).roi_heads.box_predictor.cls_score.out_features == 5  # type: ignore[union-attr]
    assert trained_normalization(config, model) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_set_classes_without_gaps() -> None:
    model = faster_rcnn("small", **SMALL)
    before = model.roi_heads.box_predictor.cls_score.weight.clone()
    set_classes(model, 3, ["__background__", "a", "N/A", "b"])
    assert torch.equal(model.roi_heads.box_predictor.cls_score.weight, before[[0, 1, 3]])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("faster-rcnn:timm:nothing", {}, "got 'timm:nothing', expected a model that timm.list_models"),
        ("faster-rcnn:timm:vit_tiny_patch16_224", {}, "expected a network whose maps get coarser"),
        ("faster-rcnn:torchvision:swin_t", {}, "expected a network whose maps get coarser"),
        ("faster-rcnn:torchvision:fasterrcnn_resnet50_fpn", {}, "expected a classifier of torchvision"),
        ("faster-rcnn:resnet18", {}, "expected 'timm:NAME', 'torchvision:NAME' or 'small'"),
        ("faster-rcnn:small", {"min_size": 800}, "got the option 'min_size', .*did you mean roi_size"),
        ("faster-rcnn:small", {"anchor_sizes": [8, 16]}, "anchor_sizes: got .8, 16., expected 4, one per level"),
        ("faster-rcnn:small", {"fpn_channels": 0}, "fpn_channels: got 0"),
        ("faster-rcnn:small", {"norm": "layer"}, "norm: got 'layer', expected 'batch' or 'group'"),
        ("torchvision:fasterrcnn_resnet50", {}, "expected a Faster R-CNN of torchvision"),
        ("torchvision:fasterrcnn_resnet50_fpn", {"num_classes": 1}, "num_classes: got 1"),
    ],
)
def test_an_unsuitable_name_or_option_is_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_model(ModelConfig(name=name, options={"num_classes": 4, **options}), "student")
    assert "student.name" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_detector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.name: got a model of type ResNet for detection"):
        DetectorModel(torchvision.models.resnet18())
    with pytest.raises(ValueError, match="classifier: got 'fc' for a detector"):
        DetectorModel(detector().model, "fc")
    with pytest.raises(ValueError, match="compile: got True"):
        detector().compile()
