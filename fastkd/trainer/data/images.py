"""Loads images on disk, from one folder per class or from WebDataset shards, with timm's augmentation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from fastkd.trainer.data.options import ImagesOptions, TransformOptions
from fastkd.trainer.data.readers.encoded import ImageSamples
from fastkd.trainer.data.readers.folder import FolderImages
from fastkd.trainer.data.readers.shards import ShardImages

Transform = Callable[[Any], Tensor]


def load_images(root: str, **options: Any) -> tuple[ImageSamples, ImageSamples]:
    """(training set, evaluation set) in ``root/train`` and ``root/val``, with the options of ``ImagesOptions``.

    A ``root`` with neither of the two, but with a folder for each class, is split: see ``val_fraction``.

    Raises:
        ValueError: a folder is missing or empty, or the classes differ between training and validation.
    """
    chosen = ImagesOptions(root=root, **options)
    folder, normalization = Path(root), (tuple(chosen.mean), tuple(chosen.std))
    kind = FolderImages if chosen.format == "folder" else ShardImages
    if chosen.format == "folder" and not folder.is_dir():
        raise ValueError(f"data.options.root: {root} is not a folder, expected one with a folder for each class")
    # The same part may be named twice, to evaluate a folder that has no other.
    parts = [(chosen.train, training_transform(chosen)), (chosen.val, evaluation_transform(chosen))]
    if chosen.format == "folder" and not any((folder / part).is_dir() for part, _ in parts):
        whole, held_out = (FolderImages(folder, steps, normalization, chosen.max_broken) for _, steps in parts)
        train, val = split_by_class(whole.labels, chosen.val_fraction, chosen.split_seed)
        whole.note = (
            f"{root}: has neither {chosen.train}/ nor {chosen.val}/; {len(val)} of its {len(whole)} images, "
            f"{chosen.val_fraction:.0%} of every class, are kept for evaluation (--data.options.val-fraction)"
        )
        return whole.keep(train), held_out.keep(val)
    train_set, eval_set = (kind(folder / part, steps, normalization, chosen.max_broken) for part, steps in parts)
    # Shards may not name their classes. The last classes are then unknown where there is no image of them.
    ours, theirs = train_set.classes, eval_set.classes
    if theirs != (ours[: len(theirs)] if chosen.format == "shards" else ours):
        differing = sorted(set(ours) ^ set(theirs))
        raise ValueError(
            f"data.options.root: {chosen.train} has {len(ours)} classes, {chosen.val} has {len(theirs)}; in "
            f"one only: {differing[:5]}"
        )
    return train_set, eval_set


def split_by_class(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(the samples for training, those for evaluation), of which every class gives ``fraction``, at least one.

    Of a class with a single sample nothing is held out. Depends on the labels and ``seed`` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        (members,) = torch.where(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return torch.where(~held_out)[0], torch.where(held_out)[0]


def evaluation_transform(options: TransformOptions) -> Transform:
    """The middle of a picture, resized and normalised."""
    size = options.image_size
    steps = [v2.Resize(round(size / options.crop), antialias=True), v2.CenterCrop(size)]
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(options.mean, options.std)]
    return v2.Compose([*steps, *to_tensor])


def training_transform(options: TransformOptions) -> Transform:
    """timm's augmentation with these options. It draws from Python's, numpy's and torch's global generators."""
    if not options.augment:
        return evaluation_transform(options)
    from timm.data.transforms_factory import (
        transforms_imagenet_train,  # takes a second, which evaluation need not wait for
    )

    jitter: Any = options.color_jitter or None  # timm takes None, though its annotation does not say so
    policy = options.auto_augment or (f"rand-m9-n{options.randaugment}" if options.randaugment else None)
    try:
        return transforms_imagenet_train(
            options.image_size,
            scale=(options.min_scale, 1.0),
            ratio=(1 / options.max_aspect, options.max_aspect),
            hflip=options.flip,
            color_jitter=jitter,
            force_color_jitter=options.color_jitter > 0,
            auto_augment=policy,
            interpolation="bilinear",
            mean=tuple(options.mean),
            std=tuple(options.std),
            re_prob=options.erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError) as error:  # timm's, of a policy that it cannot read
        raise ValueError(f"data.options.auto_augment: got {policy!r}, expected a policy of timm's ({error})") from None
