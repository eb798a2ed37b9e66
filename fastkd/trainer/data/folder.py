"""Images in one folder per class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import find_classes, make_dataset

from fastkd.trainer.data.encoded import EXTENSIONS, ImageSamples


class FolderImages(ImageSamples):
    """The images ``root/CLASS/anything/FILE``; the folders' alphabetical order numbers the classes."""

    note: str | None = None  # what a user has to know about where the samples come from

    def find_samples(self) -> tuple[Tensor, list[str]]:
        if not self.root.is_dir():
            raise ValueError(
                f"data.options.root: {self.root} is not a folder, expected one with a folder for each class"
            )
        try:
            classes, index_of = find_classes(str(self.root))
            samples = make_dataset(str(self.root), index_of, EXTENSIONS)
        except FileNotFoundError as error:
            raise ValueError(f"data.options.root: {error}") from None
        # One array holds all names: a list of a million strings would be copied into every worker that reads it.
        self._names = np.array([os.fsencode(Path(path).relative_to(self.root)) for path, _ in samples])
        return torch.tensor([label for _, label in samples]), classes

    def keep(self, chosen: Tensor) -> Self:
        """Leave out all samples but the ``chosen`` ones; the classes and their numbers stay. Returns itself."""
        self._names, self.labels = self._names[chosen.numpy()], self.labels[chosen]
        self._broken = torch.zeros(len(chosen), dtype=torch.uint8).share_memory_()
        return self

    def encoded(self, index: int) -> bytes:
        return self._path(index).read_bytes()

    def describe(self, index: int) -> str:
        return os.fsencode(self._path(index)).decode(errors="backslashreplace")

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._names[index])
