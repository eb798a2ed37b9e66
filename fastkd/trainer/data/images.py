"""Images on disk: a folder a class, or WebDataset shards; decoded, augmented, and kept going past broken ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.trainer.data.encoded import ImageSamples
from fastkd.trainer.data.folder import FolderImages
from fastkd.validate import check_choice, check_int, check_number, check_type

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def train_transform(
    size: int,
    normalization: tuple[tuple[float, ...], tuple[float, ...]],
    *,
    min_scale: float = 0.08,
    color_jitter: float = 0.0,
    randaugment: int = 0,
) -> Callable[[Any], Tensor]:
    """A random part of the image at ``size``, flipped at random; optionally colours and RandAugment."""
    from torchvision.transforms import v2

    check_int("data.options.image_size", size, 1)
    check_number("data.options.min_scale", min_scale, 0.0, 1.0, exclusive=True)
    check_number("data.options.color_jitter", color_jitter, 0.0)
    check_int("data.options.randaugment", randaugment, 0)
    steps: list[Any] = [v2.RandomResizedCrop(size, scale=(min_scale, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    if randaugment:
        steps.append(v2.RandAugment(randaugment))
    return v2.Compose([*steps, *_to_tensor(normalization)])


def eval_transform(
    size: int, normalization: tuple[tuple[float, ...], tuple[float, ...]], *, crop: float = 0.875
) -> Callable[[Any], Tensor]:
    """The middle of the image at ``size``, which is ``crop`` of its shorter side."""
    from torchvision.transforms import v2

    check_number("data.options.crop", crop, 0.0, 1.0, exclusive=True)
    shorter = round(size / crop)
    return v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(size), *_to_tensor(normalization)])


def _to_tensor(normalization: tuple[tuple[float, ...], tuple[float, ...]]) -> list[Any]:
    from torchvision.transforms import v2

    mean, std = normalization
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


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
    """(training set, validation set) in ``root/train`` and ``root/val``, with ImageNet's usual augmentation.

    ``format``: ``"folder"``, a folder a class, or ``"shards"``, WebDataset tar files (see ``shards``).
    ``mean``, ``std``: the normalisation of the student's input; a teacher with another one gets its own.
    ``augment=False`` gives the training images as those of the validation set, for a linear probe.

    Raises ValueError: a folder that is missing or empty, or whose classes differ between training and validation.
    """
    from fastkd.trainer.data.shards import ShardImages

    check_choice("data.options.format", format, ("folder", "shards"))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"data.options.{name}: got {values}, expected three numbers")
        for value in values:
            check_number(f"data.options.{name}", value, 0.0, exclusive=name == "std")
    normalization = tuple(mean), tuple(std)
    check_type("data.options.augment", augment, bool)
    plain = eval_transform(image_size, normalization, crop=crop)
    random = train_transform(
        image_size, normalization, min_scale=min_scale, color_jitter=color_jitter, randaugment=randaugment
    )
    kind = FolderImages if format == "folder" else ShardImages
    train_set, eval_set = (
        kind(Path(root) / part, transform, normalization, max_broken)
        for part, transform in ((train, random if augment else plain), (val, plain))
    )
    # Shards name no classes: those without an image in the validation set are unknown there.
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
