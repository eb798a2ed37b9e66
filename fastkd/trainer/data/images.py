"""Loads images on disk, from one folder per class or from WebDataset shards, with ImageNet's usual augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

from fastkd.trainer.data.encoded import ImageSamples, Normalization
from fastkd.trainer.data.folder import FolderImages
from fastkd.trainer.data.shards import ShardImages
from fastkd.validate import check_choice, check_int, check_number, check_type

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_images(
    root: str,
    *,
    format: str = "folder",
    train: str = "train",
    val: str = "val",
    image_size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    crop: float = 0.875,
    min_scale: float = 0.08,
    color_jitter: float = 0.0,
    randaugment: int = 0,
    augment: bool = True,
    max_broken: int = 100,
) -> tuple[ImageSamples, ImageSamples]:
    """(training set, validation set) in ``root/train`` and ``root/val``.

    Args:
        root: the folder that holds both parts.
        format: ``"folder"`` (``FolderImages``: one folder per class) or ``"shards"`` (``ShardImages``: WebDataset).
        train, val: the names of the two parts.
        image_size: height and width of the images that come out.
        mean, std: normalise the student's input. A teacher that was trained with other values gets its own.
        crop: a validation image is the middle of the picture, this fraction of its shorter side.
        min_scale: a training image covers at least this fraction of the picture's area.
        color_jitter: strength of random changes of brightness, contrast and saturation. 0 makes none.
        randaugment: RandAugment operations per training image. 0 makes none.
        augment: False makes the training images like those for validation, for a linear probe.
        max_broken: see ``ImageSamples``.

    Raises:
        ValueError: a folder is missing or empty, or the classes differ between training and validation.
    """
    check_choice("data.options.format", format, ("folder", "shards"))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"data.options.{name}: got {values}, expected three numbers")
        for value in values:
            check_number(f"data.options.{name}", value, 0.0, exclusive=name == "std")
    check_int("data.options.image_size", image_size, 1)
    check_number("data.options.crop", crop, 0.0, 1.0, exclusive=True)
    check_number("data.options.min_scale", min_scale, 0.0, 1.0, exclusive=True)
    check_number("data.options.color_jitter", color_jitter, 0.0)
    check_int("data.options.randaugment", randaugment, 0)
    check_type("data.options.augment", augment, bool)
    plain: list[Any] = [v2.Resize(round(image_size / crop), antialias=True), v2.CenterCrop(image_size)]
    augmented = [v2.RandomResizedCrop(image_size, scale=(min_scale, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    if color_jitter:
        augmented.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    if randaugment:
        augmented.append(v2.RandAugment(randaugment))
    normalization: Normalization = tuple(mean), tuple(std)
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*normalization)]
    kind = FolderImages if format == "folder" else ShardImages
    train_set, eval_set = (
        kind(Path(root) / part, v2.Compose([*steps, *to_tensor]), normalization, max_broken)
        for part, steps in ((train, augmented if augment else plain), (val, plain))
    )
    # Shards do not name their classes. A class that the validation set has no image of is unknown there.
    same = (
        set(eval_set.classes) <= set(train_set.classes) if format == "shards" else train_set.classes == eval_set.classes
    )
    if not same:
        differing = sorted(set(train_set.classes) ^ set(eval_set.classes))
        raise ValueError(
            f"data.options.root: {train} has {len(train_set.classes)} classes, {val} has {len(eval_set.classes)}; in "
            f"one only: {differing[:5]}"
        )
    return train_set, eval_set
