"""Samples that are encoded images, and what happens to those that cannot be read."""

from __future__ import annotations

import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.validate import check_int

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
