"""Reads files that strangers may have made: regular files only, and none that is larger than it should be."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, NamedTuple


class FileState(NamedTuple):
    """What tells one file from another that has taken its place."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileState:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def open_regular(path: str | Path) -> int:
    """The descriptor of a regular file, or of what a link to one leads to.

    Anything else is not even opened: a named pipe may keep its reader waiting, and opening a device may start it.

    Raises:
        OSError: there is no such file, or it is a pipe, a socket, a device or a folder.
    """
    if stat.S_ISREG(os.stat(path).st_mode):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # it may have been replaced in between
            return descriptor
        os.close(descriptor)
    raise OSError("is not a regular file")


def read_regular(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes. OSError if it is neither."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(f"has {size} bytes, expected at most {most}")
        return file.read(size)  # read(most) would first allocate as much


def content_of(path: Path, most: int) -> bytes:
    """``read_regular``, with a ValueError that names the file where that raises an OSError."""
    try:
        return read_regular(path, most)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def fetch_archive(kind: Any, root: str) -> None:
    """Fetch and unpack the archive of a data set of torchvision, which knows its address and its checksum."""
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        download_and_extract_archive(kind.url, root, filename=kind.filename, md5=kind.tgz_md5)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"data.options.download: cannot fetch {kind.url} ({error}); unpack it in {root} yourself"
        ) from None
