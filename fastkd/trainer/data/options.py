"""The options of the data sets that fastkd has itself: what ``DataConfig.options`` may hold, and their defaults."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from fastkd.validate import check_choice, check_int, check_number, check_type

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(kw_only=True, frozen=True)
class DigitsOptions:
    """scikit-learn's 1,797 handwritten digits.

    Attributes:
        train_size: this many of them are for training. The others are for evaluation.
        seed: the seed of the split.
    """

    train_size: int = 1400
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("data.options.train_size", self.train_size, 10)
        check_int("data.options.seed", self.seed, 0)


@dataclass(kw_only=True, frozen=True)
class _Folder:
    """Data in a folder. A base of its own, so that ``root`` is the first flag.

    Attributes:
        root: the folder of the data.
    """

    root: str

    def __post_init__(self) -> None:
        check_type("data.options.root", self.root, str)


@dataclass(kw_only=True, frozen=True)
class CifarOptions(_Folder):
    """CIFAR-10 or CIFAR-100, in ``root`` or in a folder in it, unpacked.

    Attributes:
        classes: 10 or 100.
        augment: shift and mirror the training images at random.
        download: fetch the archive into ``root`` if it is not there.
    """

    classes: Literal[10, 100] = 100
    augment: bool = True
    download: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("data.options.classes", str(self.classes), ("10", "100"))
        for name in ("augment", "download"):
            check_type(f"data.options.{name}", getattr(self, name), bool)


@dataclass(kw_only=True, frozen=True)
class _ScaledOptions(_Folder):
    """Images that are scaled once and held in memory.

    Attributes:
        image_size: height and width that the images are scaled to.
        augment: shift and mirror the training images at random.
    """

    image_size: int = 32
    augment: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.options.image_size", self.image_size, 1)
        check_type("data.options.augment", self.augment, bool)


@dataclass(kw_only=True, frozen=True)
class Stl10Options(_ScaledOptions):
    """STL-10 (5,000 training and 8,000 test images of 10 classes), in ``root`` or in a folder in it, unpacked.

    Attributes:
        download: fetch the archive into ``root`` if it is not there.
    """

    download: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type("data.options.download", self.download, bool)


@dataclass(kw_only=True, frozen=True)
class TinyImageNetOptions(_ScaledOptions):
    """Tiny-ImageNet (100,000 training and 10,000 validation images of 200 classes), in ``root`` or in a folder in it.

    Attributes:
        max_broken: this many images may be unreadable. One more ends the run.
    """

    max_broken: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("data.options.max_broken", self.max_broken, 0)


@dataclass(kw_only=True, frozen=True)
class TransformOptions:
    """What an image goes through before a model sees it.

    Attributes:
        image_size: height and width of the images that come out.
        mean: of the channels, to normalise the student's input on its device. A teacher that was trained with other
            values gets its own.
        std: standard deviations of the channels, as ``mean``.
        crop: an evaluation image is the middle of the picture, this fraction of its shorter side.
        min_scale: a training image covers at least this fraction of the picture's area.
        max_aspect: a training image is cut out with an aspect ratio of at most this and at least its inverse.
        flip: the probability that a training image is mirrored.
        color_jitter: strength of random changes of brightness, contrast and saturation. 0 makes none.
        randaugment: RandAugment operations per training image, at magnitude 9. 0 makes none.
        auto_augment: a policy of timm's instead, such as ``rand-m9-mstd0.5-inc1``, ``augmix-m5-w4-d2`` or ``original``.
        erasing: the probability that a random rectangle of a training image is filled with noise.
        augment: switch all of this off with False, as for a linear probe.
    """

    image_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop: float = 0.875
    min_scale: float = 0.08
    max_aspect: float = 4 / 3
    flip: float = 0.5
    color_jitter: float = 0.0
    randaugment: int = 0
    auto_augment: str | None = None
    erasing: float = 0.0
    augment: bool = True

    def __post_init__(self) -> None:
        _check_normalization(self.mean, self.std)
        check_int("data.options.image_size", self.image_size, 1)
        for name in ("crop", "min_scale"):
            check_number(f"data.options.{name}", getattr(self, name), 0.0, 1.0, exclusive=True)
        check_number("data.options.max_aspect", self.max_aspect, 1.0)
        for name in ("flip", "erasing"):
            check_number(f"data.options.{name}", getattr(self, name), 0.0, 1.0)
        check_number("data.options.color_jitter", self.color_jitter, 0.0)
        check_int("data.options.randaugment", self.randaugment, 0)
        check_type("data.options.auto_augment", self.auto_augment, (str, type(None)))
        if self.auto_augment and self.randaugment:
            raise ValueError(
                f"data.options.randaugment: got {self.randaugment} with auto_augment, expected one of them"
            )
        check_type("data.options.augment", self.augment, bool)


@dataclass(kw_only=True, frozen=True)
class ImagesOptions(TransformOptions, _Folder):
    """Images on disk. ``root`` holds a part for training and one for evaluation, or directly a folder for each class.

    Attributes:
        format: ``folder`` (one folder per class) or ``shards`` (WebDataset).
        train: the name of the part for training.
        val: the name of the part for evaluation.
        val_fraction: where ``root`` directly holds the classes, this fraction of every class is kept for evaluation.
        split_seed: the seed that those are drawn with.
        max_broken: this many images may be unreadable. One more ends the run.
    """

    format: Literal["folder", "shards"] = "folder"
    train: str = "train"
    val: str = "val"
    val_fraction: float = 0.2
    split_seed: int = 0
    max_broken: int = 100

    def __post_init__(self) -> None:
        TransformOptions.__post_init__(self)
        _Folder.__post_init__(self)
        check_choice("data.options.format", self.format, ("folder", "shards"))
        for name in ("train", "val"):
            check_type(f"data.options.{name}", getattr(self, name), str)
        check_number("data.options.val_fraction", self.val_fraction, 0.0, math.nextafter(1.0, 0.0), exclusive=True)
        check_int("data.options.split_seed", self.split_seed, 0)
        check_int("data.options.max_broken", self.max_broken, 0)


@dataclass(kw_only=True, frozen=True)
class CocoOptions(_Folder):
    """Images with boxes in the format of COCO: in ``root`` a folder and a JSON file of annotations for each part.

    COCO's own files are read with ``train=train2017, val=val2017, annotations=annotations/instances_{part}.json``.

    Attributes:
        train: the name of the part for training, which is the folder of its images.
        val: the name of the part for evaluation.
        annotations: the annotation file of a part, in ``root``.
        short_side: an image is scaled to this shorter side. Of several, a training image gets one at random, and an
            evaluation image gets the largest.
        max_side: the longer side has at most this many pixels after scaling.
        flip: the probability that a training image is mirrored.
        mean: of the channels, to normalise the student's input on its device. A teacher that was trained with other
            values gets its own.
        std: standard deviations of the channels, as ``mean``.
        limit: keep the first training images only, this many. None keeps all.
        max_broken: this many images may be unreadable. One more ends the run.
    """

    train: str = "train"
    val: str = "val"
    annotations: str = "{part}.json"
    short_side: tuple[int, ...] = (800,)
    max_side: int = 1333
    flip: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    limit: int | None = None
    max_broken: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train", "val", "annotations"):
            check_type(f"data.options.{name}", getattr(self, name), str)
        if "{part}" not in self.annotations:
            raise ValueError(f"data.options.annotations: got {self.annotations!r}, expected {{part}} in it")
        check_type("data.options.short_side", self.short_side, (tuple, list))
        if not self.short_side:
            raise ValueError("data.options.short_side: got no number, expected at least one")
        for side in self.short_side:
            check_int("data.options.short_side", side, 1)
        check_int("data.options.max_side", self.max_side, 1)
        check_number("data.options.flip", self.flip, 0.0, 1.0)
        _check_normalization(self.mean, self.std)
        if self.limit is not None:
            check_int("data.options.limit", self.limit, 1)
        check_int("data.options.max_broken", self.max_broken, 0)


@dataclass(kw_only=True, frozen=True)
class TorchvisionOptions(TransformOptions, _Folder):
    """A data set of torchvision, which reads it from ``root``.

    Attributes:
        download: let torchvision fetch it into ``root`` if it is not there.
    """

    download: bool = False

    def __post_init__(self) -> None:
        TransformOptions.__post_init__(self)
        _Folder.__post_init__(self)
        check_type("data.options.download", self.download, bool)


def _check_normalization(mean: Any, std: Any) -> None:
    for name, values in (("mean", mean), ("std", std)):
        check_type(f"data.options.{name}", values, (tuple, list))
        if len(values) != 3:
            raise ValueError(f"data.options.{name}: got {values}, expected three numbers")
        for value in values:
            check_number(f"data.options.{name}", value, 0.0, exclusive=name == "std")


_OPTIONS: dict[str, type] = {
    "digits": DigitsOptions,
    "images": ImagesOptions,
    "cifar": CifarOptions,
    "stl10": Stl10Options,
    "coco": CocoOptions,
    "tiny-imagenet": TinyImageNetOptions,
}


def options_class(data: str) -> type | None:
    """The class of the options that the data set of this name takes. None for ``package.module:callable``."""
    return TorchvisionOptions if data.startswith("torchvision:") else _OPTIONS.get(data)


def check_options(data: str, options: dict[str, Any]) -> None:
    """Raise for an option that the data set of this name does not have, or a value that it does not take.

    That ``root`` is missing is told when the data are read.
    """
    kind = options_class(data)
    if kind is None:
        return
    names = [field.name for field in dataclasses.fields(kind)]
    if unknown := sorted(set(options) - set(names)):
        raise ValueError(
            f"data.options: got {', '.join(unknown)}, expected options of {data!r}: {', '.join(sorted(names))}"
        )
    kind(**({"root": ""} if "root" in names else {}) | options)


def with_defaults(data: Any, options: Any) -> Any:
    """The options with the default of every option that is not given; as they are for a data set of others."""
    kind = options_class(data) if isinstance(data, str) else None
    if kind is None or not isinstance(options, dict):
        return options
    missing = dataclasses.MISSING
    defaults = {field.name: field.default for field in dataclasses.fields(kind) if field.default is not missing}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in (defaults | options).items()}
