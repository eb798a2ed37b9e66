"""Reads WebDataset shards (tar files of ``KEY.jpg`` and ``KEY.cls``) at random, like a folder.

The tar headers are read once into an index. A sample is then one positioned read. The order of the data, their split
over ranks and workers, and resuming in the middle of an epoch are therefore the same as for any other dataset. With a
streaming reader they would depend on the number of ranks and workers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import tarfile
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.trainer.data.readers.encoded import EXTENSIONS, MAX_BYTES, ImageSamples
from fastkd.trainer.data.readers.files import FileState, open_regular
from fastkd.trainer.data.readers.manifest import MANIFEST, classes_of_shards

OPEN_SHARDS = 64  # shards that a process keeps open
# Every number up to the largest label is a class with a name. Labels far above the number of samples are damaged.
SPARE_LABELS = 100_000
MAX_LABEL_BYTES = 1 << 13  # of a file that holds a label
MAX_HEADER_BYTES = 1 << 20  # of a tar file
_COLUMNS = ("shard", "offset", "size", "label")
_IMAGE = "IMAGE"  # stands for all extensions of images; extensions are in lower case


class ShardImages(ImageSamples):
    """The images of all ``*.tar`` in ``root``; the classes are those that ``fastkd shards`` noted beside its shards.

    The classes of other shards are the numbers up to the largest label.

    A sample is the files of one shard that share everything before the first dot: an image and its label, ``.cls`` (a
    number as text) or else ``.json`` (with the int ``"label"`` or ``"cls"``). Other files are ignored. The index is
    kept in ``.fastkd-index-*.npz`` beside the shards, or in memory where the folder cannot be written.
    """

    def find_samples(self) -> tuple[Tensor, list[str]]:
        self.shards = sorted(self.root.glob("*.tar"))
        if not self.shards:
            raise ValueError(f"data.options.root: found no *.tar in {self.root}")
        self._states = [_state(shard) for shard in self.shards]
        sizes = {shard.name: state.size for shard, state in zip(self.shards, self._states, strict=True)}
        classes = classes_of_shards(self.root, sizes)
        index = read_index(self.root, self.shards, self._states)
        self._shard, self._offset, self._size = index["shard"], index["offset"], index["size"]
        labels = torch.from_numpy(index["label"])
        largest = int(labels.max())
        if classes is not None and largest >= len(classes):
            raise ValueError(
                f"{self.root}: the largest label is {largest}, and {MANIFEST} names {len(classes)} classes"
            )
        return labels, classes or [str(label) for label in range(largest + 1)]

    @property
    def shard_starts(self) -> list[int]:
        """The first sample of every shard that has one: what an order that reads shard by shard needs."""
        return np.flatnonzero(np.diff(self._shard, prepend=-1)).tolist()

    def encoded(self, index: int) -> bytes:
        size, number = int(self._size[index]), int(self._shard[index])
        if size > MAX_BYTES:
            raise OSError(f"has {size} bytes, expected at most {MAX_BYTES}")
        shard = _open_shard(str(self.shards[number]), self._states[number], os.getpid())
        encoded = os.pread(shard.descriptor, size, int(self._offset[index]))
        if FileState.of(os.fstat(shard.descriptor)) != self._states[number]:
            raise OSError("the shard has changed since its labels were read")
        if len(encoded) != size:
            raise OSError(f"got {len(encoded)} bytes, expected {size}")
        return encoded

    def describe(self, index: int) -> str:
        return f"{self.shards[self._shard[index]]} at byte {self._offset[index]}"


class _OpenShard:
    """A file that is closed when it falls out of the cache."""

    def __init__(self, path: str) -> None:
        self.descriptor = open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@functools.lru_cache(OPEN_SHARDS)
def _open_shard(path: str, state: FileState, process: int) -> _OpenShard:
    """The open shard. A file that takes the place of another has another ``state``, and is opened anew.

    ``process`` keeps a forked worker from using the files that its parent has opened.
    """
    return _OpenShard(path)


def _state(shard: Path) -> FileState:
    try:
        descriptor = open_regular(shard)
    except OSError as error:
        raise ValueError(f"{shard}: cannot be read ({error.strerror or error})") from None
    try:
        return FileState.of(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def read_index(root: Path, shards: list[Path], states: list[FileState]) -> dict[str, np.ndarray]:
    """Arrays ``shard``, ``offset``, ``size`` and ``label``: the kept index if no shard has changed, or a new one."""
    # Another computer that sees the same disk gives it another number: the device is left out.
    known = [(shard.name, *state[1:]) for shard, state in zip(shards, states, strict=True)]
    # The 3 is the version of what is kept.
    kept = root / f".fastkd-index-{hashlib.sha256(repr((3, known)).encode()).hexdigest()[:16]}.npz"
    try:
        index = _read_kept(kept, sum(state.size for state in states))
        if _is_sound(index, np.array([state.size for state in states])):
            return index
    except Exception:  # missing; or damaged, which raises almost anything
        pass
    rows = [(number, *sample) for number, shard in enumerate(shards) for sample in _samples(shard)]
    if not rows:
        raise ValueError(f"data.options.root: the {len(shards)} tar files in {root} hold no image with a label")
    largest = max(rows, key=lambda row: row[-1])
    if largest[-1] >= _most_labels(len(rows)):
        raise ValueError(
            f"{shards[largest[0]]}: got the label {largest[-1]} with {len(rows)} samples in all shards, "
            f"expected less than {_most_labels(len(rows))}"
        )
    table = np.array(rows, dtype=np.int64)
    index = dict(zip(_COLUMNS, np.ascontiguousarray(table.T), strict=True))
    # A folder that cannot be written, or is full: the index is made again next time.
    with contextlib.suppress(OSError):
        _keep(index, kept)
    return index


def _read_kept(path: Path, shards_size: int) -> dict[str, np.ndarray]:
    with open(open_regular(path), "rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
        # A sample takes a header of 512 bytes and more in its shard, and 8 bytes in each array.
        if any(entry.file_size > 4096 + shards_size // 64 for entry in arrays.zip.infolist()):
            raise ValueError("has more samples than fit the shards")
        return {name: arrays[name] for name in _COLUMNS}


def _most_labels(samples: int) -> int:
    return SPARE_LABELS + 10 * samples


def _is_sound(index: dict[str, np.ndarray], sizes: np.ndarray) -> bool:
    """Whether every sample of ``index`` lies within its shard. ``sizes`` are the shards' sizes in bytes."""
    rows = index["shard"].shape
    if len(rows) != 1 or rows[0] == 0 or any(column.shape != rows for column in index.values()):
        return False
    if any(column.dtype != np.int64 or column.min() < 0 for column in index.values()):
        return False
    shard, offset, size, label = (index[name] for name in _COLUMNS)
    if shard.max() >= len(sizes) or (np.diff(shard) < 0).any() or label.max() >= _most_labels(len(label)):
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


