"""Reads WebDataset shards (tar files of ``KEY.jpg`` and ``KEY.cls``) at random, like a folder.

The tar headers are read once into an index. A sample is then one positioned read. The order of the data, their split
over ranks and workers, and resuming in the middle of an epoch are therefore the same as for any other dataset. With a
streaming reader they would depend on the number of ranks and workers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tarfile
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.trainer.data.encoded import EXTENSIONS, ImageSamples

OPEN_SHARDS = 64  # shards that a process keeps open
MAX_LABELS = 10_000_000  # every number up to the largest label is a class with a name; larger labels are damaged
_COLUMNS = ("shard", "offset", "size", "label")
_IMAGE = "IMAGE"  # stands for all extensions of images; extensions are in lower case


class ShardImages(ImageSamples):
    """The images of all ``*.tar`` in ``root``; the classes are the numbers up to the largest label.

    A sample is the files of one shard that share everything before the first dot: an image and its label, ``.cls`` (a
    number as text) or else ``.json`` (with the int ``"label"`` or ``"cls"``). Other files are ignored. The index is
    kept in ``.fastkd-index-*.npz`` beside the shards, or in memory where the folder cannot be written.
    """

    def find_samples(self) -> tuple[Tensor, list[str]]:
        self.shards = sorted(self.root.glob("*.tar"))
        if not self.shards:
            raise ValueError(f"data.options.root: found no *.tar in {self.root}")
        index = read_index(self.root, self.shards)
        self._shard, self._offset, self._size = index["shard"], index["offset"], index["size"]
        labels = torch.from_numpy(index["label"])
        return labels, [str(label) for label in range(int(labels.max()) + 1)]

    @property
    def shard_starts(self) -> list[int]:
        """The first sample of every shard that has one: what an order that reads shard by shard needs."""
        return np.flatnonzero(np.diff(self._shard, prepend=-1)).tolist()

    def encoded(self, index: int) -> bytes:
        size, shard = int(self._size[index]), _open_shard(str(self.shards[self._shard[index]]), os.getpid())
        encoded = os.pread(shard.descriptor, size, int(self._offset[index]))
        if len(encoded) != size:
            raise OSError(f"got {len(encoded)} bytes, expected {size}")
        return encoded

    def describe(self, index: int) -> str:
        return f"{self.shards[self._shard[index]]} at byte {self._offset[index]}"


class _OpenShard:
    """A file that is closed when it falls out of the cache."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


@functools.lru_cache(OPEN_SHARDS)
def _open_shard(path: str, process: int) -> _OpenShard:
    """The open shard. ``process`` keeps a forked worker from using the files that its parent has opened."""
    return _OpenShard(path)


def read_index(root: Path, shards: list[Path]) -> dict[str, np.ndarray]:
    """Arrays ``shard``, ``offset``, ``size`` and ``label``: the kept index if no shard has changed, or a new one."""
    states = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    # The 2 is the version of what is kept.
    kept = root / f".fastkd-index-{hashlib.sha256(repr((2, states)).encode()).hexdigest()[:16]}.npz"
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            index = {name: arrays[name] for name in _COLUMNS}
        if _is_sound(index, np.array([size for _, size, _ in states])):
            return index
    except Exception:  # missing; or damaged, which raises almost anything
        pass
    rows = [(number, *sample) for number, shard in enumerate(shards) for sample in _samples(shard)]
    if not rows:
        raise ValueError(f"data.options.root: the {len(shards)} tar files in {root} hold no image with a label")
    table = np.array(rows, dtype=np.int64)
    index = dict(zip(_COLUMNS, np.ascontiguousarray(table.T), strict=True))
    # A folder that cannot be written, or is full: the index is made again next time.
    with contextlib.suppress(OSError):
        _keep(index, kept)
    return index


def _is_sound(index: dict[str, np.ndarray], sizes: np.ndarray) -> bool:
    """Whether every sample of ``index`` lies within its shard. ``sizes`` are the shards' sizes in bytes."""
    rows = index["shard"].shape
    if len(rows) != 1 or rows[0] == 0 or any(column.shape != rows for column in index.values()):
        return False
    if any(column.dtype != np.int64 or column.min() < 0 for column in index.values()):
        return False
    shard, offset, size, label = (index[name] for name in _COLUMNS)
    if shard.max() >= len(sizes) or (np.diff(shard) < 0).any() or label.max() >= MAX_LABELS:
        return False
    return bool((offset <= sizes[shard]).all() and (size <= sizes[shard] - offset).all())


def _keep(index: dict[str, Any], path: Path) -> None:
    """Write the index, whole or not at all, and readable to others as far as the umask allows."""
    temporary = path.with_name(f".fastkd-index-{uuid.uuid4().hex}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
            np.savez(file, **index)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _samples(shard: Path) -> list[tuple[int, int, int]]:
    """(offset, size, label) of every image of a shard."""
    samples: dict[str, dict[str, Any]] = {}  # by what its files have in common: _IMAGE (offset, size), texts of labels
    twice: list[str] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, name = os.path.split(member.name)
                stem, _, kind = name.partition(".")
                kind = _IMAGE if f".{kind.lower()}" in EXTENSIONS else kind.lower()
                if kind not in (_IMAGE, "cls", "json"):
                    continue
                sample = samples.setdefault(f"{folder}/{stem}", {})
                if kind in sample:
                    twice.append(member.name)
                file = archive.extractfile(member)
                assert file is not None
                sample[kind] = (member.offset_data, member.size) if kind == _IMAGE else file.read()
        images = {key: sample for key, sample in samples.items() if _IMAGE in sample}
        missing = sorted(key for key, sample in images.items() if len(sample) == 1)
        found = [(*sample[_IMAGE], _label(sample)) for sample in images.values() if len(sample) > 1]
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{shard}: is not a WebDataset shard ({type(error).__name__}: {error})") from error
    if twice:
        raise ValueError(
            f"{shard}: {len(twice)} samples have a second image or label, expected one of each; such as {twice[0]}"
        )
    if missing:
        raise ValueError(f"{shard}: {len(missing)} images have no .cls or .json, such as {missing[0].lstrip('/')}")
    return found


def _label(sample: dict[str, Any]) -> int:
    if "cls" in sample:
        label = int(sample["cls"])
    else:
        entries = json.loads(sample["json"])
        label = entries["label"] if "label" in entries else entries["cls"]
        if not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(f"got the label {label!r}, expected an int")
    if not 0 <= label < MAX_LABELS:
        raise ValueError(f"got the label {label}, expected a number in [0, {MAX_LABELS})")
    return label
