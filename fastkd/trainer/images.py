"""Images on disk: a folder a class, or WebDataset shards; decoded, augmented, and kept going past broken ones."""

from __future__ import annotations

import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.validate import check_choice, check_int, check_number, check_type

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


class BrokenImagesError(RuntimeError):
    """More images than allowed cannot be read."""


class ImageSamples(Dataset[tuple[Tensor, Tensor]], ABC):
    """Encoded images with labels; a sample is the transformed image [3, H, W] and its label.

    An image that cannot be decoded is replaced by the next one that can, label included: a pure function of the index,
    so that a resumed run sees the same. It is counted once however often it comes up, in memory that worker processes
    share. More than ``max_broken`` of them raise BrokenImagesError.

    Attributes:
        labels: [N], int64. classes: their names. normalization: (mean, std) of the channels that come out.
    """

    def __init__(
        self,
        labels: Tensor,
        classes: Sequence[str],
        transform: Callable[[Any], Tensor],
        normalization: tuple[tuple[float, ...], tuple[float, ...]],
        max_broken: int,
    ) -> None:
        check_int("data.options.max_broken", max_broken, 0)
        self.labels = labels
        self.classes = list(classes)
        self.transform = transform
        self.normalization = normalization
        self.max_broken = max_broken
        self._broken = torch.zeros(len(labels), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def broken(self) -> int:
        """Images found broken so far, in all worker processes."""
        return int(self._broken.count_nonzero())

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The file of sample ``index``; OSError if it cannot be read."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where sample ``index`` comes from, for messages."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        for chosen in range(index, index + len(self)):
            chosen %= len(self)
            if not self._broken[chosen]:
                try:
                    image = decode(self.encoded(chosen))
                except Exception as error:  # decoders raise almost anything on damaged files
                    self._report(chosen, error)
                    continue
                return self.transform(image), self.labels[chosen]
        raise BrokenImagesError(f"data: none of the {len(self)} images can be read")

    def _report(self, index: int, error: Exception) -> None:
        self._broken[index] = 1
        found = self.broken
        what = f"{self.describe(index)}: cannot be read ({type(error).__name__}: {error})"
        if found > self.max_broken:
            raise BrokenImagesError(
                f"data: {found} images cannot be read, expected at most {self.max_broken} (data.options.max_broken); "
                f"the last one: {what}"
            ) from error
        warnings.warn(f"{what}; the next image takes its place", RuntimeWarning, stacklevel=3)


def decode(encoded: bytes) -> Any:
    """An RGB image of PIL's, 16 bits scaled to 8. ValueError for floating-point pixels, whose range is unknown."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        if image.mode == "F":
            raise ValueError("has floating-point pixels, expected 8 or 16 bits")
        if image.mode == "I" or image.mode.startswith("I;16"):  # PIL would clip them to 8 bits
            pixels = np.asarray(image, dtype=np.float64) / 257
            return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


class FolderImages(ImageSamples):
    """``root/CLASS/anything/FILE``: classes are the folders in alphabetical order."""

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Any], Tensor],
        normalization: tuple[tuple[float, ...], tuple[float, ...]],
        max_broken: int = 100,
    ) -> None:
        from torchvision.datasets.folder import find_classes, make_dataset

        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"data.options.root: {root} is not a folder, expected one with a folder for each class")
        try:
            classes, index_of = find_classes(str(root))
            samples = make_dataset(str(root), index_of, EXTENSIONS)
        except FileNotFoundError as error:
            raise ValueError(f"data.options.root: {error}") from None
        # One array for all names: a list of a million strings is copied into every worker as soon as it is read.
        self._names = np.array([os.fsencode(Path(path).relative_to(root)) for path, _ in samples])
        self.root = root
        super().__init__(torch.tensor([label for _, label in samples]), classes, transform, normalization, max_broken)

    def encoded(self, index: int) -> bytes:
        return self._path(index).read_bytes()

    def describe(self, index: int) -> str:
        return os.fsencode(self._path(index)).decode(errors="backslashreplace")

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._names[index])


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

    ``format``: ``"folder"``, a folder a class, or ``"shards"``, WebDataset tar files (see ``fastkd.trainer.shards``).
    ``mean``, ``std``: the normalisation of the student's input; a teacher with another one gets its own.
    ``augment=False`` gives the training images as those of the validation set, for a linear probe.

    Raises ValueError: a folder that is missing or empty, or whose classes differ between training and validation.
    """
    from fastkd.trainer.shards import ShardImages

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
