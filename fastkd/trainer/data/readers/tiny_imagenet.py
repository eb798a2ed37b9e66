"""Tiny-ImageNet as it is published, with its images scaled down and held in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.trainer.data.options import TinyImageNetOptions
from fastkd.trainer.data.readers.cifar import CifarImages
from fastkd.trainer.data.readers.encoded import EXTENSIONS, MAX_BYTES, ImageSamples, scaled
from fastkd.trainer.data.readers.files import content_of, read_regular
from fastkd.trainer.data.readers.folder import FolderImages

# Means and standard deviations of the training images' channels, as DCD's authors use them.
NORMALIZATION = ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))
FOLDER, ANNOTATIONS = "tiny-imagenet-200", "val_annotations.txt"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MAX_TEXT = 1 << 24  # bytes of the annotations; the published ones have half a megabyte


class AnnotatedImages(ImageSamples):
    """The images ``root/images/FILE``. Lines of ``root/val_annotations.txt`` give a file and its class, then a box."""

    def __init__(
        self, root: Path, transform: Callable[[Any], Tensor], classes: list[str], max_broken: int = 100
    ) -> None:
        self._known = classes
        super().__init__(root, transform, NORMALIZATION, max_broken)

    def find_samples(self) -> tuple[Tensor, list[str]]:
        path = self.root / ANNOTATIONS
        numbers = {name: number for number, name in enumerate(self._known)}
        self._names: list[str] = []
        labels = []
        for place, line in enumerate(content_of(path, MAX_TEXT).decode(errors="replace").splitlines(), 1):
            name, *rest = line.split("\t")
            if not rest or rest[0] not in numbers or Path(name).name != name or not name.lower().endswith(EXTENSIONS):
                raise ValueError(
                    f"{path}: line {place} is {line[:80]!r}, expected the name of an image, a tab and a class of the "
                    "training set"
                )
            self._names.append(name)
            labels.append(numbers[rest[0]])
        if not labels:
            raise ValueError(f"{path}: is empty, expected a line for each image")
        return torch.tensor(labels), self._known

    def encoded(self, index: int) -> bytes:
        return read_regular(self.describe(index), MAX_BYTES)

    def describe(self, index: int) -> str:
        return str(self.root / "images" / self._names[index])


def load_tiny_imagenet(root: str, **options: Any) -> tuple[CifarImages, CifarImages]:
    """(training set, validation set) of Tiny-ImageNet in ``root``, with the options of ``TinyImageNetOptions``.

    ``root`` is the folder ``tiny-imagenet-200`` of the published archive, or the one that holds it. Validation images
    may also lie in a folder for each class, as the scripts of many benchmarks arrange them. All images are decoded and
    scaled once, when the run begins. The scaling is that of ``load_stl10``.

    Raises:
        ValueError: a folder is missing, or the validation set has other classes than the training set.
        BrokenImagesError: more images than ``max_broken`` cannot be read.
    """
    chosen = TinyImageNetOptions(root=root, **options)
    places = (Path(root) / FOLDER, Path(root))
    folder = next((place for place in places if all((place / part).is_dir() for part in ("train", "val"))), None)
    if folder is None:
        raise ValueError(
            f"data.options.root: found no Tiny-ImageNet in {root}, expected the folder {FOLDER} with train and val in "
            f"it; unpack {URL} there"
        )
    scale = partial(scaled, side=chosen.image_size)
    train: ImageSamples = FolderImages(folder / "train", scale, NORMALIZATION, chosen.max_broken)
    if (folder / "val" / "images").is_dir():
        val: ImageSamples = AnnotatedImages(folder / "val", scale, train.classes, chosen.max_broken)
    else:
        val = FolderImages(folder / "val", scale, NORMALIZATION, chosen.max_broken)
    if val.classes != train.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"data.options.root: train and val of {folder} differ in their classes, as in {differing[:5]}")
    return _in_memory(train, chosen.image_size, chosen.augment), _in_memory(val, chosen.image_size, augment=False)


def _in_memory(samples: ImageSamples, side: int, augment: bool) -> CifarImages:
    images = torch.empty((len(samples), 3, side, side), dtype=torch.uint8)
    labels = torch.empty(len(samples), dtype=torch.long)
    for index in range(len(samples)):
        images[index], labels[index] = samples[index]
    return CifarImages(images, labels, NORMALIZATION, augment=augment, classes=samples.classes)