class _Headers(io.FileIO):
    """A shard as ``tarfile`` reads it. tarfile would read a header of any size, which a file of holes may claim."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {size} bytes, expected at most {MAX_HEADER_BYTES}")
        return super().read(size) or b""


def _samples(shard: Path) -> list[tuple[int, int, int]]:
    """(offset, size, label) of every image of a shard."""
    samples: dict[str, dict[str, Any]] = {}  # by what its files have in common: _IMAGE (offset, size), texts of labels
    twice: list[str] = []
    try:
        with _Headers(open_regular(shard)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.size < 0:  # tarfile would go back by as much, and come here again
                    raise ValueError(f"{member.name!r:.80} has {member.size} bytes")
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
                if member.issparse():
                    raise ValueError(f"{member.name!r:.80} is stored with holes, expected a plain file")
                sample[kind] = (member.offset_data, member.size) if kind == _IMAGE else _text(archive, member)
        images = {key: sample for key, sample in samples.items() if _IMAGE in sample}
        missing = sorted(key for key, sample in images.items() if len(sample) == 1)
        found = [(*sample[_IMAGE], _label(sample)) for sample in images.values() if len(sample) > 1]
    except (tarfile.TarError, ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise ValueError(f"{shard}: is not a WebDataset shard ({type(error).__name__}: {error})") from error
    if twice:
        raise ValueError(f"{shard}: {len(twice)} samples have a second image or label, such as {twice[0]!r:.80}")
    if missing:
        raise ValueError(
            f"{shard}: {len(missing)} images have no .cls or .json, such as {missing[0].lstrip('/')!r:.80}"
        )
    return found


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """The content of a file; None for one that is too long to be a label."""
    file = archive.extractfile(member)
    assert file is not None
    return file.read() if member.size <= MAX_LABEL_BYTES else None


def _label(sample: dict[str, Any]) -> int:
    text = sample["cls"] if "cls" in sample else sample["json"]
    if text is None:
        raise ValueError(f"a label has more than {MAX_LABEL_BYTES} bytes")
    if "cls" in sample:
        if not re.fullmatch(rb"\s*-?[0-9]{1,18}\s*", text):  # int() also takes 1_0
            raise ValueError(f"got the label {text[:40]!r}, expected a number of digits alone")
        label = int(text)
    else:
        entries = json.loads(text)
        label = entries["label"] if "label" in entries else entries["cls"]
        if not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(f"got the label {str(label)[:40]!r}, expected an int")
    if not 0 <= label < 1 << 31:
        raise ValueError(f"got the label {label}, expected a number in [0, 2147483648)")
    return label
