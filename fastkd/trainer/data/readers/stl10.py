"""STL-10 as it is published, with its images scaled down and held in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from fastkd.trainer.data.options import Stl10Options
from fastkd.trainer.data.readers.cifar import CifarImages
from fastkd.trainer.data.readers.encoded import scaled
from fastkd.trainer.data.readers.files import content_of, fetch_archive

SIDE = 96
MAX_BYTES = 1 << 28  # of a file; the largest published one has 221 MB
# Means and standard deviations of the training images' channels, as DCD's authors use them.
NORMALIZATION = ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2712))
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
FOLDER = "stl10_binary"
FILES = (("train_X.bin", "train_y.bin"), ("test_X.bin", "test_y.bin"))


def load_stl10(root: str, **options: Any) -> tuple[CifarImages, CifarImages]:
    """(training set, test set) of STL-10 in ``root``, with the options of ``Stl10Options``.

    ``root`` is the folder ``stl10_binary`` of the published archive, or the one that holds it. The images are scaled
    once, as the authors of DCD scale them: PIL's bilinear interpolation, which averages over the pixels that it leaves
    out. The 100,000 images without a label are not read.

    Raises:
        ValueError: files are missing, cannot be downloaded, or do not hold what the layout says.
    """
    chosen = Stl10Options(root=root, **options)
    for folder in (Path(root) / FOLDER, Path(root)):
        if all((folder / name).is_file() for names in FILES for name in names):
            (train, labels), (test, test_labels) = (_read(folder, names, chosen.image_size) for names in FILES)
            return (
                CifarImages(train, labels, NORMALIZATION, augment=chosen.augment, classes=CLASSES),
                CifarImages(test, test_labels, NORMALIZATION, augment=False, classes=CLASSES),
            )
    if not chosen.download:
        raise ValueError(
            f"data.options.root: found no STL-10 in {root}, expected the folder {FOLDER}, or --data.options.download"
        )
    from torchvision.datasets import STL10

    fetch_archive(STL10, root)
    return load_stl10(root, image_size=chosen.image_size, augment=chosen.augment)


def _read(folder: Path, names: tuple[str, str], side: int) -> tuple[Tensor, Tensor]:
    """Reads images of 3 x 96 x 96 bytes, column by column, and as many labels from 1 to 10, a byte each."""
    pixels, labels = (np.frombuffer(content_of(folder / name, MAX_BYTES), np.uint8) for name in names)
    if pixels.size == 0 or pixels.size != 3 * SIDE * SIDE * labels.size:
        raise ValueError(
            f"{folder / names[0]}: has {pixels.size} bytes for {labels.size} labels, expected {3 * SIDE * SIDE} each"
        )
    if labels.min() < 1 or labels.max() > len(CLASSES):
        raise ValueError(f"{folder / names[1]}: has labels outside of [1, {len(CLASSES)}]")
    images = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 3, 2, 1)  # height, width, channels
    return torch.stack([scaled(pil_to_tensor(Image.fromarray(image)), side) for image in images]), torch.tensor(
        labels
    ).long() - 1
