"""Images with boxes in the format of COCO, scaled once, as the samples that object detectors learn from."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.trainer.batches import DetectionSample
from fastkd.trainer.data.coco.annotations import Annotations, read_annotations
from fastkd.trainer.data.coco.transform import scaled_size, scaled_with_boxes
from fastkd.trainer.data.options import CocoOptions
from fastkd.trainer.data.readers.encoded import MAX_BYTES, EncodedImages, decode
from fastkd.trainer.data.readers.files import read_regular


def load_coco(root: str, **options: Any) -> tuple[CocoImages, CocoImages]:
    """(training set, evaluation set) in ``root``, with the options of ``CocoOptions``.

    Without options these are the images in ``root/train`` and ``root/val`` that ``root/train.json`` and
    ``root/val.json`` name. Each category of the files is a class. Their ids may have gaps.

    An image without boxes is left out in training. In evaluation it is kept, since what is found there is wrong. Boxes
    that hold a crowd are left out in training, as torchvision's reference does. In evaluation they are kept, and what
    is found in them counts neither as right nor as wrong.

    Raises:
        ValueError: one line that names the file and what is wrong with it: see ``read_annotations``. Or the categories
            of the two parts differ, or a part has no box.

    Example::

        train_set, eval_set = load_coco("shapes", short_side=(128,))
        image, target, seed = train_set[0]  # target["boxes"], target["labels"], ...
    """
    chosen = CocoOptions(root=root, **options)
    if not Path(root).is_dir():
        raise ValueError(f"data.options.root: {root} is not a folder, expected one with {chosen.train}/ in it")
    parts = (chosen.train, chosen.val)
    files = [Path(root) / chosen.annotations.replace("{part}", part) for part in parts]
    train, val = (read_annotations(file, Path(root) / part) for file, part in zip(files, parts, strict=True))
    if train.categories != val.categories:
        one, other = (sorted(set(a.categories) - set(b.categories))[:3] for a, b in ((train, val), (val, train)))
        raise ValueError(
            f"data.options.root: {files[0]} and {files[1]} have different categories, expected the same ids and names; "
            f"only the first has {one}, only the second {other}"
        )
    for file, part in zip(files, (train, val), strict=True):
        if part.crowd.all():
            raise ValueError(f"{file}: has no box of an object, expected at least one")
    alone = train.with_boxes(~train.crowd)
    has_boxes = np.diff(alone.starts) > 0
    kept = alone.with_images(has_boxes & (has_boxes.cumsum() <= (chosen.limit or len(has_boxes))))
    train_set = CocoImages(Path(root) / chosen.train, kept, chosen, training=True)
    eval_set = CocoImages(Path(root) / chosen.val, val, chosen, training=False)
    train_set.note = _note(files, train, val, int((~has_boxes).sum()))
    return train_set, eval_set


def _note(files: list[Path], train: Annotations, val: Annotations, empty: int) -> str | None:
    """What a user has to know about boxes and images that are not used. None if all are."""
    crowd = int(train.crowd.sum())
    lines = [
        (files[0], empty, "images without boxes are not trained on"),
        (files[0], crowd, "boxes of crowds are not trained on"),
        *((file, part.without_area, "boxes without width or height are left out")
          for file, part in zip(files, (train, val), strict=True)),
    ]  # fmt: skip
    return "; ".join(f"{file}: {count} {what}" for file, count, what in lines if count) or None


class CocoImages(EncodedImages):
    """The images of one part with their boxes.

    A sample is (image, target, seed), see ``DetectionSample``. An image that cannot be read, or that has another size
    than the annotations say, is replaced by the next one together with its boxes, see ``EncodedImages``. A rotation
    that is noted in the file (EXIF) is not applied: COCO's boxes are those of the pixels as they are stored.

    Args:
        folder: the images.
        annotations: what is to be seen in them.
        options: how they are scaled and mirrored.
        training: draw the size, the mirroring and the seed of a sample from Python's global generator. Otherwise
            images have the largest of ``short_side``, and the seed of a sample is its number.

    Attributes:
        classes: the names of the classes, without the background. The first one has the label 1.
        labels_sha256: a hash of the annotations, by which a resumed run knows its data.
        note: what a user has to know about boxes and images that are not used.
    """

    note: str | None = None

    def __init__(self, folder: Path, annotations: Annotations, options: CocoOptions, *, training: bool) -> None:
        super().__init__(folder, (tuple(options.mean), tuple(options.std)), options.max_broken)
        self.annotations, self.options, self.training = annotations, options, training
        self.classes = annotations.classes
        self.labels_sha256 = annotations.sha256()
        self.hold(len(annotations.image_ids))

    def encoded(self, index: int) -> bytes:
        return read_regular(self._path(index), MAX_BYTES)

    def describe(self, index: int) -> str:
        return os.fsencode(self._path(index)).decode(errors="backslashreplace")

    def decoded(self, index: int) -> Tensor:
        image, expected = decode(self.encoded(index)), self.annotations.sizes[index].tolist()
        if list(image.shape[-2:]) != expected:
            height, width = image.shape[-2:]
            raise ValueError(f"has {width} x {height} pixels, the annotations say {expected[1]} x {expected[0]}")
        return image

    def __getitem__(self, index: int) -> DetectionSample:
        chosen, image = self.read(index)
        known, options, (height, width) = self.annotations, self.options, image.shape[-2:]
        seed, side, mirror = chosen, max(options.short_side), False
        if self.training:
            # The seed comes first: what a model draws with it does not change with the options.
            seed, side = random.getrandbits(62), random.choice(options.short_side)
            mirror = random.random() < options.flip
        own = slice(known.starts[chosen], known.starts[chosen + 1])
        size = scaled_size(height, width, side, options.max_side)
        image, boxes, scale = scaled_with_boxes(image, known.boxes[own], size, mirror)
        target = {
            "boxes": boxes,
            "labels": torch.tensor(known.labels[own]),
            "iscrowd": torch.tensor(known.crowd[own], dtype=torch.int64),
            "area": torch.tensor(known.area[own]),
            "scale": scale,
            "image_id": torch.tensor(int(known.image_ids[chosen])),
        }
        return image, target, seed

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.annotations.names[index])
