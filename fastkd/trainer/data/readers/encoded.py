"""Data sets of encoded images, which go on past images that cannot be read."""

from __future__ import annotations

import io
import struct
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from fastkd.validate import check_int

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
# What these extensions stand for. PIL would go by the content: it starts Ghostscript for PostScript named .jpg.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
MAX_BYTES = 1 << 28  # of an encoded image
MAX_PIXELS = 1 << 26  # of a decoded one, which takes 200 MB in RGB


class BrokenImagesError(RuntimeError):
    """More images cannot be read than ``data.options.max_broken`` allows.

    Example::

        try:
            train(config)
        except BrokenImagesError as error:
            print(f"repair the data set, or allow more broken images: {error}")
    """


class EncodedImages(Dataset[Any], ABC):
    """The images in ``root``, where an image that cannot be read is replaced by the next one that can.

    The replacement depends on the index alone, so that a resumed run sees the same images. A broken image is counted
    once, however often it comes up and whichever worker process finds it. Broken are also files of other formats than
    FORMATS, and images that are larger than MAX_BYTES and MAX_PIXELS allow. A subclass calls ``hold``.

    Args:
        root: the folder. A subclass says how the images lie in it.
        normalization: (means, standard deviations) of the channels, for the model that the images are given to.
        max_broken: this many images may be broken. One more raises BrokenImagesError.

    Attributes:
        classes: the names of the classes.
        broken: the number of images found broken so far, in all worker processes.
    """

    classes: list[str]

    def __init__(self, root: str | Path, normalization: Normalization, max_broken: int = 100) -> None:
        check_int("data.options.max_broken", max_broken, 0)
        self.root = Path(root)
        self.normalization = normalization
        self.max_broken = max_broken

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The file of sample ``index``. OSError if it cannot be read, or has more than MAX_BYTES."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where sample ``index`` comes from, for messages."""

    def hold(self, samples: int) -> None:
        """Have this many samples, of which none is known to be broken."""
        self._broken = torch.zeros(samples, dtype=torch.uint8).share_memory_()

    @property
    def broken(self) -> int:
        return int(self._broken.count_nonzero())

    def __len__(self) -> int:
        return len(self._broken)

    def read(self, index: int) -> tuple[int, Tensor]:
        """The first sample from ``index`` on whose image can be read, and this image, uint8 [3, H, W]."""
        for chosen in range(index, index + len(self)):
            chosen %= len(self)
            if not self._broken[chosen]:
                try:
                    return chosen, self.decoded(chosen)
                except Exception as error:  # decoders raise almost anything on damaged files
                    self._report(chosen, error)
        raise BrokenImagesError(f"data: none of the {len(self)} images can be read")

    def decoded(self, index: int) -> Tensor:
        """The image of sample ``index``, uint8 [3, H, W]. Any exception says that it is broken."""
        return decode(self.encoded(index))

    def _report(self, index: int, error: Exception) -> None:
        self._broken[index] = 1
        found = self.broken
        what = f"{self.describe(index)}: cannot be read ({type(error).__name__}: {error})"
        if found > self.max_broken:
            raise BrokenImagesError(
                f"data: {found} images cannot be read, expected at most {self.max_broken} (data.options.max_broken); "
                f"the last one: {what}"
            ) from error
        warnings.warn(f"{what}; the next image takes its place", RuntimeWarning, stacklevel=4)


class ImageSamples(EncodedImages):
    """Labelled images: a sample is a transformed image, uint8 [3, H, W], and its label.

    With a replaced image comes the label of the one that takes its place.

    Args:
        transform: what an image, uint8 [3, H, W], goes through. The others are those of ``EncodedImages``.

    Attributes:
        labels: [N], int64.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Tensor], Tensor],
        normalization: Normalization,
        max_broken: int = 100,
    ) -> None:
        super().__init__(root, normalization, max_broken)
        self.transform = transform
        self.labels, self.classes = self.find_samples()
        self.hold(len(self.labels))

    @abstractmethod
    def find_samples(self) -> tuple[Tensor, list[str]]:
        """The label of every sample in ``root``, and the names of the classes."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        chosen, image = self.read(index)
        return self.transform(image), self.labels[chosen]


def decode(encoded: bytes) -> Tensor:
    """An RGB image as uint8 [3, H, W]. 16 bits are scaled to 8.

    JPEGs are decoded by torchvision, which gives PIL's pixels in less time. PIL decodes all other formats, and JPEGs
    that do not say their size plainly.

    Raises:
        ValueError: the pixels are floating-point numbers, or more than MAX_PIXELS.
        Exception: almost anything, for an image that is damaged or of no format in FORMATS.
    """
    if 0 < _pixels_of_jpeg(encoded) <= MAX_PIXELS:
        return decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"has {image.width} x {image.height} pixels, expected at most {MAX_PIXELS}")
        if image.mode == "F":  # nothing tells the range of its pixels
            raise ValueError("has floating-point pixels, expected 8 or 16 bits")
        if image.mode == "I" or image.mode.startswith("I;16"):  # PIL would clip them to 8 bits
            pixels = np.asarray(image, dtype=np.float64) / 257
            return pil_to_tensor(Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).convert("RGB"))
        return pil_to_tensor(image.convert("RGB"))


def _pixels_of_jpeg(encoded: bytes) -> int:
    """The pixels of a JPEG by its frame header. 0 for anything else than segments that follow each other up to it.

    PIL would tell as well. Its way there takes a tenth of the decoder's time.
    """
    place = 2 if encoded.startswith(b"\xff\xd8") else len(encoded)
    while place + 9 <= len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA:  # no segment, or that of the first scan
            return 0
        if marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # not the tables among the frame headers
            height, width = struct.unpack_from(">HH", encoded, place + 5)
            return int(height * width)
        place += 2 + int.from_bytes(encoded[place + 2 : place + 4])
    return 0


def scaled(image: Tensor, side: int) -> Tensor:
    """An image, uint8 [3, H, W], as [3, side, side]. PIL's bilinear interpolation averages over left-out pixels."""
    return pil_to_tensor(to_pil_image(image).resize((side, side), Image.Resampling.BILINEAR))
