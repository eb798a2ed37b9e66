"""Images in one folder per class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fastkd.trainer.data.readers.encoded import EXTENSIONS, MAX_BYTES, ImageSamples
from fastkd.trainer.data.readers.files import read_regular


class FolderImages(ImageSamples):
    """The images ``root/CLASS/anything/FILE``; the folders' alphabetical order numbers the classes.

    Links are followed. A folder that is reached twice raises ValueError: its images would count twice, under the labels
    of two classes or in a loop without end.
    """

    note: str | None = None  # what a user has to know about where the samples come from

    def find_samples(self) -> tuple[Tensor, list[str]]:
        if not self.root.is_dir():
            raise ValueError(
                f"data.options.root: {self.root} is not a folder, expected one with a folder for each class"
            )
        try:
            classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
            inside = self.root.resolve()
            seen = {_identity(folder) for folder in (inside, *inside.parents)}
            found = [_images_below(os.path.join(self.root, name), seen) for name in classes]
        except OSError as error:
            raise ValueError(f"data.options.root: cannot read {error.filename!r} ({error.strerror})") from None
        empty = [name for name, images in zip(classes, found, strict=True) if not images]
        if empty or not classes:
            what = f"no image in the folders {', '.join(map(repr, empty[:5]))} of" if empty else "no folder in"
            raise ValueError(f"data.options.root: found {what} {self.root}, expected a folder of images for each class")
        # One array holds all names: a list of a million strings would be copied into every worker that reads it.
        above = len(os.path.join(self.root, ""))
        self._names = np.array([os.fsencode(path[above:]) for paths in found for path in paths])
        return torch.tensor([label for label, paths in enumerate(found) for _ in paths]), classes

    def keep(self, chosen: Tensor) -> Self:
        """Leave out all samples but the ``chosen`` ones; the classes and their numbers stay. Returns itself."""
        self._names, self.labels = self._names[chosen.numpy()], self.labels[chosen]
        self.hold(len(chosen))
        return self

    @property
    def names(self) -> np.ndarray:
        """The path of every sample below ``root``, as bytes."""
        return self._names

    def encoded(self, index: int) -> bytes:
        return read_regular(self._path(index), MAX_BYTES)

    def describe(self, index: int) -> str:
        return os.fsencode(self._path(index)).decode(errors="backslashreplace")

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._names[index])


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _images_below(top: str, seen: set[tuple[int, int]]) -> list[str]:
    """The images in ``top`` and below, folder by folder. No folder may be in ``seen``; all are added to it."""
    images: dict[str, list[str]] = {}
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        if (identity := _identity(folder)) in seen:
            raise ValueError(f"data.options.root: {folder!r} leads to a folder that was read already, by a link")
        seen.add(identity)
        images[folder] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.name.lower().endswith(EXTENSIONS):
                    if not entry.is_file() and not entry.is_symlink():
                        raise ValueError(f"data.options.root: {entry.path!r} is not a regular file")
                    images[folder].append(entry.path)
    return [path for folder in sorted(images) for path in sorted(images[folder])]
