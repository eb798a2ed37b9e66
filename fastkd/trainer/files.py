"""Files that a run writes: by the one process that owns their folder, and never through a link."""

from __future__ import annotations

import fcntl
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO

from fastkd.trainer.models.weights import CheckpointError

LOCK = ".lock"
_locks: weakref.WeakSet[FileIO] = weakref.WeakSet()


class FolderLock:
    """Keeps every other ``FolderLock`` out of a folder, from its construction to ``close`` or the end of the process.

    The folder is made if it is not there. ``close`` removes again what was made, unless ``keep`` was called. Raises
    CheckpointError when the folder is a link, or another process (or another run of this process) has it. The message
    says what that process is ``doing``.

    The kernel gives the lock back when the process dies. It is one of ``flock``, which Windows and some network file
    systems do not have.
    """

    def __init__(self, folder: Path, doing: str = "training in this run folder") -> None:
        self._folder, self._file, self._doing = folder, folder / LOCK, doing
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._made_file = not self._file.exists()
        self._lock = self._take()

    def _take(self) -> FileIO:
        while True:
            refuse_link(self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            except FileNotFoundError:  # a process that gave up its start has just removed the folder
                continue
            except OSError as error:
                raise CheckpointError(f"{self._file}: cannot be locked ({error.strerror})") from error
            lock = FileIO(descriptor, "r+")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise CheckpointError(f"{self._folder}: another process is {self._doing}") from None
            except OSError as error:
                lock.close()
                raise CheckpointError(f"{self._file}: cannot be locked ({error.strerror})") from error
            _locks.add(lock)
            if _is_at(lock, self._file):
                return lock
            lock.close()  # the lock of a file that was removed meanwhile keeps nobody out

    def keep(self) -> None:
        """Leave the folder and the file of the lock where they are, because there is something in the folder now."""
        self._made, self._made_file = [], False

    def check(self) -> None:
        """Raise CheckpointError when the folder was removed or replaced, or another process has taken it."""
        if _is_at(self._lock, self._file):
            return
        if not self._folder.is_dir():
            raise CheckpointError(f"{self._folder}: was removed while a run was training in it")
        self._lock.close()
        self._lock = self._take()  # the file of the lock alone was removed

    def close(self) -> None:
        """Let other processes use the folder; may be called twice."""
        if self._lock.closed:
            return
        if self._made_file and _is_at(self._lock, self._file):
            self._file.unlink()
        for path in self._made:
            with suppress(OSError):  # it is not empty
                path.rmdir()
        fcntl.flock(self._lock, fcntl.LOCK_UN)  # also where a process that was just forked still has it
        self._lock.close()


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return not file.closed and os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _forget_locks() -> None:
    """A forked process has the locks too, and a loader's workers may outlive a killed run: so it lets them go."""
    for lock in _locks:
        lock.close()


os.register_at_fork(after_in_child=_forget_locks)


def refuse_link(path: Path) -> None:
    """Raise CheckpointError when ``path`` is a symbolic link, or a file that has another name too."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(found.st_mode):
        raise CheckpointError(f"{path}: is a link, and a run writes through none; put its target here instead")
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        raise CheckpointError(
            f"{path}: is a hard link, one of {found.st_nlink} names of a file, and a run would change them all; put a "
            "copy here instead"
        )


def open_to_append(path: Path) -> IO[bytes]:
    """``path`` for appending, made if it is not there. CheckpointError for what is not a regular file of one name."""
    refuse_link(path)
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: is not a regular file")
    return os.fdopen(descriptor, "ab")


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, also after a power cut, sees the old one or the whole new one.

    Raises CheckpointError when it cannot be written (a full disk); the old one stays.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        temporary.unlink(missing_ok=True)  # of a process that died, or a link
        try:
            with temporary.open("x") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from error
