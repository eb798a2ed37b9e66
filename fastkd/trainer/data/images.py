"""Loads images on disk, from one folder per class or from WebDataset shards, and augments them as bytes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import RandomErasing, v2
from torchvision.transforms.v2 import functional

from fastkd.trainer.data.options import ImagesOptions, TransformOptions
from fastkd.trainer.data.readers.encoded import ImageSamples
from fastkd.trainer.data.readers.folder import FolderImages
from fastkd.trainer.data.readers.shards import ShardImages

Transform = Callable[[Tensor], Tensor]


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
    """The middle of a picture, resized. Takes and gives uint8 [3, H, W]."""
    size = options.image_size
    return v2.Compose([v2.Resize(round(size / options.crop), antialias=True), v2.CenterCrop(size)])


def training_transform(options: TransformOptions) -> Transform:
    """Augmentation with these options. Takes and gives uint8 [3, H, W]."""
    return RandomChange(options) if options.augment else evaluation_transform(options)


class RandomChange:
    """Cuts out and mirrors an image, uint8 [3, H, W], at random. On request it changes its colours and erases a part.

    The crop is drawn as by torchvision's ``RandomResizedCrop`` (arXiv 1409.4842, section 6), in a tenth of its time.
    timm's augmentations (its policies, the jitter of colours) are applied to the crop. The random numbers come from
    Python's, numpy's and torch's global generators.

    Raises:
        ValueError: timm knows no such policy.
    """

    def __init__(self, options: TransformOptions) -> None:
        self.size = (options.image_size, options.image_size)
        self.min_scale, self.max_aspect = options.min_scale, options.max_aspect
        self.flip, self.erasing = options.flip, options.erasing
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (options.mean, options.std))
        self.change = _colours(options)

    def __call__(self, image: Tensor) -> Tensor:
        rows, columns = self._place(image.shape[1], image.shape[2])
        image = interpolate(image[None, :, rows, columns], self.size, mode="bilinear", antialias=True)[0]
        if random.random() < self.flip:
            image = image.flip(2)
        if self.change is not None:
            image = functional.pil_to_tensor(self.change(functional.to_pil_image(image)))
        if random.random() < self.erasing:
            image = self._erase(image)
        return image

    def _place(self, height: int, width: int) -> tuple[slice, slice]:
        """Where to cut: an area and an aspect ratio at random that fit, or after ten tries the largest middle."""
        for _ in range(10):
            area = height * width * random.uniform(self.min_scale, 1.0)
            aspect = self.max_aspect ** random.uniform(-1.0, 1.0)
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < h <= height and 0 < w <= width:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                return slice(top, top + h), slice(left, left + w)
        h, w = min(height, round(width * self.max_aspect)), min(width, round(height * self.max_aspect))
        top, left = (height - h) // 2, (width - w) // 2
        return slice(top, top + h), slice(left, left + w)

    def _erase(self, image: Tensor) -> Tensor:
        """The image with noise in a random rectangle: normal numbers of the data's means and standard deviations."""
        top, left, height, width, noise = RandomErasing.get_params(image, (0.02, 1 / 3), (0.3, 1 / 0.3))
        if height < image.shape[1]:  # else no rectangle was found that fits
            pixels = ((noise * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)
            image = image.clone()
            image[:, top : top + height, left : left + width] = pixels
        return image


def _colours(options: TransformOptions) -> Callable[[Any], Any] | None:
    """What timm does to a picture of PIL's by these options. None for nothing."""
    policy = options.auto_augment or (f"rand-m9-n{options.randaugment}" if options.randaugment else None)
    if policy is None and not options.color_jitter:
        return None
    # timm takes a second, which other runs need not wait for.
    from timm.data.transforms_factory import transforms_imagenet_train

    jitter: Any = options.color_jitter or None  # timm takes None, though its annotation does not say so
    try:
        _, change, _ = transforms_imagenet_train(
            options.image_size,
            color_jitter=jitter,
            force_color_jitter=options.color_jitter > 0,
            auto_augment=policy,
            interpolation="bilinear",
            mean=tuple(options.mean),
            separate=True,
        )
    except (AssertionError, ValueError, KeyError) as error:  # timm's, of a policy that it cannot read
        raise ValueError(f"data.options.auto_augment: got {policy!r}, expected a policy of timm's ({error})") from None
    return change
