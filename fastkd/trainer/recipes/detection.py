"""Recipes for object detection: a folder of your own in COCO's format, and the pairs of DCD's table 4 on COCO.

A folder holds ``train/`` and ``val/`` with images, and ``train.json`` and ``val.json`` with their boxes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.config import DataConfig
from fastkd.trainer.models.build import ModelConfig
from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.options.fused import KDConfig
from fastkd.trainer.optim import OptimConfig

# Fewer regions than for large images, and anchors for objects of 8 to 64 pixels.
_SMALL: dict[str, Any] = {
    "anchor_sizes": (12, 24, 48, 96),
    "box_batch_size_per_image": 64,
    "rpn_batch_size_per_image": 64,
    "rpn_pre_nms_top_n_train": 200,
    "rpn_pre_nms_top_n_test": 200,
    "rpn_post_nms_top_n_train": 200,
    "rpn_post_nms_top_n_test": 100,
}
SMALL_TEACHER = ModelConfig(
    name="faster-rcnn:small", options={"width": 32, "fpn_channels": 32, "head_width": 128, **_SMALL}
)
SMALL_STUDENT = ModelConfig(
    name="faster-rcnn:small", options={"width": 8, "fpn_channels": 16, "head_width": 32, **_SMALL}
)


def detection_teacher() -> TrainConfig:
    """Your own images with boxes (``--data.options.root DIR``, COCO's format) by a detector's own losses.

    All settings are ours, for about 2,000 small images and a CPU: they are scaled to a short side of 128 pixels, and
    the detector is a small Faster R-CNN of 562,000 parameters for objects of 8 to 64 pixels. Six epochs take some
    minutes on a core. A smaller set needs more (``--epochs``). For photos take a usual detector and larger images:
    ``--student.name faster-rcnn:timm:resnet18 --student.pretrained --student.options '{}' --data.options.short-side
    640``.
    """
    return TrainConfig(
        task="detection",
        student=SMALL_TEACHER,
        data=DataConfig(name="coco", options={"short_side": (128,)}, batch_size=16, eval_batch_size=16),
        objective=ObjectiveConfig(terms="detector"),
        optim=OptimConfig(name="adamw", lr=2e-3, weight_decay=1e-4, warmup_epochs=0.5, clip_norm=5.0),
        epochs=6,
        eval_every=3,
        run_dir="runs/detection-teacher",
    )


def detection() -> TrainConfig:
    """Your own images with boxes, distilled by DCD from the run of ``detection-teacher``.

    ``--teacher.weights RUN`` names another run. The rows that are distilled are the student's regions of interest,
    background included; ``--detection.regions foreground`` takes those with an object. Other methods:
    ``--objective.terms "dcd + kd"``, or ``fitnet`` and ``reviewkd`` on the levels of the feature pyramid. The student
    has 56,000 parameters. The other settings are ours, and the same as in ``detection-teacher``.
    """
    return replace(
        detection_teacher(),
        student=SMALL_STUDENT,
        teacher=replace(SMALL_TEACHER, weights="runs/detection-teacher"),
        objective=ObjectiveConfig(terms="dcd"),
        epochs=8,
        eval_every=4,
        run_dir="runs/detection",
    )


# COCO has 117,266 training images with boxes. The schedule of 180,000 steps of 8 images that mdistiller's detectors
# have, with its steps at 120,000 and 160,000 and a warm-up of 1,000, is told in epochs of 14,658 steps.
_STEPS_PER_EPOCH = 117_266 / 8
_SCHEDULE = OptimConfig(
    lr=0.01,
    weight_decay=1e-4,
    schedule="step",
    milestones=(120_000 / _STEPS_PER_EPOCH, 160_000 / _STEPS_PER_EPOCH),
    warmup_epochs=1_000 / _STEPS_PER_EPOCH,
)


def _coco(name: str, backbone: str, terms: str) -> TrainConfig:
    """A detector on COCO in ``coco/``, as it is unpacked, that begins with torchvision's weights of the backbone."""
    student = ModelConfig(
        name=f"faster-rcnn:torchvision:{backbone}.IMAGENET1K_V1",
        pretrained=True,
        options={"frozen_norm": True, "frozen_stages": 1},
    )
    layout = {"train": "train2017", "val": "val2017", "annotations": "annotations/instances_{part}.json"}
    sides = (640, 672, 704, 736, 768, 800)
    return TrainConfig(
        task="detection",
        student=student,
        data=DataConfig(
            name="coco",
            options={"root": "coco", **layout, "short_side": sides},
            batch_size=8,
            eval_batch_size=8,
            num_workers=4,
        ),
        objective=ObjectiveConfig(terms=terms, kd=KDConfig(temperature=1.0)),
        optim=_SCHEDULE,
        epochs=12,
        precision="bf16",
        channels_last=True,
        run_dir=f"runs/{name}",
    )


def coco_r101_teacher() -> TrainConfig:
    """ResNet-101 with a feature pyramid on COCO, the teacher of ``coco-r101-r18`` and ``coco-r101-r50``.

    torchvision publishes no such detector, and this recipe is ours. The network is torchvision's Faster R-CNN on its
    ResNet-101. The schedule is that of the students. mdistiller's teacher is Detectron2's, which was trained three
    times as long (42.0 mAP), so this one is weaker.
    """
    return _coco("coco-r101-teacher", "resnet101", "detector")


def _pair(name: str, student: str, teacher: ModelConfig | None = None) -> TrainConfig:
    """``teacher``: None is the one that ``coco-r101-teacher`` trains."""
    trained = coco_r101_teacher()
    if teacher is None and trained.student is not None:
        teacher = replace(trained.student, weights=trained.run_dir)
    return replace(_coco(name, student, "dcd"), teacher=teacher)


def coco_r101_r18() -> TrainConfig:
    """ResNet-101 -> ResNet-18 on COCO by DCD: a pair of table 4 of arXiv 2407.11802.

    The schedule is mdistiller's, which the paper follows: batch 8, SGD with lr 0.01 and weight decay 1e-4, 180,000
    steps, divided by 10 after 120,000 and 160,000, short sides of 640 to 800. Training ends after 12 epochs, which are
    175,904 steps. These choices are ours: DCD at weight 1 on all regions, torchvision's Faster R-CNN in place of
    Detectron2's, bf16, and a teacher from ``coco-r101-teacher``, which has to be trained first.
    """
    return _pair("coco-r101-r18", "resnet18")


def coco_r101_r50() -> TrainConfig:
    """ResNet-101 -> ResNet-50 on COCO by DCD: a pair of table 4 of arXiv 2407.11802.

    The settings are ours and mdistiller's, as for coco-r101-r18.
    """
    return _pair("coco-r101-r50", "resnet50")


def coco_r50_mobilenetv2() -> TrainConfig:
    """ResNet-50 -> MobileNetV2 on COCO by DCD: a pair of table 4 of arXiv 2407.11802.

    The settings are ours and mdistiller's, as for coco-r101-r18. The teacher is torchvision's
    ``fasterrcnn_resnet50_fpn_v2`` with its published weights (46.7 mAP), which is our choice. mdistiller's is
    Detectron2's (40.2 mAP).
    """
    teacher = ModelConfig(name="torchvision:fasterrcnn_resnet50_fpn_v2", pretrained=True, min_accuracy=0.44)
    return _pair("coco-r50-mv2", "mobilenet_v2", teacher)
