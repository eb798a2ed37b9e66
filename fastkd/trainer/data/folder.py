"""Images in a folder per class."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.trainer.data.encoded import EXTENSIONS, ImageSamples


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
