"""Recipes: functions that return the configuration of a whole run, by the name that ``fastkd train`` takes.

Example:
    >>> from fastkd.trainer import RECIPES, train
    >>> config = RECIPES["digits-teacher"]()
    >>> result = train(config)
"""

from __future__ import annotations

from collections.abc import Callable

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.recipes import cifar, detection, digits, embeddings, imagenet, images

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "images": images.images,
    "images-kd": images.images_kd,
    "embeddings": embeddings.embeddings,
    "embeddings-images": embeddings.embeddings_images,
    "digits": digits.digits,
    "digits-scratch": digits.digits_scratch,
    "digits-teacher": digits.digits_teacher,
    "cifar100-resnet32x4": cifar.resnet32x4,
    "cifar100-wrn-40-2": cifar.wrn_40_2,
    "cifar100": cifar.any_method,
    "cifar100-dcd-kd": cifar.dcd_kd,
    "cifar100-ckd": cifar.ckd,
    "cifar100-pckd": cifar.pckd,
    "imagenet-r34-r18-dcd": imagenet.resnet34_resnet18_dcd,
    "imagenet-r34-r18-dcd-as-run": imagenet.resnet34_resnet18_dcd_as_run,
    "imagenet-r34-r18-dcd-kd": imagenet.resnet34_resnet18_dcd_kd,
    "imagenet-r50-r18-dcd": imagenet.resnet50_resnet18_dcd,
    "imagenet-r50-r18-dcd-kd": imagenet.resnet50_resnet18_dcd_kd,
    "imagenet-r50-mv2-dcd": imagenet.resnet50_mobilenetv2_dcd,
    "imagenet-r50-mv2-dcd-kd": imagenet.resnet50_mobilenetv2_dcd_kd,
    "imagenet-r34-r18-ckd": imagenet.resnet34_resnet18_ckd,
    "imagenet-r34-r18-pckd": imagenet.resnet34_resnet18_pckd,
    "imagenet-large-batch": imagenet.large_batch,
    "detection-teacher": detection.detection_teacher,
    "detection": detection.detection,
    "coco-r101-teacher": detection.coco_r101_teacher,
    "coco-r101-r18": detection.coco_r101_r18,
    "coco-r101-r50": detection.coco_r101_r50,
    "coco-r50-mv2": detection.coco_r50_mobilenetv2,
}
# Those of several runs, one after the other: by the names of the stages.
STAGED_RECIPES: dict[str, Callable[[], dict[str, TrainConfig]]] = {
    "cifar100-ab": cifar.ab,
    "cifar100-fsp": cifar.fsp,
    "cifar100-ft": cifar.ft,
}


def summary(name: str) -> str:
    """The first line of a recipe's docstring."""
    return ((RECIPES.get(name) or STAGED_RECIPES[name]).__doc__ or "").strip().splitlines()[0]
