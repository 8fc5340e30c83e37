"""Files that survive a crash: whole or not there, and changed by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import threading
import time
from typing import TYPE_CHECKING

from aos_context.errors import BusyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

FILE_MODE = 0o600
FOLDER_MODE = 0o700
CHUNK_BYTES = 1 << 20
"""How much of a file is read at a time."""
LOCK_WAIT_S = 10.0
"""How long a call waits for a lock that others hold: a change takes milliseconds, a large pack seconds."""
LOCK_PAUSE_S, LOCK_PAUSE_MOST_S = 0.0005, 0.02
"""Between two looks whether it is free, at first and at most."""


class _Held(threading.local):
    """The lock files that this thread has locked, by device and inode."""

    def __init__(self) -> None:
        self.files: set[tuple[int, int]] = set()


_held = _Held()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of all processes and threads on a file of its own (flock); it ends with the process.

    A thread that has it may take it again. So nothing is awaited meanwhile: another task would be the same thread.
    Raises `BusyError` where others, or one that was stopped, hold it for `LOCK_WAIT_S`.
    """
    make_folder(path.parent)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    try:
        found = os.fstat(fd)
        file = (found.st_dev, found.st_ino)
        if file in _held.files:
            yield
            return
        _take(fd, path)
        _held.files.add(file)
        try:
            yield
        finally:
            _held.files.discard(file)
    finally:
        os.close(fd)


def _take(fd: int, path: Path) -> None:
    """flock has no deadline, so it is tried; the pauses grow by random parts, lest those who wait keep step."""
    deadline, pause = time.monotonic() + LOCK_WAIT_S, LOCK_PAUSE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                hint = "Try again. If it stays so, see who holds the lock (lslocks): a stopped process keeps it."
                detail = f"{path} has been held by others for {LOCK_WAIT_S:g} s"
                raise BusyError(detail, hint=hint, file=str(path)) from None
            time.sleep(pause)
            pause = min(pause * random.uniform(1, 2), LOCK_PAUSE_MOST_S)  # noqa: S311  # nothing secret
        else:
            return


def write_atomic(path: Path, data: bytes, mode: int = FILE_MODE) -> None:
    """The file has the old content or the new, whatever happens, and the new one once this returns.

    The temporary file and the folder are synced. Raises `OSError`; then the old content stands, or, where only the
    folder could not be synced, the new.
    """
    with temporary_file(path, data, mode) as temporary:
        replace(temporary, path)


@contextlib.contextmanager
def temporary_file(path: Path, data: bytes | Iterable[bytes], mode: int = FILE_MODE) -> Iterator[Path]:
    """A file beside `path` that has the content, synced; it is gone afterwards, unless it was moved. Raises `OSError`.

    `data` may come in chunks, which are written as they come.

    With `replace`, `write_atomic` in two steps: what may fail for want of space is done before what commits.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            for chunk in [data] if isinstance(data, bytes) else data:
                write_all(fd, chunk)
            os.fsync(fd)
        finally:
            os.close(fd)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def replace(temporary: Path, path: Path) -> None:
    """From now on the file is this one, and its name is on the disk."""
    temporary.replace(path)
    sync_folder(path.parent)


def make_folder(folder: Path, *, synced: bool = True) -> None:
    """The folder is there, and so are those above it, each its owner's alone, and their names are on the disk.

    Without `synced` the names are not on the disk yet, for who syncs all of them later.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent, synced=synced)
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
    if synced:
        sync_folder(folder.parent)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """Names in it are on the disk from now on."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
