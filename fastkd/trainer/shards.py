"""WebDataset shards (tar files of ``KEY.jpg`` and ``KEY.cls``), read at random like a folder.

The tar headers are read once into an index. A sample is then one positioned read, so that the order of the data, its
split over ranks and workers, and resuming in the middle of an epoch are exactly those of any other dataset; a streaming
reader would make them depend on the number of ranks and workers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.trainer.images import EXTENSIONS, ImageSamples

OPEN_SHARDS = 64  # file handles that a process keeps


class ShardImages(ImageSamples):
    """The images of all ``*.tar`` in a folder; classes are the numbers up to the largest label.

    A sample is the files of one shard that share everything before the first dot: an image and its label, ``.cls`` (a
    number as text) or ``.json`` (with ``"label"`` or ``"cls"``). Other files are ignored. The index is kept in
    ``.fastkd-index-*.npz`` beside the shards, or in memory where the folder cannot be written.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Any], Tensor],
        normalization: tuple[tuple[float, ...], tuple[float, ...]],
        max_broken: int = 100,
    ) -> None:
        root = Path(root)
        self.shards = sorted(root.glob("*.tar"))
        if not self.shards:
            raise ValueError(f"data.options.root: found no *.tar in {root}")
        index = read_index(root, self.shards)
        self._shard, self._offset, self._size = index["shard"], index["offset"], index["size"]
        labels = torch.from_numpy(index["label"])
        classes = [str(label) for label in range(int(labels.max()) + 1)]
        super().__init__(labels, classes, transform, normalization, max_broken)

    @property
    def shard_starts(self) -> list[int]:
        """The first sample of every shard that has one: what an order that reads shard by shard needs."""
        return np.flatnonzero(np.diff(self._shard, prepend=-1)).tolist()

    def encoded(self, index: int) -> bytes:
        size = int(self._size[index])
        encoded = os.pread(_handle(str(self.shards[self._shard[index]]), os.getpid()), size, int(self._offset[index]))
        if len(encoded) != size:
            raise OSError(f"got {len(encoded)} bytes, expected {size}")
        return encoded

    def describe(self, index: int) -> str:
        return f"{self.shards[self._shard[index]]} at byte {self._offset[index]}"


class _Handle:
    """A file that is closed when it falls out of the cache."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


@functools.lru_cache(OPEN_SHARDS)
def _opened(path: str, process: int) -> _Handle:
    return _Handle(path)


def _handle(path: str, process: int) -> int:
    return _opened(path, process).descriptor


def read_index(root: Path, shards: list[Path]) -> dict[str, np.ndarray]:
    """``shard``, ``offset``, ``size`` and ``label`` of every sample; the kept ones if the shards are unchanged."""
    states = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    kept = root / f".fastkd-index-{hashlib.sha256(repr(states).encode()).hexdigest()[:16]}.npz"
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("shard", "offset", "size", "label")}
    except (OSError, ValueError, KeyError):
        pass
    rows = [(number, *sample) for number, shard in enumerate(shards) for sample in _samples(shard)]
    if not rows:
        raise ValueError(f"data.options.root: the {len(shards)} tar files in {root} hold no image with a label")
    table = np.array(rows, dtype=np.int64)
    index = dict(zip(("shard", "offset", "size", "label"), np.ascontiguousarray(table.T), strict=True))
    try:
        with tempfile.NamedTemporaryFile(dir=root, prefix=".fastkd-index-", suffix=".tmp", delete=False) as file:
            np.savez(file, **index)
        os.replace(file.name, kept)
    except OSError:
        pass  # a folder that cannot be written: the index is made again next time
    return index


def _samples(shard: Path) -> list[tuple[int, int, int]]:
    """(offset, size, label) of every image of a shard."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                key, extension = f"{folder}/{stem}", f".{extension.lower()}"
                if extension in EXTENSIONS:
                    images[key] = member.offset_data, member.size
                elif extension in (".cls", ".json"):
                    file = archive.extractfile(member)
                    assert file is not None
                    labels[key] = _label(file.read(), extension)
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{shard}: is not a WebDataset shard ({type(error).__name__}: {error})") from error
    missing = sorted(images.keys() - labels.keys())
    if missing:
        raise ValueError(f"{shard}: {len(missing)} images have no .cls or .json, such as {missing[0].lstrip('/')}")
    return [(*place, labels[key]) for key, place in images.items()]


def _label(text: bytes, extension: str) -> int:
    if extension == ".cls":
        label = int(text)
    else:
        entries = json.loads(text)
        label = int(entries["label"] if "label" in entries else entries["cls"])
    if label < 0:
        raise ValueError(f"got the label {label}, expected a number >= 0")
    return label
