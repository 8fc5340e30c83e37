"""Files that survive a crash: whole or not there."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

FILE_MODE = 0o600
FOLDER_MODE = 0o700
CHUNK_BYTES = 1 << 20
"""How much of a file is read at a time."""


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
